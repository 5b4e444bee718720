"""From a prompt to its tokens, and from tokens, as they come, to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastlm.data import EOS_TOKEN
from fastlm.models import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["NEW_TOKENS", "TEMPERATURE", "Text", "pieces", "prompt_ids", "room"]

NEW_TOKENS = 200  # where nobody says how many
TEMPERATURE = 0.8  # likewise


def prompt_ids(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int | None = None) -> list[int]:
    """A prompt's tokens, for which there is room."""
    ids = tokenizer.encode(prompt).ids
    start = tokenizer.token_to_id(EOS_TOKEN)
    ids = ids if start is None else [start, *ids]  # in training it is what comes before a document
    if not ids:
        raise ValueError("a model without an end-of-text token needs a prompt")
    longest = model.config.max_seq_len
    if len(ids) >= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context only {longest}, new ones included")
    if max_new_tokens is not None and len(ids) + max_new_tokens > longest:
        got = f"{len(ids)} and {max_new_tokens}"
        raise ValueError(f"prompt and new tokens must fit max_seq_len = {longest}, got {got}")
    return ids


def room(model: GPT, ids: list[int]) -> int:
    return min(NEW_TOKENS, model.config.max_seq_len - len(ids))


def pieces(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str], last: int) -> Iterator[str]:
    """The text of tokens, as they come: whole characters, up to a text that ends it; of `last` tokens at most."""
    text = Text(tokenizer, stop, last)
    for token in tokens:
        if piece := text.add(token):
            yield piece
        if text.stopped:
            return
    if rest := text.rest():
        yield rest


class Text:
    """What `pieces` yields, token by token.

    Args:
        stop: texts any of which ends it, and is left out.
        last: after so many tokens nothing waits for what may come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], last: int) -> None:
        self.tokenizer, self.stop, self.last = tokenizer, stop, last
        self.tokens: list[int] = []
        self.shown = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What is certain with one token more; `stopped` says whether the text ends with it."""
        self.tokens.append(token)
        text = self._decoded()
        ends = [text.index(each) for each in self.stop if each in text]
        if ends:
            self.stopped = True
            return self._until(text, min(ends))
        if len(self.tokens) == self.last:
            return self._until(text, len(text))
        # What may yet become another character, or the beginning of what ends the text, waits.
        whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        begun = [n for each in self.stop for n in range(1, len(each)) if text.endswith(each[:n])]
        return self._until(text, min(whole, len(text) - max(begun, default=0)))

    def rest(self) -> str:
        """What has waited, where no token follows."""
        text = self._decoded()
        return self._until(text, len(text))

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=False)

    def _until(self, text: str, end: int) -> str:
        piece = text[len(self.shown) : end]
        self.shown += piece
        return piece
