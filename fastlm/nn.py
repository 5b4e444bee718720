"""Modules: `torch.nn`'s own, with FastLM's functions in their forward.

A model takes them in place of torch's as it is: constructors, initialisation, parameters' names, `state_dict` and
`repr` are torch's. What this has no module for is torch's too, so that `from fastlm import nn` in place of
`from torch import nn` is all there is to change.

None of them keeps anything that torch's does not: a module of torch becomes one of these, and goes back, by its class
alone (`swap`). That is what `fastlm.accelerate` does.

Shape suffixes: B batch, T queries, S keys, E embed_dim, H heads, D = E / H.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlm import functional as F
from fastlm.ops.attention.op import SCALED_DOT_PRODUCT_ATTENTION
from fastlm.ops.checks import TENSORS, autocast_dtype
from fastlm.ops.measured import fastest

__all__ = [
    "CrossEntropyLoss",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def __getattr__(name: str) -> Any:
    """`Embedding`, `Module`, `functional` and all else that torch.nn has."""
    return getattr(torch.nn, name)


class Linear(torch.nn.Linear):
    r"""`torch.nn.Linear` through `fastlm.functional.linear`.

        output = input weight^T + bias

    Args:
        in_features, out_features: of the input and the output.
        bias: False for no bias.
        device, dtype: of the parameters.

    The input is `(*, in_features)`, the output `(*, out_features)` in its dtype. Errors are those of
    `fastlm.functional.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.is_nested:
            return super().forward(input)
        return F.linear(input, self.weight, self.bias)


class NonDynamicallyQuantizableLinear(torch.nn.modules.linear.NonDynamicallyQuantizableLinear, Linear):
    """`out_proj` of an attention layer."""


class LayerNorm(torch.nn.LayerNorm):
    r"""`torch.nn.LayerNorm` through `fastlm.functional.layer_norm`.

        output = (input - mean) / sqrt(var + eps) * weight + bias

    with the mean and the biased variance over the last dimensions, those of `normalized_shape`.

    Args:
        normalized_shape: the last dimensions of the input; an int is one dimension.
        eps: added to the variance.
        elementwise_affine: False for neither weight nor bias.
        bias: False for no bias.
        device, dtype: of the parameters.

    The input is (*, normalized_shape), of the parameters' dtype, or bf16 or fp16 with fp32 parameters; the output has
    its shape and dtype. Errors are those of `fastlm.functional.layer_norm`.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.is_nested:
            return super().forward(input)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    r"""`torch.nn.RMSNorm` through `fastlm.functional.rms_norm`.

        output = input / sqrt(mean(input^2) + eps) * weight

    with the mean over the last dimensions, those of `normalized_shape`.

    Args:
        normalized_shape: the last dimensions of the input; an int is one dimension.
        eps: added to the mean square; None is the machine epsilon of the arithmetic (fp32; fp64 for fp64).
        elementwise_affine: False for no weight.
        device, dtype: of the weight.

    The input is (*, normalized_shape), of the weight's dtype, or bf16 or fp16 with an fp32 weight; the output has its
    shape and dtype. Errors are those of `fastlm.functional.rms_norm`.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    r"""`torch.nn.CrossEntropyLoss` through `fastlm.functional.cross_entropy`.

        loss = sum_c q_c * (lse - x_c) + z_loss * lse^2,  lse = log(sum_c exp(x_c))

    with q the target distribution and x the logits, soft-capped.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in `torch.nn.CrossEntropyLoss`, the
            deprecated two among them.
        z_loss, softcap, inplace_backward: as in `fastlm.functional.cross_entropy`.

    Input (C,), (N, C) or (N, C, d1, ...), target, result and errors are those of `fastlm.functional.cross_entropy`.

    Source: see `fastlm.functional.cross_entropy`.
    """

    z_loss, softcap, inplace_backward = 0.0, 0.0, False  # of a module that was torch's

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.inplace_backward = z_loss, softcap, inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    r"""A linear layer and the cross-entropy of its output, whose logits never exist in full.

        loss = cross_entropy(linear(input, linear.weight, linear.bias), target)

    Parameters, their names, shapes and initialisation are those of `torch.nn.LinearCrossEntropyLoss` (torch >= 2.13).

    Args:
        in_features: of the input.
        num_classes: C.
        out_features: (d1, ...) of a loss over (N, C, d1, ...) logits.
        bias: whether the linear layer has one.
        device, dtype: of the parameters.
        reduction, weight, ignore_index, label_smoothing, z_loss, softcap, recompute: as in
            `fastlm.functional.linear_cross_entropy`.

    Input (N, in_features) or (in_features,), target, result and errors are those of
    `fastlm.functional.linear_cross_entropy`. RuntimeError for a weight of another shape than (C,).

    Source: see `fastlm.functional.linear_cross_entropy`.
    """

    weight: Tensor | None  # a buffer
    z_loss, softcap, recompute = 0.0, 0.0, False  # of a module that was torch's

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            need = f"shape {(num_classes,)}, one per class"
            raise RuntimeError(f"LinearCrossEntropyLoss: weight must have {need}, got {tuple(weight.shape)}")
        rows = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.z_loss, self.softcap, self.recompute = z_loss, softcap, recompute

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            recompute=self.recompute,
        )

    @staticmethod
    def why_not(module: torch.nn.Module) -> str:
        """Why torch's module cannot become this one; "" if it can."""
        return "" if module.options is None else "its options choose how torch's computes it"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


# Attention ----------------------------------------------------------------------------------------------------------


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` through `fastlm.functional.linear` and `scaled_dot_product_attention`.

        output = concat_h(attention(query W_h^Q, key W_h^K, value W_h^V)) W^O

    Args:
        embed_dim: E, of the query and the output.
        num_heads: H, which divides E.
        dropout: probability of dropping an attention probability in training.
        bias: False for projections without bias.
        add_bias_kv: a learned key and value after the others.
        add_zero_attn: a key and a value of zeros after the others.
        kdim, vdim: features of key and value; None is E.
        batch_first: (B, T, E) instead of (T, B, E).
        device, dtype: of the parameters.

    Differs from torch's in one thing: a query that sees no key gets 0 before the last projection, and weights of 0,
    where torch has NaN in some cases.

    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        swap(self.children())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, if needed, the attention probabilities, which takes memory of B * H * T * S.

        Args:
            query, key, value: (T, B, E), (S, B, kdim), (S, B, vdim), with `batch_first` (B, T, E) and so on, or
                without B.
            key_padding_mask: (B, S), or (S) without B: bool, True for keys that nobody sees, or added to the scores.
            need_weights: False is the fast way.
            attn_mask: (T, S) or (B * H, T, S): bool, True where a query does not see a key, or added to the scores.
            average_attn_weights: the mean over the heads, (B, T, S), else (B, H, T, S).
            is_causal: a hint that `attn_mask`, which must be given, is the causal mask.

        Raises:
            What torch's raises: its checks are used.
        """
        masked = attn_mask is not None or key_padding_mask is not None
        if (
            not self._fits(query, key, value, key_padding_mask, attn_mask)
            or (is_causal and attn_mask is None)
            or self._has_no_use(query, masked, need_weights)
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
            message = "Support for mismatched key_padding_mask and attn_mask is deprecated."  # torch's words
            warnings.warn(f"{message} Use same type for both instead.", stacklevel=2)
        batched = query.dim() == 3
        turned = batched and not self.batch_first  # (T, B, E)
        q, k, v = (
            (x.transpose(0, 1) if turned else x) if batched else x[None] for x in self._projected(query, key, value)
        )
        keys = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, b.expand(len(x), 1, -1)), 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        more = k.shape[1] - keys
        causal = is_causal and not need_weights and (key_padding_mask is None or not more)
        mask = self._merged(None if causal else attn_mask, key_padding_mask, len(q), more, q.dtype)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = _attention_and_weights(q, k, v, mask, dropout, average_attn_weights)
            weights = weights if batched else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = (y.permute(2, 0, 1, 3) if turned else y.transpose(1, 2)).flatten(-2)
        return F.linear(y if batched else y[0], self.out_proj.weight, self.out_proj.bias), weights

    def _fits(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether this is a call as documented. Nested tensors, other kinds of tensors and mistakes are torch's."""
        tensors = [x for x in (query, key, value, key_padding_mask, attn_mask) if x is not None]
        masks = tensors[3:]
        if not all([type(x) in TENSORS and not x.is_nested for x in tensors]):
            return False
        rank, first = query.dim(), self.batch_first
        if rank not in (2, 3) or not rank == key.dim() == value.dim():
            return False
        B = () if rank == 2 else query.shape[:1] if first else query.shape[1:2]
        T, S = (x.shape[-2] if rank == 2 or first else x.shape[0] for x in (query, key))
        lead = (S, *B) if rank == 3 and not first else (*B, S)
        return (
            query.shape[-1] == self.embed_dim
            and key.shape == (*lead, self.kdim)
            and value.shape == (*lead, self.vdim)
            and all([mask.dtype == torch.bool or mask.is_floating_point() for mask in masks])
            and (key_padding_mask is None or key_padding_mask.shape == (*B, S))
            and (attn_mask is None or attn_mask.shape in ((T, S), (math.prod(B) * self.num_heads, T, S)))
        )

    def _has_no_use(self, query: Tensor, masked: bool, need_weights: bool) -> bool:
        """Whether torch's own forward is as fast, which it is where no measurement speaks for our kernels or none of
        them would run, and has no NaN for queries that see no key."""
        if not SCALED_DOT_PRODUCT_ATTENTION.auto_alone():
            return False
        inference = not (self.training or torch.is_grad_enabled())
        if need_weights or fastest("scaled_dot_product_attention", query):
            return need_weights and inference and not masked
        return not masked if inference else query.is_cpu and (self.training or not masked)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Iterable[Tensor]:
        """Query, key and value, of all heads, in the layout of the input."""
        E, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.split((E, 2 * E))
            biases = (None, None) if bias is None else bias.split((E, 2 * E))
            return F.linear(query, weights[0], biases[0]), *F.linear(key, weights[1], biases[1]).chunk(2, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return map(F.linear, (query, key, value), weights, biases)

    def _merged(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, B: int, more: int, dtype: torch.dtype
    ) -> Tensor | None:
        """One mask as `scaled_dot_product_attention` has it, (1 or B, 1 or H, 1 or T, S + more)."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (B, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(B, 1, 1, -1))
        if not masks:
            return None
        if more:
            masks = [torch.nn.functional.pad(mask, (0, more)) for mask in masks]
        if all(mask.dtype == torch.bool for mask in masks):
            return ~functools.reduce(operator.or_, masks)
        masks = [
            mask.new_zeros(mask.shape, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
            for mask in masks
        ]
        return functools.reduce(operator.add, masks)


def _attention_and_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, average: bool
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, and its probabilities after dropout, (B, H, T, S), or (B, T, S) their average."""
    B, H, _, D = q.shape
    q, k = (q * D**-0.5).flatten(0, 1), k.flatten(0, 1)
    if mask is None:
        y, weights = _weighted(torch.bmm(q, k.mT).unflatten(0, (B, H)), v, dropout_p)
        return y, weights.mean(1) if average else weights
    if mask.dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    blind = (mask == -math.inf).all(-1, keepdim=True)  # sees no key: not even its gradient may be NaN
    mask = mask.masked_fill(blind, 0.0).to(q.dtype)
    mask = mask.expand(B, H, *mask.shape[2:]).flatten(0, 1) if len(mask) > 1 or mask.shape[1] > 1 else mask[0]
    y, weights = _weighted(torch.baddbmm(mask, q, k.mT).unflatten(0, (B, H)), v, dropout_p)
    if average and blind.shape[1] == 1:  # before there is less to fill
        return y.masked_fill(blind, 0.0), weights.mean(1).masked_fill(blind[:, 0], 0.0)
    weights = weights.masked_fill(blind, 0.0)
    return y.masked_fill(blind, 0.0), weights.mean(1) if average else weights


def _weighted(scores: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    weights = torch.nn.functional.dropout(scores.softmax(-1).to(v.dtype), dropout_p)
    return weights @ v, weights


# Transformer --------------------------------------------------------------------------------------------------------


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    r"""`torch.nn.TransformerEncoderLayer`; an addition and the norm after it are one pass over memory.

        x = norm1(x + attention(x));  x = norm2(x + ffn(x))        or, with `norm_first`,
        x = x + attention(norm1(x));  x = x + ffn(norm2(x))        with ffn(x) = linear2(activation(linear1(x)))

    Args:
        d_model: E, features of input and output.
        nhead: heads of the attention, which divide d_model.
        dim_feedforward: features between linear1 and linear2.
        dropout: probability of dropping, in training: attention probabilities, activations, what is added.
        activation: "relu", "gelu" or a function.
        layer_norm_eps: added to the variance.
        batch_first: (B, T, E) instead of (T, B, E).
        norm_first: norms before attention and ffn, instead of after the additions.
        bias: False for linear layers and norms without bias.
        device, dtype: of the parameters.

    Shapes, masks and errors as in `torch.nn.TransformerEncoderLayer`.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); Xiong et al. 2020 (arXiv 2002.04745) for `norm_first`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = torch.nn.functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        swap(self.modules())

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = [mask for mask in (src_mask, src_key_padding_mask) if mask is not None]
        inference = not (self.training or torch.is_grad_enabled())
        if (  # torch's path for inference takes additive masks for bool ones
            not _is_ours(self, torch.nn.TransformerEncoderLayer, src, *masks)
            or (torch.compiler.is_compiling() and (self.training or not masks))
            or (inference and not masks and self.self_attn.batch_first and SCALED_DOT_PRODUCT_ATTENTION.auto_alone())
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if type(self.self_attn) is not MultiheadAttention or is_hooked(self.self_attn):
            src_mask, src_key_padding_mask = (_additive(mask, src) for mask in (src_mask, src_key_padding_mask))
        places = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}

        def attention(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, need_weights=False, **places)[0]

        if not self.norm_first:
            x, _ = _add_norm(attention(src), src, self.dropout1, self.norm1)
            return _add_norm(_ffn(self, x), x, self.dropout2, self.norm2)[0]
        y, x = _add_norm(attention(self.norm1(src)), src, self.dropout1, self.norm2)
        return x + self.dropout2(_ffn(self, y))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    r"""`torch.nn.TransformerDecoderLayer`; an addition and the norm after it are one pass over memory.

    As `TransformerEncoderLayer`, with attention to `memory`, what an encoder gave, and a norm of its own between
    attention and ffn. Shapes, masks and errors as in `torch.nn.TransformerDecoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = torch.nn.functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        swap(self.modules())

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        # A compiler fuses what torch's does.
        if torch.compiler.is_compiling() or not _is_ours(self, torch.nn.TransformerDecoderLayer, tgt, memory):
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        cross = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}

        def attention(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, need_weights=False, **own)[0]

        def cross_attention(x: Tensor) -> Tensor:
            return self.multihead_attn(x, memory, memory, need_weights=False, **cross)[0]

        if not self.norm_first:
            x, _ = _add_norm(attention(tgt), tgt, self.dropout1, self.norm1)
            x, _ = _add_norm(cross_attention(x), x, self.dropout2, self.norm2)
            return _add_norm(_ffn(self, x), x, self.dropout3, self.norm3)[0]
        y, x = _add_norm(attention(self.norm1(tgt)), tgt, self.dropout1, self.norm2)
        y, x = _add_norm(cross_attention(y), x, self.dropout2, self.norm3)
        return x + self.dropout3(_ffn(self, y))


def _ffn(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


def _additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A bool mask as torch's layer hands it to an attention that may be anyone's."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, -math.inf)


def _is_ours(layer: torch.nn.Module, torchs: type, *inputs: Tensor) -> bool:
    """Whether a layer's forward need not be torch's: its parts have not been given another meaning, by a subclass or on
    this one, and the inputs are no nested tensors."""
    parts = [name for name in ("_sa_block", "_mha_block", "_ff_block") if hasattr(torchs, name)]
    own = all([name not in vars(layer) and getattr(type(layer), name) is getattr(torchs, name) for name in parts])
    return own and all([type(x) in TENSORS and not x.is_nested for x in inputs])


def _add_norm(y: Tensor, x: Tensor, dropout: torch.nn.Module, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """norm(x + dropout(y)) and x + dropout(y)."""
    if (
        type(norm) is LayerNorm
        and type(dropout) is torch.nn.Dropout
        and y.dtype == x.dtype
        and not is_hooked(norm, dropout)
        and autocast_dtype(x) is None
    ):
        return F.add_layer_norm(
            y,
            x,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
        )
    x = x + dropout(y)
    return norm(x), x


def is_hooked(*modules: torch.nn.Module) -> bool:
    """Whether someone would miss the call of one of these modules."""
    everywhere = torch.nn.modules.module
    return any(
        [
            *["forward" in vars(module) for module in modules],
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
            *[
                hooks
                for module in modules
                for hooks in (
                    module._forward_hooks,
                    module._forward_pre_hooks,
                    module._backward_hooks,
                    module._backward_pre_hooks,
                )
            ],
        ]
    )


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: copies of a layer, one after the other, and a norm if there is one.

    Arguments, shapes, masks and errors as in `torch.nn.TransformerEncoder`.
    """


class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: copies of a layer, one after the other, and a norm if there is one.

    Arguments, shapes, masks and errors as in `torch.nn.TransformerDecoder`.
    """


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer`: an encoder and a decoder.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as in `TransformerEncoderLayer`.
        num_encoder_layers, num_decoder_layers: of the encoder and of the decoder.
        custom_encoder, custom_decoder: modules to take instead.

    Shapes, masks and errors as in `torch.nn.Transformer`.

    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = torch.nn.functional.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        for given, made in ((custom_encoder, self.encoder), (custom_decoder, self.decoder)):
            if given is None:
                swap(made.modules())


# From torch's to ours -----------------------------------------------------------------------------------------------

OURS: dict[type, type] = {
    ours.__mro__[1]: ours
    for ours in (
        CrossEntropyLoss, LayerNorm, Linear, MultiheadAttention, NonDynamicallyQuantizableLinear, RMSNorm,
        Transformer, TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer,
    )
}  # fmt: skip
if hasattr(torch.nn, "LinearCrossEntropyLoss"):
    OURS[torch.nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss


def swap(modules: Iterable[torch.nn.Module]) -> None:
    """Makes modules of torch.nn's types modules of this, in place; all others stay."""
    for module in modules:
        module.__class__ = OURS.get(type(module), type(module))
