"""Chooses the backend that serves a call, and binds an op to torch. This is the only dispatch code in FastLM.

An `Op` is one public function: its torch schemas, its autograd and its table of backends. A `Backend` says which
devices and dtypes it serves and gives the `reasons` why it cannot serve particular inputs. Choosing walks a list of
names and takes the first backend without a reason; if none is left, the error shows every candidate's reasons.

The public function chooses, and calls torch's own op, or ours, directly: a call through torch's dispatcher would cost
more than a small kernel does. Where something watches the dispatcher (a compiler, a mode, a tensor subclass, the
profiler), the call goes through `torch.ops.fastlm.<op>_fwd` and `_bwd`, which choose inside, so that no compiler traces
the choice.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as _keeps_graph
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

from fastlm.ops.checks import TENSORS
from fastlm.ops.measured import Sizes, entries, fastest, tuned

KNOWN_NAMES = ("auto", "cuda", "triton", "cpu", "native", "reference")
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

LIBRARY = torch.library.Library("fastlm", "DEF")
OPS: dict[str, Op] = {}


class BackendError(RuntimeError):
    """None of the backends asked for can serve the call; the text lists every candidate's reasons."""


def _none(inputs: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: what `use_backend` and `explain` call it.
        devices: device types it serves, None for any.
        dtypes: dtypes of the op's first tensor that it serves.
        reasons: given the op's inputs (its named tuple), why it cannot serve them; empty if it can.
        call: takes the op's inputs and runs outside `torch.ops.fastlm`, under torch's own autograd.
        fwd, bwd: what runs inside `torch.ops.fastlm.<op>_fwd` and `_bwd`; same arguments but for `backend`. Of a
            gradient that is not needed `bwd` may return anything. A backend has either `call`, or `fwd` and `bwd`.
        available: "" or why it cannot run at all on this machine or in this installation.
        copies: what it would copy of these inputs, for `explain`.
    """

    name: str
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = FLOATS
    reasons: Callable[[Any], list[str]] = _none
    call: Callable[..., Any] | None = None
    fwd: Callable[..., Any] | None = None
    bwd: Callable[..., Any] | None = None
    available: Callable[[], str] = str
    copies: Callable[[Any], list[str]] = _none

    def unfit(self, inputs: Any) -> list[str]:
        """Why this backend cannot serve `inputs`; empty if it can."""
        tensor = inputs[0]
        if self.devices is not None:
            device = "cpu" if tensor.is_cpu else tensor.device.type
            if device not in self.devices:
                return [f"serves {', '.join(sorted(self.devices))} tensors, got {device}"]
        if tensor.dtype not in self.dtypes:
            return [f"does not serve {tensor.dtype}"]
        missing = self.available()
        return [missing] if missing else self.reasons(inputs)


class Op:
    """A public function of `fastlm.functional`: torch schemas, autograd and backends, bound together by names.

    The two schemas say almost everything, by name. In `bwd`, `grad_<output>` is an upstream gradient (None when that
    output was not used), the name of an argument or of a result of `fwd` is what backward needs of it (a tensor among
    them is saved), `<input>_dtype` is that input's dtype, and `needs_grad` says which of the returned `grad_<input>`
    are wanted; the others are returned empty. Both end with `backend`, names in order of preference.

    Args:
        name: the stem that every layer shares (`layer_norm`).
        inputs: the named tuple of the forward arguments, which `reasons` are given; its first field is a tensor.
        fwd, bwd: schemas, without the op's name. The reference's `bwd` must be differentiable, and form the statistics
            (results of `fwd` that have no gradient) anew where it is given None: that is the double backward.
        fake_fwd: output tensors without data. Backward's follow from its names.
        composite: the same function of the same inputs in plain differentiable torch operations: what a compiler
            decomposes to, and what function transforms and gradients that `bwd` lacks run through.
        auto: backends in the order in which "auto" tries them.
        sizes: from the inputs, what it depends on which backend is the fastest: numbers, and names of options.
        measured: the backend that a measurement puts first for such inputs, "" for none; else measured.json says it.
            The user's own measurement (`fastlm tune`) comes before it.
        fusable: under `torch.compile`, "auto" decomposes so that the op can be fused with its neighbours.
        result: the public result, from the outputs of `fwd` and the inputs.
        draws: the last two inputs are `dropout_p` and `rng_state`, which is drawn when one of our implementations runs.
        beyond_bwd: why these inputs need gradients that `bwd` does not give; empty if they do not.
        stand_ins: for inputs that backward does not keep, the saved tensor that backends may look at instead.
        in_place: the backends' `bwd` take a last argument `in_place`: whether they may overwrite what was saved, as
            they may when autograd calls them directly for the last time. A call through `torch.ops.fastlm`, whose
            schema promises not to, may not.
        one_gradient: from the arguments of `bwd` by name, whether its first two gradients are equal: then only the
            second is asked for, and both inputs get that tensor, as torch's own addition does it.
        key: from the inputs, all that the choice among backends depends on besides `measured`, so that it is made once
            for each.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Any,
        fwd: str,
        bwd: str,
        fake_fwd: Callable[..., Any],
        composite: Callable[..., Any],
        auto: tuple[str, ...],
        fusable: bool,
        result: Callable[[tuple[Tensor, ...], Any], Any],
        sizes: Callable[[Any], Sizes],
        draws: bool = False,
        measured: Callable[[Any], str] | None = None,
        beyond_bwd: Callable[[Any], list[str]] = _none,
        stand_ins: dict[str, str] | None = None,
        in_place: bool = False,
        one_gradient: Callable[[dict[str, Any]], bool] | None = None,
        key: Callable[[Any], tuple[Any, ...]] | None = None,
    ) -> None:
        self.name, self.auto, self.fusable = name, auto, fusable
        self.inputs, self.draws, self.one_gradient = inputs, draws, one_gradient
        self.sizes, self._measured = sizes, measured
        self.composite = self._seeded(composite)
        self.result, self.beyond_bwd, self.stand_ins = result, beyond_bwd, stand_ins or {}
        self.key, self.in_place = key, in_place
        self.backends: dict[str, Backend] = {}
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.calls: dict[str, Callable[..., Any]] = {}
        self.fwd = _define(f"{name}_fwd{fwd}", self._run_fwd, fake_fwd)
        self.bwd = _define(f"{name}_bwd{bwd}", self._run_bwd, self._fake_bwd)
        self.function = _autograd_function(self)
        LIBRARY.impl(f"{name}_fwd", self._autograd, "Autograd")
        OPS[name] = self

    # Choosing ---------------------------------------------------------------------------------------------------

    def choose(self, inputs: Any) -> Callable[..., Any]:
        """The callable that serves `inputs`; call it with `*inputs`."""
        names = preference()
        if torch.compiler.is_compiling():
            return self._choose_for_compiler(inputs, names)
        plain = self._beyond_op(inputs)
        key = None
        if self.key is not None and not plain and _state.asked is None:
            key = (names, self.measured(inputs), self.key(inputs))
            if (known := self._chosen.get(key)) is not None:
                return known
        rejected = {}
        chosen = None
        for name in self._expand(names, inputs):
            reasons, call = self._candidate(name, inputs, plain)
            if not reasons:
                chosen = name
                break
            rejected[name] = reasons
        if _state.asked is not None:
            _state.asked(Choice(self, inputs, names, chosen, rejected, plain))
        if chosen is None:
            raise BackendError(self._complaint(inputs, names, rejected))
        if key is not None:
            self._chosen[key] = call
        return call

    def auto_alone(self) -> bool:
        """Whether only a measurement stands between a plain call and torch's own op.

        That is so where "auto" decides, torch's op comes first, and neither a compiler nor a transform is under way. A
        public function may then ask `fastest` and call what it says without the way through `choose`, which takes
        longer than a small kernel.
        """
        return (
            preference() == ("auto",)
            and self.auto[0] == "native"
            and _state.asked is None
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )

    def _expand(self, names: tuple[str, ...], inputs: Any) -> Sequence[str]:
        if names == ("auto",):
            return self._auto(inputs)
        return [each for name in names for each in (self._auto(inputs) if name == "auto" else (name,))]

    def measured(self, inputs: Any) -> tuple[str, ...]:
        """The backends that measurements put first, the user's own and FastLM's."""
        # A compiler cannot trace the tables, and need not: an opaque op chooses when it runs.
        compiling = torch.compiler.is_compiling()
        if self._measured is not None:
            ours = self._measured(inputs)
        else:
            ours = "" if compiling else fastest(self.name, inputs[0])
        if not compiling and entries() and (users := tuned(self.name, inputs[0], self.sizes(inputs))):
            return (users, ours) if ours and ours != users else (users,)
        return (ours,) if ours else ()

    def _auto(self, inputs: Any) -> tuple[str, ...]:
        first = self.measured(inputs)
        return (*first, *(name for name in self.auto if name not in first)) if first else self.auto

    def _candidate(self, name: str, inputs: Any, plain: list[str]) -> tuple[list[str], Any]:
        backend = self.backends.get(name)
        if backend is None:
            return self._unknown(), None
        if reasons := backend.unfit(inputs):
            return reasons, None
        if backend.call is not None:
            return [], backend.call
        if not plain:
            return [], self.calls[name]
        return ([], self.composite) if name == "reference" else (plain, None)

    def _beyond_op(self, inputs: Any) -> list[str]:
        """Why only plain torch operations will do: a custom op has first-order reverse-mode gradients and no more."""
        if torch._C._are_functorch_transforms_active():
            return ["does not run under torch.func transforms (vmap, grad, jvp)"]
        if forward_ad._current_level >= 0:
            return ["has no forward-mode derivative"]
        return self.beyond_bwd(inputs)

    def _choose_for_compiler(self, inputs: Any, names: tuple[str, ...]) -> Callable[..., Any]:
        """What a compiler traces: torch's own op, its decomposition, or our opaque op that chooses when it runs."""
        auto = names == ("auto",)
        for name in self._auto(inputs) if auto else names:
            backend = self.backends.get(name)
            if backend is not None and backend.call is not None:
                if not backend.unfit(inputs):
                    return backend.call
            elif not (auto and self.fusable) and not self.beyond_bwd(inputs):
                return functools.partial(self._through_op, ",".join(names))
        if auto or "reference" in names:
            return self.composite
        return functools.partial(self._through_op, ",".join(names))  # which raises with the reasons when it runs

    def _through_op(self, names: str, *inputs: Any) -> Any:
        return self._seeded(lambda *inputs: self.result(self.fwd(*inputs, names), inputs))(*inputs)

    def _through_function(self, name: str) -> Callable[..., Any]:
        # Function.apply without its preparations for torch.func, under which this is never called.
        apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        result, run = self.result, self._eager_fwd

        def call(*inputs: Any) -> Any:
            if torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in inputs]):
                return result(apply(*inputs, name), inputs)
            return result(run(*inputs, name), inputs)

        return self._seeded(call)

    def _eager_fwd(self, *args: Any) -> Any:
        """`fwd` below autograd, past the dispatcher if nothing watches it. The last argument names the backend."""
        backend = self.backends.get(args[-1])
        if backend is None or backend.fwd is None or _watched(args):
            with torch._C._AutoDispatchBelowAutograd():
                return self.fwd(*args)
        if args[0].numel() == 0:
            backend = self.backends["reference"]
        return backend.fwd(*args[:-1])  # type: ignore[misc]

    def _eager_bwd(self, *args: Any) -> Any:
        backend = self.backends.get(args[-1])
        if backend is None or backend.bwd is None or _watched(args):
            return self.bwd(*args)
        return backend.bwd(*args[:-1], not _keeps_graph()) if self.in_place else backend.bwd(*args[:-1])

    def _seeded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with a fresh `rng_state` as last input where dropout needs one."""
        if not self.draws:
            return call
        draw = torch.ops.fastlm.new_rng_state

        def seeded(*inputs: Any) -> Any:
            return call(*inputs[:-1], draw(inputs[0]) if inputs[-2] else None)

        return seeded

    def _kernel(self, inputs: Any, names: str) -> Backend:
        """The backend that runs inside the op: as `choose`, among those that have `fwd` and `bwd`."""
        rejected = {}
        for name in self._expand(_parse(names), inputs):
            backend = self.backends.get(name)
            if backend is None:
                rejected[name] = self._unknown()
            elif reasons := backend.unfit(inputs):
                rejected[name] = reasons
            elif backend.fwd is None:
                rejected[name] = [f"runs outside torch.ops.fastlm.{self.name}_fwd"]
            else:
                return backend if inputs[0].numel() else self.backends["reference"]  # no kernel meets an empty input
        raise BackendError(self._complaint(inputs, _parse(names), rejected))

    def _unknown(self) -> list[str]:
        return [f"{self.name} has no such backend here; it has {', '.join(self.backends)}"]

    def _complaint(self, inputs: Any, names: tuple[str, ...], rejected: dict[str, list[str]]) -> str:
        lines = [f"{self.name}: no backend of {','.join(names)!r} can serve these inputs", *describe(inputs)]
        return "\n".join([*lines, *(f"  {name}: {'; '.join(reasons)}" for name, reasons in rejected.items())])

    # Running ----------------------------------------------------------------------------------------------------

    def _run_fwd(self, *args: Any) -> Any:
        outputs = self._kernel(self.inputs._make(args[:-1]), args[-1]).fwd(*args[:-1])  # type: ignore[misc]
        # Contiguous whatever the inputs are, so that a compiler knows the strides.
        return outputs.contiguous() if isinstance(outputs, Tensor) else tuple(y.contiguous() for y in outputs)

    def _run_bwd(self, *args: Any) -> Any:
        given = dict(zip(self._bwd_names, args, strict=True))
        fields = self.inputs._fields
        inputs = self.inputs(*(given.get(self.stand_ins.get(name, name)) for name in fields))
        args = (*args[:-1], False) if self.in_place else args[:-1]
        gradients = self._kernel(inputs, given["backend"]).bwd(*args)  # type: ignore[misc]
        if isinstance(gradients, Tensor):
            return gradients.contiguous()
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        pairs = zip(gradients, given["needs_grad"], strict=True)
        return tuple(gradient.contiguous() if wanted else tensor.new_empty(0) for gradient, wanted in pairs)

    def _fake_bwd(self, *args: Any) -> Any:
        given = dict(zip(self._bwd_names, args, strict=True))
        grads = []
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        for name, wanted in zip(self.differentiable, given["needs_grad"], strict=True):
            like: Any = given.get(self.stand_ins.get(name, name))
            dtype = given.get(f"{name}_dtype")
            grads.append(like.new_empty(like.shape, dtype=dtype or like.dtype) if wanted else tensor.new_empty(0))
        return tuple(grads) if len(grads) > 1 else grads[0]

    @functools.cached_property
    def _bwd_names(self) -> list[str]:
        return [argument.name for argument in self.bwd._schema.arguments]

    @functools.cached_property
    def differentiable(self) -> list[str]:
        """Names of the inputs that `bwd` gives gradients of, in its order."""
        return [output.name.removeprefix("grad_") for output in self.bwd._schema.returns]

    def _autograd(self, *args: Any) -> Any:
        """The op's autograd kernel, for callers of `torch.ops.fastlm` and for compilers."""
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return self.function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.fwd(*args)

    def register(self, backend: Backend, *, before: str | None = None) -> None:
        """Adds or replaces a backend; `before` also puts it into the order of "auto", ahead of that one."""
        if (backend.call is None) == (backend.fwd is None) or (backend.fwd is None) != (backend.bwd is None):
            raise ValueError(f"{self.name}: backend {backend.name!r} needs either call, or fwd and bwd")
        if not backend.name.isidentifier() or backend.name == "auto":
            raise ValueError(f"{self.name}: backend name must be an identifier other than 'auto', got {backend.name!r}")
        if before is not None and before not in self.auto:
            raise ValueError(f"{self.name}: before must be one of {', '.join(self.auto)}, got {before!r}")
        self.backends[backend.name] = backend
        self.calls[backend.name] = self._through_function(backend.name)
        self._chosen.clear()
        if before is not None:
            order = [name for name in self.auto if name != backend.name or name == before]
            if backend.name != before:
                order.insert(order.index(before), backend.name)
            self.auto = tuple(order)


