"""PyTorch's own scaled_dot_product_attention on FastLM's kernels, for models that do not know FastLM.

torch.nn.functional.scaled_dot_product_attention, torch.nn.attention.varlen and others end in a few aten operators. The
functions here have the arguments of those operators and give their results, in the layouts that PyTorch's compilers
expect, or None for what PyTorch's own kernel is to do. They are registered below autograd: derivatives, transforms,
fake tensors and autocast stay PyTorch's.

In every flash attention operator on a GPU a causal mask and a window are aligned at the last query and the last key,
in the CPU's at the first of each; scaled_dot_product_attention takes the former only where the two are the same.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.attention as providers
from torch import Tensor

from fastlm.ops.attention.op import (
    SCALED_DOT_PRODUCT_ATTENTION,
    VARLEN_ATTENTION,
    ScaledDotProductAttentionInputs,
    VarlenAttentionInputs,
    native_is_fastest,
)
from fastlm.ops.registry import Backend, Op, preference

NAME = "FASTLM"
Inputs = ScaledDotProductAttentionInputs | VarlenAttentionInputs


def register_sdpa(*, cpu: bool = False) -> Registration:
    """Lets models that call torch.nn.functional.scaled_dot_product_attention run on FastLM's kernels.

    On a GPU this registers "FASTLM" with torch.nn.attention and activates it, which replaces PyTorch's flash attention:
    whatever calls that, through scaled_dot_product_attention or torch.nn.attention.varlen, in eager mode or compiled,
    runs FastLM's kernels, dropout and both passes included. Afterwards
    torch.nn.attention.restore_flash_attention_impl() and activate_flash_attention_impl("FASTLM") switch between them.
    Which of PyTorch's kernels is taken (flash, cuDNN, memory-efficient, math) is decided by PyTorch before, as ever:
    `torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)` has it take this one.

    With `cpu` also on CPU tensors, where a measurement says that FastLM's kernels are faster
    (fastlm/ops/measured.json). A call that goes on to PyTorch's kernel has come through Python, which costs it some 10
    microseconds forward and 30 backward, a tenth of what 64 tokens of 12 heads take: do not register for less.

    PyTorch's own kernel still does what FastLM's do not: other dtypes, heads wider than 256, paged caches, a fixed
    number of splits, debug masks, and dropout on a CPU. `fastlm.use_backend` has a say here too: "native" is PyTorch's
    own kernel, and a named backend that cannot serve raises.

    Models of Hugging Face's `transformers`, if that is installed, may be made with `attn_implementation="fastlm"` from
    then on, on any device.

    Args:
        cpu: also replace PyTorch's flash attention on CPU tensors.

    Returns:
        A handle whose `remove()` takes this call back, as leaving it as a context manager does. Calls may be nested:
        what one asked for stays until its own handle is removed. With the last of them PyTorch is what it was.

    Raises:
        RuntimeError: this is PyTorch for AMD's GPUs. When the operators are called: gradients are needed that PyTorch's
        backward operator does not have (ALiBi, `seqused_k`), or dropout in a call that only PyTorch's kernel serves.

    Example:
        >>> with fastlm.register_sdpa(cpu=True):
        ...     loss = model(input_ids, labels=labels).loss
    """
    if torch.version.hip:
        raise RuntimeError(f"register_sdpa: PyTorch must be built for CUDA or for CPUs, got HIP {torch.version.hip}")
    if importlib.util.find_spec("transformers") is not None:
        try:
            importlib.import_module("fastlm.transformers")
        except (AttributeError, ImportError) as error:
            warnings.warn(f"register_sdpa: this version of transformers is not known: {error}", stacklevel=2)
    return Registration(cpu)


class Registration:
    """What one call of `register_sdpa` asked for, in force until it is removed."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        _registrations.append(self)
        _settle()

    def remove(self) -> None:
        """Takes the call back; does nothing the second time."""
        if self in _registrations:
            _registrations.remove(self)
            _settle()

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


# The choice -------------------------------------------------------------------------------------------------------


