"""The public functions, with the signatures of `torch.nn.functional`; extra arguments are keyword-only."""

from fastlm.ops.attention.op import scaled_dot_product_attention, varlen_attention
from fastlm.ops.cross_entropy.op import cross_entropy, linear_cross_entropy
from fastlm.ops.layer_norm.op import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastlm.ops.linear.op import linear

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "scaled_dot_product_attention",
    "varlen_attention",
]
