"""A few steps of a model beside the same model in plain PyTorch."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import AbstractContextManager

import torch

from fastlm.data.objectives import Objective, TokenArray
from fastlm.models.pretrained import Pretrained
from fastlm.ops.registry import use_backend
from fastlm.train.config import TrainConfig
from fastlm.train.memory import kept_memory
from fastlm.train.trainer import Trainer

__all__ = ["speedup"]


def speedup(
    model: Pretrained, config: TrainConfig, data: Objective | TokenArray, rounds: int = 5
) -> tuple[float, float]:
    """Seconds of a step, and how many times as long one of the same model in plain PyTorch takes, whose functions are
    torch's own (`use_backend("native")`): medians of steps in turn.

    Args:
        model: copies of it are trained; it is not changed.
        config: of the training, as in `Trainer`.
        data: what the steps see.
        rounds: steps of each side.

    Returns:
        Seconds, and the ratio: above 1 FastLM is faster.
    """
    sides = [Trainer(copy.deepcopy(model), config, data, quiet=True) for _ in range(2)]
    device = config.torch_device()
    times: list[tuple[float, ...]] = []
    with torch.random.fork_rng():
        for _ in range(rounds + 1):
            around: list[AbstractContextManager] = [kept_memory(device), use_backend("native")]
            times.append(tuple(_second_step(side, way) for side, way in zip(sides, around, strict=True)))
    ours, ratio = (statistics.median(each) for each in zip(*((o, p / o) for o, p in times[1:]), strict=True))
    return ours, ratio


def _second_step(trainer: Trainer, way: AbstractContextManager) -> float:
    """Of two: the first gets the memory that the second finds there, where memory is kept."""
    with way:
        for _ in range(2):
            started = time.perf_counter()
            trainer.train_step()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started
