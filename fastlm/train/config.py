"""The configuration of a training run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastlm.config import Config, nearest

__all__ = ["OPTIMIZERS", "TrainConfig"]

# By their names in lower case: torch's, but for two of which one needs a closure and the other sparse gradients.
OPTIMIZERS: dict[str, Any] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "LBFGS", "SparseAdam")
}


@dataclass(frozen=True)
class TrainConfig(Config):
    """A training run, but for the model and the data.

    Args:
        steps: updates of the weights
        batch_size: sequences in a step, over all processes
        micro_batch_size: sequences that a process has in memory at once; None is batch_size
        seq_len: tokens in a sequence
        optimizer: muon has the matrices in the blocks updated by Muon and the rest by AdamW; else a name in torch.optim
        optimizer_options: arguments of the optimizer, with muon of Muon
        lr: learning rate, with muon of AdamW
        muon_lr: learning rate of Muon
        weight_decay: of the matrices; the embeddings, norms and biases have none
        warmup_steps: over which the learning rates rise
        schedule: how they fall after that, to min_lr at the end; wsd stays up until the last decay_steps
        decay_steps: of wsd; None is a fifth of the steps
        min_lr: what is left of the learning rates at the end, as a fraction
        grad_clip: largest norm of the gradient; 0 does not clip
        dtype: of the arithmetic, the weights being fp32; auto is bf16 on processors that are made for it
        device: cpu, cuda or cuda:N; auto is cuda if there is one; of several processes each takes another GPU
        parallel: of several processes: ddp has the model in each, fsdp a share of weights, gradients and optimizer
        compile: the model by torch.compile
        checkpointing: keep only the inputs of the blocks and compute the rest again in backward: less memory, slower
        seed: of the batches, of dropout and, from the command line, of the initial weights
        log_every: steps between two lines of metrics, over which the training loss is averaged
        eval_every: steps between two evaluations; 0 leaves only the one at the end
        save_every: steps between two checkpoints; 0 leaves only the one at the end
        keep: so many of the last checkpoints stay, and the best
        best_by: what makes an evaluation the best; accuracy and f1 are of classifiers
        patience: evaluations without a better loss after which the run stops; 0 never stops it
        max_skipped: so many steps in a row whose loss or gradient is not finite stop the run
        tensorboard: write the metrics for TensorBoard too
    """

    steps: int = 600
    batch_size: int = 8
    micro_batch_size: int | None = None
    seq_len: int = 256
    optimizer: str = "muon"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.2e-2
    muon_lr: float = 1e-2
    weight_decay: float = 0.1
    warmup_steps: int = 50
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    decay_steps: int | None = None
    min_lr: float = 0.0
    grad_clip: float = 1.0
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    keep: int = 1
    best_by: Literal["loss", "accuracy", "f1"] = "loss"
    patience: int = 0
    max_skipped: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "seq_len", "log_every", "keep", "max_skipped"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("eval_every", "save_every", "warmup_steps", "seed", "patience"):
            self._need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip"):
            self._need(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite")
        like = nearest(self.optimizer.lower(), OPTIMIZERS)
        self._need(self.optimizer.lower() in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}{like}")
        self._need(0 <= self.min_lr <= 1, "min_lr", "from 0 to 1")
        self._need(self.decay_steps is None or self.decay_steps >= 1, "decay_steps", "at least 1, or None")
        micro = self.micro_batch_size
        self._need(micro is None or micro >= 1, "micro_batch_size", "at least 1, or None")
        self.torch_device()

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied with at step 0, 1, ...: up over the warm-up, then down to `min_lr`."""
        rise = (step + 1) / (self.warmup_steps + 1)
        falling = self.steps - self.warmup_steps
        if self.schedule == "wsd":
            falling = min(falling, self.decay_steps or self.steps // 5)
        left = min(1.0, (self.steps - step) / max(1, falling))
        shape = {"cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}.get(self.schedule, left)
        return min(rise, self.min_lr + (1 - self.min_lr) * shape)

    def torch_device(self) -> torch.device:
        """The device that `device` names; of the processes that torchrun started each its own."""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if name == "cuda" and "LOCAL_RANK" in os.environ:  # of the processes that torchrun started
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        known = device is not None and device.type in ("cpu", "cuda")
        self._need(known, "device", "auto, cpu, cuda or cuda:N")
        assert device is not None
        there = device.type == "cpu" or (device.index or 0) < torch.cuda.device_count()
        self._need(there, "device", f"one that is here, and torch sees {torch.cuda.device_count()} GPUs")
        return device

    def torch_dtype(self) -> torch.dtype:
        """Of the arithmetic: bf16 too where "auto" runs on a processor that multiplies in it faster than in fp32."""
        if self.dtype == "auto" and self.torch_device().type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return names["bf16" if self.dtype == "auto" and fast else self.dtype.replace("auto", "fp32")]

    def autocast(self) -> torch.autocast:
        """The context of forward and loss, of `dtype`; turned off for fp32."""
        dtype = self.torch_dtype()
        mixed = dtype != torch.float32
        return torch.autocast(self.torch_device().type, dtype=dtype if mixed else None, enabled=mixed)
