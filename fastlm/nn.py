"""Modules: `torch.nn`'s own, with FastLM's functions in their forward. A model takes them in place of torch's as it is:
constructors, initialisation, parameters' names, `state_dict` and `repr` are torch's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm import functional as F

__all__ = ["CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm"]


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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
