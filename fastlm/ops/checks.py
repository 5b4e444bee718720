"""Checks that several ops share. Every message names the op, the argument, what it needs and what it got."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

TENSORS = (Tensor, torch.nn.Parameter)


def fits(input: Any, shape: Any, *parameters: Any) -> bool:
    """Whether this is the usual call, about which there is nothing to say: cheaper than looking for what is wrong.

    Plain tensors; `shape` one int in a tuple, or a Size, the input's last dimensions; parameters None or of that shape
    and of the input's dtype and device.
    """
    if type(input) not in TENSORS or not input.is_floating_point():
        return False
    if type(shape) is not torch.Size and (type(shape) is not tuple or len(shape) != 1 or type(shape[0]) is not int):
        return False
    if not shape or input.shape[-len(shape) :] != shape:
        return False
    for parameter in parameters:
        if parameter is not None and (
            type(parameter) not in TENSORS
            or parameter.shape != shape
            or parameter.dtype != input.dtype
            or parameter.device != input.device
        ):
            return False
    return True


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def check_number(op: str, name: str, value: Any) -> Any:
    """A number of Python's, numpy's or a compiler's, as torch's schemas take it."""
    if type(value) is float or isinstance(value, (float, torch.SymInt, torch.SymFloat)):
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
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int, got {value if value is None else type(value).__name__}")
    return int(value)


def check_bool(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value if value is None else type(value).__name__}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast where it is on for the tensor's device; None where it is off or there is none."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
