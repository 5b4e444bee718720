"""Makes a model that exists faster: its layers become FastLM's in place, by their class alone.

A layer keeps its parameters, buffers, hooks, name, device, dtype and mode, because it stays the object that it was; and
copies, pickles and checkpoints of the model are what they were, because FastLM's layers keep nothing of their own.
"""

from __future__ import annotations

import collections
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastlm import nn
from fastlm.ops.registry import FLOATS

__all__ = ["Change", "Report", "accelerate"]


@dataclass(frozen=True)
class Change:
    """One thing that `accelerate` did.

    Args:
        name: of the module, as in `named_modules`; "" is the model.
        before, after: what it was and is, a class or a setting.
        undo: makes it what it was.
    """

    name: str
    before: str
    after: str
    undo: Callable[[], None]


@dataclass
class Report:
    """What `accelerate` did, what it left alone, and why; `str()` of it is for people.

    Args:
        model: what was accelerated.
        swapped: every change, in order.
        left: name of a module -> why it is as it was.
    """

    model: torch.nn.Module
    swapped: list[Change] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def undo(self) -> None:
        """Takes every change back that nobody else has changed since. A copy of the model is not touched."""
        for change in reversed(self.swapped):
            change.undo()
        self.swapped.clear()

    def swap(self, name: str, module: torch.nn.Module, ours: type) -> None:
        """Gives a module the class `ours`."""
        theirs = type(module)

        def undo() -> None:
            if type(module) is ours:
                module.__class__ = theirs

        module.__class__ = ours
        self.swapped.append(Change(name, _title(theirs), _title(ours), undo))

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.swapped)} changes, {len(self.left)} layers left as they were"]
        kinds: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for change in self.swapped:
            kinds[change.before, change.after].append(change.name)
        for (before, after), names in kinds.items():
            lines.append(f"  {before} -> {after}: {_listed(names)}")
        reasons: dict[str, list[str]] = collections.defaultdict(list)
        for name, reason in self.left.items():
            reasons[reason].append(name)
        lines += [f"  not {_listed(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(model: torch.nn.Module, *, unpad: bool = True) -> Report:
    """Gives a model's layers FastLM's forward, in place.

    Swapped are the layers of torch.nn that `fastlm.nn` has, and GPT-2, BERT and BLOOM of Hugging Face's `transformers`
    (`fastlm.transformers`). Outputs and gradients stay the same but for rounding, and so do parameters, buffers and the
    keys of `state_dict`, hooks, tied weights, device, dtype and mode; `deepcopy`, pickle, DDP and `torch.compile` work
    as before.

    A layer is left alone, and the report says why, if its class is not exactly the one that FastLM's stands for, or its
    forward was replaced.

    Args:
        model: any module; it may be wrapped (DDP).
        unpad: where a mask (B, T) has padding, a BERT of `transformers` computes the tokens alone, and hidden states at
            padding are 0. False: padding is computed too.

    Returns:
        What was done and what was not; its `undo()` takes it back.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> report = fastlm.accelerate(model)
        >>> print(report)
        >>> report.undo()
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    report, ours = Report(model), dict(nn.OURS)
    kept: dict[str, str] = {}
    modules = dict(model.named_modules())
    if any(kind.__module__.startswith("transformers.") for module in modules.values() for kind in type(module).__mro__):
        try:
            huggingface = importlib.import_module("fastlm.transformers")
        except (AttributeError, ImportError) as error:
            report.left[""] = f"FastLM does not know this version of transformers: {error}"
        else:
            ours |= huggingface.OURS
            kept = huggingface.configure(report, unpad)
    for name, module in modules.items():
        theirs = next((kind for kind in type(module).__mro__ if kind in ours), None)
        if theirs is None:
            if not any(module.children()) and any(True for _ in module.parameters()):
                report.left[name] = f"FastLM has nothing for {_title(type(module))}"
        elif reason := kept.get(name) or _why_not(module, theirs, ours[theirs]):
            report.left[name] = reason
        else:
            report.swap(name, module, ours[theirs])
    return report


def _why_not(module: torch.nn.Module, theirs: type, ours: type) -> str:
    """Why a module, of class `theirs` or one made from it, cannot be one of `ours`; "" if it can."""
    if isinstance(module, ours):
        return "FastLM's already"
    if type(module) is not theirs:
        return f"{_title(type(module))} may do another thing than {_title(theirs)}"
    if "forward" in vars(module):
        return f"its forward is not that of {_title(theirs)}"
    if kinds := {str(p.dtype) for p in module.parameters(recurse=False) if p.dtype not in FLOATS}:
        return f"parameters of {', '.join(sorted(kinds))}"
    return getattr(ours, "why_not", lambda module: "")(module)


def _title(kind: type) -> str:
    package = "torch.nn" if kind.__module__.startswith("torch.nn.") else kind.__module__
    return f"{package}.{kind.__name__}"


def _listed(names: list[str]) -> str:
    """The first names of many, and how many there are."""
    names = [name or "the model" for name in names]
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:2])}, ..., {names[-1]} ({len(names)})"
