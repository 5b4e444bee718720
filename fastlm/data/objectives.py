"""What a model is to learn from tokens: examples, in an order that depends on a seed alone, as batches.

    CausalLM(tokens, seq_len)                     the next token: GPT
    MaskedLM(tokens, seq_len, special=...)        tokens that were masked and, if asked for, whether B follows A: BERT
    Labelled(examples)                            whatever each example's labels say: classifiers

Examples are numbered: number i is example `shuffled(i % n)` of epoch `i // n`, n examples making an epoch. A batch is a
range of numbers, so a run needs nothing but its step to go on, and its batches are the same for any number of
processes. Randomness is raw words of Philox 4x64, which numpy keeps the same in all its versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlm.data.collate import collate

__all__ = ["CausalLM", "Labelled", "MaskedLM", "Objective", "shuffled"]

IGNORED = -100
Inputs = dict[str, Any]  # what the model is called with
Numbers = npt.NDArray[np.int64]


class TokenArray(Protocol):
    """(N,) integers: a numpy array, or `Tokens` of several files."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Any: ...


class Objective:
    """Base of the three. A subclass has `__len__`, the number of examples in an epoch, and `inputs`."""

    labels: str = "labels"  # the argument of the model that holds what it is to predict
    eval_bytes: int | None = None  # bytes of text that the labels of `eval_batches` stand for
    num_classes: int | None = None  # of classifiers

    def __len__(self) -> int:
        raise NotImplementedError

    def inputs(self, places: Numbers, numbers: Numbers, epochs: Numbers, seed: int) -> Inputs:
        """The examples at `places`, whose numbers and epochs are known too, as one batch."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Tells other data from this."""
        raise NotImplementedError

    def batch(self, start: int, stop: int, seed: int) -> Inputs:
        """Examples number `start` to `stop` of the endless sequence that `seed` gives."""
        numbers = np.arange(start, stop)
        epochs, places = np.divmod(numbers, len(self))
        return self.inputs(shuffled(places, len(self), _keys(seed, epochs)), numbers, epochs, seed)

    def eval_batches(self, batch_size: int) -> Iterator[Inputs]:
        """Every example once, in order, the same every time."""
        for start in range(0, len(self), batch_size):
            places = np.arange(start, min(start + batch_size, len(self)))
            yield self.inputs(places, places, np.zeros_like(places), 0)

    def num_tokens(self, inputs: Inputs) -> int:
        """How many tokens a batch has, padding left out."""
        mask = inputs.get("attention_mask")
        return inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def count(self, inputs: Inputs) -> int:
        """How many labels a batch has: what its loss is the mean over."""
        labels = inputs[self.labels]
        return len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())


class CausalLM(Objective):
    """Predict the next token: windows of `seq_len` tokens that follow each other, cut elsewhere in every epoch.

    Batches are `input_ids` and `shift_labels`, the inputs one token later, int64 (B, seq_len) each.

    Args:
        tokens: (N,) of integers.
        document_id: the token that starts a document. With it documents do not see each other: batches have
            `cu_seqlens`, where documents and rows start among the B * seq_len tokens, and positions count from there.
        eval_overlap: how many inputs a window of an evaluation repeats as context; what was scored is not again.
        num_bytes: of the text of all tokens but the first, for bits per byte.

    Raises ValueError where there are fewer tokens than a window and its last label.
    """

    labels = "shift_labels"

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        *,
        document_id: int | None = None,
        eval_overlap: int = 0,
        num_bytes: int | None = None,
    ) -> None:
        _check_windows("CausalLM", tokens, seq_len, seq_len + 1)
        if not 0 <= eval_overlap < seq_len:
            raise ValueError(f"CausalLM: eval_overlap must be from 0 to seq_len - 1, {seq_len - 1}, got {eval_overlap}")
        self.tokens, self.seq_len, self.document_id = tokens, seq_len, document_id
        self.eval_overlap, self.eval_bytes = eval_overlap, num_bytes

    def __len__(self) -> int:
        return max(1, (len(self.tokens) - 1) // self.seq_len - 1)

    def inputs(self, places: Numbers, numbers: Numbers, epochs: Numbers, seed: int) -> Inputs:
        slack = len(self.tokens) - len(self) * self.seq_len  # starts of the first window: 0 to slack - 1
        return self._windows(places * self.seq_len + _below(slack, _words(_keys(seed, epochs))))

    def eval_batches(self, batch_size: int) -> Iterator[Inputs]:
        """Every token after the first is scored once. The last window ends with the text, and overlaps for that."""
        T, last = self.seq_len, len(self.tokens) - 1 - self.seq_len
        starts = np.append(np.arange(0, last, T - self.eval_overlap), last)
        scored = np.concatenate(([0], starts[:-1] + T))  # labels before this place were in an earlier window
        for i in range(0, len(starts), batch_size):
            rows = slice(i, i + batch_size)
            inputs = self._windows(starts[rows])
            repeated = torch.from_numpy(scored[rows] - starts[rows])[:, None]
            yield inputs | {self.labels: inputs[self.labels].masked_fill(torch.arange(T) < repeated, IGNORED)}

    def _windows(self, starts: Numbers) -> Inputs:
        ids = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64))
        inputs = {"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()}
        if self.document_id is not None:
            begins = inputs["input_ids"] == self.document_id
            begins[:, 0] = True
            places = torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()])))
            inputs["cu_seqlens"] = places.int()
        return inputs

    def fingerprint(self) -> str:
        return _fingerprint(self.tokens)