def _backend(op: Op, inputs: Inputs) -> Backend | None:
    """The backend that runs, as `use_backend` and measurements have it; None for torch's own kernel."""
    first = op.backends.get(next(iter(op.measured(inputs)), ""))
    if first is not None and (first.fwd is None or first.unfit(inputs)):
        first = None
    # Backward has another thread's preference. With dropout it must take forward's side all the same, for torch's mask
    # is not ours: so what decides between the two sides is what both passes are given.
    if first is None and inputs.dropout_p:
        return None
    names = preference()
    for name in names:
        if name in ("auto", "native"):
            return first if name == "auto" or inputs.dropout_p else None
        backend = op.backends.get(name)
        if backend is not None and backend.fwd is not None and not backend.unfit(inputs):
            return backend if inputs.query.numel() else op.backends["reference"]
    op.choose(inputs)  # raises with everyone's reasons
    return None


def _alike(query: Tensor, key: Tensor, value: Tensor, rank: int) -> bool:
    """Whether the tensors, with heads in their dimension 1, fit each other; if not, torch's own kernel says why."""
    return (
        query.dim() == key.dim() == rank
        and key.shape == value.shape
        and (rank == 3 or query.shape[0] == key.shape[0])
        and key.shape[1] > 0 == query.shape[1] % key.shape[1]
        and query.shape[-1] == key.shape[-1] > 0
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )


