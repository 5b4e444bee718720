"""The training loop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastlm.config import to_toml
from fastlm.data.objectives import CausalLM, Objective, TokenArray
from fastlm.models.pretrained import Pretrained, read_json, replacing
from fastlm.train import checkpoint
from fastlm.train.config import TrainConfig
from fastlm.train.estimate import Estimate, cost, duration
from fastlm.train.evaluation import Evaluation, confusion_of
from fastlm.train.memory import kept_memory, peak_memory
from fastlm.train.metrics import METRICS, Metrics
from fastlm.train.optimizers import build_optimizers, step_unless
from fastlm.train.parallel import Processes, whole
from fastlm.train.plot import plot_loss
from fastlm.train.progress import Progress
from fastlm.train.signals import stop_signals

__all__ = ["NonFiniteError", "Trainer"]


class NonFiniteError(RuntimeError):
    """The loss or the gradient was infinite or not a number in many steps in a row."""


class Trainer:
    """Trains a model.

    Args:
        model: it is moved to the configuration's device; its weights stay in their dtype.
        train_data, eval_data: what it is to learn, an `Objective`; token ids (N,), as `Dataset.train_tokens`, are
            `CausalLM(tokens, config.seq_len)`. Without `eval_data` nothing is evaluated.
        folder: where the run is written: config.toml, metrics.jsonl, loss.png, checkpoints. None: nowhere.
        eval_bytes: bytes of the text of `eval_data` where that are token ids, for bits per byte.
        baselines: name to bits per byte, lines in loss.png.
        source: where the data comes from, JSON values; the table `data` of config.toml, and compared by `resume`.
        start: where the weights come from, likewise, in the table `model`.
        tokenizer: the tokenizer.json to keep in the folder.
        price_per_hour: of the machine; the estimates then say what the run costs.
        profile: write a trace of three steps to trace.json, for chrome://tracing or Perfetto.
        quiet: print nothing.

    `train` goes from `step` to the end; `resume` first puts everything back to where the last checkpoint was taken.
    From there the losses are the same to the last bit as those of a run that was never interrupted, on a CPU with the
    same number of threads, and on a GPU under `torch.use_deterministic_algorithms`.

    A step whose loss or gradient is not finite, or that has no labels, changes no weight; it is counted, and
    `metrics.jsonl` and the progress say so. Micro-batches count by their labels, so that a step's gradient is that of
    the whole batch.

    Where torch.distributed has a group of several processes (`parallel.process_group` makes that of torchrun), each
    makes a Trainer with the same arguments, calls what the others call, and takes its share of every batch; losses and
    evaluations are those of all together, as one process has them but for rounding. The first one prints and writes.
    A run may go on with another number of processes, or another kind of `parallel`; with the same number its losses
    are the same to the last bit. With fsdp `model` is sharded in place.

    Raises ValueError where model, configuration and data do not fit.
    """

    def __init__(
        self,
        model: Pretrained,
        config: TrainConfig,
        train_data: Objective | TokenArray,
        eval_data: Objective | TokenArray | None = None,
        *,
        folder: str | Path | None = None,
        eval_bytes: int | None = None,
        baselines: Mapping[str, float] | None = None,
        source: Mapping[str, Any] | None = None,
        start: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        price_per_hour: float | None = None,
        profile: bool = False,
        quiet: bool = False,
    ) -> None:
        longest = getattr(model.config, "max_seq_len", config.seq_len)
        if config.seq_len > longest:
            raise ValueError(
                f"Trainer: seq_len must be at most the model's max_seq_len, {longest}, got {config.seq_len}"
            )
        if config.best_by != "loss" and getattr(eval_data, "num_classes", None) is None:
            raise ValueError(f"Trainer: best_by = {config.best_by!r} needs eval_data of a classifier (`Labelled`)")
        if profile and folder is None:
            raise ValueError("Trainer: profile needs a folder to write the trace to")
        self.processes = processes = Processes(config.parallel)
        if config.batch_size % processes.count:
            raise ValueError(
                f"Trainer: batch_size must be a multiple of the number of processes, {processes.count}, "
                f"got {config.batch_size}"
            )
        self._share = config.batch_size // processes.count  # of a batch
        self._micro = min(config.micro_batch_size or self._share, self._share)
        self.device, self._autocast = config.torch_device(), config.autocast()
        self.model, self.config, kind = model, config, type(model).__name__
        for module in model.modules():
            if isinstance(module, Pretrained):
                module.checkpointing = config.checkpointing
        wrapped = processes.wrap(model, self.device)
        self._forward = torch.compile(wrapped) if config.compile else wrapped
        self.train_data = _objective(train_data, config)
        self.eval_data = None if eval_data is None else _objective(eval_data, config, eval_bytes)
        self.folder, self.baselines = None if folder is None else Path(folder), baselines
        self.quiet, self.profile = quiet or not processes.first, profile and processes.first
        self.tokenizer, self.price_per_hour = tokenizer, price_per_hour
        prints = {"train": self.train_data, "eval": self.eval_data}
        self.description = {
            "model": {"type": kind, **model.config.to_dict(), **(start or {})},
            "data": dict(source or {}),
            "train": config.to_dict(),
            "tokens": {name: data.fingerprint() if data is not None else None for name, data in prints.items()},
        }
        self.optimizers = build_optimizers(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.torch_dtype() == torch.float16)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step = 0
        self.seconds = 0.0  # of training; evaluating and saving do not count
        self.interrupted = False
        self.evaluation: Evaluation | None = None
        self.best: tuple[int, float] | None = None  # step of the best evaluation, and its loss or what `best_by` says
        self.metrics = Metrics(self.folder if processes.first else None)
        self._worse = 0  # evaluations since the best one
        self._logged = (0, 0.0)  # step and seconds
        self._tokens = 0  # since then
        # Since then: the sums of loss and gradient norm, steps that were skipped; and how many of these in a row, ever.
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._estimated: Estimate | None = None
        self._first_measured = not self.quiet

    def train(self) -> Evaluation | None:
        """Train to the end, or until `patience` runs out, or SIGINT or SIGTERM to any of the processes, which
        saves and sets `interrupted`; a second signal kills.

        Returns the last evaluation. Raises NonFiniteError, leaving the last checkpoint as it is.
        """
        config = self.config
        with (
            stop_signals() as received,
            Progress(config.steps, self.quiet) as progress,
            kept_memory(self.device),
            self._profiler(progress) as profiler,
        ):
            stop = False
            if self.step == 0:
                self.processes.once(self._begin)
            if config.tensorboard:
                self.metrics.open_tensorboard(self.step)
            self._estimate(progress)
            while self.step < config.steps and not stop and not self._enough():
                started = time.perf_counter()
                factor = config.lr_factor(self.step)
                self.train_step(factor)
                means = self._means() if self._due(config.log_every) else None
                self.seconds += time.perf_counter() - started
                if profiler is not None:
                    profiler.step()
                if means is not None:
                    self._log(progress, means, lr=config.lr * factor)
                better = self.eval_data is not None and self._due(config.eval_every) and self._evaluate(progress)
                stop = self.processes.any(bool(received))
                if stop or better or self._due(config.save_every) or self._enough():
                    self._save()
        self.interrupted = stop and self.step < config.steps
        if self.folder is not None and self.metrics.records and self.processes.first:
            plot_loss(self.metrics.records, self.folder / "loss.png", self._bytes_per_label, self.baselines)
        return self.evaluation

    def train_step(self, lr_factor: float = 1.0) -> None:
        """One update with these parts of the learning rates. Nothing in it waits for the device.

        It seeds torch's random generators, with a function of (seed, step, process).
        """
        self.model.train()
        seed = np.random.SeedSequence((self.config.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        batches = list(self._micro_batches())
        counts = [self.train_data.count(inputs) for inputs in batches]
        labels, tokens = self.processes.sum(sum(counts), sum(map(self.train_data.num_tokens, batches)))
        loss = torch.zeros((), device=self.device)
        for i, (inputs, count) in enumerate(zip(batches, counts, strict=True)):
            if not labels or not (count or self.processes.several):  # a mean over nothing
                continue
            if not count:  # the other processes count on this one's part in what they do together
                inputs = self._labelled(inputs)
            with self.processes.accumulating(last=i == len(batches) - 1):
                with self._autocast:
                    part = self._forward(**self._to_device(inputs)).loss * (self.processes.count * count / labels)
                self.scaler.scale(part).backward()
            loss += part.detach()
        if labels:
            self._update(self.processes.add_(loss) / self.processes.count, lr_factor)
        else:
            self._sums[2] += 1
        self._tokens += tokens
        self.step += 1

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        first = self.step * self.config.batch_size + self.processes.rank * self._share
        for start in range(first, first + self._share, self._micro):
            stop = min(start + self._micro, first + self._share)
            yield self.train_data.batch(start, stop, self.config.seed)

    def _labelled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with labels, of which it has none."""
        labels = {self.train_data.labels: torch.zeros_like(inputs[self.train_data.labels])}
        return {name: value for name, value in inputs.items() if name != "labelled"} | labels

    def _update(self, loss: Tensor, lr_factor: float) -> None:
        """Clip the gradient and step, but where loss or gradient are not finite: then the weights stay."""
        for optimizer in self.optimizers.values():
            if self.scaler.is_enabled():
                self.scaler.unscale_(optimizer)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        skip = ~(loss.isfinite() & norm.isfinite())
        limit = self.config.grad_clip or math.inf
        divisor = ((norm + 1e-6) / limit).clamp(min=1.0).nan_to_num(1.0, 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor
            step_unless(skip, optimizer, divisor)
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        self._sums[:2] += torch.stack((loss, norm)).where(~skip, 0.0)
        self._sums[2] += skip
        self._sums[3] = (self._sums[3] + 1) * skip

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The mean loss over every label of `eval_data`, and what follows from it or, of a classifier, its choices."""
        data = self.eval_data
        if data is None:
            raise ValueError("Trainer.evaluate: there is no eval_data")
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        classes = data.num_classes
        confusion = None if classes is None else torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        for inputs, counts in self.processes.share(data.eval_batches(self._micro)):
            with self._autocast:
                output = self._forward(**(on_device := self._to_device(inputs)))
            if counts and (scored := data.count(inputs)):
                total += output.loss.double() * scored
                count += scored
            if counts and confusion is not None and classes is not None:
                confusion += confusion_of(output.logits, on_device[data.labels], classes)
        total, (count,) = self.processes.add_(total), self.processes.sum(count)
        confusion = None if confusion is None else self.processes.add_(confusion)
        return Evaluation.of(total.item(), count, data.eval_bytes, confusion)

    def resume(self) -> None:
        """Go back to the last checkpoint in `folder`.

        Raises FileNotFoundError where there is none and ValueError, with the differences, for one of another model,
        configuration or text.
        """
        last, saved = self.processes.once(self._last)
        was = saved["description"]
        was["train"] = {**TrainConfig().to_dict(), **was["train"], "parallel": self.config.parallel}
        if differences := _differences(was, self.description):
            raise ValueError(f"Trainer: {last} is of another run: {'; '.join(differences)}")
        checkpoint.load(last, self.model, self.optimizers, self.processes)
        self.step, self.seconds, self._logged = saved["step"], saved["seconds"], tuple(saved["logged"])
        self._tokens = saved["tokens_since"]
        self._sums.copy_(torch.tensor(saved["sums"], dtype=torch.float64))
        self.evaluation = Evaluation(**saved["evaluation"]) if saved["evaluation"] else None
        self.best, self._worse = tuple(saved["best"]) if saved["best"] else None, saved["worse"]
        self.scaler.load_state_dict(saved["scaler"])
        self.metrics.restore(self.step)

    def _last(self) -> tuple[Path, dict[str, Any]]:
        last = None if self.folder is None else checkpoint.latest(self.folder)
        if last is None:
            raise FileNotFoundError(f"Trainer: there is no checkpoint in {self.folder}")
        return last, read_json(last / "training.json")

    def _begin(self) -> None:
        """Make the folder, which must not hold a run."""
        if self.folder is None:
            return
        if (self.folder / METRICS).exists():
            raise FileExistsError(f"Trainer: {self.folder} holds a run already; resume it or name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "config.toml") as path:
            path.write_text(
                to_toml({name: self.description[name] for name in ("model", "data", "train")}), encoding="utf-8"
            )
        if self.tokenizer is not None:
            with replacing(self.folder / "tokenizer.json") as path:
                shutil.copyfile(self.tokenizer, path)
        self.metrics.begin()

    def _evaluate(self, progress: Progress) -> bool:
        """Whether it is the best so far."""
        self.evaluation = self.evaluate()
        self.metrics.add(self.step, {f"val_{name}": value for name, value in self.evaluation.to_dict().items()})
        progress.line(f"step {self.step:,}: validation {self.evaluation}")
        by = self.config.best_by
        value = self.evaluation.loss if by == "loss" else -getattr(self.evaluation, by)
        value = value if math.isfinite(value) else math.inf
        better = self.best is None or value < self.best[1]
        if better:
            self.best = (self.step, value)
        self._worse = 0 if better else self._worse + 1
        return better

    def _enough(self) -> bool:
        return 0 < self.config.patience <= self._worse

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {"description": self.description, "seconds": self.seconds, "logged": self._logged}
        state |= {"tokens_since": self._tokens}
        state |= {"sums": self._sums.tolist(), "evaluation": self.evaluation.to_dict() if self.evaluation else None}
        state |= {"best": self.best, "worse": self._worse, "scaler": self.scaler.state_dict()}
        best = None if self.best is None else self.best[0]
        checkpoint.save(
            self.folder, self.step, self.model, self.optimizers, state, self.processes, keep=self.config.keep, best=best
        )

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _means(self) -> dict[str, float]:
        """Of loss and gradient norm since the last log point, and how many steps were skipped; waits for the device."""
        loss, norm, skipped, streak = self._sums.tolist()
        if streak >= self.config.max_skipped:
            last = None if self.folder is None else checkpoint.latest(self.folder)
            raise NonFiniteError(
                f"the loss or the gradient was not finite in the last {streak:,.0f} steps, up to step {self.step:,}; "
                "the weights are those before them: try a lower lr or a longer warm-up; "
                + (f"the last checkpoint is {last}" if last else "there is no checkpoint yet")
            )
        taken = self.step - self._logged[0] - skipped
        means = {"loss": loss / taken, "grad_norm": norm / taken} if taken else {}
        return means | ({"skipped": int(skipped)} if skipped else {})

    def _log(self, progress: Progress, means: dict[str, float], lr: float) -> None:
        """Record the means since the last log point, and start anew."""
        steps, seconds = self.step - self._logged[0], self.seconds - self._logged[1]
        speed, left = self._tokens / seconds, (self.config.steps - self.step) * seconds / steps
        figures = {**means, "lr": lr, "tokens_per_second": speed, "seconds": self.seconds}
        figures["peak_memory"] = peak_memory(self.device)
        shown = [f"loss {means['loss']:.3f}" if "loss" in means else "no loss", f"{speed:,.0f} tokens/s"]
        if self._estimated is not None:
            figures["mfu"] = speed * self._estimated.flops_per_token / self._estimated.peak
            shown.append(f"MFU {figures['mfu']:.0%}")
        shown += [f"{figures['peak_memory'] / 2**30:.1f} GiB", f"{duration(left)} left"]
        if "skipped" in means:
            progress.line(
                f"step {self.step:,}: {means['skipped']} of the last {steps} steps skipped, loss or gradient not finite"
            )
        self.metrics.add(self.step, figures)
        progress.update(self.step, "   ".join(shown))
        if self._first_measured:
            self._first_measured = False
            whole = self.config.steps * seconds / steps
            progress.line(
                f"measured: {duration(whole)}{cost(whole, self.price_per_hour)} for all {self.config.steps:,} steps"
            )
        self._sums[:3] = 0
        self._tokens, self._logged = 0, (self.step, self.seconds)

    def _estimate(self, progress: Progress) -> None:
        """Say what is ahead, before the first step."""
        if self.quiet:
            return
        inputs = next(self._micro_batches())
        sequences = (self.config.steps - self.step) * self.config.batch_size
        tokens = sequences * self.train_data.num_tokens(inputs) // len(inputs["input_ids"])
        inputs = self._to_device(inputs)
        self._estimated = Estimate.of(
            self.model, inputs, self.optimizers, self._autocast, tokens, self.config.seq_len, self.processes.count
        )
        for line in self._estimated.lines(self.price_per_hour):
            progress.line(line)

    @contextmanager
    def _profiler(self, progress: Progress) -> Iterator[Any]:
        if not self.profile or self.folder is None:
            yield None
            return
        from torch.profiler import profile, schedule

        path = self.folder / "trace.json"

        def export(profiler: Any) -> None:
            profiler.export_chrome_trace(str(path))
            progress.line(f"trace of three steps in {path}")

        with profile(schedule=schedule(wait=2, warmup=1, active=3, repeat=1), on_trace_ready=export) as profiler:
            yield profiler

    @property
    def _bytes_per_label(self) -> float | None:
        data = self.eval_data
        if not isinstance(data, CausalLM) or data.eval_bytes is None:
            return None
        return data.eval_bytes / (len(data.tokens) - 1)

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.device.type == "cpu":
            return inputs
        return tree_map_only(Tensor, lambda x: x.pin_memory().to(self.device, non_blocking=True), inputs)


def _objective(data: Objective | TokenArray, config: TrainConfig, num_bytes: int | None = None) -> Objective:
    return data if isinstance(data, Objective) else CausalLM(data, config.seq_len, num_bytes=num_bytes)


def _differences(saved: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*saved, *now])
        return [line for key in keys for line in _differences(saved.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if saved == now else [f"{name} was {saved!r} and is {now!r}"]
