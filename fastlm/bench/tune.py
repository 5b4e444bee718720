"""Finding out which backend is the fastest here, for the user's own shapes: what "auto" goes by from then on.

A call is measured where it has been seen: `tune` runs the user's step and notes what every op was given, one call of
each bucket of sizes, then runs these calls again on random tensors of the same shapes, strides and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.bench.check import judge
from fastlm.bench.harness import compare, seconds_of
from fastlm.ops import measured
from fastlm.ops.registry import Choice, Op, asked, use_backend

LEAST_GAIN = 1.03  # times as fast as torch's own op that another must be: less may be noise
LEAST_SECONDS = 1e-3  # of one timing, which repeats a call that takes less
# Torch's own way holds the logits in full; however fast it is, it is not taken where they are larger than this.
LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Call:
    """A call of an op that was seen, without the data that do not matter: floating-point tensors that get values anew.

    Args:
        op: the op.
        inputs: its inputs; in the place of a tensor that is made anew an empty one on "meta" with its strides.
        training: whether gradients were enabled.
        device: of the tensors.
    """

    op: Op
    inputs: Any
    training: bool
    device: torch.device

    @classmethod
    def of(cls, choice: Choice) -> Call:
        inputs = choice.inputs
        kept = [_kept(name, x) for name, x in zip(inputs._fields, inputs, strict=True)]
        return cls(choice.op, type(inputs)(*kept), torch.is_grad_enabled(), inputs[0].device)

    @property
    def place(self) -> tuple[str, str, str, str]:
        """Where the measurement belongs: device, op, dtype, bucket of sizes."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        bucket = measured.bucket(self.op.sizes(self.inputs), self.training)
        dtype = str(self.inputs[0].dtype).removeprefix("torch.")
        return measured.device_name(self.device, threads), self.op.name, dtype, bucket

    def __str__(self) -> str:
        sizes = " ".join(str(size) for size in self.op.sizes(self.inputs) if size != "")
        dtype = str(self.inputs[0].dtype).removeprefix("torch.")
        return f"{self.op.name} {sizes} {dtype}{'' if self.training else ' inference'}"

    def made(self, seed: int = 0) -> Any:
        """Inputs with data: the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        fields = zip(self.inputs._fields, self.inputs, strict=True)
        made = [_made(name, x, self.device, generator) if isinstance(x, Tensor) else x for name, x in fields]
        return type(self.inputs)(*made)


@dataclass(frozen=True)
class Winner:
    """The fastest backend for a call, how many times as fast as torch's own op, and why others were not measured."""

    call: Call
    backend: str
    ratio: float
    rejected: dict[str, str]


def tune(
    step: Callable[[], object] | Iterable[Callable[[], object]],
    *,
    seconds: float = 0.5,
    again: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Winner]:
    """Finds the fastest backend of every op that a step calls, on this device, and has "auto" take it from then on.

    Runs `step` once, in eager mode (a compiled one hides its calls), then every kind of call that was seen with every
    backend that can serve it: PyTorch's own op first, against which the others must be right (the error rule of
    `fastlm bench`) and at least 3% faster. The winners go to `tuned.json` in the cache's folder (`$FASTLM_CACHE`, else
    `~/.cache/fastlm`), for this device, number of threads, and these versions of FastLM and torch; sizes between the
    same powers of two share a measurement. Linear cross-entropy stays ours where torch's logits would take more than
    64 MiB.

    Args:
        step: what is to become fast, e.g. `lambda: model(tokens, labels=tokens).loss.backward()`; or several such.
        seconds: of measurement for each call.
        again: also measure what has been measured before.
        tell: is given a line for each result.

    Returns:
        What was measured now.
    """
    steps = [step] if callable(step) else step
    calls: dict[tuple[str, str, str, str], Call] = {}

    def note(choice: Choice) -> None:
        sizes = choice.op.sizes(choice.inputs)
        if choice.names == ("auto",) and not choice.plain and choice.inputs[0].numel() and "autocast" not in sizes:
            call = Call.of(choice)
            calls.setdefault(call.place, call)

    with asked(note):
        for one in steps:
            one()
    if not again:
        known = measured.entries()
        calls = {at: call for at, call in calls.items() if not _found(known, at)}
    winners = []
    for n, (place, call) in enumerate(calls.items()):
        winner = _fastest(call, seconds)
        if winner is not None:
            entry = {"backend": winner.backend, "times as fast": round(winner.ratio, 3), "measured": str(call)}
            measured.keep({place: entry})
            winners.append(winner)
            tell(f"[{n + 1}/{len(calls)}] {call}: {winner.backend}{_in_words(winner)}")
    return winners


def _found(entries: dict[str, Any], place: Sequence[str]) -> bool:
    found: Any = entries
    for key in place:
        found = found.get(key, {})
    return bool(found)


def _in_words(winner: Winner) -> str:
    ratio = f", {winner.ratio:.2f} times as fast as torch's own" if winner.backend != "native" else ""
    return "".join([ratio, *(f"; not {name}: {reason}" for name, reason in winner.rejected.items())])


