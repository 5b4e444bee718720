"""The linear layer, also with an int8 weight: contract, torch ops, backends.

Ours is for few rows on a CPU, where the weight is all there is to read. For many rows in fp32 there "onednn" is the
product of matrices that torch has for compiled models, both ways, where it is measured faster than torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import onednn, rows
from fastlm.ops.checks import TENSORS, autocast_dtype, check_tensor
from fastlm.ops.compiled import CPU, Launchers
from fastlm.ops.linear import reference
from fastlm.ops.measured import Sizes, entries, fastest, tuned
from fastlm.ops.registry import Backend, Op, preference

FEW_ROWS = 12  # of the input, up to which measured.json speaks of the kernel
EVERY_DTYPE = frozenset(value for value in vars(torch).values() if isinstance(value, torch.dtype))


class LinearInputs(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor | None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, weight_scale: Tensor | None = None) -> Tensor:
    r"""A linear layer.

        output = (input weight^T) * weight_scale + bias

    Args:
        input: (*, in_features).
        weight: (out_features, in_features) in the input's dtype, or int8 with `weight_scale`; `quantize` makes these.
        bias: (out_features) in the input's dtype.
        weight_scale: (out_features) fp32, fp64 for a fp64 input. Where the processor has instructions for dot products
            of bytes, the kernel rounds rows of a bf16 or fp16 input to 16 bits of their largest element for them, those
            of an fp32 input to 24.

    Returns:
        (*, out_features) in the input's dtype.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, as from torch. TypeError: something is not a tensor.
    """
    usual = (
        weight_scale is None
        and type(input) in TENSORS
        and type(weight) in TENSORS
        and input.shape[-1:] == weight.shape[-1:]
        and input.dtype == weight.dtype
        and input.device == weight.device
        and (bias is None or (type(bias) in TENSORS and bias.dtype == input.dtype and bias.device == input.device))
    )
    autocast = torch._C._is_any_autocast_enabled()
    if usual and LINEAR.auto_alone():
        users = "" if autocast or not entries() else tuned("linear", input, _sizes_of(input, weight))
        name = "" if autocast or users else _fastest(input, weight)
        if users == "native" or not (users or name):
            return torch.nn.functional.linear(input, weight, bias)
        if name and (bias is None or bias.shape == weight.shape[:1]) and not (name == "cpu" and CPU.missing()):
            return LINEAR.calls[name](input, weight, bias, None)
    if not usual:
        _check(input, weight, bias, weight_scale, autocast)
    inputs = LinearInputs(input, weight, bias, weight_scale)
    if autocast and (weight_scale is not None or preference() != ("auto",)):
        inputs = _autocast(inputs)
    return LINEAR.choose(inputs)(*inputs)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weight and fp32 `weight_scale` that are nearest to a weight (out_features, in_features), row by row.

        weight_scale = max |weight| / 127,   int8 = round(weight / weight_scale)

    Raises:
        ValueError: `weight` is not a matrix of floating point numbers. What is not finite gives no meaningful row.
    """
    check_tensor("quantize", "weight", weight)
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"shape {tuple(weight.shape)} and {weight.dtype}"
        raise ValueError(f"quantize: weight must be (out_features, in_features) and floating point, got {got}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if not weight.numel():
        return weight.to(torch.int8), weight.new_zeros(len(weight), dtype=wide)
    with torch.no_grad():
        scale = torch.linalg.vector_norm(weight, torch.inf, 1, dtype=wide) / 127
        rounded = (weight / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-127, 127)
        return rounded.to(torch.int8).contiguous(), scale


def _check(input: Any, weight: Any, bias: Any, weight_scale: Any, autocast: bool) -> None:
    check_tensor("linear", "input", input)
    check_tensor("linear", "weight", weight)
    if type(weight) not in TENSORS:
        return  # it may be what it likes: torch's linear asks it
    if input.dim() == 0 or weight.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        shapes = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        raise RuntimeError(f"linear: input must be (*, in_features), weight (out_features, in_features), got {shapes}")
    if bias is not None:
        check_tensor("linear", "bias", bias)
    if weight_scale is not None:
        check_tensor("linear", "weight_scale", weight_scale)
        if weight.dtype != torch.int8 or weight.dim() != 2:
            got = f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise RuntimeError(f"linear: weight must be int8 of two dimensions with weight_scale, got {got}")
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        if not input.is_floating_point() or weight_scale.dtype != wide or weight_scale.shape != weight.shape[:1]:
            need, got = (
                f"{wide} of shape {tuple(weight.shape[:1])} with an input that is floating point",
                (f"{weight_scale.dtype} of shape {tuple(weight_scale.shape)} with {input.dtype}"),
            )
            raise RuntimeError(f"linear: weight_scale must be {need}, got {got}")
    for name, x in (("weight", weight), ("bias", bias), ("weight_scale", weight_scale)):
        if x is None:
            continue
        if x.device != input.device:
            raise RuntimeError(f"linear: {name} must be on {input.device} as input is, got {x.device}")
        if x.dtype != input.dtype and not autocast and (name == "bias" or weight_scale is None):
            raise RuntimeError(f"linear: {name} must be {input.dtype} as input is, got {x.dtype}")


def _autocast(inputs: LinearInputs) -> LinearInputs:
    """What torch's linear does under autocast. Of int8 weights it knows nothing: what goes with them fares alike."""
    input, weight, bias, scale = inputs
    dtype = autocast_dtype(input)
    if dtype is None or input.dtype == torch.float64 or not input.is_floating_point():
        return inputs
    weight = weight.to(dtype) if scale is None else weight
    return LinearInputs(input.to(dtype), weight, None if bias is None else bias.to(dtype), scale)


# Torch ops ------------------------------------------------------------------------------------------------------


def _composite(input: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    if weight_scale is not None:
        weight = (weight * weight_scale[:, None]).to(input.dtype)
    return torch.nn.functional.linear(input, weight, bias)


def _measured(inputs: LinearInputs) -> str:
    if torch.compiler.is_compiling():
        return ""
    if inputs.weight_scale is None and torch._C._is_any_autocast_enabled():
        return ""  # torch keeps the weights that it has cast
    if inputs.weight_scale is None:
        return _fastest(inputs.input, inputs.weight)
    return "cpu" if _few_rows(inputs.input, inputs.weight) else ""


def _fastest(input: Tensor, weight: Tensor) -> str:
    if _few_rows(input, weight):
        return fastest("linear", weight)
    many = input.is_cpu and weight.dim() == 2 and weight.shape[1] > 0
    return "onednn" if many and onednn.faster(input.numel() // weight.shape[1], weight) else ""


def _few_rows(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernel may be the fastest."""
    return (
        input.is_cpu
        and weight.dim() == 2
        and input.numel() <= FEW_ROWS * weight.shape[1]
        and (weight.stride(1) == 1 or weight.shape[1] == 1)
    )


def _sizes_of(input: Tensor, weight: Tensor, *options: str) -> Sizes:
    outputs, features = weight.shape if weight.dim() == 2 else (1, weight.numel())
    return input.numel() // max(1, features), features, outputs, *options


def _sizes(inputs: LinearInputs) -> Sizes:
    autocast = torch._C._is_any_autocast_enabled()  # under which torch keeps the weights that it has cast
    options = [name for name, given in (("int8", inputs.weight_scale is not None), ("autocast", autocast)) if given]
    return _sizes_of(inputs.input, inputs.weight, *options)


def _key(inputs: LinearInputs) -> tuple[Any, ...]:
    input = inputs.input
    return (input.device, input.dtype, inputs.weight_scale is None, *_cpu_reasons(inputs))


LINEAR = Op(
    "linear",
    inputs=LinearInputs,
    fwd="(Tensor input, Tensor weight, Tensor? bias, Tensor? weight_scale, str backend) -> Tensor output",
    bwd="(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? weight_scale, bool[] needs_grad,"
    " str backend) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    fake_fwd=lambda input, weight, *_: input.new_empty((*input.shape[:-1], weight.shape[0])),
    composite=_composite,
    auto=("native", "cpu", "reference"),
    fusable=True,
    result=lambda output, inputs: output,
    sizes=_sizes,
    measured=_measured,
    beyond_bwd=lambda inputs: (
        ["gives no gradient of weight_scale"]
        if inputs.weight_scale is not None and inputs.weight_scale.requires_grad and torch.is_grad_enabled()
        else []
    ),
    key=_key,
)


# Backends -------------------------------------------------------------------------------------------------------


def _needs_matrix(inputs: LinearInputs) -> list[str]:
    input, weight, bias, scale = inputs
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        return [f"needs input (*, in_features) and weight (out_features, in_features), got {shapes}"]
    if weight.dtype != (input.dtype if scale is None else torch.int8):
        return [f"needs weight in the input's dtype, {input.dtype}, or int8 with weight_scale, got {weight.dtype}"]
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != input.dtype):
        return [f"needs bias (out_features) in the input's dtype, got {tuple(bias.shape)} and {bias.dtype}"]
    return []


def _cpu_reasons(inputs: LinearInputs) -> list[str]:
    input, weight, _, scale = inputs
    if reasons := _needs_matrix(inputs):
        return reasons
    if scale is not None and input.dtype == torch.float64:
        return ["does not serve int8 with float64"]
    if not weight.numel() or not input.numel():
        return ["needs at least one row, and a column of each"]
    return []


def fwd(
    launchers: Launchers, input: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None
) -> Tensor:
    """-> output."""
    if reasons := _cpu_reasons(LinearInputs(input, weight, bias, weight_scale)):
        # Lest the kernel read past an end, should someone call torch.ops.fastlm.
        raise ValueError(f"linear kernel: {'; '.join(reasons)}")
    outputs, features = weight.shape
    output = input.new_empty((*input.shape[:-1], outputs))
    sizes: Any = input.numel() // features
    strides: Any = features
    if not input.is_contiguous():
        (view,), sizes, (strides,) = rows.as_rows((input,), 1)
        input = input if view is None else view
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if weight_scale is not None and not weight_scale.is_contiguous():
        weight_scale = weight_scale.contiguous()
    launchers.linear_fwd(
        input.data_ptr(),
        weight.data_ptr(),
        0 if weight_scale is None else weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        sizes,
        strides,
        features,
        outputs,
        weight.stride(0),
        launchers.codes[input.dtype],
        *launchers.extra(input),
    )
    return output


def register_cpu(name: str, launchers: Launchers) -> None:
    """Registers a variant of the CPU kernel as a backend."""
    LINEAR.register(
        Backend(
            name,
            devices=frozenset({"cpu"}),
            reasons=_cpu_reasons,
            fwd=functools.partial(fwd, launchers),
            bwd=reference.linear_bwd,
            available=launchers.missing,
            copies=lambda inputs: rows.copies(1, input=inputs.input) + rows.copies(1, weight=inputs.weight),
        )
    )


def _onednn_reasons(inputs: LinearInputs) -> list[str]:
    return _cpu_reasons(inputs) + (["does not serve int8"] if inputs.weight_scale is not None else [])


def onednn_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    """-> output."""
    return onednn.product(input.contiguous(), weight.contiguous(), bias)


def onednn_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of input, weight and bias; empty where not needed."""
    nothing, (outputs, features) = input.new_empty(0), weight.shape
    grad, x = grad_output.reshape(-1, outputs).contiguous(), input.reshape(-1, features).contiguous()
    return (
        onednn.product(grad, weight.contiguous().mT).view(input.shape) if needs_grad[0] else nothing,
        onednn.product(grad.mT, x.mT) if needs_grad[1] else nothing,
        grad.sum(0) if needs_grad[2] and bias is not None else nothing,
    )


LINEAR.register(Backend("native", dtypes=EVERY_DTYPE, call=_composite))
LINEAR.register(
    Backend(
        "onednn",
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        reasons=_onednn_reasons,
        fwd=onednn_fwd,
        bwd=onednn_bwd,
        available=onednn.missing,
        copies=lambda inputs: rows.copies(1, input=inputs.input) + rows.copies(1, weight=inputs.weight),
    )
)
LINEAR.register(Backend("reference", reasons=_needs_matrix, fwd=reference.linear_fwd, bwd=reference.linear_bwd))
register_cpu("cpu", CPU)