def _watched(args: Sequence[Any]) -> bool:
    """Whether someone would miss a call that does not go through torch's dispatcher."""
    if torch._C._len_torch_dispatch_stack() or _profiler_enabled() or torch._C._get_tracing_state() is not None:
        return True
    for arg in args:
        if type(arg) not in TENSORS and isinstance(arg, Tensor):
            return True
    return False


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastlm, name).default


def _autograd_function(op: Op) -> Any:
    """First-order reverse mode: `fwd` below autograd, then `bwd` on what it names."""
    arguments = [argument.name for argument in op.fwd._schema.arguments]
    outputs = [output.name for output in op.fwd._schema.returns]
    names = [name for name in op._bwd_names if name not in ("needs_grad", "backend")]
    upstream = [outputs.index(name.removeprefix("grad_")) for name in names if name.startswith("grad_")]
    statistics = {name: n for n, name in enumerate(outputs) if n not in upstream}
    kept = names[len(upstream) :]
    tensors = {a.name for a in op.bwd._schema.arguments if "Tensor" in str(a.type)}
    saved_inputs = [arguments.index(name) for name in kept if name in tensors and name in arguments]
    saved_outputs = [outputs.index(name) for name in kept if name in tensors and name in outputs]
    others = [name for name in kept if name not in tensors]
    dtypes = {name: arguments.index(name.removesuffix("_dtype")) for name in others if name.endswith("_dtype")}
    scalars = [arguments.index(name) for name in others if name not in dtypes]
    order = [*[arguments[n] for n in saved_inputs], *[outputs[n] for n in saved_outputs]]
    assert kept == [*order, *[arguments[n] for n in scalars], *dtypes], f"{op.name}_bwd: arguments out of order"
    differentiable = [arguments.index(name) for name in op.differentiable]
    inputs_of, outputs_of = _picker(saved_inputs), _picker(saved_outputs)
    scalars_of, typed_of = _picker(scalars), _picker(list(dtypes.values()))
    statistics_of = _picker(list(statistics.values()))

    def forward(ctx: Any, *args: Any) -> Any:
        results = op._eager_fwd(*args)
        ctx.save_for_backward(*inputs_of(args), *outputs_of(results))
        backend = args[-1] if args[0].numel() else "reference"
        ctx.rest = (*scalars_of(args), *[tensor.dtype for tensor in typed_of(args)], backend)
        ctx.mark_non_differentiable(*statistics_of(results))
        ctx.set_materialize_grads(False)
        return results

    def backward(ctx: Any, *grads: Any) -> Any:
        result: list[Tensor | None] = [None] * len(arguments)
        if all([grads[n] is None for n in upstream]):
            return tuple(result)
        needs_grad = [ctx.needs_input_grad[n] for n in differentiable]
        given, saved, (*rest, backend) = [grads[n] for n in upstream], ctx.saved_tensors, ctx.rest
        both = False
        if op.one_gradient is not None and needs_grad[0] and needs_grad[1]:
            both = op.one_gradient(dict(zip(kept, (*saved, *rest), strict=True)))
            needs_grad[0] = not both
        if torch.is_grad_enabled():  # double backward: the reference's is differentiable, if it forms statistics anew
            saved = [tensor if name not in statistics else None for name, tensor in zip(kept, saved, strict=False)]
            gradients = op.backends["reference"].bwd(*given, *saved, *rest, needs_grad)  # type: ignore[misc]
        else:
            gradients = op._eager_bwd(*given, *saved, *rest, needs_grad, backend)
        gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
        for n, wanted, gradient in zip(differentiable, needs_grad, gradients, strict=True):
            result[n] = gradient if wanted else None
        if both:
            result[differentiable[0]] = result[differentiable[1]]
        return tuple(result)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op.name, (torch.autograd.Function,), members)


