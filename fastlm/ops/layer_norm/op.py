"""Layer norm, RMS norm, and both fused with the addition of a residual: contract, torch ops, backends.

Statistics are kept for backward in one fp32 tensor (fp64 for fp64): (2, rows) mean and rstd, or (1, rows) rstd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import rows
from fastlm.ops.checks import (
    TENSORS,
    autocast_dtype,
    check_integer,
    check_number,
    check_probability,
    check_tensor,
    fits,
)
from fastlm.ops.compiled import CPU, CUDA, Launchers, triton_devices, triton_missing
from fastlm.ops.layer_norm import launch, reference
from fastlm.ops.measured import Sizes, entries, fastest, tuned
from fastlm.ops.registry import FLOATS, Backend, Op

Shape = Sequence[int]


class LayerNormInputs(NamedTuple):
    input: Tensor
    normalized_shape: Sequence[int]
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class RMSNormInputs(NamedTuple):
    input: Tensor
    normalized_shape: Sequence[int]
    weight: Tensor | None
    eps: float


class AddLayerNormInputs(NamedTuple):
    input: Tensor
    residual: Tensor
    normalized_shape: Sequence[int]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dropout_p: float
    rng_state: Tensor | None


class AddRMSNormInputs(NamedTuple):
    input: Tensor
    residual: Tensor
    normalized_shape: Sequence[int]
    weight: Tensor | None
    eps: float
    dropout_p: float
    rng_state: Tensor | None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalisation over the last dimensions.

        output = (input - mean) / sqrt(var + eps) * weight + bias

    with the mean and the biased variance over the dimensions of `normalized_shape`.

    Args:
        input: (*, normalized_shape) fp32, bf16, fp16 or fp64, any strides.
        normalized_shape: the last dimensions of `input`.
        weight, bias: (normalized_shape) in the input's dtype, or fp32 with a bf16 or fp16 input.
        eps: added to the variance.

    Returns:
        Shape and dtype of `input`.

    Raises:
        RuntimeError: shapes or dtypes that do not fit. TypeError: `normalized_shape` is not a sequence of ints.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """
    if type(eps) is float and _is_torchs(LAYER_NORM, input, normalized_shape, weight, bias):
        return torch.layer_norm(input, normalized_shape, weight, bias, eps)
    _check("layer_norm", input, normalized_shape, weight, bias)
    eps = check_number("layer_norm", "eps", eps)
    inputs = LayerNormInputs(_autocast("layer_norm", input), normalized_shape, weight, bias, eps)
    return LAYER_NORM.choose(inputs)(*inputs)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    r"""Root mean square normalisation over the last dimensions.

        output = input / sqrt(mean(input^2) + eps) * weight

    Args:
        input: (*, normalized_shape) fp32, bf16, fp16 or fp64, any strides.
        normalized_shape: the last dimensions of `input`.
        weight: (normalized_shape) in the input's dtype, or fp32 with a bf16 or fp16 input.
        eps: None is the machine epsilon of the arithmetic (fp32; fp64 for fp64), as in torch.

    Returns:
        Shape and dtype of `input`.

    Raises:
        RuntimeError: shapes or dtypes that do not fit. TypeError: `normalized_shape` is not a sequence of ints.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    if (eps is None or type(eps) is float) and _is_torchs(RMS_NORM, input, normalized_shape, weight):
        return torch.rms_norm(input, normalized_shape, weight, eps)
    _check("rms_norm", input, normalized_shape, weight, None)
    inputs = RMSNormInputs(_autocast("rms_norm", input), normalized_shape, weight, _rms_eps("rms_norm", input, eps))
    return RMS_NORM.choose(inputs)(*inputs)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Adds to the residual stream and normalises it, in one pass over memory each way.

        new_residual = residual + dropout(input)
        output       = layer_norm(new_residual)

    The sum is formed in fp32 (fp64 for fp64), whatever the two dtypes, and rounded once.

    Args:
        input: (*, normalized_shape) what a layer adds; broadcasts against `residual`.
        residual: (*, normalized_shape) the stream, in the input's dtype or another, e.g. fp32 over bf16 layers.
        normalized_shape, weight, bias, eps: as in `layer_norm`.
        dropout_p: probability of dropping an element of `input`, in [0, 1]; only if `training`.
        training: False turns dropout off.

    Returns:
        (output, new_residual): output in the dtype of `input`, new_residual in that of `residual`.

    Raises:
        ValueError: shapes, dtypes or a probability that do not fit. TypeError: an argument of the wrong type.
    """
    input, residual, p = _check_add("add_layer_norm", input, residual, normalized_shape, weight, bias, dropout_p)
    eps = check_number("add_layer_norm", "eps", eps)
    p = p if training else 0.0
    if not p and input.dtype == residual.dtype and _is_torchs(ADD_LAYER_NORM, input, normalized_shape, weight, bias):
        new_residual = residual + input
        return torch.layer_norm(new_residual, normalized_shape, weight, bias, eps), new_residual
    inputs = AddLayerNormInputs(input, residual, normalized_shape, weight, bias, eps, p, None)
    return ADD_LAYER_NORM.choose(inputs)(*inputs)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Adds to the residual stream and normalises it by its root mean square, in one pass over memory each way.

        new_residual = residual + dropout(input)
        output       = rms_norm(new_residual)

    Arguments, result and errors as `add_layer_norm`'s; `eps` as in `rms_norm`.
    """
    input, residual, p = _check_add("add_rms_norm", input, residual, normalized_shape, weight, None, dropout_p)
    p = p if training else 0.0
    inputs = AddRMSNormInputs(
        input, residual, normalized_shape, weight, _rms_eps("add_rms_norm", residual, eps), p, None
    )
    return ADD_RMS_NORM.choose(inputs)(*inputs)


# Checks ---------------------------------------------------------------------------------------------------------

# Device types on which autocast runs torch's op in fp32, read from torch's own dispatcher.
_FP32_UNDER_AUTOCAST = frozenset(
    (op, device)
    for op in ("layer_norm", "rms_norm")
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", f"Autocast{device.upper()}")
)


def _autocast(op: str, input: Tensor) -> Tensor:
    if autocast_dtype(input) is None or input.dtype == torch.float64:
        return input
    return input.float() if (op, input.device.type) in _FP32_UNDER_AUTOCAST else input


def _rms_eps(op: str, input: Tensor, eps: float | None) -> float:
    if eps is not None:
        return check_number(op, "eps", eps)
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


def _check(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    error: type[Exception] = RuntimeError,
) -> None:
    if fits(input, normalized_shape, weight, bias):
        return
    check_tensor(op, "input", input)
    if not isinstance(normalized_shape, (tuple, list)):
        kind = type(normalized_shape).__name__
        raise TypeError(f"{op}: normalized_shape must be a tuple or list of ints, got {kind}")
    shape = tuple(check_integer(op, "normalized_shape's elements", size) for size in normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        need = "at least one dimension" if not shape else "the last dimensions of input"
        longer = op == "rms_norm" and len(shape) > input.dim()  # where torch's rms_norm has an error of its own
        error = ValueError if longer else error
        raise error(f"{op}: normalized_shape must be {need}, got {shape} for input of shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise NotImplementedError(f"{op}: input must be floating point, got {input.dtype}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        check_tensor(op, name, parameter)
        if parameter.shape != shape:
            raise error(f"{op}: {name} must have shape {shape}, got {tuple(parameter.shape)}")
        if parameter.device != input.device:
            raise error(f"{op}: {name} must be on {input.device} as input is, got {parameter.device}")
        if parameter.dtype != input.dtype and not _mixed(op, parameter.dtype, input.dtype):
            raise error(f"{op}: {name} must be {input.dtype} as input is, or float32, got {parameter.dtype}")


def _mixed(op: str, parameter: torch.dtype, input: torch.dtype) -> bool:
    """Whether a parameter may have another dtype than the input."""
    if "rms" in op:
        return parameter.is_floating_point
    return parameter == torch.float32 and input in (torch.bfloat16, torch.float16)


def _check_add(
    op: str,
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, float]:
    for name, tensor in (("input", input), ("residual", residual)):
        check_tensor(op, name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if input.device != residual.device:
        raise ValueError(f"{op}: residual must be on {input.device} as input is, got {residual.device}")
    dropout_p = check_probability(op, "dropout_p", dropout_p)
    if input.shape != residual.shape:
        try:
            input, residual = torch.broadcast_tensors(input, residual)
        except RuntimeError:
            shapes = f"{tuple(input.shape)} and {tuple(residual.shape)}"
            raise ValueError(f"{op}: input and residual must broadcast, got shapes {shapes}") from None
    _check(op, input, normalized_shape, weight, bias, ValueError)
    return input, residual, dropout_p


# Torch ops ------------------------------------------------------------------------------------------------------


def _fake_stats(input: Tensor, normalized_shape: Sequence[int], statistics: int) -> Tensor:
    rows = 1
    for size in input.shape[: input.dim() - len(normalized_shape)]:
        rows = rows * size
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((statistics, rows), dtype=dtype)


def _fake_contiguous(input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


def _one_gradient(bwd: dict[str, Any]) -> bool:
    return bwd["input_dtype"] == bwd["new_residual"].dtype and bwd["rng_state"] is None


def _is_torchs(op: Op, input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether "auto" takes torch's op for a call without dropout about which there is nothing to say."""
    if not (
        type(input) in TENSORS
        and input.is_cpu
        and op.auto_alone()
        and not torch._C._is_any_autocast_enabled()
        and fits(input, normalized_shape, *parameters)
    ):
        return False
    if entries() and (users := tuned(op.name, input, _sizes_of(input, normalized_shape))):
        return users == "native"
    return not fastest(op.name, input)


