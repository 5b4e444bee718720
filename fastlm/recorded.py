"""A step of generation as a list of launches, recorded once: every layer's kernels, without Python between them.

Beside weights that stream through the caches, Python's own code and data come from memory again at every call; for
one token of GPT-2 small in bf16 that is a third of the time. All that differs from step to step lies in tensors: the
token's embedding, the places for its keys, how many keys there are, and who sees which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.ops.attention import kernels
from fastlm.ops.attention import launch as attention
from fastlm.ops.compiled import CPU, Recorder
from fastlm.ops.layer_norm import launch as layer_norm
from fastlm.ops.linear import op as linear
from fastlm.ops.measured import fastest
from fastlm.ops.registry import preference

if TYPE_CHECKING:
    from fastlm.models.gpt import GPT, AddNorm

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")  # as in csrc/generation/step.h


def serves(model: GPT, rows: int) -> bool:
    """Whether a step of so many sequences can be recorded, and has been measured to be faster."""
    from fastlm.generation import Int8Linear
    from fastlm.models import gpt

    own = (gpt.GPT, gpt.Block, gpt.Attention, gpt.AddNorm, gpt.Linear, Int8Linear, nn.Embedding, nn.ModuleList)
    weight, activation = model.token_embedding.weight, gpt.ACTIVATIONS[model.config.activation]
    return (
        preference() == ("auto",)
        and weight.is_cpu
        and 0 < rows <= linear.FEW_ROWS
        and fastest("linear of a whole step", weight) == "cpu"
        and not CPU.missing()
        and not torch._C._is_any_autocast_enabled()
        and all(type(p) is nn.Parameter and p.is_contiguous() and p.dtype == weight.dtype for p in model.parameters())
        and all(type(m) in own and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        and all(block.activation is activation for block in model.blocks)
    )


class RecordedStep:
    """Called with the embeddings of tokens, gives their logits, which the next call overwrites.

    Args:
        keys, values: (layers, B, H, S, D).
        places: (R,) int64, where the keys of each token go.
        lengths: (B,) int32, how many keys are filled.
        mask: (B, 1 or H, N, S) of the N tokens of each prompt; None: one token each.
    """

    def __init__(
        self,
        model: GPT,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        lengths: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
    ) -> None:
        config, self.recorder = model.config, Recorder(CPU)
        self.alive: list[Any] = [model, keys, values, places, lengths, mask, slopes]
        C, H, D, rows = config.hidden_size, config.num_heads, config.hidden_size // config.num_heads, len(places)
        _, B, _, S, _ = keys.shape
        x = self.embeddings = keys.new_empty((rows, C))
        code = CPU.codes[x.dtype]
        y = None
        block: Any
        for n, block in enumerate(model.blocks):
            normed, x = self._add_norm(block.attention_norm, y, x)
            qkv = self._linear(block.attention.qkv, normed)
            self.recorder.cache_write(
                qkv.data_ptr(), keys[n].data_ptr(), values[n].data_ptr(), places.data_ptr(), rows, rows // B, H, D, S,
                keys.stride(1), keys.stride(2), code, *CPU.extra(x),
            )  # fmt: skip
            query = qkv.view(B, rows // B, 3, H, D)[:, :, 0].transpose(1, 2)
            problem = kernels.dense(
                query, keys[n], values[n], mask, slopes, lengths, None, False, D**-0.5, -1, -1, 0.0, 0.0
            )
            output = x.new_empty((B, rows // B, H, D))
            lse = x.new_empty((B, H, rows // B), dtype=torch.float32)
            alive = attention.kernels(self.recorder).fwd(problem, output.transpose(1, 2), lse)
            self.alive += (problem, output, lse, alive)
            normed, x = self._add_norm(
                block.ffn_norm, self._linear(block.attention.projection, output.view(rows, C)), x
            )
            up = self._linear(block.ffn_up, normed)
            self.recorder.activation(
                up.data_ptr(), up.numel(), ACTIVATIONS.index(config.activation), code, *CPU.extra(up)
            )
            y = self._linear(block.ffn_down, up)
        hidden, _ = self._add_norm(model.final_norm, y, x)
        self.logits = self._linear(model.token_embedding if config.tie_embeddings else model.head, hidden)

    def __call__(self, embeddings: Tensor) -> Tensor:
        self.embeddings.copy_(embeddings)
        self.recorder.run()
        return self.logits

    def _linear(self, module: Any, x: Tensor) -> Tensor:
        bias, scale = getattr(module, "bias", None), getattr(module, "weight_scale", None)
        output = linear.fwd(self.recorder, x, module.weight, bias, scale)
        self.alive.append(output)
        return output

    def _add_norm(self, module: AddNorm, y: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        input, residual = (x, None) if y is None else (y, x)
        output, new_residual, stats = layer_norm.fwd(
            self.recorder,
            False,
            input,
            residual,
            module.weight.shape,
            module.weight,
            module.bias,
            module.eps,
            0.0,
            None,
        )
        self.alive += (output, new_residual, stats)
        return output, x if y is None else new_residual
