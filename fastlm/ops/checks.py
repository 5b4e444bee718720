"""Checks that several ops share. Every message names the op, the argument, what it needs and what it got."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def check_number(op: str, name: str, value: Any) -> Any:
    """A number of Python's, numpy's or a compiler's, as torch's schemas take it."""
    if isinstance(value, (float, torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {value if value is None else type(value).__name__}")
    return float(value)


def check_not_negative(op: str, name: str, value: Any) -> Any:
    value = check_number(op, name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{op}: {name} must be finite and at least 0, got {value}")
    return value


def check_probability(op: str, name: str, value: Any, error: type[Exception] = ValueError) -> Any:
    value = check_number(op, name, value)
    if not 0.0 <= value <= 1.0:
        raise error(f"{op}: {name} must be between 0 and 1, got {value}")
    return value


def check_integer(op: str, name: str, value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int, got {value if value is None else type(value).__name__}")
    return int(value)


def check_bool(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value if value is None else type(value).__name__}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast where it is on for the tensor's device; None where it is off or there is none."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