def _sizes_of(input: Tensor, normalized_shape: Sequence[int], dropout_p: float = 0.0) -> Sizes:
    columns = math.prod(normalized_shape)
    return input.numel() // max(1, columns), columns, "dropout" if dropout_p else ""


def _sizes(inputs: Any) -> Sizes:
    return _sizes_of(inputs.input, inputs.normalized_shape, getattr(inputs, "dropout_p", 0.0))


def _key(inputs: Any) -> tuple[Any, ...]:
    """The device and all dtypes: what `reasons` look at."""
    input = inputs[0]
    return (input.device, *[x.dtype if isinstance(x, Tensor) else None for x in inputs])


LAYER_NORM = Op(
    "layer_norm",
    inputs=LayerNormInputs,
    fwd="(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor output, Tensor stats)",
    bwd="(Tensor? grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, SymInt[] normalized_shape,"
    " float eps, bool[] needs_grad, str backend) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    fake_fwd=lambda input, normalized_shape, *_: (_fake_contiguous(input), _fake_stats(input, normalized_shape, 2)),
    result=lambda outputs, inputs: outputs[0],
    composite=lambda *inputs: reference.layer_norm_fwd(*inputs)[0],
    auto=("native", "reference"),
    fusable=True,
    key=_key,
    sizes=_sizes,
)

