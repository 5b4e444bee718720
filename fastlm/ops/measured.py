"""What measurements say of "auto": which backend is the fastest for an op on a kind of device, from which size on.

The table is measured.json: class of device -> op -> dtype -> [backend, elements of the first input from which on]. The
class of a CPU is "cpu" and what torch makes of it ("cpu AVX512"), of a GPU its name. What is not in the table has not
been measured, and is left to the order of the op. Attention with key_lengths, or of one query, goes by the elements of
the keys, the linear layer by those of the weight, for few rows.
`benchmarks/bench_layer_norm.py --sizes` and `bench_cross_entropy.py --sizes` are how they got there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text())
NOTHING = ("", 0)


def device_class(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _entry(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
    dtypes = TABLE.get(device_class(device), {}).get(op, {})
    return tuple(dtypes.get(str(dtype).removeprefix("torch."), NOTHING))


def fastest(op: str, tensor: Tensor) -> str:
    """The backend that is fastest for such a first input; "" if nothing is known."""
    backend, elements = _entry(op, tensor.device, tensor.dtype)
    return backend if backend and tensor.numel() >= elements else ""
