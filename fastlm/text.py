"""From a prompt to its tokens, and from tokens, as they come, to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastlm.data import EOS_TOKEN
from fastlm.models import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["NEW_TOKENS", "pieces", "prompt_ids", "room"]

NEW_TOKENS = 200  # where nobody says how many


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
    new: list[int] = []
    shown = 0
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=False)
        ends = [text.index(each) for each in stop if each in text]
        if ends:
            yield text[shown : min(ends)]
            return
        # What may yet become another character, or the beginning of what ends the text, waits.
        whole = len(text) if len(new) == last else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        begun = [n for each in stop for n in range(1, len(each)) if text.endswith(each[:n])]
        until = max(shown, min(whole, len(text) - (max(begun, default=0) if len(new) < last else 0)))
        if until > shown:
            yield text[shown:until]
            shown = until
    if shown < len(text := tokenizer.decode(new, skip_special_tokens=False)):
        yield text[shown:]
