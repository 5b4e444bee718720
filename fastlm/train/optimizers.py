"""The optimizers of a run: which weights each has, and a step that a gradient which is not finite leaves undone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.config import OPTIMIZERS, TrainConfig
from fastlm.train.parallel import local

__all__ = ["build_optimizers", "step_unless"]

Optimizers = dict[str, torch.optim.Optimizer]
_DEFAULTS: dict[str, dict[str, Any]] = {"adamw": {"betas": (0.9, 0.95)}, "adam": {"betas": (0.9, 0.95)}}
# Of sharded weights: those whose fused steps torch has, and those it has no step of at all.
_FUSED_SHARDED, _NOT_SHARDED = ("adam", "adamw"), ("adafactor", "rprop")


def build_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """One optimizer by the name of `config.optimizer`, or "muon" for the matrices in the blocks and "adamw".

    Weight decay is for matrices that are not embeddings. Fused where torch has it.
    Raises ValueError for options that the optimizer does not take, and where it cannot update weights that FSDP shards.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = dict(model.named_parameters())
    matrices = {name for name, parameter in named.items() if parameter.dim() >= 2 and id(parameter) not in embeddings}
    in_blocks = {name for name in matrices if ".blocks." in f".{name}"} if config.optimizer.lower() == "muon" else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named.items() if name not in matrices], "weight_decay": 0.0},
        {
            "params": [named[name] for name in named if name in matrices - in_blocks],
            "weight_decay": config.weight_decay,
        },
    ]
    groups, optimizers = [group for group in groups if group["params"]], {}
    if in_blocks:
        hidden = [named[name] for name in named if name in in_blocks]
        muon = {"lr": config.muon_lr, "weight_decay": config.weight_decay}
        optimizers["muon"] = _optimizer("muon", [{"params": hidden}], muon | config.optimizer_options)
        optimizers["adamw"] = _optimizer("adamw", groups, {"lr": config.lr})
    else:
        name = config.optimizer.lower().replace("muon", "adamw")
        optimizers[name] = _optimizer(name, groups, {"lr": config.lr} | config.optimizer_options)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer, divisor: Tensor) -> None:
    """A step with the gradients divided by `divisor`; where `skip` () is true it changes nothing. No sync.

    Fused optimizers can do that themselves. For others weights and state are copied, and put back; of state made in
    this very step, and of a count that is not on the device of `skip`, nothing is.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # what torch's GradScaler goes by
        optimizer.grad_scale, optimizer.found_inf = divisor, skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if not grads:
        return
    torch._foreach_div_(grads, divisor)
    for grad in grads:
        grad.masked_fill_(skip, 0)
    state = [t for p in parameters for t in optimizer.state[p].values() if torch.is_tensor(t) and t.device == p.device]
    changed = [*(local(p.detach()) for p in parameters), *(local(t) for t in state)]
    before = [tensor.clone() for tensor in changed]
    optimizer.step()
    for now, then in zip(changed, before, strict=True):
        torch.where(skip, then, now, out=now)


def _optimizer(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    takes = inspect.signature(OPTIMIZERS[name].__init__).parameters
    if unknown := [option for option in options if option not in takes]:
        wanted = ", ".join(sorted(takes.keys() - {"self", "params", "lr"}))
        raise ValueError(f"TrainConfig: optimizer_options of {name} must be of {wanted}, got {', '.join(unknown)}")
    sharded = any(local(parameter) is not parameter for group in groups for parameter in group["params"])
    if sharded and name in _NOT_SHARDED:
        raise ValueError(f"TrainConfig: parallel must be ddp with optimizer {name}, which torch has not for fsdp")
    fused = "fused" in takes and not options.keys() & {"foreach", "capturable"}
    fused = fused and not (sharded and name not in _FUSED_SHARDED)
    return OPTIMIZERS[name](groups, **({"fused": True} if fused else {}) | _DEFAULTS.get(name, {}) | options)
