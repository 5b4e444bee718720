"""The configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fastlm.config import Config

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig(Config):
    """A training run, but for the model and the data.

    Args:
        steps: updates of the weights
        batch_size: sequences in a step
        seq_len: tokens in a sequence
        optimizer: muon has the matrices in the blocks updated by Muon and the rest by AdamW
        lr: learning rate of AdamW
        muon_lr: learning rate of Muon
        weight_decay: of the matrices in the blocks; the embeddings, norms and biases have none
        warmup_steps: over which the learning rates rise
        schedule: how they fall after that, to 0 at the end
        grad_clip: largest norm of the gradient; 0 does not clip
        dtype: of the arithmetic, the weights being fp32; auto is bf16 on processors that are made for it
        device: cpu, cuda or cuda:N; auto is cuda if there is one
        seed: of the batches, of dropout and, from the command line, of the initial weights
        log_every: steps between two lines of metrics, over which the training loss is averaged
        eval_every: steps between two evaluations; 0 leaves only the one at the end
        save_every: steps between two checkpoints; 0 leaves only the one at the end
    """

    steps: int = 450
    batch_size: int = 8
    seq_len: int = 256
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 1.2e-2
    muon_lr: float = 1e-2
    weight_decay: float = 0.1
    warmup_steps: int = 50
    schedule: Literal["linear", "cosine"] = "linear"
    grad_clip: float = 1.0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 150
    save_every: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "seq_len", "log_every"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("eval_every", "save_every", "warmup_steps", "seed"):
            self._need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip"):
            self._need(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite")
        self.torch_device()

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied with at step 0, 1, ...: up over the warm-up, then down to 0."""
        rise = (step + 1) / (self.warmup_steps + 1)
        left = min(1.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))
        return min(rise, left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def torch_device(self) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
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

    def autocast(self) -> torch.autocast:
        """bf16 where it is asked for, or "auto" and the processor multiplies in it faster than in fp32."""
        device = self.torch_device().type
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        enabled = self.dtype == "bf16" or (self.dtype == "auto" and fast)
        return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)
