"""What a run will take, before it starts: memory by part, floating-point operations, time and cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastlm.models.pretrained import Pretrained
from fastlm.train.parallel import local

__all__ = ["Estimate", "peak_flops"]

_ASSUMED_MFU = 0.4  # before anything is measured
# TFLOP/s of dense products with sums in fp32, as data sheets have them: in 16 bits, and of fp32 on tensor cores (TF32).
_DATA_SHEETS = {
    "A100": (312, 156), "A10G": (70, 35), "A10": (125, 62), "L40S": (362, 183), "L4": (121, 60), "T4": (65, 8),
    "H100 PCIe": (756, 378), "H100": (989, 495), "H200": (989, 495), "B200": (2250, 1125), "V100": (125, 16),
    "RTX 3090": (71, 36), "RTX 4090": (165, 83), "RTX 5090": (210, 105),
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Of a run. Memory is in bytes, and that of one process.

    Args:
        parameters: of the model.
        weights, gradients, optimizer, activations: memory of the four; activations are what autograd keeps of one
            micro-batch between forward and backward.
        flops_per_token: floating-point operations of a step for a token: 6 for each weight of a matrix that it meets,
            and attention's; what is computed again in backward is not counted.
        tokens: of all steps.
        peak: floating-point operations per second that the devices of all processes can do at most.
        peak_source: where that comes from.
        processes: their number.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops_per_token: float
    tokens: int
    peak: float
    peak_source: str
    processes: int = 1

    @classmethod
    def of(
        cls,
        model: Pretrained,
        inputs: dict[str, Any],
        optimizers: dict[str, torch.optim.Optimizer],
        autocast: torch.autocast,
        tokens: int,
        seq_len: int,
        processes: int = 1,
    ) -> Estimate:
        """Of a run over so many tokens, with `inputs` like its micro-batches."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        state = 0
        for optimizer in optimizers.values():
            owned = sum(local(p).nbytes for group in optimizer.param_groups for p in group["params"])
            state += owned * _STATES.get(type(optimizer).__name__.lower(), 2)
        device = next(model.parameters()).device
        dtype = torch.get_autocast_dtype(device.type) if autocast._enabled else torch.float32
        peak, source = peak_flops(device, dtype)
        return cls(
            parameters=sum(p.numel() for p in parameters),
            weights=sum(local(p).nbytes for p in model.parameters()),
            gradients=sum(local(p).nbytes for p in parameters),
            optimizer=state,
            activations=saved_bytes(model, inputs, autocast),
            flops_per_token=model.flops_per_token(seq_len),
            tokens=tokens,
            peak=processes * peak,
            peak_source=source,
            processes=processes,
        )

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    def seconds(self, mfu: float = _ASSUMED_MFU) -> float:
        return self.flops / self.peak / mfu

    def lines(self, price_per_hour: float | None = None) -> list[str]:
        """For people."""
        parts = ("weights", "gradients", "optimizer", "activations")
        memory = ", ".join(f"{name} {_bytes(getattr(self, name))}" for name in parts)
        whole = _bytes(sum(getattr(self, name) for name in parts))
        seconds, each = self.seconds(), f" in each of {self.processes} processes" if self.processes > 1 else ""
        return [
            f"{self.parameters / 1e6:.2f} M parameters; memory {whole}{each}: {memory}",
            f"{_flop(self.flops)}FLOP in all: about {duration(seconds)}{cost(seconds, price_per_hour)} at "
            f"{_ASSUMED_MFU:.0%} of {_flop(self.peak)}FLOP/s ({self.peak_source})",
        ]


_STATES = {"muon": 1, "sgd": 1, "adagrad": 1, "rmsprop": 1, "adafactor": 0}  # of the size of the weights; Adam's are 2


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations per second in matrix products, and where that is from: the data sheet of a GPU that is known, or a
    product of 2,048 x 2,048 matrices, the fastest of three."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, single) in _DATA_SHEETS.items():
            if known in name:
                return (half if dtype != torch.float32 else single) * 1e12, f"data sheet of {known}"
    a, seconds = torch.ones(2048, 2048, dtype=dtype, device=device), []
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds[1:]), "a matrix product here"


def saved_bytes(model: Pretrained, inputs: dict[str, Any], autocast: torch.autocast) -> int:
    """What autograd keeps for backward of a forward pass over `inputs`, parameters not counted.

    One is made with tensors that have no values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    device, random = next(model.parameters()).device, torch.get_rng_state()
    with FakeTensorMode() as mode, device:
        twin = type(model)(model.config).train()
        for module in twin.modules():
            if isinstance(module, Pretrained):
                module.checkpointing = model.checkpointing
        fake = tree_map_only(Tensor, mode.from_tensor, inputs)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            loss = twin(**fake).loss
        own = {parameter.untyped_storage()._cdata for parameter in twin.parameters()}
        size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
        del loss
    torch.set_rng_state(random)
    return size


def duration(seconds: float) -> str:
    """1:02:03, or days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cost(seconds: float, price_per_hour: float | None) -> str:
    return "" if price_per_hour is None else f" and {price_per_hour * seconds / 3600:,.2f} in money"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _flop(count: float) -> str:
    for power, prefix in ((18, "E"), (15, "P"), (12, "T")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {prefix}"
    return f"{count / 1e9:.0f} G"
