"""The error rule of every op's tests, which is that of every measurement, as an assertion."""

from __future__ import annotations

from torch import Tensor

from fastlm.bench.check import allowed_error, judge

__all__ = ["allowed_error", "assert_within_rule"]


def assert_within_rule(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "output") -> None:
    """Asserts that `ours` has torch's shape, dtype and device and is as near to `exact` as the error rule asks.

    Args:
        ours: what FastLM gave.
        torchs: what torch gives for the same inputs in the same dtypes.
        exact: the same in float64.
        what: what is compared, for the message.
    """
    _, wrong = judge(ours, torchs, exact, what)
    assert not wrong, wrong