def _picker(places: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The elements at certain places of a sequence, as a tuple."""
    if len(places) < 2:
        return lambda sequence: [sequence[n] for n in places]
    return operator.itemgetter(*places)


def register_backend(op: str, backend: Backend, *, before: str | None = None) -> None:
    """Adds a backend to an op, for this project and for other packages alike.

    Args:
        op: the op's name, e.g. "layer_norm".
        backend: what it is called, what it serves and how it runs.
        before: also let "auto" consider it, ahead of the backend of this name.

    Raises:
        ValueError: unknown op, or a backend that is not complete.
    """
    if op not in OPS:
        raise ValueError(f"register_backend: unknown op {op!r}; known: {', '.join(OPS)}")
    OPS[op].register(backend, before=before)


# Preference -----------------------------------------------------------------------------------------------------


def _parse(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


class _State(threading.local):
    def __init__(self) -> None:  # no attributes of the class: the compiler of torch 2.10 reads those in their place
        self.names: tuple[str, ...] | None = None  # set by `with use_backend(...)` and by its decorator, per thread
        self.asked: Callable[[Choice], None] | None = None  # is told of every choice


_state = _State()
_setters: collections.deque[use_backend] = collections.deque(maxlen=64)  # process-wide, the latest wins
_environment = _parse(os.environ.get("FASTLM_BACKEND") or "auto")
_default = _environment  # the latest setter's names; a plain global, which a compiler can guard on


def preference() -> tuple[str, ...]:
    """Backend names in order of preference: the enclosing `use_backend`, else the global one, else the environment."""
    return _default if _state.names is None else _state.names


def _checked(names: str, where: str) -> tuple[str, ...]:
    known = [*KNOWN_NAMES, *sorted({name for op in OPS.values() for name in op.backends} - set(KNOWN_NAMES))]
    for name in (parsed := _parse(names)):
        if name not in known:
            raise ValueError(f"{where}: unknown backend {name!r}; known: {', '.join(known)}")
    return parsed


class use_backend:
    """Chooses the backend: a context manager, a decorator, and when neither, a setter for the whole process.

    Args:
        name: "auto", or a backend's name, or several separated by commas in order of preference. A named backend that
            cannot serve a call raises `BackendError` with the reasons; only "auto" (alone or last in the list) falls
            back. Backward runs where forward ran.

    Without a call, the environment variable FASTLM_BACKEND decides, else "auto".

    Example:
        >>> with fastlm.use_backend("reference"):
        ...     loss = model(input_ids, labels=labels).loss
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"use_backend: name must be a string, got {type(name).__name__}")
        self.names = _checked(name, "use_backend")
        self._outer: list[tuple[str, ...] | None] = []
        _setters.append(self)
        _publish()

    def _local(self) -> None:
        """Takes back the process-wide setting of the constructor: this is a context manager or a decorator."""
        if self in _setters:
            _setters.remove(self)
            _publish()

    def __enter__(self) -> None:
        self._local()
        self._outer.append(_state.names)
        _state.names = self.names

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _state.names = self._outer.pop()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self._local()

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer, _state.names = _state.names, self.names
            try:
                return function(*args, **kwargs)
            finally:
                _state.names = outer

        return wrapped