class MaskedLM(Objective):
    """Predict masked tokens: BERT's pretraining (Devlin et al. 2019, arXiv 1810.04805).

    An example is [CLS] and seq_len - 2 tokens and [SEP], or [CLS] A [SEP] B [SEP]. Of its tokens that are not special
    `probability` are chosen, at least one: each becomes [MASK] in 80% of the cases, a random token in 10%, and stays in
    10%. Batches are `input_ids`, `labels`, -100 where nothing was chosen, `labelled`, where something was, and with
    `next_sentence` also `token_type_ids`, `next_sentence_label`, `attention_mask` and `packing`.
    Which are chosen depends on (seed, number of the example).

    Args:
        tokens: (N,) of integers, a [SEP] before every document.
        seq_len: tokens of an example.
        special: the ids of "[CLS]", "[SEP]" and "[MASK]".
        vocab_size: random tokens are below this and not special.
        next_sentence: A is what comes first in a document or the rest of one, cut at random; B is what follows it, or
            in half of the cases (label 1) as many tokens from elsewhere. Neither reaches into another document.
    """

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        *,
        special: dict[str, int],
        vocab_size: int,
        probability: float = 0.15,
        next_sentence: bool = False,
    ) -> None:
        if missing := {"[CLS]", "[SEP]", "[MASK]"} - special.keys():
            raise ValueError(f"MaskedLM: special must have [CLS], [SEP] and [MASK], lacks {', '.join(sorted(missing))}")
        if not 0 < probability < 1:
            raise ValueError(f"MaskedLM: probability must be above 0 and below 1, got {probability}")
        self.taken = seq_len - 3 if next_sentence else seq_len - 2
        if self.taken < 2:
            raise ValueError(f"MaskedLM: seq_len must be at least {seq_len - self.taken + 2}, got {seq_len}")
        _check_windows("MaskedLM", tokens, seq_len, self.taken)
        self.tokens, self.seq_len, self.special, self.vocab_size = tokens, seq_len, special, vocab_size
        self.probability, self.next_sentence = probability, next_sentence
        self._specials = np.array(sorted(special.values()))

    def __len__(self) -> int:
        return max(1, len(self.tokens) // self.taken - 1)

    def inputs(self, places: Numbers, numbers: Numbers, epochs: Numbers, seed: int) -> Inputs:
        slack = len(self.tokens) - len(self) * self.taken + 1
        starts = places * self.taken + _below(slack, _words(_keys(seed, epochs)))
        words = np.stack([_stream(seed, number, 2 * self.seq_len + 3) for number in numbers.tolist()])
        if self.next_sentence:
            return self._pairs(starts, words)
        cls, sep = (np.full((len(starts), 1), self.special[name]) for name in ("[CLS]", "[SEP]"))
        window = self.tokens[starts[:, None] + np.arange(self.taken)].astype(np.int64)
        rows = [self._masked(ids, word) for ids, word in zip(np.hstack((cls, window, sep)), words, strict=True)]
        ids, labels = (torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True))
        return {"input_ids": ids, "labels": labels, "labelled": _labelled(labels)}

    def _pairs(self, starts: Numbers, words: npt.NDArray[np.uint64]) -> Inputs:
        cls, sep = ([self.special[name]] for name in ("[CLS]", "[SEP]"))
        examples = []
        for start, word in zip(starts.tolist(), words, strict=True):
            text = self._within_document(start)
            cut = 1 + int(word[-1] % np.uint64(max(1, len(text) - 1)))
            first, second, other = text[:cut], text[cut:], int(word[-2] >> np.uint64(63))
            if other or not len(second):
                place = int(word[-3] % np.uint64(len(self.tokens) - self.taken + 1))
                first, second, other = text[:cut], self._within_document(place)[: self.taken - cut], 1
            parts = np.concatenate((cls, first, sep, second, sep)).astype(np.int64)
            ids, labels = self._masked(parts, word)
            types = (np.arange(len(ids)) >= len(first) + 2).astype(np.int64)
            examples.append({"input_ids": ids, "labels": labels, "token_type_ids": types, "next_sentence_label": other})
        inputs: Inputs = collate(examples, pad_token_id=self.special.get("[PAD]", 0))
        return inputs | {"labelled": _labelled(inputs["labels"])}

    def _within_document(self, start: int) -> npt.NDArray[Any]:
        """At most `taken` tokens from `start` on, to the end of the document that the first of them is in."""
        text = self.tokens[start : start + self.taken]
        text = text[1:] if text[0] == self.special["[SEP]"] else text
        ends = np.flatnonzero(text == self.special["[SEP]"])
        return text[: max(1, ends[0])] if len(ends) else text

    def _masked(self, ids: Numbers, words: npt.NDArray[np.uint64]) -> tuple[Numbers, Numbers]:
        """What the model sees and what it is to predict."""
        eligible = np.flatnonzero(~np.isin(ids, self._specials))
        wanted = min(len(eligible), max(1, round(self.probability * len(eligible))))
        chosen = eligible[np.argsort(words[eligible], kind="stable")[:wanted]]
        labels = np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        draws = words[self.seq_len + chosen]
        fate, random = draws % np.uint64(10), (draws // np.uint64(10)) % np.uint64(self._ordinary())
        seen = ids.copy()
        seen[chosen[fate < 8]] = self.special["[MASK]"]
        seen[chosen[fate == 8]] = self._ordinary_token(random[fate == 8].astype(np.int64))
        return seen, labels

    def _ordinary(self) -> int:
        return self.vocab_size - len(self._specials)

    def _ordinary_token(self, places: Numbers) -> Numbers:
        """The tokens at these places among those that are not special."""
        for special in self._specials:
            places = places + (places >= special)
        return places

    def fingerprint(self) -> str:
        return _fingerprint(self.tokens)


class Labelled(Objective):
    """Examples with labels of their own, as `collate` takes them, padded to the longest of a batch.

    Args:
        examples: each with `input_ids` and `labels`.
        num_classes: where labels are classes; evaluations then report accuracy, precision, recall and F1.
    """

    def __init__(
        self, examples: Sequence[dict[str, Any]], *, num_classes: int | None = None, pad_token_id: int = 0
    ) -> None:
        if not examples:
            raise ValueError("Labelled: there must be at least one example")
        self.examples, self.num_classes, self.pad_token_id = examples, num_classes, pad_token_id

    def __len__(self) -> int:
        return len(self.examples)

    def inputs(self, places: Numbers, numbers: Numbers, epochs: Numbers, seed: int) -> Inputs:
        return collate([self.examples[place] for place in places.tolist()], pad_token_id=self.pad_token_id)

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=8)
        for example in self.examples:
            digest.update(repr(sorted(example.items())).encode())
        return f"{len(self)} examples, {digest.hexdigest()}"