RMS_NORM = Op(
    "rms_norm",
    inputs=RMSNormInputs,
    fwd="(Tensor input, SymInt[] normalized_shape, Tensor? weight, float eps, str backend)"
    " -> (Tensor output, Tensor stats)",
    bwd="(Tensor? grad_output, Tensor input, Tensor? weight, Tensor stats, SymInt[] normalized_shape, float eps,"
    " bool[] needs_grad, str backend) -> (Tensor grad_input, Tensor grad_weight)",
    fake_fwd=lambda input, normalized_shape, *_: (_fake_contiguous(input), _fake_stats(input, normalized_shape, 1)),
    result=lambda outputs, inputs: outputs[0],
    composite=lambda *inputs: reference.rms_norm_fwd(*inputs)[0],
    auto=("native", "reference"),
    fusable=True,
    key=_key,
    sizes=_sizes,
)

ADD_LAYER_NORM = Op(
    "add_layer_norm",
    inputs=AddLayerNormInputs,
    fwd="(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps,"
    " float dropout_p, Tensor? rng_state, str backend) -> (Tensor output, Tensor new_residual, Tensor stats)",
    bwd="(Tensor? grad_output, Tensor? grad_new_residual, Tensor? weight, Tensor? bias, Tensor? rng_state,"
    " Tensor new_residual, Tensor stats, SymInt[] normalized_shape, float eps, float dropout_p,"
    " ScalarType input_dtype, bool[] needs_grad, str backend)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    fake_fwd=lambda input, residual, normalized_shape, *_: (
        _fake_contiguous(input),
        _fake_contiguous(residual),
        _fake_stats(residual, normalized_shape, 2),
    ),
    result=lambda outputs, inputs: outputs[:2],
    composite=lambda *inputs: reference.add_layer_norm_fwd(*inputs)[:2],
    auto=("native", "reference"),
    fusable=True,
    key=_key,
    sizes=_sizes,
    draws=True,
    stand_ins={"input": "new_residual", "residual": "new_residual"},
    one_gradient=_one_gradient,
)

