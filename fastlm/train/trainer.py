"""The training loop."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastlm import data
from fastlm.models.gpt import GPT
from fastlm.models.pretrained import read_json, replacing
from fastlm.train import checkpoint
from fastlm.train.config import TrainConfig
from fastlm.train.plot import plot_loss
from fastlm.train.progress import Progress

__all__ = ["Evaluation", "NonFiniteError", "Trainer"]

Tokens = npt.NDArray[Any]
METRICS = "metrics.jsonl"


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or not a number."""


class Evaluation(NamedTuple):
    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float | None  # None where the number of bytes is not known

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"
        return f"loss {self.loss:.3f}, perplexity {self.perplexity:.1f}{bits}"


class Trainer:
    """Trains a model on tokens.

    Args:
        model: it is moved to the configuration's device; its weights stay in their dtype.
        train_data, eval_data: (N,) token ids, as `Dataset.train_tokens`; without `eval_data` nothing is evaluated.
        folder: where the run is written: config.json, metrics.jsonl, loss.png, the last checkpoint. None: nowhere.
        eval_bytes: bytes of the text of `eval_data`, for bits per byte.
        baselines: name to bits per byte, lines in loss.png.
        source: where the data comes from, JSON values; kept in config.json and compared by `resume`.
        tokenizer: the tokenizer.json to keep in the folder.
        quiet: print nothing.

    `train` goes from `step` to the end; `resume` first puts everything back to where the last checkpoint was taken.
    From there the losses are the same to the last bit as those of a run that was never interrupted, on a CPU with the
    same number of threads, and on a GPU under `torch.use_deterministic_algorithms`.

    Raises ValueError where model, configuration and data do not fit.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        train_data: Tokens,
        eval_data: Tokens | None = None,
        *,
        folder: str | Path | None = None,
        eval_bytes: int | None = None,
        baselines: Mapping[str, float] | None = None,
        source: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        quiet: bool = False,
    ) -> None:
        if config.seq_len > model.config.max_seq_len:
            need, got = model.config.max_seq_len, config.seq_len
            raise ValueError(f"Trainer: seq_len must be at most the model's max_seq_len, {need}, got {got}")
        self.device, self._autocast = config.torch_device(), config.autocast()
        self.model, self.config = model.to(self.device), config
        self.train_data, self.eval_data, self.eval_bytes = train_data, eval_data, eval_bytes
        self.folder, self.baselines, self.quiet = None if folder is None else Path(folder), baselines, quiet
        self.tokenizer = tokenizer
        self._shape = {"batch_size": config.batch_size, "seq_len": config.seq_len}
        for tokens in (train_data, eval_data):
            if tokens is not None:
                next(iter(data.eval_batches(tokens, **self._shape)))  # raises where the text is too small
        self.description = {
            "model": model.config.to_dict(),
            "train": config.to_dict(),
            "source": dict(source or {}),
            "tokens": {"train": _fingerprint(train_data), "eval": _fingerprint(eval_data)},
        }
        self.optimizers = _optimizers(model, config)
        self.parameters = list(model.parameters())
        self.step = 0
        self.seconds = 0.0  # of training; evaluating and saving do not count
        self.interrupted = False
        self.evaluation: Evaluation | None = None
        self.records: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self._logged = (0, 0.0)  # step and seconds
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of loss and gradient norm since then

    def train(self) -> Evaluation | None:
        """Train to the end, or until SIGINT or SIGTERM, which saves and sets `interrupted`; a second one kills.

        Returns the last evaluation. Raises NonFiniteError, leaving the last checkpoint as it is.
        """
        config = self.config
        with _stop_signals() as received, Progress(config.steps, self.quiet) as progress:
            if self.step == 0:
                self._begin()
            while self.step < config.steps:
                started = time.perf_counter()
                factor = config.lr_factor(self.step)
                self._train_step(factor)
                means = self._means() if self._due(config.log_every) else None
                self.seconds += time.perf_counter() - started
                if means is not None:
                    self._log(progress, *means, lr=config.lr * factor)
                if self.eval_data is not None and self._due(config.eval_every):
                    self.evaluation = self.evaluate()
                    self._record({f"val_{name}": value for name, value in self.evaluation._asdict().items()})
                    progress.line(f"step {self.step:,}: validation {self.evaluation}")
                if received or self._due(config.save_every):
                    self._save()
                if received:
                    break
        self.interrupted = self.step < config.steps
        if self.folder is not None and self.records:
            plot_loss(self.records, self.folder / "loss.png", self._bytes_per_token(), self.baselines)
        return self.evaluation

    def _train_step(self, lr_factor: float) -> None:
        """One update. Nothing in it waits for the device."""
        config = self.config
        x, y = (self._to_device(ids) for ids in data.batch(self.train_data, self.step, seed=config.seed, **self._shape))
        self.model.train()
        with self._autocast:
            loss = self.model.loss(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor
            optimizer.step()
            optimizer.zero_grad()
        self._sums += torch.stack((loss.detach(), norm))
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The mean loss over every token of `eval_data` after the first, in windows that do not overlap."""
        if self.eval_data is None:
            raise ValueError("Trainer.evaluate: there is no eval_data")
        self._means()
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for x, y in data.eval_batches(self.eval_data, **self._shape):
            scored = int((y != -100).sum())
            with self._autocast:
                total += self.model.loss(self._to_device(x), self._to_device(y)).double() * scored
            count += scored
        loss = total.item() / count
        bits = None if self.eval_bytes is None else total.item() / math.log(2) / self.eval_bytes
        return Evaluation(loss, math.exp(min(loss, 700.0)), bits)  # which exp still holds

    def resume(self) -> None:
        """Go back to the last checkpoint in `folder`.

        Raises FileNotFoundError where there is none and ValueError, with the differences, for one of another model,
        configuration or text.
        """
        folder = self.folder
        last = None if folder is None else checkpoint.latest(folder)
        if folder is None or last is None:
            raise FileNotFoundError(f"Trainer: there is no checkpoint in {folder}")
        saved = read_json(last / "training.json")
        if differences := _differences(saved["description"], self.description):
            raise ValueError(f"Trainer: {last} is of another run: {'; '.join(differences)}")
        checkpoint.load(last, self.model, self.optimizers)
        self.step, self.seconds, self._logged = saved["step"], saved["seconds"], tuple(saved["logged"])
        self._sums.copy_(torch.tensor(saved["sums"], dtype=torch.float64))
        self.evaluation = Evaluation(*saved["evaluation"]) if saved["evaluation"] else None
        self.records = [record for record in _read_records(folder / METRICS) if record["step"] <= self.step]
        with replacing(folder / METRICS) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")

    def _begin(self) -> None:
        """Seed, and make the folder, which must not hold a run."""
        torch.manual_seed(self.config.seed)
        if self.folder is None:
            return
        if (self.folder / METRICS).exists():
            raise FileExistsError(f"Trainer: {self.folder} holds a run already; resume it or name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "config.json") as path:
            path.write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            with replacing(self.folder / "tokenizer.json") as path:
                shutil.copyfile(self.tokenizer, path)
        (self.folder / METRICS).touch()

    def _save(self) -> None:
        self._means()
        if self.folder is not None:
            state = {"description": self.description, "seconds": self.seconds, "logged": self._logged}
            state |= {"sums": self._sums.tolist(), "evaluation": self.evaluation}
            checkpoint.save(self.folder, self.step, self.model, self.optimizers, state)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _means(self) -> tuple[float, float]:
        """Of loss and gradient norm since the last log point; waits for the device, raises if they are not finite."""
        steps = max(1, self.step - self._logged[0])
        loss, norm = (total / steps for total in self._sums.tolist())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            last = None if self.folder is None else checkpoint.latest(self.folder)
            raise NonFiniteError(
                f"the loss is {loss} and the norm of the gradient {norm} between steps {self._logged[0]:,} and "
                f"{self.step:,}: try a lower lr or a longer warm-up; "
                + (f"the last checkpoint is {last}" if last else "there is no checkpoint yet")
            )
        return loss, norm

    def _log(self, progress: Progress, loss: float, norm: float, lr: float) -> None:
        """Record the means since the last log point, and start anew."""
        steps, seconds = self.step - self._logged[0], self.seconds - self._logged[1]
        speed = steps * self.config.batch_size * self.config.seq_len / seconds
        figures = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": speed, "seconds": self.seconds}
        self._record(figures)
        progress.update(self.step, loss, speed, (self.config.steps - self.step) * seconds / steps)
        self._sums.zero_()
        self._logged = (self.step, self.seconds)

    def _record(self, figures: dict[str, Any]) -> None:
        self.records.append({"step": self.step, **figures})
        if self.folder is not None:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.records[-1]) + "\n")

    def _bytes_per_token(self) -> float | None:
        known = self.eval_bytes is not None and self.eval_data is not None
        return self.eval_bytes / (len(self.eval_data) - 1) if known else None  # type: ignore[operator, arg-type]

    def _to_device(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.device.type == "cpu" else ids.pin_memory().to(self.device, non_blocking=True)


def _optimizers(model: GPT, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("blocks.") and p.dim() == 2)]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        optimizers["muon"] = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    else:
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    optimizers["adamw"] = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _fingerprint(tokens: Tokens | None) -> str | None:
    """How many tokens there are and a hash of 65,536 of them, evenly spaced."""
    if tokens is None:
        return None
    sample = np.ascontiguousarray(tokens[:: max(1, len(tokens) // 65536)], dtype=np.int64)
    return f"{len(tokens)} tokens, {blake2b(sample.tobytes(), digest_size=8).hexdigest()}"


def _differences(saved: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*saved, *now])
        return [line for key in keys for line in _differences(saved.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if saved == now else [f"{name} was {saved!r} and is {now!r}"]


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, but for one that a kill cut off."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is put into the list, a second one does what it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield received
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield received
    finally:
        restore()
