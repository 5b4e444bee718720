"""Softmax cross-entropy, of logits and fused with the linear layer before it: contract, torch ops, backends."""

from __future__ import annotations

import functools
import importlib.util
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
    check_not_negative,
    check_probability,
    check_tensor,
)
from fastlm.ops.compiled import CPU, CUDA, Launchers, cuda_missing, triton_devices, triton_missing
from fastlm.ops.cross_entropy import kernels, launch, reference
from fastlm.ops.measured import Sizes, entries, fastest, tuned
from fastlm.ops.registry import FLOATS, Backend, Op


class CrossEntropyInputs(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    inplace_backward: bool = False


class LinearCrossEntropyInputs(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    recompute: bool
    needs_grad: Sequence[bool]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy between logits and class indices or probabilities.

        x    = softcap * tanh(input / softcap)                   (x = input without a soft cap)
        lse  = log(sum_c exp(x_c))
        loss = sum_c q_c * (lse - x_c) + z_loss * lse^2

    q is the target distribution, (1 - label_smoothing) * onehot(target) + label_smoothing / C, with the class weights
    multiplied in as torch does. Arithmetic is in fp32 (fp64 for fp64).

    Args:
        input: (C,), (N, C) or (N, C, d1, ...) logits; fp32, bf16, fp16 or fp64, any strides.
        target: class indices () , (N,) or (N, d1, ...) int64 or uint8; or probabilities with the shape of `input`.
        weight: (C,) weight of each class, in the dtype of `input`.
        ignore_index: index that contributes neither loss nor gradient.
        reduction: "none", "mean" (over the weights of the targets that are not ignored; nan if there are none), "sum".
        label_smoothing: in [0, 1].
        z_loss: factor of lse^2, averaged over the rows that are not ignored, whatever the class weights.
        softcap: bound of the logits; 0 for none.
        inplace_backward: backward may overwrite `input` with its gradient. An operation that has kept `input` for its
            own backward then raises torch's "modified by an inplace operation"; a leaf is refused. Ignored by
            compilers, which plan memory themselves.

    Returns:
        () or, for "none", the shape of the class indices, in the dtype of `input`; fp32 under autocast.

    Raises:
        RuntimeError, ValueError, IndexError: as torch's `cross_entropy`. IndexError for a target out of range on a CPU;
        on CUDA it is a device-side assertion.

    Source: de Brébisson and Vincent 2016 (arXiv 1604.08859) for z_loss; Gemma Team 2024 (arXiv 2408.00118) for softcap.
    """
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    if _is_torchs(input, target, weight, *options) and not inplace_backward:
        return _native_cross_entropy(input, target, None, *options)
    check_tensor("cross_entropy", "input", input)
    options = _check_options("cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap)
    target = _check("cross_entropy", input, input.shape, target, weight, options[0])
    if autocast_dtype(input) is not None and input.dtype != torch.float64:
        input, weight = input.float(), None if weight is None else weight.float()
    if _wider(input, target, weight):
        input = input.double()
    if inplace_backward:
        inplace_backward = input.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        input = _overwritten(input) if inplace_backward else input
    inputs = CrossEntropyInputs(input, target, weight, *options, inplace_backward)
    return CROSS_ENTROPY.choose(inputs)(*inputs)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    r"""`cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`, the logits only in a bounded workspace.

    The rows are taken in chunks, two or more; in 16 bits on a CPU in one, up to 128 MiB of logits. For "mean" and "sum"
    the forward pass forms the gradients, the weight's summed in fp32.
    "none" forms the logits again in backward. To accumulate gradients over micro-batches exactly, take reduction="sum"
    and divide by the number of all their targets.

    Args:
        input: (in_features,) or (N, in_features) hidden states.
        linear_weight: (C, in_features), or (C, d1, ..., in_features) for a loss over (N, C, d1, ...) logits.
        target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap: as in `cross_entropy`;
            `ignore_index=None` is -100.
        linear_bias: (C,) or (C, d1, ...), in the dtype of `linear_weight`.
        recompute: keep no gradients from forward to backward, only lse, and form the logits twice: slower, for when
            `linear_weight` is large and backward is far away.

    Returns, raises: as `cross_entropy`; RuntimeError as torch's `linear_cross_entropy` for shapes that do not fit.

    Source: Hsu et al. 2024 (arXiv 2410.10989); Wijmans et al. 2024 (arXiv 2411.09009).
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    shape = _check_linear(input, linear_weight, linear_bias)
    options = _check_options("linear_cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap)
    target = _check("linear_cross_entropy", input, shape, target, weight, options[0])
    dtype = autocast_dtype(input)
    if dtype is not None and input.dtype != torch.float64:
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
        weight = None if weight is None else weight.float()
    if linear_weight.dim() > 2 or _wider(input, target, weight):
        # Classes that are not the rows of one matrix, or probabilities in fp64 for logits that are not.
        flat_bias = None if linear_bias is None else linear_bias.flatten()
        logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), flat_bias).reshape(shape)
        return cross_entropy(
            logits,
            target,
            weight if weight is None or target.is_floating_point() else weight.to(logits.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
    grad = torch.is_grad_enabled()
    needs_grad = [grad and x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)]
    inputs = LinearCrossEntropyInputs(
        input, linear_weight, target, linear_bias, weight, *options, recompute, needs_grad
    )
    return LINEAR_CROSS_ENTROPY.choose(inputs)(*inputs)


def _wider(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether probabilities or their weights make the loss fp64 while the logits are not."""
    dtypes = (target.dtype, None if weight is None else weight.dtype)
    return target.is_floating_point() and input.dtype != torch.float64 and torch.float64 in dtypes


class _Overwrite(torch.autograd.Function):
    """Identity whose gradient takes the place of its input's values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (input,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: inplace_backward does not go with create_graph=True")
        if grads[0].data_ptr() != input.data_ptr():  # not by the kernel
            return input.detach().copy_(grads[0])
        torch.autograd.graph.increment_version(input)
        return grads[0]


def _overwritten(input: Tensor) -> Tensor:
    if input.is_leaf:
        raise RuntimeError("cross_entropy: inplace_backward needs logits that were computed, got a leaf")
    if any(size > 1 and stride == 0 for size, stride in zip(input.shape, input.stride(), strict=True)):
        raise RuntimeError(
            "cross_entropy: inplace_backward needs logits with memory of their own, got an expanded tensor"
        )
    return _Overwrite.apply(input)


# Checks ---------------------------------------------------------------------------------------------------------


def _check(
    op: str,
    input: Tensor,
    shape: Sequence[int],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Checks tensors for logits of this shape, in the dtype and on the device of `input`; returns the target."""
    check_tensor(op, "target", target)
    if (
        weight is None
        and len(shape) == 2
        and input.is_floating_point()
        and target.dtype is torch.int64
        and target.shape == shape[:1]
        and target.device == input.device
    ):
        return target  # the usual call, about which there is nothing to say
    if not input.is_floating_point():
        raise NotImplementedError(f"{op}: input must be floating point, got {input.dtype}")
    if target.device != input.device:
        raise RuntimeError(f"{op}: target must be on {input.device} as input is, got {target.device}")
    shape = tuple(shape)
    if not shape:
        raise RuntimeError(f"{op}: input must have a dimension of classes, got a scalar")
    dim = min(1, len(shape) - 1)
    classes, rows = shape[dim], shape[:dim] + shape[dim + 1 :]
    if tuple(target.shape) == shape and (len(shape) > 1 or classes != 1 or target.is_floating_point()):
        if not target.is_floating_point():
            raise RuntimeError(f"{op}: target with the shape of the logits must be probabilities, got {target.dtype}")
        if ignore_index >= 0:
            raise RuntimeError(f"{op}: ignore_index must not be given for probabilities, got {ignore_index}")
    else:
        if not rows and tuple(target.shape) == (1,):  # as torch, one index for the one row of (C,) logits
            target = target.reshape(())
        if tuple(target.shape) != rows:
            sizes = rows or (classes,)  # torch compares the first of these with the target's first
            error = ValueError if not target.dim() or target.shape[0] != sizes[0] else RuntimeError
            raise error(f"{op}: target must have shape {rows} or {shape} for logits {shape}, got {tuple(target.shape)}")
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"{op}: target must be int64 or uint8 class indices, got {target.dtype}")
    if weight is not None:
        _check_weight(op, input, classes, target, weight)
    return target


def _check_options(
    op: str, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[int, str, float, float, float]:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return (
        check_integer(op, "ignore_index", ignore_index),
        reduction,
        check_probability(op, "label_smoothing", label_smoothing, RuntimeError),
        check_not_negative(op, "z_loss", z_loss),
        check_not_negative(op, "softcap", softcap),
    )


def _check_weight(op: str, input: Tensor, classes: int, target: Tensor, weight: Tensor) -> None:
    check_tensor(op, "weight", weight)
    probabilities = target.is_floating_point()
    if tuple(weight.shape) != (classes,):
        raise RuntimeError(f"{op}: weight must have shape {(classes,)}, one per class, got {tuple(weight.shape)}")
    if not weight.is_floating_point() or not (
        weight.dtype == input.dtype
        or probabilities
        or (autocast_dtype(input) is not None and input.dtype != torch.float64)
    ):
        raise RuntimeError(f"{op}: weight must be {input.dtype} as input is, got {weight.dtype}")
    if weight.device != input.device:
        raise RuntimeError(f"{op}: weight must be on {input.device} as input is, got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled() and not probabilities:
        raise RuntimeError(f"{op}: weight must not require a gradient with class indices")


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[int, ...]:
    """The shape of the logits."""
    op = "linear_cross_entropy"
    for name, x in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not (name == "linear_bias" and x is None):
            check_tensor(op, name, x)
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{op}: input must have 1 or 2 dimensions, got shape {tuple(input.shape)}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        need = f"(C, {input.shape[-1]}) or (C, d1, ..., {input.shape[-1]})"
        raise RuntimeError(f"{op}: linear_weight must have shape {need}, got {tuple(linear_weight.shape)}")
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(f"{op}: input must have 2 dimensions with linear_weight {tuple(linear_weight.shape)}, got 1")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        shape = tuple(linear_weight.shape[:-1])
        raise RuntimeError(f"{op}: linear_bias must have shape {shape}, got {tuple(linear_bias.shape)}")
    for name, x in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if x is not None and x.device != input.device:
            raise RuntimeError(f"{op}: {name} must be on {input.device} as input is, got {x.device}")
        if x is not None and x.dtype != input.dtype and autocast_dtype(input) is None:
            raise RuntimeError(f"{op}: {name} must be {input.dtype} as input is, got {x.dtype}")
    return (*input.shape[:-1], *linear_weight.shape[:-1])


# Torch ops ------------------------------------------------------------------------------------------------------


def _fake_statistics(input: Tensor, rows: int, reduction: str) -> tuple[Tensor, Tensor]:
    dtype = kernels.wide_dtype(input)
    return input.new_empty((3, rows), dtype=dtype), input.new_empty(2 if reduction == "mean" else 0, dtype=dtype)


def _fake_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dim = min(1, input.dim() - 1)
    rows = input.shape[:dim] + input.shape[dim + 1 :]
    loss = input.new_empty(rows if reduction == "none" else (), dtype=kernels.wide_dtype(input))
    return loss, *_fake_statistics(input, math.prod(rows), reduction)


def _fake_linear_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    inputs = LinearCrossEntropyInputs(*args[:-1])
    input, dtype = inputs.input, kernels.wide_dtype(inputs.input)
    forms, rows = inputs.reduction != "none" and not inputs.recompute, input.shape[:-1]
    loss = input.new_empty(rows if inputs.reduction == "none" else (), dtype=dtype)
    parameters = dtype if input.dtype == torch.float16 else input.dtype
    likes = ((input, input.dtype), (inputs.linear_weight, parameters), (inputs.linear_bias, parameters))
    formed = [
        input.new_empty(like.shape if like is not None and needed and forms else 0, dtype=kind)
        for (like, kind), needed in zip(likes, inputs.needs_grad, strict=True)
    ]
    return loss, *_fake_statistics(input, math.prod(rows), inputs.reduction), *formed


def _public_loss(outputs: tuple[Tensor, ...], inputs: Any) -> Tensor:
    """The loss in the dtype that torch gives it."""
    input, (loss, *_) = inputs[0], outputs
    if autocast_dtype(input) is not None:
        return loss
    target, weight = (
        (inputs[1], inputs[2]) if len(inputs) == len(CrossEntropyInputs._fields) else (inputs[2], inputs[4])
    )
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    return loss.to(dtype)


def _beyond_bwd(inputs: CrossEntropyInputs | LinearCrossEntropyInputs) -> list[str]:
    if not torch.is_grad_enabled() or not inputs.target.is_floating_point():  # with indices weight must not need one
        return []
    wanted = {"target": inputs.target, "weight": inputs.weight}
    return [f"gives no gradient of {name}" for name, x in wanted.items() if x is not None and x.requires_grad]


def _composite(*inputs: Any) -> Tensor:
    return _public_loss(reference.cross_entropy_fwd(*inputs), inputs)


def _linear_composite(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, *options: Any
) -> Tensor:
    return _composite(torch.nn.functional.linear(input, linear_weight, linear_bias), target, *options[:-2], False)


REDUCTIONS = ("none", "mean", "sum")
LONG_ROW = 512  # classes; below, a CPU's kernel is slower than torch's (`fastlm tune cross_entropy:64x200`)
CPU_BUILT = importlib.util.find_spec("fastlm._C") is not None  # a plain constant, for compilers


def _first(inputs: CrossEntropyInputs) -> str:
    """On a GPU ours moves less memory; on a CPU measured.json says from which size on it is the faster, of rows that
    are long and of one run."""
    x = inputs.input
    if not x.is_cpu:
        return _gpu_first()
    dim = 1 if x.dim() > 1 else 0
    long = x.shape[dim] >= LONG_ROW and x.stride(dim) == 1
    return fastest("cross_entropy", x) if long and not torch.compiler.is_compiling() else ""


def _gpu_first() -> str:
    return "triton" if cuda_missing() else "cuda"


def _is_torchs(
    input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, smoothing: Any, z_loss: Any, softcap: Any
) -> bool:
    """Whether "auto" takes torch's op for a call about which there is nothing to say: rows of logits on a CPU, an index
    for each."""
    if not (
        type(input) in TENSORS
        and type(target) in TENSORS
        and input.is_cpu
        and input.dim() == 2
        and target.dtype == torch.int64
        and target.is_cpu
        and target.shape == input.shape[:1]
        and input.is_floating_point()
        and weight is None
        and type(z_loss) is float
        and type(softcap) is float
        and z_loss == softcap == 0.0
        and type(smoothing) is float
        and 0.0 <= smoothing <= 1.0
        and type(ignore_index) is int
        and reduction in REDUCTIONS
        and CROSS_ENTROPY.auto_alone()
        and not torch._C._is_any_autocast_enabled()
    ):
        return False
    if entries() and (users := tuned("cross_entropy", input, _sizes_of(input, 1))):
        return users == "native"
    return input.shape[1] < LONG_ROW or input.stride(1) != 1 or not fastest("cross_entropy", input)


def _sizes_of(x: Tensor, dim: int, *options: str) -> Sizes:
    classes = x.shape[dim]
    return x.numel() // max(1, classes), classes, "classes apart" if x.stride(dim) != 1 else "", *options


def _sizes(inputs: CrossEntropyInputs) -> Sizes:
    given = {"probabilities": inputs.target.is_floating_point(), "in place": inputs.inplace_backward}
    dim = 1 if inputs.input.dim() > 1 else 0
    return _sizes_of(inputs.input, dim, *[name for name, present in given.items() if present])


def _linear_sizes(inputs: LinearCrossEntropyInputs) -> Sizes:
    classes, features = inputs.linear_weight.shape
    probabilities = "probabilities" if inputs.target.is_floating_point() else ""
    rows = inputs.input.numel() // max(1, features)
    return rows, features, classes, probabilities, "recompute" if inputs.recompute else ""


def _key(inputs: CrossEntropyInputs) -> tuple[Any, ...]:
    weight = None if inputs.weight is None else inputs.weight.dtype
    input, target = inputs.input, inputs.target
    return input.device, input.dtype, target.dtype, weight, not inputs.z_loss, not inputs.softcap


CROSS_ENTROPY = Op(
    "cross_entropy",
    inputs=CrossEntropyInputs,
    fwd="(Tensor input, Tensor target, Tensor? weight, SymInt ignore_index, str reduction, float label_smoothing,"
    " float z_loss, float softcap, bool inplace_backward, str backend)"
    " -> (Tensor loss, Tensor stats, Tensor divisors)",
    bwd="(Tensor? grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor stats, Tensor divisors,"
    " SymInt ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, bool inplace_backward,"
    " bool[] needs_grad, str backend) -> Tensor grad_input",
    fake_fwd=_fake_cross_entropy,
    result=_public_loss,
    composite=_composite,
    auto=("native", "reference"),
    sizes=_sizes,
    measured=_first,
    key=_key,
    fusable=True,
    beyond_bwd=_beyond_bwd,
    in_place=True,
)


def _linear_first(inputs: LinearCrossEntropyInputs) -> str:
    """Ours holds less memory. On a CPU without our kernels the chunks win in eager fp32 only: in 16 bits they cost 5 to
    9%, and a compiler makes torch's own cross-entropy so fast that they cost 11% of a GPT step."""
    x = inputs.input
    if not x.is_cpu:
        return _gpu_first()
    if CPU_BUILT:
        return "cpu"
    return "native" if x.dtype in (torch.bfloat16, torch.float16) or torch.compiler.is_compiling() else ""


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    inputs=LinearCrossEntropyInputs,
    fwd="(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, SymInt ignore_index,"
    " str reduction, float label_smoothing, float z_loss, float softcap, bool recompute, bool[] needs_grad,"
    " str backend) -> (Tensor loss, Tensor stats, Tensor divisors, Tensor formed_input, Tensor formed_weight,"
    " Tensor formed_bias)",
    bwd="(Tensor? grad_loss, Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight,"
    " Tensor stats, Tensor divisors, Tensor formed_input, Tensor formed_weight, Tensor formed_bias,"
    " SymInt ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, bool recompute,"
    " bool[] needs_grad, str backend)"
    " -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
    fake_fwd=_fake_linear_cross_entropy,
    result=_public_loss,
    composite=_linear_composite,
    auto=("reference", "native"),  # torch's holds the logits in full
    sizes=_linear_sizes,
    measured=_linear_first,
    fusable=False,
    beyond_bwd=_beyond_bwd,
    in_place=True,
)


# Backends: torch's own operations, and the reference --------------------------------------------------------------


def _native_reasons(inputs: CrossEntropyInputs | LinearCrossEntropyInputs) -> list[str]:
    lacking = {"z_loss": inputs.z_loss, "softcap": inputs.softcap}
    return [f"torch's cross_entropy has no {name}" for name, value in lacking.items() if value]


def _native_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    *_: Any,
) -> Tensor:
    return torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _native_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, *options: Any
) -> Tensor:
    return _native_cross_entropy(torch.nn.functional.linear(input, linear_weight, linear_bias), target, *options)


def _reference_cross_entropy_fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs = CrossEntropyInputs(*args)
    classes = inputs.input.shape[min(1, inputs.input.dim() - 1)]
    kernels.check_range("cross_entropy", inputs.target, classes, inputs.ignore_index)
    return reference.cross_entropy_fwd(*args)


def _reference_linear_cross_entropy_fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs = LinearCrossEntropyInputs(*args)
    kernels.check_range("linear_cross_entropy", inputs.target, len(inputs.linear_weight), inputs.ignore_index)
    return kernels.linear_fwd(reference.KERNELS, *args)


def _copies(inputs: CrossEntropyInputs) -> list[str]:
    tensors = {"input": inputs.input, "target": inputs.target if inputs.target.is_floating_point() else None}
    return rows.copies(1, **{name: None if x is None else kernels.classes_last(x) for name, x in tensors.items()})


CROSS_ENTROPY.register(Backend("native", reasons=_native_reasons, call=_native_cross_entropy))
CROSS_ENTROPY.register(
    Backend("reference", fwd=_reference_cross_entropy_fwd, bwd=reference.cross_entropy_bwd, copies=_copies)
)
LINEAR_CROSS_ENTROPY.register(Backend("native", reasons=_native_reasons, call=_native_linear_cross_entropy))
LINEAR_CROSS_ENTROPY.register(
    Backend("reference", fwd=_reference_linear_cross_entropy_fwd, bwd=reference.linear_cross_entropy_bwd)
)


def _dtypes(inputs: Any) -> set[torch.dtype]:
    return {x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}


def _cpu_reasons(inputs: Any) -> list[str]:
    mixed = torch.float64 in _dtypes(inputs) and len(_dtypes(inputs)) > 1
    return ["serves float64 only if all tensors are"] if mixed else []


def _gpu_reasons(inputs: Any) -> list[str]:
    return ["does not serve float64"] if torch.float64 in _dtypes(inputs) else []


def register(
    name: str,
    load: Callable[[], kernels.Kernels],
    *,
    devices: Iterable[str],
    dtypes: frozenset[torch.dtype],
    reasons: Callable[[Any], list[str]],
    available: Callable[[], str],
) -> None:
    """Registers a backend of both losses that is three functions of rows.

    Args:
        name, dtypes, reasons, available: as in `Backend`.
        load: gives the functions.
        devices: device types served.
    """
    functions: dict[Op, tuple[Callable[..., Any], Callable[..., Any]]] = {
        CROSS_ENTROPY: (kernels.fwd, kernels.bwd),
        LINEAR_CROSS_ENTROPY: (kernels.linear_fwd, kernels.linear_bwd),
    }
    for op, (fwd, bwd) in functions.items():
        op.register(
            Backend(
                name,
                devices=frozenset(devices),
                dtypes=dtypes,
                reasons=reasons,
                fwd=lambda *args, fwd=fwd: fwd(load(), *args),
                bwd=lambda *args, bwd=bwd: bwd(load(), *args),
                available=available,
                copies=_copies if op is CROSS_ENTROPY else list,
            )
        )


def register_cpu(name: str, launchers: Launchers) -> None:
    """Registers a variant of the CPU kernels as a backend."""
    register(
        name,
        functools.cache(lambda: launch.kernels(launchers)),
        devices={"cpu"},
        dtypes=FLOATS,
        reasons=_cpu_reasons,
        available=launchers.missing,
    )


def register_cuda(name: str, launchers: Launchers, device: str = "cuda") -> None:
    """Registers the CUDA kernels as a backend."""
    register(
        name,
        functools.cache(lambda: launch.kernels(launchers)),
        devices={device},
        dtypes=FLOATS - {torch.float64},
        reasons=_gpu_reasons,
        available=launchers.missing,
    )


def _triton() -> kernels.Kernels:
    from fastlm.ops.cross_entropy import triton

    return triton.KERNELS


register_cpu("cpu", CPU)
register_cuda("cuda", CUDA)
register(
    "triton",
    _triton,
    devices=triton_devices(),
    dtypes=FLOATS - {torch.float64},
    reasons=_gpu_reasons,
    available=triton_missing,
)
