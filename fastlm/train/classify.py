"""What a classifier says to labelled texts, and a report of how good that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastlm.data.objectives import Labelled
from fastlm.models import BERTForSequenceClassification
from fastlm.models.pretrained import replacing
from fastlm.train.config import TrainConfig
from fastlm.train.evaluation import Evaluation, confusion_of
from fastlm.train.plot import plot_confusion

__all__ = ["evaluate_classifier", "log_probabilities", "summary", "wilson_interval", "write_report"]

CONFUSION = "confusion.png"
_MISTAKES = 10
_SHOWN_CHARACTERS = 120


@torch.no_grad()
def log_probabilities(model: BERTForSequenceClassification, data: Labelled, config: TrainConfig) -> Tensor:
    """(N, classes) fp32, on the CPU: of the classes of every example, in the model's evaluation mode."""
    model = model.eval().to(device := config.torch_device())
    with config.autocast():
        logits = [
            model(**tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), inputs)).logits.float()
            for inputs in data.eval_batches(config.micro_batch_size or config.batch_size)
        ]
    return torch.cat(logits).log_softmax(-1).cpu()


def evaluate_classifier(log_p: Tensor, labels: Tensor) -> Evaluation:
    """Of log-probabilities (N, classes) and the numbers of the right classes (N,)."""
    total = -log_p.gather(1, labels[:, None]).double().sum().item()
    return Evaluation.of(total, len(labels), None, confusion_of(log_p, labels, log_p.shape[1]))


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Where the true share is in 95 of 100 cases (Wilson 1927), of one that was seen in `count` cases."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def write_report(
    folder: Path,
    title: str,
    facts: Mapping[str, Any],
    texts: Sequence[str],
    labels: Tensor,
    log_p: Tensor,
    classes: Sequence[str],
) -> Path:
    """report.md and confusion.png: the measures, those of each class, and the mistakes that the model is surest of."""
    evaluation = evaluate_classifier(log_p, labels)
    folder.mkdir(parents=True, exist_ok=True)
    plot_confusion(evaluation.confusion or [], classes, folder / CONFUSION)
    with replacing(folder / "report.md") as path:
        path.write_text("\n".join(_lines(title, facts, texts, labels, log_p, classes, evaluation)), encoding="utf-8")
    return folder / "report.md"


def summary(log_p: Tensor, labels: Tensor, classes: Sequence[str]) -> list[str]:
    """The measures in two lines, for people."""
    evaluation, count = evaluate_classifier(log_p, labels), len(labels)
    low, high = wilson_interval(evaluation.accuracy or 0.0, count)
    frequent = torch.bincount(labels, minlength=len(classes))
    return [
        f"{evaluation} on {count:,} texts",
        f"accuracy is from {low:.1%} to {high:.1%} with 95% confidence; always {classes[int(frequent.argmax())]!r} "
        f"would have {frequent.max().item() / count:.1%}",
    ]


def _lines(
    title: str,
    facts: Mapping[str, Any],
    texts: Sequence[str],
    labels: Tensor,
    log_p: Tensor,
    classes: Sequence[str],
    evaluation: Evaluation,
) -> Iterator[str]:
    counts = torch.tensor(evaluation.confusion, dtype=torch.float64)
    support, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
    accuracy, (low, high) = evaluation.accuracy or 0.0, wilson_interval(evaluation.accuracy or 0.0, len(labels))
    yield from (f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), "")
    yield from ("| measure | value |", "|---|---|")
    yield f"| accuracy | {accuracy:.2%} of {len(labels):,} texts (95%: {low:.2%} to {high:.2%}) |"
    yield f"| always {_cell(classes[int(support.argmax())])} | {support.max().item() / len(labels):.2%} |"
    for name in ("precision", "recall", "f1"):
        yield f"| {name}, mean of the classes | {getattr(evaluation, name):.2%} |"
    yield from (f"| loss | {evaluation.loss:.4f} nats |", "")
    yield from ("| class | texts | precision | recall | F1 |", "|---|---|---|---|---|")
    for n, name in enumerate(classes):
        figures = (right[n] / predicted[n], right[n] / support[n], 2 * right[n] / (predicted[n] + support[n]))
        yield f"| {_cell(name)} | {int(support[n]):,} | " + " | ".join(f"{x.nan_to_num():.2%}" for x in figures) + " |"
    yield from ("", f"![Confusion of the classes]({CONFUSION})", "")
    said = log_p.argmax(1)
    wrong = (said != labels).nonzero().flatten()
    if len(wrong):
        surest = wrong[log_p[wrong].amax(1).argsort(descending=True, stable=True)][:_MISTAKES]
        yield from (
            "The mistakes that the model is surest of:",
            "",
            "| text | label | said | with |",
            "|---|---|---|---|",
        )
        for n in surest.tolist():
            text = texts[n] if len(texts[n]) <= _SHOWN_CHARACTERS else texts[n][:_SHOWN_CHARACTERS] + " ..."
            names = (_cell(classes[int(labels[n])]), _cell(classes[int(said[n])]))
            yield f"| {_cell(text)} | {names[0]} | {names[1]} | {log_p[n].max().exp():.1%} |"
        yield ""


def _cell(text: str) -> str:
    """As one cell of a table that shows it as it is."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