def _gradients(
    op: Op, backend: Backend, inputs: Inputs, grad_output: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> those of query, key and value."""
    needs_grad = [name != "attn_mask" for name in op.differentiable]
    given = {**inputs._asdict(), "grad_output": grad_output, "output": output, "lse": lse, "needs_grad": needs_grad}
    gradients = backend.bwd(*[given[name] for name in op._bwd_names if name != "backend"])  # type: ignore[misc]
    return gradients[:3]


def _like(x: Tensor, like: Tensor) -> Tensor:
    """x in the layout that torch.empty_like gives."""
    if x.stride() == like.stride():
        return x
    wanted = torch.empty_like(like)
    return x if x.stride() == wanted.stride() else wanted.copy_(x)


def _swapped(x: Tensor) -> Tensor:
    """(B, H, T, D) as (B, T, H, D), or the other way."""
    return x.transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    """(B, H, T, ...) that lies in memory as (B, T, H, ...)."""
    return _swapped(_swapped(x).contiguous())


# On a GPU -----------------------------------------------------------------------------------------------------------


def _flash_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
    *,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Op, Inputs] | None:
    """The function that packed sequences or a batch need, and its inputs, without dropout's state; None if they are
    not those of an attention."""
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    if cum_seq_q is not None and cum_seq_k is not None:
        usual = cum_seq_q.dtype == cum_seq_k.dtype == torch.int32 and cum_seq_q.shape == cum_seq_k.shape
        if not usual or cum_seq_q.dim() != 1 or not _alike(query, key, value, 3):
            return None
        return VARLEN_ATTENTION, VarlenAttentionInputs(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, _scale(query, scale), left, right,
            alibi_slopes, 0.0, True, dropout_p, None,
        )  # fmt: skip
    if cum_seq_q is not None or query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return None
    query, key, value = _swapped(query), _swapped(key), _swapped(value)
    if not _alike(query, key, value, 4):
        return None
    placed = is_causal or left >= 0 or right >= 0 or alibi_slopes is not None
    if seqused_k is None and placed and query.shape[2] != key.shape[2]:  # which aligns ends with ends
        seqused_k = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
    return SCALED_DOT_PRODUCT_ATTENTION, ScaledDotProductAttentionInputs(
        query, key, value, None, is_causal, _scale(query, scale), left, right, alibi_slopes, 0.0, seqused_k, True,
        dropout_p, None,
    )  # fmt: skip


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """query, key and value are (B, T, H, D), or (total, H, D) with cum_seq_q and cum_seq_k.

    -> output, laid out as query; logsumexp, fp32 (B, H, T_q) or (H, total_q); dropout's state, which backward is given;
    a scalar that means nothing and an empty debug mask.
    """
    op_and_inputs = _flash_inputs(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left,
        window_size_right, seqused_k=seqused_k, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    if op_and_inputs is None:
        return None
    op, inputs = op_and_inputs
    backend = _backend(op, inputs)
    if backend is None:
        return None
    options = {"return_debug_mask": return_debug_mask, "block_table": block_table, "num_splits": num_splits}
    if cum_seq_q is not None:
        options["seqused_k"] = seqused_k
    beyond = [name for name, option in options.items() if option is not None and option is not False]
    if beyond:
        if dropout_p:  # _flash_attention_backward is not told of these, and would take our mask for torch's
            raise RuntimeError(f"_flash_attention_forward: dropout_p must be 0 with {beyond[0]}, got {dropout_p}")
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        for name, option in (("alibi_slopes", alibi_slopes), ("seqused_k", seqused_k)):
            if option is not None:
                need = f"{name} must be None where gradients are needed, for _flash_attention_backward does not take it"
                raise RuntimeError(f"_flash_attention_forward: {need}; fastlm.functional has them")
    rng_state = torch.ops.fastlm.new_rng_state(query) if dropout_p else None
    output, lse = backend.fwd(*inputs[:-1], rng_state)  # type: ignore[misc]
    if cum_seq_q is None:
        output = _swapped(output)
    state = query.new_empty(2, dtype=torch.uint64) if rng_state is None else rng_state.view(torch.uint64)
    return _like(output, query), lse, state, query.new_empty((), dtype=torch.uint64), query.new_empty(0)


def _flash_attention_forward_no_dropout_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | None:
    """As `_flash_attention_forward`, with the output in `out` -> logsumexp."""
    results = _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale,
        window_size_left=window_size_left, window_size_right=window_size_right, seqused_k=seqused_k,
        alibi_slopes=alibi_slopes, block_table=block_table, num_splits=num_splits,
    )  # fmt: skip
    if results is None:
        return None
    out.copy_(results[0])
    return results[1]


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """-> gradients of query, key and value, each laid out as that is."""
    op_and_inputs = _flash_inputs(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left,
        window_size_right,
    )  # fmt: skip
    if op_and_inputs is None:
        return None
    op, inputs = op_and_inputs
    backend = _backend(op, inputs)
    if backend is None:
        return None
    inputs = inputs._replace(rng_state=rng_state.view(torch.int64) if dropout_p else None)
    if cum_seq_q is None:
        grad_out, out = _swapped(grad_out), _swapped(out)
    gradients = _gradients(op, backend, inputs, grad_out, out, logsumexp.contiguous())
    if cum_seq_q is None:
        gradients = _swapped(gradients[0]), _swapped(gradients[1]), _swapped(gradients[2])
    return _like(gradients[0], query), _like(gradients[1], key), _like(gradients[2], value)


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor] | None:
    """`_flash_attention_forward` of (B, H, T, D); of the results that only packed sequences have, nothing."""
    results = _flash_attention_forward(
        _swapped(query), _swapped(key), _swapped(value), None, None, query.shape[2], key.shape[2], dropout_p, is_causal,
        return_debug_mask, scale=scale,
    )  # fmt: skip
    if results is None:
        return None
    output, lse, *rest = results
    return _swapped(output), lse, None, None, query.shape[2], key.shape[2], *rest  # type: ignore[return-value]


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`_flash_attention_backward` of (B, H, T, D)."""
    gradients = _flash_attention_backward(
        _swapped(grad_out), _swapped(query), _swapped(key), _swapped(value), _swapped(out), logsumexp, None, None,
        max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
    )  # fmt: skip
    return None if gradients is None else (_swapped(gradients[0]), _swapped(gradients[1]), _swapped(gradients[2]))


# On a CPU -----------------------------------------------------------------------------------------------------------


def _cpu_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Backend, ScaledDotProductAttentionInputs] | None:
    if dropout_p or query.dim() != 4 or not query.numel():
        return None
    if attn_mask is None and preference() == ("auto",) and native_is_fastest(query, key, is_causal, dropout_p):
        return None  # as `_backend` would say, only sooner
    if not _alike(query, key, value, 4):
        return None
    inputs = ScaledDotProductAttentionInputs(
        query, key, value, attn_mask, is_causal, _scale(query, scale), -1, -1, None, 0.0, None, False, 0.0, None
    )
    backend = _backend(SCALED_DOT_PRODUCT_ATTENTION, inputs)
    return None if backend is None else (backend, inputs)