def _fastest(call: Call, seconds: float) -> Winner | None:
    """None where there is no choice."""
    op, inputs = call.op, call.made()
    names = [name for name in op.backends if not op.backends[name].unfit(inputs)]
    if "native" in names and _holds_too_much(op, inputs):
        names.remove("native")
    if len(names) > 1 and op.auto[0] != "reference":
        names.remove("reference")
    if len(names) < 2:
        return None
    rejected = {}
    for name in [name for name in names if name not in ("native", "reference")]:
        if wrong := _wrong(call, name):
            rejected[name] = wrong
            names.remove(name)
    if len(names) < 2:
        return Winner(call, names[0], 1.0, rejected) if names else None
    sides = {name: _timed(call, name, call.made()) for name in names}
    times = compare(str(call), sides, seconds=seconds, number=_number(sides[names[0]]), least=5)
    first = min(names, key=times.median)
    if "native" not in names:
        return Winner(call, first, times.ratio(first, *(name for name in names if name != first)), rejected)
    ratio = times.ratio(first, "native") if first != "native" else 1.0
    return Winner(call, first, ratio, rejected) if ratio >= LEAST_GAIN else Winner(call, "native", 1.0, rejected)


def _holds_too_much(op: Op, inputs: Any) -> bool:
    if op.name != "linear_cross_entropy":
        return False
    classes, features = inputs.linear_weight.shape
    return inputs.input.numel() // max(1, features) * classes * inputs.input.element_size() > LOGITS_BYTES


# Calls with data ----------------------------------------------------------------------------------------------------

_AS_GIVEN = frozenset({"target", "attn_mask", "alibi_slopes", "weight_scale"})  # whose values matter


def _kept(name: str, x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if name in _AS_GIVEN or not x.is_floating_point():
        return x.detach().clone().requires_grad_(x.requires_grad)
    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return like.requires_grad_(x.requires_grad)


def _made(name: str, x: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    if x.device.type != "meta":
        return x.detach().clone().requires_grad_(x.requires_grad)
    shape = [1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)]
    made = torch.empty_strided(shape, x.stride(), dtype=x.dtype, device=device)
    matrix = name.endswith("weight") and x.dim() == 2  # whose products are to be of the size of what it is applied to
    made.normal_(std=x.shape[1] ** -0.5 if matrix and x.shape[1] else 1.0, generator=generator)
    return made.expand(x.shape).requires_grad_(x.requires_grad)


def _ran(call: Call, name: str, inputs: Any, upstream: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the inputs that want them; `upstream` is filled at the first run."""
    backend = call.op.backends[name]
    with torch.set_grad_enabled(call.training):
        # Torch's own op as it is without FastLM; ours as "auto" would call them.
        result = backend.call(*inputs) if backend.call is not None else call.op.choose(inputs)(*inputs)
        outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if isinstance(y, Tensor)]
        ends = [y for y in outputs if y.requires_grad]
        if not ends:
            return outputs, []
        if not upstream:
            upstream.extend(torch.randn_like(y) for y in ends)
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        given = [grad.to(y.dtype) for grad, y in zip(upstream, ends, strict=True)]
        return outputs, list(torch.autograd.grad(ends, leaves, given))


def _timed(call: Call, name: str, inputs: Any) -> Callable[[], object]:
    upstream: list[Tensor] = []
    return use_backend(name)(lambda: _ran(call, name, inputs, upstream))


def _number(run: Callable[[], object]) -> int:
    """How often a call is to run within one timing."""
    run()
    return max(1, min(1000, round(LEAST_SECONDS / seconds_of(run))))


def _wrong(call: Call, name: str) -> str:
    """How a backend's outputs or gradients break the error rule; "" if they do not. Dropout has masks of its own."""
    if "dropout" in call.op.sizes(call.inputs):
        return ""
    wide = [x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.made()]
    for x, like in zip(wide, call.inputs, strict=True):
        if isinstance(like, Tensor):
            x.requires_grad_(like.requires_grad)
    unfit = call.op.backends["native"].unfit
    oracle, given = ("reference" if unfit(x) else "native" for x in (call.inputs._make(wide), call.made()))
    upstream: list[Tensor] = []
    try:
        torchs = use_backend(given)(_ran)(call, given, call.made(), upstream)
        exact = use_backend(oracle)(_ran)(call, oracle, call.inputs._make(wide), upstream)
        ours = use_backend(name)(_ran)(call, name, call.made(), upstream)
    except RuntimeError as failure:
        return f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    outputs = len(torchs[0])
    for number, each in enumerate(zip(*([*y, *gradients] for y, gradients in (ours, torchs, exact)), strict=True)):
        what = f"output {number}" if number < outputs else f"gradient {number - outputs}"
        _, wrong = judge(each[0], each[1], each[2], what)
        if wrong:
            return wrong
    return ""
