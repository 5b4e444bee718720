"""Batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.models.bert import Packing

__all__ = ["collate"]


def collate(
    examples: Sequence[dict[str, Any]], *, pad_token_id: int = 0, ignore_index: int = -100
) -> dict[str, Tensor | Packing]:
    """A batch for BERT and its heads: padded on the right to the longest, and where its tokens are (`packing`), so that
    the model need not wait for a GPU to find out.

    Args:
        examples: each with `input_ids`, a list of integers, and whatever else all of them have. What is as long as
            `input_ids` is padded like it, `labels` with `ignore_index`, the rest with 0; numbers become (B,).
        pad_token_id, ignore_index: what `input_ids` and `labels` are padded with.

    Raises:
        ValueError: no examples, or examples with different names.
    """
    if not examples or any(example.keys() != examples[0].keys() for example in examples):
        raise ValueError("collate: examples must be at least one, all with the same names")
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch: dict[str, Any] = {}
    for name in examples[0]:
        values = [torch.as_tensor(example[name]) for example in examples]
        if all(value.dim() == 1 and len(value) == n for value, n in zip(values, lengths.tolist(), strict=True)):
            filler = {"input_ids": pad_token_id, "labels": ignore_index}.get(name, 0)
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
        else:
            batch[name] = torch.stack(values)
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batch["packing"] = Packing.of(batch["attention_mask"])
    return batch