def _scaled_dot_product_flash_attention_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """-> output, laid out as query, and logsumexp (B, H, T_q), which lies in memory as (B, T_q, H).

    Whoever ran here, ours or torch's, either of the two can run backward; torch's needs 0 for rows that see no key.
    """
    serving = _cpu_backend(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if serving is None:
        return None
    backend, inputs = serving
    output, lse = backend.fwd(*inputs)  # type: ignore[misc]
    if attn_mask is not None:
        lse = lse.masked_fill(lse == -math.inf, 0.0)
    return _like(output, query), _tokens_first(lse)


def _scaled_dot_product_flash_attention_for_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """-> gradients of query, key and value, which lie in memory as (B, T, H, D)."""
    serving = _cpu_backend(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if serving is None:
        return None
    backend, inputs = serving
    gradients = _gradients(SCALED_DOT_PRODUCT_ATTENTION, backend, inputs, grad_out, out, logsumexp)
    return _tokens_first(gradients[0]), _tokens_first(gradients[1]), _tokens_first(gradients[2])


# Registration -----------------------------------------------------------------------------------------------------

OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    "CUDA": (
        _flash_attention_forward,
        _flash_attention_forward_no_dropout_inplace,
        _flash_attention_backward,
        _scaled_dot_product_flash_attention,
        _scaled_dot_product_flash_attention_backward,
    ),
    "CPU": (_scaled_dot_product_flash_attention_for_cpu, _scaled_dot_product_flash_attention_for_cpu_backward),
}


class Override:
    """The functions of a dispatch key in place of torch's own kernels, which still do what those do not serve."""

    def __init__(self, key: str) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        for function in OPERATORS[key]:
            if hasattr(torch.ops.aten, function.__name__):  # not all releases have them all
                self._register(function, key)

    def _register(self, function: Callable[..., Any], key: str) -> None:
        name, own = function.__name__, None
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            own = torch.library.get_kernel(f"aten::{name}", key).call_boxed

        def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
            results = function(*args, **kwargs)
            if results is not None:
                return results
            if own is None:
                raise NotImplementedError(
                    f"{name}: needs a kernel of PyTorch's own for these inputs, got none for {key}"
                )
            return own(keys, *args, **kwargs)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            self.library.impl(name, run, key, with_keyset=True)

    def remove(self) -> None:
        self.library._destroy()


_registrations: list[Registration] = []
_cpu_override: Override | None = None
_replaced: str | None = None  # the implementation that was active before ours


def _settle() -> None:
    """Has in force what the registrations that are left ask for."""
    global _cpu_override, _replaced
    wanted = any(registration.cpu for registration in _registrations)
    if wanted and _cpu_override is None:
        _cpu_override = Override("CPU")
    elif not wanted and _cpu_override is not None:
        _cpu_override.remove()
        _cpu_override = None
    active = providers.current_flash_attention_impl()
    if _registrations and active != NAME:
        _replaced = active
        providers.register_flash_attention_impl(NAME, register_fn=lambda: Override("CUDA"))
        providers.activate_flash_attention_impl(NAME)
    elif not _registrations and active == NAME:
        _restore(_replaced)


def _restore(previous: str | None) -> None:
    if hasattr(providers, "restore_flash_attention_impl"):
        providers.restore_flash_attention_impl()
        if previous is not None:
            providers.activate_flash_attention_impl(previous)
    else:  # PyTorch 2.10 can activate an implementation, over another's, and not restore
        registry: Any = providers._registry
        registry._FLASH_ATTENTION_HANDLES.pop(NAME).remove()
        registry._FLASH_ATTENTION_ACTIVE = previous
