"""Sequences of a GPT that run side by side, each with its own beginning and end.

Shape suffixes: R running sequences, N tokens of all prompts that join together, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastlm.functional as F
from fastlm import recorded
from fastlm.generation import quantized
from fastlm.models import GPT
from fastlm.ops.linear.op import FEW_ROWS

__all__ = ["Slots"]


class Slots:
    """`join` takes prompts, `step` a token more of every running sequence; `leave` makes room.

    Keys and values lie in (layers, slots, H, max_seq_len, D) each, allocated once. The running sequences have the first
    `running` slots, so that a step reads and computes nothing else: where one leaves, the last takes its slot.
    """

    def __init__(self, model: GPT, slots: int, int8: bool = False) -> None:
        self.model, self.steps_model = model, quantized(model) if int8 else model
        config, weight = model.config, model.token_embedding.weight
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        self.device, self.running = weight.device, 0
        shape = (2, config.num_layers, slots, heads, config.max_seq_len, size)
        self.keys, self.values = weight.detach().new_empty(shape).unbind(0)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=self.device)  # filled places of each slot
        self.places = torch.zeros(slots, dtype=torch.int64, device=self.device)  # where the next keys go
        self.slopes = model.alibi_slopes(self.device)
        self.records = recorded.serves(self.steps_model, min(slots, FEW_ROWS))
        self.recorded: dict[tuple[int, int], recorded.RecordedStep] = {}  # of the slots from one to before another

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(prompts, V) logits of the first new tokens. The prompts, one after the other without padding, go through
        the model as it is; they take the next slots."""
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        starts = nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        positions_N = (torch.arange(int(sizes.sum())) - starts[:-1].repeat_interleave(sizes)).to(self.device)
        first, stop = self.running, self.running + len(prompts)
        slots_N = torch.arange(first, stop).repeat_interleave(sizes).to(self.device)
        ids_N = torch.tensor([*itertools.chain(*prompts)], device=self.device)
        cu_seqlens, longest = starts.to(self.device), int(sizes.max())

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q, k, v (1, H, N, D)."""
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            self.keys[layer][slots_N, :, positions_N] = k
            self.values[layer][slots_N, :, positions_N] = v
            y_NHD = F.varlen_attention(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, is_causal=True, alibi_slopes=self.slopes
            )
            return y_NHD.transpose(0, 1)[None]

        hidden_NC = self._run(self.model, ids_N[None], positions_N[None], attend)[0]
        logits = self.model.logits(hidden_NC[cu_seqlens[1:].long() - 1])
        self.lengths[first:stop] = sizes.to(self.lengths)
        self.running = stop
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """(R, V) logits after one token more of each running sequence, which the next step may overwrite."""
        R = self.running
        ids, places, lengths = torch.tensor(tokens, device=self.device)[:, None], self.places[:R], self.lengths[:R]
        places.copy_(lengths)
        lengths += 1
        if self.records:
            x_RC = self.steps_model.embed(ids, places[:, None])[:, 0]
            logits = [self._recorded(n, min(n + FEW_ROWS, R))(x_RC[n : n + FEW_ROWS]) for n in range(0, R, FEW_ROWS)]
            return logits[0] if len(logits) == 1 else torch.cat(logits)
        keys, values = self.keys[:, :R], self.values[:, :R]
        stop, each = int(lengths.max()), (torch.arange(R, device=self.device), slice(None), places)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q, k, v (R, H, 1, D)."""
            keys[layer][each], values[layer][each] = k[:, :, 0], v[:, :, 0]
            filled = keys[layer, :, :, :stop], values[layer, :, :, :stop]
            return F.scaled_dot_product_attention(q, *filled, alibi_slopes=self.slopes, key_lengths=lengths)

        return self.steps_model.logits(self._run(self.steps_model, ids, places[:, None], attend)[:, 0])

    @torch.inference_mode()
    def leave(self, slot: int) -> None:
        """The sequence in a slot is gone; the last one has its slot now."""
        last = self.running - 1
        if slot != last:
            filled = int(self.lengths[last])
            for cache in (self.keys, self.values):
                cache[:, slot, :, :filled] = cache[:, last, :, :filled]
            self.lengths[slot] = filled
        self.running = last

    def _recorded(self, first: int, stop: int) -> recorded.RecordedStep:
        if (first, stop) not in self.recorded:
            caches = self.keys[:, first:stop], self.values[:, first:stop]
            places, lengths = self.places[first:stop], self.lengths[first:stop]
            step = recorded.RecordedStep(self.steps_model, *caches, places, lengths, None, self.slopes)
            self.recorded[first, stop] = step
        return self.recorded[first, stop]

    def _run(self, model: GPT, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        return model.run(ids, positions, [functools.partial(attend, layer) for layer in range(len(model.blocks))])
