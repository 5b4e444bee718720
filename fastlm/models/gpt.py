"""GPT: a decoder-only transformer. GPT-2's architecture; with position="alibi" and embedding_norm=True it is BLOOM's.

    x = embedding(ids) + position
    x = x + attention(norm(x));  x = x + ffn(norm(x))          in every block
    logits = norm(x) @ embedding^T

What a layer adds to the residual stream travels beside it until the next norm, which adds and normalises in one pass
over memory (`AddNorm`); so a block takes and returns the pair (y, x).

Shape suffixes: B batch, T tokens, C hidden size, H heads, D = C / H head size, V vocabulary.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019); Press et al. 2021 (arXiv 2108.12409)
for ALiBi; Vaswani et al. 2017 (arXiv 1706.03762) for sinusoidal positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastlm.functional as F
from fastlm import generation
from fastlm.config import Config
from fastlm.models import huggingface
from fastlm.models.pretrained import Pretrained
from fastlm.nn import Linear

__all__ = ["GPT", "GPTConfig", "GPTOutput"]


def gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


@dataclass(frozen=True)
class GPTConfig(Config):
    """The shape of a GPT.

    Args:
        vocab_size: number of tokens
        max_seq_len: longest sequence; only learned positions have weights of this size
        hidden_size: of the residual stream
        num_layers: blocks
        num_heads: attention heads, each of hidden_size / num_heads
        ffn_size: hidden size of the feed-forward layers; None is 4 * hidden_size
        position: how a token knows its place
        activation: of the feed-forward layers
        norm_eps: added to the variance in every layer norm
        dropout: of the embedding unless it has a norm, the attention probabilities and what every layer adds
        tie_embeddings: the token embeddings are the weights of the last layer too
        embedding_norm: a layer norm after the embedding
    """

    vocab_size: int
    max_seq_len: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int | None = None
    position: Literal["learned", "alibi", "sinusoidal"] = "learned"
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    norm_eps: float = 1e-5
    dropout: float = 0.0
    tie_embeddings: bool = True
    embedding_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "max_seq_len", "hidden_size", "num_layers", "num_heads"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        self._need(self.ffn_size is None or self.ffn_size >= 1, "ffn_size", "at least 1, or None")
        heads = self.num_heads
        self._need(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_heads, {heads}")
        even = self.position != "sinusoidal" or self.hidden_size % 2 == 0
        self._need(even, "hidden_size", "even for sinusoidal positions")
        self._need(0 < self.norm_eps < math.inf, "norm_eps", "above 0")
        self._need(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values (B, H, T, D) -> (B, H, T, D)


class GPTOutput(NamedTuple):
    loss: Tensor | None  # () mean over the labels that are not -100
    logits: Tensor | None  # (B, T, V)
    attentions: tuple[Tensor, ...] | None = None  # of each block (B, H, T, T)


class AddNorm(nn.Module):
    """(y, x) -> norm(x + dropout(y)), x + dropout(y); no y is nothing to add."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps, self.dropout = config.norm_eps, config.dropout

    def forward(self, y_BTC: Tensor | None, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.weight.shape
        if y_BTC is None:
            return F.layer_norm(x_BTC, shape, self.weight, self.bias, self.eps), x_BTC
        return F.add_layer_norm(
            y_BTC, x_BTC, shape, self.weight, self.bias, self.eps, dropout_p=self.dropout, training=self.training
        )


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTC: Tensor, attend: Attend) -> Tensor:
        B, T, C = x_BTC.shape
        H = self.num_heads
        q_BHTD, k_BHTD, v_BHTD = self.qkv(x_BTC).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTD = attend(q_BHTD, k_BHTD, v_BHTD)
        return self.projection(y_BHTD.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        ffn_size = config.ffn_size or 4 * config.hidden_size
        self.attention_norm = AddNorm(config)
        self.attention = Attention(config)
        self.ffn_norm = AddNorm(config)
        self.ffn_up = Linear(config.hidden_size, ffn_size)
        self.activation = ACTIVATIONS[config.activation]
        self.ffn_down = Linear(ffn_size, config.hidden_size)

    def forward(self, y_BTC: Tensor | None, x_BTC: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        normed_BTC, x_BTC = self.attention_norm(y_BTC, x_BTC)
        normed_BTC, x_BTC = self.ffn_norm(self.attention(normed_BTC, attend), x_BTC)
        return self.ffn_down(self.activation(self.ffn_up(normed_BTC))), x_BTC


class GPT(Pretrained):
    """GPT-2, with ALiBi and a norm of the embedding BLOOM: see this module.

    Args:
        config: the shape.
    """

    config: GPTConfig
    config_type = GPTConfig
    layouts = (huggingface.GPT2, huggingface.BLOOM)
    architectures: ClassVar = {"gpt2": "GPT2LMHeadModel", "bloom": "BloomForCausalLM"}
    generate = generation.generate
    stream = generation.stream

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = AddNorm(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = AddNorm(config)
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """GPT-2's: N(0, 0.02), what adds to the residual stream narrower, since 2 * num_layers of them add up."""
        if parameter.dim() == 2:
            adds = name.endswith(("attention.projection.weight", "ffn_down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_layers) if adds else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        *,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool = False,
    ) -> GPTOutput:
        """The logits of the next token at every position and, with labels, the loss.

        Args:
            input_ids: (B, T) int64 or int32, T at most `max_seq_len`.
            attention_mask: (B, T), 0 where `input_ids` is padding, left or right of the text; positions count the
                rest. What stands in `logits` at padding means nothing.
            labels: (B, T), usually `input_ids` themselves: the logits at t are compared with labels[:, t + 1].
                -100 is ignored. Padding is not ignored unless it is -100.
            return_logits: None: only without labels. With False the logits never exist in full.
            shift_labels: (B, T), labels that are shifted already: the logits at t are compared with shift_labels[:, t].
            cu_seqlens: (n + 1,) int32: where documents start among the B * T tokens of all rows, 0 and every multiple
                of T among them, B * T last. Tokens see their own document alone, and positions count from its start.
            output_attentions: also the probabilities of every block, in plain torch.

        Raises:
            ValueError: wrong shapes, or a sequence longer than `max_seq_len`. TypeError: ids that are not integers.
            IndexError: a token id out of range, on a CPU; elsewhere looking would cost a sync.
        """
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and given.shape != input_ids.shape:
                need, got = tuple(input_ids.shape), tuple(given.shape)
                raise ValueError(f"GPT: {name} must have the shape of input_ids, {need}, got {got}")
        if labels is not None and shift_labels is not None:
            raise ValueError("GPT: labels and shift_labels exclude each other")
        if cu_seqlens is not None and (attention_mask is not None or output_attentions):
            raise ValueError("GPT: cu_seqlens must come without attention_mask and output_attentions")
        targets = shift_labels if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        attentions: list[Tensor] | None = [] if output_attentions else None
        hidden_BTC = self.hidden_states(input_ids, attention_mask, attentions, cu_seqlens)
        seen = None if attentions is None else tuple(attentions)
        if not (targets is None if return_logits is None else return_logits):
            return GPTOutput(None if targets is None else self._loss(hidden_BTC, targets), None, seen)
        logits_BTV = self.logits(hidden_BTC)
        loss = None if targets is None else F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten())
        return GPTOutput(loss, logits_BTV, seen)

    def _loss(self, hidden_BTC: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden_BTC.flatten(0, 1), self.head_weight, targets.flatten())

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        attentions: list[Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) after the last norm; `attentions` gets the probabilities of every block."""
        self._check(input_ids, attention_mask)
        (B, T), device = input_ids.shape, input_ids.device
        slopes_H = self.alibi_slopes(device)
        mask_B11T, positions = None, torch.arange(T, device=device)  # (T), with a mask (B, T)
        if attention_mask is not None:
            mask_B11T = attention_mask.bool()[:, None, None]
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if cu_seqlens is not None:
            places = torch.arange(B * T, dtype=torch.int32, device=device)
            documents = torch.searchsorted(cu_seqlens, places, right=True) - 1
            positions = (places - cu_seqlens[documents]).view(B, T)
        dropout = self.config.dropout if self.training else 0.0

        def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
            if cu_seqlens is not None:
                q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q_BHTD, k_BHTD, v_BHTD))
                y = F.varlen_attention(
                    q, k, v, cu_seqlens, cu_seqlens, T, T, dropout, is_causal=True, alibi_slopes=slopes_H
                )
                return y.unflatten(0, (B, T)).transpose(1, 2)
            if attentions is None:
                return F.scaled_dot_product_attention(
                    q_BHTD, k_BHTD, v_BHTD, mask_B11T, dropout, is_causal=True, alibi_slopes=slopes_H
                )
            sees_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril()
            sees = sees_TT if mask_B11T is None else sees_TT & mask_B11T
            attentions.append(probabilities(q_BHTD, k_BHTD, sees, slopes_H))
            return nn.functional.dropout(attentions[-1], dropout) @ v_BHTD

        return self.run(input_ids, positions, [attend] * len(self.blocks))

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(B, T, C) what the first block takes, of tokens at `positions`, (T) or (B, T)."""
        x_BTC, C = self.token_embedding(input_ids), self.config.hidden_size
        if self.config.position == "learned":
            x_BTC = x_BTC + self.position_embedding(positions)
        elif self.config.position == "sinusoidal":
            x_BTC = x_BTC * math.sqrt(C) + sinusoids(positions, C).to(x_BTC.dtype)
        if self.config.embedding_norm:  # in place of dropout, as in BLOOM
            return self.embedding_norm(None, x_BTC)[0]
        return nn.functional.dropout(x_BTC, self.config.dropout, self.training)

    def run(self, input_ids: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """(B, T, C) after the last norm, with each block's attention."""
        x_BTC, y_BTC = self.embed(input_ids, positions), None
        for block, attend in zip(self.blocks, attends, strict=True):
            y_BTC, x_BTC = self.through(block, y_BTC, x_BTC, attend)
        return self.final_norm(y_BTC, x_BTC)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states after the last norm."""
        return F.linear(hidden, self.token_embedding.weight) if self.config.tie_embeddings else self.head(hidden)

    def alibi_slopes(self, device: torch.device) -> Tensor | None:
        """(H,) fp32; None where positions are not ALiBi's."""
        return alibi_slopes(self.config.num_heads, device) if self.config.position == "alibi" else None

    @property
    def head_weight(self) -> Tensor:
        """(V, C) what the hidden states are multiplied with to give the logits."""
        return self.token_embedding.weight if self.config.tie_embeddings else self.head.weight

    def flops_per_token(self, seq_len: int) -> float:
        """As the base has it, half of attention since a token sees half of the others, and the last layer."""
        half = 6 * self.config.num_layers * self.config.hidden_size * seq_len
        return super().flops_per_token(seq_len) - half + 6 * self.head_weight.numel()

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        shape, longest, last = tuple(input_ids.shape), self.config.max_seq_len, self.config.vocab_size - 1
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"GPT: input_ids must be int64 or int32, got {input_ids.dtype}")
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"GPT: input_ids must have shape (B, T) with T at least 1, got {shape}")
        if shape[1] > longest:
            raise ValueError(f"GPT: input_ids must have at most max_seq_len = {longest} tokens, got {shape[1]}")
        if attention_mask is not None and tuple(attention_mask.shape) != shape:
            got = tuple(attention_mask.shape)
            raise ValueError(f"GPT: attention_mask must have the shape of input_ids, {shape}, got {got}")
        plain = type(input_ids) is Tensor and not torch.compiler.is_compiling()  # its values can be looked at
        if plain and input_ids.device.type == "cpu" and input_ids.numel():
            for bound in input_ids.aminmax():
                if not 0 <= bound <= last:
                    raise IndexError(f"GPT: input_ids must be from 0 to vocab_size - 1 = {last}, got {bound}")


def probabilities(q_BHTD: Tensor, k_BHTD: Tensor, sees: Tensor | None, slopes_H: Tensor | None = None) -> Tensor:
    """(B, H, T, T) of attention, which kernels never form; `sees` is true where a query sees a key."""
    scores_BHTT = q_BHTD @ k_BHTD.mT / math.sqrt(q_BHTD.shape[-1])
    if slopes_H is not None:
        positions = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
        distances_TT = (positions[:, None] - positions).abs()
        scores_BHTT = scores_BHTT - (slopes_H[:, None, None] * distances_TT).to(scores_BHTT.dtype)
    if sees is not None:
        scores_BHTT = scores_BHTT.masked_fill(~sees, torch.finfo(scores_BHTT.dtype).min)
    return scores_BHTT.softmax(-1)


def sinusoids(positions: Tensor, C: int) -> Tensor:
    """(..., C) fp32: sin and cos in turn of position / 10000^(2i / C)."""
    frequencies = 10000.0 ** (-torch.arange(0, C, 2, device=positions.device) / C)
    angles = positions[..., None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def alibi_slopes(H: int, device: torch.device) -> Tensor:
    """(H,) fp32: 2^(-8i / n) for i = 1..n, n the power of 2 in H; further heads take the odd steps halfway between."""
    n = 2 ** (H.bit_length() - 1)
    steps = torch.arange(2 * n, device=device) + 1
    return torch.exp2(torch.cat((steps[1::2], steps[::2]))[:H] * (-4 / n))
