"""The ops as equations in float64, element by element where that is clearer; torch's autograd differentiates them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(input, normalized_shape, weight=None, eps=None):
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    y = input / torch.sqrt((input * input).mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight


def _stream(input, residual, keep, dropout_p):
    if keep is not None:
        input = torch.where(keep, input / (1 - dropout_p), 0.0) if dropout_p < 1 else input * 0
    return residual + input


def add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, keep=None, dropout_p=0.0, training=True
):
    new_residual = _stream(input, residual, keep, dropout_p)
    return layer_norm(new_residual, normalized_shape, weight, bias, eps), new_residual


def add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, *, keep=None, dropout_p=0.0, training=True):
    new_residual = _stream(input, residual, keep, dropout_p)
    return rms_norm(new_residual, normalized_shape, weight, eps), new_residual


def cross_entropy(
    input, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=0.0
):
    dim = min(1, input.dim() - 1)
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    classes = input.shape[dim]
    x = input.movedim(dim, -1).reshape(math.prod(shape), classes)
    x = softcap * torch.tanh(x / softcap) if softcap else x
    w = torch.ones(classes, dtype=x.dtype, device=x.device) if weight is None else weight
    probabilities = target.is_floating_point()
    target = target.movedim(dim, -1).reshape(len(x), classes) if probabilities else target.reshape(len(x))
    losses, zs, total, counted = [], [], torch.zeros((), dtype=x.dtype, device=x.device), 0
    for row, t in zip(x, target, strict=True):
        lse = torch.logsumexp(row, 0)
        if probabilities:
            q = ((1 - label_smoothing) * t + label_smoothing / classes) * w
            loss, counts = (q * (lse - row)).sum(), 1.0
        elif t.item() == ignore_index:
            losses.append(row.new_zeros(()))
            zs.append(row.new_zeros(()))
            continue
        else:
            loss, counts = (1 - label_smoothing) * w[t.item()] * (lse - row[t.item()]), w[t.item()]
            if label_smoothing:
                loss = loss + label_smoothing / classes * (w * (lse - row)).sum()
        losses.append(loss)
        zs.append(z_loss * lse * lse if z_loss else row.new_zeros(()))
        total, counted = total + counts, counted + 1
    if reduction == "none":
        rows = [loss + z for loss, z in zip(losses, zs, strict=True)]
        return torch.stack([x.new_zeros(()), *rows])[1:].reshape(shape)
    loss, z = sum(losses, x.new_zeros(())), sum(zs, x.new_zeros(()))
    if reduction == "sum":
        return loss + z
    return loss / total + (z / counted if z_loss else 0.0)


def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, ignore_index=-100, **options):
    logits = torch.tensordot(input, linear_weight, ([-1], [-1]))
    logits = logits if linear_bias is None else logits + linear_bias
    return cross_entropy(logits, target, weight, ignore_index=-100 if ignore_index is None else ignore_index, **options)


def linear(input, weight, bias=None, *, weight_scale=None):
    output = (input[..., None, :] * weight).sum(-1)
    output = output if weight_scale is None else output * weight_scale
    return output if bias is None else output + bias


def visible(i: int, j: int, offset: int, is_causal: bool, window: tuple[int, int] | None) -> bool:
    """Whether query i, which sits at key position i + offset, may see key j."""
    left, right = window or (-1, -1)
    at = i + offset
    return not (is_causal and j > at) and (left < 0 or j >= at - left) and (right < 0 or j <= at + right)


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    *,
    window=None,
    alibi_slopes=None,
    softcap=0.0,
    key_lengths=None,
    return_lse=False,
    keep=None,
):
    """(B, H, T, D) only; returns output and lse."""
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // max(1, key.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, queries, keys)
    outputs = value.new_zeros((batch, heads, queries, value.shape[3]))
    lses = value.new_full((batch, heads, queries), -math.inf)
    for b in range(batch):
        filled = keys if key_lengths is None else int(key_lengths[b])
        offset = 0 if key_lengths is None else filled - queries
        for h in range(heads):
            k, v = key[b, h // group], value[b, h // group]
            for i in range(queries):
                js = [j for j in range(filled) if visible(i, j, offset, is_causal, window)]
                if mask is not None and mask.dtype == torch.bool:
                    js = [j for j in js if mask[b, h, i, j]]
                elif mask is not None:
                    js = [j for j in js if mask[b, h, i, j] != -math.inf]
                if not js:
                    continue
                s = scale * (k[js] @ query[b, h, i])
                s = softcap * torch.tanh(s / softcap) if softcap else s
                if alibi_slopes is not None:
                    slope = alibi_slopes.expand(batch, heads)[b, h]
                    s = s - slope * torch.tensor([abs(i + offset - j) for j in js], device=s.device)
                if mask is not None and mask.dtype != torch.bool:
                    s = s + mask[b, h, i, js]
                lse = torch.logsumexp(s, 0)
                p = torch.exp(s - lse)
                if keep is not None:
                    p = torch.where(keep[b, h, i, js], p / (1 - dropout_p), 0.0) if dropout_p < 1 else p * 0
                outputs[b, h, i] = p @ v[js]
                lses[b, h, i] = lse.detach()
    return (outputs, lses) if return_lse else outputs


def varlen_attention(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    *,
    window=None,
    alibi_slopes=None,
    softcap=0.0,
    return_lse=False,
    keep=None,
):
    """One sequence after another; `keep` is (H, total_q, max_seqlen_k)."""
    outputs, lses = [], []
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    q0, k0 = next(bounds)
    for n, (q1, k1) in enumerate(bounds):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[n]
        output, lse = scaled_dot_product_attention(
            query[q0:q1].transpose(0, 1)[None],
            key[k0:k1].transpose(0, 1)[None],
            value[k0:k1].transpose(0, 1)[None],
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            window=window,
            alibi_slopes=slopes,
            softcap=softcap,
            key_lengths=torch.tensor([k1 - k0]),
            return_lse=True,
            keep=None if keep is None else keep[None, :, q0:q1, : k1 - k0],
        )
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
        q0, k0 = q1, k1
    if not outputs:
        outputs, lses = [value.new_zeros((*query.shape[:2], value.shape[2]))], [value.new_zeros(query.shape[1::-1])]
    result: Tensor = torch.cat(outputs)
    return (result, torch.cat(lses, 1)) if return_lse else result
