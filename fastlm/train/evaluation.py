"""How good a model is on data that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation; None is what there is none of.

        perplexity = exp(loss);    bits_per_byte = loss * labels / ln 2 / bytes
        precision = TP / (TP + FP);    recall = TP / (TP + FN);    F1 = 2 TP / (2 TP + FP + FN)

    Args:
        loss: nats per label.
        perplexity: of a language model.
        bits_per_byte: None where the number of bytes is not known.
        accuracy: share of the labels that were predicted.
        precision, recall, f1: means over the classes that occur, as labels or predictions (macro), 0 where a divisor
            is 0.
        confusion: counts of a classifier: rows are labels, columns predictions.
    """

    loss: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    confusion: list[list[int]] | None = None

    @classmethod
    def of(cls, total: float, count: int, num_bytes: int | None, confusion: Tensor | None) -> Evaluation:
        """From the sum of the losses, the number of labels and, of a classifier, the counts of label and prediction."""
        loss = total / max(count, 1)
        if confusion is None:
            bits = None if num_bytes is None else total / math.log(2) / num_bytes
            return cls(loss, math.exp(min(loss, 700.0)), bits)  # which exp still holds
        counts = confusion.double()
        right, predicted, labelled = counts.diagonal(), counts.sum(0), counts.sum(1)
        occurs = predicted + labelled > 0

        def mean(values: Tensor, over: Tensor) -> float:
            return (values / over.clamp(min=1))[occurs].mean().item()

        return cls(
            loss,
            accuracy=(right.sum() / counts.sum().clamp(min=1)).item(),
            precision=mean(right, predicted),
            recall=mean(right, labelled),
            f1=mean(2 * right, predicted + labelled),
            confusion=confusion.tolist(),
        )

    def to_dict(self) -> dict[str, Any]:
        """What there is."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        shown = {"loss": ".3f", "perplexity": ".1f", "bits_per_byte": ".3f"}
        shown |= {"accuracy": ".1%", "precision": ".1%", "recall": ".1%", "f1": ".1%"}
        there = self.to_dict()
        return ", ".join(
            f"{there[name]:{form}} bits per byte" if name == "bits_per_byte" else f"{name} {there[name]:{form}}"
            for name, form in shown.items()
            if name in there
        )


def confusion_of(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(classes, classes) int64: how often each label (row) got each prediction (column)."""
    pairs = labels.flatten() * num_classes + logits.argmax(-1).flatten()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
