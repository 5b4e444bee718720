"""oneDNN's product of matrices in fp32 on a CPU, which torch has for models that are compiled and frozen.

Where "linear of many rows" in measured.json says so it is faster than torch's own, which is MKL's or OpenBLAS's
(`python benchmarks/bench_linear.py --many`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.measured import fastest

MANY_ROWS = range(128, 1025)  # of which the measurement speaks


def missing() -> str:
    """Why it cannot run; "" if it can."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "" if there else "this torch was built without oneDNN"


def faster(rows: int, weight: Tensor) -> bool:
    """Whether it is the fastest for so many rows and such a weight."""
    return rows in MANY_ROWS and fastest("linear of many rows", weight) == "onednn" and not missing()


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x y^T + bias, of matrices that are contiguous, or their transposes are."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