def _labelled(labels: Tensor) -> Tensor:
    return (labels.flatten() != IGNORED).nonzero().flatten()


def shuffled(places: Numbers, n: int, keys: npt.NDArray[np.uint64]) -> Numbers:
    """Where each of `places`, 0 to n - 1, goes in the permutation of its key, without any array of length n.

    A Feistel network over the next even number of bits, walked until it is back below n (Black and Rogaway 2002,
    Ciphers with arbitrary finite domains).
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out, todo = places.astype(np.uint64), np.ones(len(places), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for turn in range(6):
            left, right = right, left ^ (_words(right ^ (keys[todo] + np.uint64(turn << 56))) & low)
        out[todo] = left << half | right
        todo = out >= np.uint64(n)
    return out.astype(np.int64)


def _words(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): 64 bits to 64 bits, all of them mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epochs: Numbers) -> npt.NDArray[np.uint64]:
    """A key for every epoch."""
    known = {epoch: _stream(seed, epoch, 1, purpose=1)[0] for epoch in set(epochs.tolist())}
    return np.array([known[epoch] for epoch in epochs.tolist()], np.uint64)


def _stream(seed: int, number: int, count: int, purpose: int = 0) -> npt.NDArray[np.uint64]:
    """`count` random words for (seed, number, purpose)."""
    key = (seed % 2**64) + (purpose << 64)
    return np.random.Philox(key=key, counter=number << 64).random_raw(count)


def _below(limit: int, words: npt.NDArray[np.uint64]) -> Numbers:
    return (words % np.uint64(limit)).astype(np.int64)


def _check_windows(name: str, tokens: TokenArray, seq_len: int, need: int) -> None:
    if seq_len < 1:
        raise ValueError(f"{name}: seq_len must be at least 1, got {seq_len}")
    if len(tokens) < need:
        raise ValueError(
            f"{name}: the text is too small: {len(tokens):,} tokens, seq_len {seq_len:,} needs at least {need:,}"
        )


def _fingerprint(tokens: TokenArray) -> str:
    """How many tokens there are and a hash of 65,536 of them, evenly spaced."""
    sample = np.ascontiguousarray(tokens[:: max(1, len(tokens) // 65536)], dtype=np.int64)
    return f"{len(tokens)} tokens, {blake2b(sample.tobytes(), digest_size=8).hexdigest()}"
