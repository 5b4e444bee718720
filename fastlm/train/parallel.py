"""The processes that train one model together: DistributedDataParallel or FSDP2, and what they have to agree about.

A run of one process has a `Processes` too, whose methods then do nothing that costs anything.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlm.models.pretrained import Pretrained

__all__ = ["Processes", "local", "process_group", "whole"]

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=6)


@contextmanager
def process_group() -> Iterator[None]:
    """Within it the processes that torchrun started are a group. One process alone, or a group that is there already,
    is left as it is.

    All leave it together, since torchrun ends the others when one ends with an exit code. But where the block raises
    the others are not waited for: they may be waiting themselves, for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index < torch.cuda.device_count():
        torch.cuda.set_device(index)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


class Processes:
    """Those of the group of torch.distributed, or this one alone.

    What decides how to go on is agreed about between CPUs, so that no process waits for a GPU.
    """

    def __init__(self, parallel: str = "ddp") -> None:
        there, started = dist.is_available() and dist.is_initialized(), os.environ.get("WORLD_SIZE", "1")
        if not there and started != "1":
            raise RuntimeError(
                f"torchrun started {started} processes, which are no group yet: call it within "
                "fastlm.train.parallel.process_group, or after torch.distributed.init_process_group"
            )
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self.first, self.several = self.rank == 0, self.count > 1
        self.sharded = self.several and parallel == "fsdp"
        # For what is on the CPU; the others wait in it for as long as the first takes to prepare the data.
        self._cpu: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.several else None
        self._ddp: Any = None

    def wrap(self, model: Pretrained, device: torch.device) -> nn.Module:
        """Move the model to its device, everywhere with the weights that it has in the first process, or with a share
        of them; returns what is to be called in its place."""
        if self.sharded:
            self._shard(model, device)
            return model
        model.to(device)
        if self.several:
            self._ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model if self._ddp is None else self._ddp

    def _shard(self, model: Pretrained, device: torch.device) -> None:
        """Block by block, so that a device never has the whole weights of more than one."""
        from torch.distributed.fsdp import fully_shard

        # Ours are views at times, and the warning is about what is done in place to them, which nothing is.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = dist.init_device_mesh(device.type, (self.count,))
        lists = [module for name, module in model.named_modules() if name.split(".")[-1] == "blocks"]
        for module in (*(block for blocks in lists for block in blocks), model):
            module.to(device)
            for tensor in (*module.parameters(), *module.buffers()):
                if local(tensor) is tensor:
                    dist.broadcast(tensor.detach(), 0)
            fully_shard(module, mesh=mesh)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: DDP adds up gradients over the processes for the last alone.
        FSDP does so for each, since a gradient before that is as large as the whole model's."""
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def share(self, batches: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
        """Of batches that are dealt out in turn those of this process, and True. Every process gets as many: where
        they run out, one that is another's, and False."""
        batches = iter(batches)
        while dealt := list(islice(batches, self.count)):
            yield dealt[min(self.rank, len(dealt) - 1)], self.rank < len(dealt)

    def sum(self, *numbers: int) -> list[int]:
        """Over the processes."""
        if not self.several:
            return list(numbers)
        sums = torch.tensor(numbers)
        dist.all_reduce(sums, group=self._cpu)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes."""
        return self.sum(int(flag)) != [0]

    def add_(self, tensor: Tensor) -> Tensor:
        """In place and on its device: the sum over the processes."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def once(self, make: Callable[[], _T]) -> _T:
        """What `make` gives in the first process, or the error that it raises there, in every process."""
        if not self.several:
            return make()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made, 0, group=self._cpu, device=torch.device("cpu"))
        if made[1] is not None:
            raise made[1]
        return made[0]

    def before_others(self, make: Callable[[], _T]) -> _T:
        """What `make` gives in each process, the others calling it once it is done in the first."""
        made: list[_T] = []
        self.once(lambda: made.append(make()))
        return made[0] if made else make()

    def gathered(self, model: Pretrained) -> Pretrained | None:
        """The model with its whole weights, in the first process."""
        if not self.sharded:
            return model if self.first else None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.first:
            return None
        twin = _unwritten(model)
        twin.load_state_dict(weights, assign=True)
        return twin

    def load_folder(self, model: Pretrained, folder: Path) -> None:
        """`model.load_folder(folder)`, which the first process reads for all."""
        if not self.several:
            model.load_folder(folder)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        twin = _unwritten(model).to_empty(device="cpu") if self.first else None
        self.once(lambda: twin.load_folder(folder) if twin is not None else None)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, {} if twin is None else twin.state_dict(), options=options)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that FSDP shards, which changes with it; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _unwritten(model: Pretrained) -> Pretrained:
    """The like of a model, its weights without memory."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.other_config = model.other_config
    return twin
