"""The error rule of tests and measurements: never further from the truth than twice what torch is, plus 4 ulp."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["allowed_error", "judge"]

# The exact values are computed in float64, so for float64 they carry rounding of their own.
ULPS = {torch.float64: 64}


def allowed_error(torchs: Tensor, exact: Tensor) -> float:
    """2 * |torch - exact| + 4 ulp of the output's scale, over the elements that are finite in both."""
    finite = torchs.isfinite() & exact.isfinite()
    if not finite.any():
        return 0.0
    scale = exact[finite].abs().max().item()
    error = (torchs.double() - exact)[finite].abs().max().item()
    limits = torch.finfo(torchs.dtype)
    ulp = limits.eps * max(scale, limits.smallest_normal)  # below that numbers lie evenly
    return 2 * error + ULPS.get(torchs.dtype, 4) * ulp


def judge(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "output") -> tuple[float, str]:
    """How far `ours` goes within the error rule, and what is wrong with it, "" if nothing is.

    Args:
        ours: what is judged.
        torchs: what torch gives for the same inputs in the same dtypes: ours must have its shape, dtype and device.
        exact: the same in float64.
        what: what is compared, for the text.

    Returns:
        The largest error as a share of the allowed one, and the text. Where torch and the exact value agree that an
        element is nan or infinite, ours must be the same; where they do not (one has overflowed), ours must agree with
        one of them.
    """
    assert exact.dtype == torch.float64, f"{what}: the exact value must be float64, got {exact.dtype}"
    if not ours.shape == torchs.shape == exact.shape:
        return float("inf"), f"{what}: {ours.shape=}, {torchs.shape=}, {exact.shape=}"
    for name in ("dtype", "device"):
        if getattr(ours, name) != getattr(torchs, name):
            return float("inf"), f"{what}: torch gives {getattr(torchs, name)}, got {getattr(ours, name)}"
    ours, torchs, exact = ours.detach(), torchs.detach(), exact.detach().to(torchs.device)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        sure = kind(torchs) == kind(exact)
        if not torch.equal(kind(ours)[sure], kind(exact)[sure]):
            counts = f"{kind(ours).sum()} elements, {kind(exact).sum()} in the exact value"
            return float("inf"), f"{what}: {kind.__name__} is {counts}"
    finite = torchs.isfinite() & exact.isfinite()
    if not finite.any():
        return 0.0, ""
    error, allowed = (ours.double() - exact)[finite].abs(), allowed_error(torchs, exact)
    worst = error.max().item()
    if worst <= allowed:
        return worst / allowed if allowed else 0.0, ""
    count = f"{(error > allowed).sum()} of {error.numel()} elements"
    torch_off = (torchs.double() - exact)[finite].abs().max().item()
    off = f"off by {worst:.3e} where {allowed:.3e} is allowed ({count}; torch is off by {torch_off:.3e})"
    return worst / allowed if allowed else float("inf"), f"{what}: {off}"