ADD_RMS_NORM = Op(
    "add_rms_norm",
    inputs=AddRMSNormInputs,
    fwd="(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float eps, float dropout_p,"
    " Tensor? rng_state, str backend) -> (Tensor output, Tensor new_residual, Tensor stats)",
    bwd="(Tensor? grad_output, Tensor? grad_new_residual, Tensor? weight, Tensor? rng_state, Tensor new_residual,"
    " Tensor stats, SymInt[] normalized_shape, float eps, float dropout_p, ScalarType input_dtype,"
    " bool[] needs_grad, str backend) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight)",
    fake_fwd=lambda input, residual, normalized_shape, *_: (
        _fake_contiguous(input),
        _fake_contiguous(residual),
        _fake_stats(residual, normalized_shape, 1),
    ),
    result=lambda outputs, inputs: outputs[:2],
    composite=lambda *inputs: reference.add_rms_norm_fwd(*inputs)[:2],
    auto=("native", "reference"),
    fusable=True,
    key=_key,
    sizes=_sizes,
    draws=True,
    stand_ins={"input": "new_residual", "residual": "new_residual"},
    one_gradient=_one_gradient,
)


# Backends --------------------------------------------------------------


def _native_add(input: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    added = torch.nn.functional.dropout(input, dropout_p) if dropout_p else input
    return (residual + added).to(residual.dtype)


def _native_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: None,
) -> tuple[Tensor, Tensor]:
    new_residual = _native_add(input, residual, dropout_p)
    if input.dtype != residual.dtype:
        weight, bias = (None if p is None else p.to(residual.dtype) for p in (weight, bias))
    output = torch.nn.functional.layer_norm(new_residual, normalized_shape, weight, bias, eps)
    return output.to(input.dtype), new_residual


def _native_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: None,
) -> tuple[Tensor, Tensor]:
    new_residual = _native_add(input, residual, dropout_p)
    if weight is not None and input.dtype != residual.dtype:
        weight = weight.to(residual.dtype)
    output = torch.nn.functional.rms_norm(new_residual, normalized_shape, weight, eps)
    return output.to(input.dtype), new_residual


