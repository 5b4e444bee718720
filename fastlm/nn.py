"""Modules: `torch.nn`'s own, with FastLM's functions in their forward. A model takes them in place of torch's as it is:
constructors, initialisation, parameters' names, `state_dict` and `repr` are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import functional as F

__all__ = ["LayerNorm", "RMSNorm"]


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