def _publish() -> None:
    global _default
    _default = _setters[-1].names if _setters else _environment


# Explaining -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One call's: what was asked for, the backend that was chosen (None if nothing fits), and what was rejected.

    `plain` is why only plain torch operations would do, if so.
    """

    op: Op
    inputs: Any
    names: tuple[str, ...]
    chosen: str | None
    rejected: dict[str, list[str]]
    plain: list[str]


class _Explained(Exception):
    def __init__(self, choice: Choice) -> None:
        self.choice = choice


class Explanation:
    """What `explain` found; `str()` of it is a report. `backend` is the choice, None if nothing fits; `tuned` whether a
    measurement of the user's own (`fastlm tune`) made it."""

    def __init__(self, choice: Choice) -> None:
        op, inputs, chosen, rejected = choice.op, choice.inputs, choice.chosen, choice.rejected
        self.op, self.backend, self.preference = op.name, chosen, choice.names
        self.inputs = describe(inputs)
        self.reasons = dict(rejected)
        for name in op.backends:
            if name != chosen and name not in rejected:
                reasons, _ = op._candidate(name, inputs, choice.plain)
                self.reasons[name] = reasons or [
                    "can serve, ranked after the choice" if name in op.auto else "can serve when named"
                ]
        self.copies = op.backends[chosen].copies(inputs) if chosen else []
        users = tuned(op.name, inputs[0], op.sizes(inputs)) if "auto" in choice.names and entries() else ""
        self.tuned = bool(users) and users == chosen

    def __str__(self) -> str:
        asked = f"asked for: {','.join(self.preference)}{'; measured by fastlm tune' if self.tuned else ''}"
        lines = [f"{self.op}: {self.backend or 'no backend'} ({asked})", *self.inputs]
        lines += [f"  copies {copy}" for copy in self.copies]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend would run `function(*args, **kwargs)`, why the others would not, and what would be copied.

    Nothing is computed: the call stops at the very point where the backend has been chosen.

    Args:
        function: one of `fastlm.functional`, e.g. `F.layer_norm`.

    Raises:
        TypeError: `function` does not dispatch. Whatever the function raises for bad arguments.
    """
    with asked(_raise):
        try:
            function(*args, **kwargs)
        except _Explained as found:
            return Explanation(found.choice)
    raise TypeError(f"explain: expected a function of fastlm.functional that has backends, got {function!r}")


def _raise(choice: Choice) -> None:
    raise _Explained(choice)


@contextlib.contextmanager
def asked(tell: Callable[[Choice], None]) -> Iterator[None]:
    """In this thread every call of an op in eager mode tells which backend it has chosen, before it runs."""
    outer, _state.asked = _state.asked, tell
    try:
        yield
    finally:
        _state.asked = outer


def describe(inputs: Any) -> list[str]:
    """The op's inputs, a line each: tensors by dtype, shape, strides and device."""
    lines = []
    for name, value in zip(inputs._fields, inputs, strict=True):
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            value = f"{dtype} {tuple(value.shape)} strides {value.stride()} {value.device}"
        lines.append(f"  {name} = {value}")
    return lines