def _native_reasons(inputs: LayerNormInputs | AddLayerNormInputs) -> list[str]:
    parameters = [p for p in (inputs.weight, inputs.bias) if p is not None]
    if inputs.input.device.type != "cpu" and any(p.dtype != inputs.input.dtype for p in parameters):
        return [f"torch's layer_norm needs parameters of the input's dtype on {inputs.input.device.type}"]
    if inputs.input.device.type == "cpu" and len({p.dtype for p in parameters}) > 1:
        return ["torch's layer_norm needs weight and bias of one dtype"]
    return []


LAYER_NORM.register(Backend("native", reasons=_native_reasons, call=torch.nn.functional.layer_norm))
RMS_NORM.register(Backend("native", call=torch.nn.functional.rms_norm))
ADD_LAYER_NORM.register(Backend("native", reasons=_native_reasons, call=_native_add_layer_norm))
ADD_RMS_NORM.register(Backend("native", call=_native_add_rms_norm))
LAYER_NORM.register(Backend("reference", fwd=reference.layer_norm_fwd, bwd=reference.layer_norm_bwd))
RMS_NORM.register(Backend("reference", fwd=reference.rms_norm_fwd, bwd=reference.rms_norm_bwd))
ADD_LAYER_NORM.register(Backend("reference", fwd=reference.add_layer_norm_fwd, bwd=reference.add_layer_norm_bwd))
ADD_RMS_NORM.register(Backend("reference", fwd=reference.add_rms_norm_fwd, bwd=reference.add_rms_norm_bwd))


def _dtypes(inputs: Any) -> set[torch.dtype]:
    return {x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}


def _parameter_reasons(inputs: Any) -> list[str]:
    if len({p.dtype for p in (inputs.weight, getattr(inputs, "bias", None)) if p is not None}) > 1:
        return ["needs weight and bias of one dtype"]
    return []


def _cpu_reasons(inputs: Any) -> list[str]:
    dtypes = _dtypes(inputs)
    if len(dtypes) == 1:
        return []
    if torch.float64 in dtypes:
        return ["serves float64 only if all tensors are"]
    return _parameter_reasons(inputs)


def _triton_reasons(inputs: Any) -> list[str]:
    return ["does not serve float64"] if torch.float64 in _dtypes(inputs) else []


def _cuda_reasons(inputs: Any) -> list[str]:
    dtypes = _dtypes(inputs)
    if len(dtypes) == 1:
        return []
    if torch.float64 in dtypes:
        return ["does not serve float64"]
    residual = getattr(inputs, "residual", inputs.input).dtype
    if residual not in (inputs.input.dtype, torch.float32):
        return [f"serves a residual in the input's dtype or float32, got {residual}"]
    return _parameter_reasons(inputs)


def _copies(inputs: Any) -> list[str]:
    tensors = {name: getattr(inputs, name, None) for name in ("input", "residual")}
    return rows.copies(len(inputs.normalized_shape), **tensors)


