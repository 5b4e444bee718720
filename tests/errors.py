"""The error rule of every op's tests: never further from the truth than twice what torch is, plus 4 ulp."""

from __future__ import annotations

import torch
from torch import Tensor

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


def assert_within_rule(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "output") -> None:
    """Asserts that `ours` has torch's shape and dtype and is as near to `exact` as the error rule asks.

    Args:
        ours: what FastLM gave.
        torchs: what torch gives for the same inputs in the same dtypes.
        exact: the same in float64.
        what: what is compared, for the message.

    Where torch and the exact value agree that an element is nan or infinite, ours must be the same; where they do not
    (one has overflowed), ours must agree with one of them.
    """
    assert exact.dtype == torch.float64, f"{what}: the exact value must be float64, got {exact.dtype}"
    assert ours.shape == exact.shape == torchs.shape, f"{what}: {ours.shape=}, {torchs.shape=}, {exact.shape=}"
    assert ours.dtype == torchs.dtype, f"{what}: torch gives {torchs.dtype}, got {ours.dtype}"
    assert ours.device == torchs.device, f"{what}: torch gives {torchs.device}, got {ours.device}"
    ours, torchs, exact = ours.detach(), torchs.detach(), exact.detach().to(torchs.device)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        sure = kind(torchs) == kind(exact)
        assert torch.equal(kind(ours)[sure], kind(exact)[sure]), (
            f"{what}: {kind.__name__} is {kind(ours).sum()} elements, {kind(exact).sum()} in the exact value"
        )
    finite = torchs.isfinite() & exact.isfinite()
    if not finite.any():
        return
    error, allowed = (ours.double() - exact)[finite].abs(), allowed_error(torchs, exact)
    worst = error.max().item()
    assert worst <= allowed, (
        f"{what}: off by {worst:.3e} where {allowed:.3e} is allowed ({(error > allowed).sum()} of {error.numel()} "
        f"elements; torch is off by {(torchs.double() - exact)[finite].abs().max().item():.3e})"
    )