def register(
    name: str,
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    *,
    devices: Iterable[str],
    dtypes: frozenset[torch.dtype],
    reasons: Callable[[Any], list[str]],
    available: Callable[[], str],
) -> None:
    """Registers a backend of all four ops that is one function each way; the ops differ in what they leave out.

    Args:
        name, dtypes, reasons, available: as in `Backend`.
        fwd: (rms, input, residual, normalized_shape, weight, bias, eps, dropout_p, rng_state) -> (output, new_residual,
            stats). No residual: None.
        bwd: (rms, grad_output, grad_new_residual, normalized, weight, bias, stats, normalized_shape, dropout_p,
            rng_state, input_dtype, needs_grad) -> gradients of input, residual, weight and bias, None if not needed.
            `normalized` is new_residual, without residual the input. No upstream gradient: None.
        devices: device types served.
    """

    def layer_norm_fwd(x: Tensor, shape: Shape, weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor]:
        output, _, stats = fwd(False, x, None, shape, weight, bias, eps, 0.0, None)
        return output, stats

    def rms_norm_fwd(x: Tensor, shape: Shape, weight: Any, eps: float) -> tuple[Tensor, Tensor]:
        output, _, stats = fwd(True, x, None, shape, weight, None, eps, 0.0, None)
        return output, stats

    def add_layer_norm_fwd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return fwd(False, *inputs)

    def add_rms_norm_fwd(
        x: Tensor, residual: Tensor, shape: Shape, weight: Any, eps: float, p: float, rng_state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return fwd(True, x, residual, shape, weight, None, eps, p, rng_state)

    def layer_norm_bwd(
        dy: Any, x: Tensor, weight: Any, bias: Any, stats: Tensor, shape: Shape, eps: float, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = (needs[0], False, *needs[1:])
        grads = bwd(False, dy, None, x, weight, bias, stats, shape, 0.0, None, x.dtype, wanted)
        return grads[0], grads[2], grads[3]

    def rms_norm_bwd(
        dy: Any, x: Tensor, weight: Any, stats: Tensor, shape: Shape, eps: float, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        wanted = (needs[0], False, needs[1], False)
        grads = bwd(True, dy, None, x, weight, None, stats, shape, 0.0, None, x.dtype, wanted)
        return grads[0], grads[2]

    def add_layer_norm_bwd(
        dy: Any, dx: Any, weight: Any, bias: Any, rng_state: Any, x: Tensor, stats: Tensor, shape: Shape, eps: float,
        p: float, dtype: torch.dtype, needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return bwd(False, dy, dx, x, weight, bias, stats, shape, p, rng_state, dtype, needs)

    def add_rms_norm_bwd(
        dy: Any, dx: Any, weight: Any, rng_state: Any, x: Tensor, stats: Tensor, shape: Shape, eps: float,
        p: float, dtype: torch.dtype, needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return bwd(True, dy, dx, x, weight, None, stats, shape, p, rng_state, dtype, (*needs, False))[:3]

    functions: dict[Op, tuple[Callable[..., Any], Callable[..., Any]]] = {
        LAYER_NORM: (layer_norm_fwd, layer_norm_bwd),
        RMS_NORM: (rms_norm_fwd, rms_norm_bwd),
        ADD_LAYER_NORM: (add_layer_norm_fwd, add_layer_norm_bwd),
        ADD_RMS_NORM: (add_rms_norm_fwd, add_rms_norm_bwd),
    }
    for op, (op_fwd, op_bwd) in functions.items():
        op.register(
            Backend(
                name,
                devices=frozenset(devices),
                dtypes=dtypes,
                reasons=reasons,
                fwd=op_fwd,
                bwd=op_bwd,
                available=available,
                copies=_copies,
            )
        )


def register_cpu(name: str, launchers: Launchers) -> None:
    """Registers a variant of the CPU kernels as a backend."""
    register(
        name,
        functools.partial(launch.fwd, launchers),
        functools.partial(launch.bwd, launchers, lambda rows: max(1, min(rows // 8, 64))),
        devices={"cpu"},
        dtypes=FLOATS,
        reasons=_cpu_reasons,
        available=launchers.missing,
    )


def register_cuda(name: str, launchers: Launchers, device: str = "cuda") -> None:
    """Registers the CUDA kernels as a backend."""
    register(
        name,
        functools.partial(launch.fwd, launchers),
        functools.partial(launch.bwd, launchers, lambda rows: max(1, min(rows // 8, max(256, rows // 32), 1024))),
        devices={device},
        dtypes=FLOATS - {torch.float64},
        reasons=_cuda_reasons,
        available=launchers.missing,
    )


register_cpu("cpu", CPU)
register_cuda("cuda", CUDA)


def _triton_fwd(*args: Any) -> Any:
    from fastlm.ops.layer_norm import triton

    return triton.fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from fastlm.ops.layer_norm import triton

    return triton.bwd(*args)


register(
    "triton",
    _triton_fwd,
    _triton_bwd,
    devices=triton_devices(),
    dtypes=FLOATS - {torch.float64},
    reasons=_triton_reasons,
    available=triton_missing,
)
