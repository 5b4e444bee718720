"""Philox 4x32-10, the counter-based generator behind every dropout of FastLM.

A dropout mask is a pure function of (seed, offset) and of each element's place, so that every backend gives the same
mask and backward computes it again rather than keep it. For element (row, column):

    words = philox(counter = (column // 4, row mod 2^32, row // 2^32, offset), key = (seed mod 2^32, seed // 2^32))
    keep  = words[column % 4] >= p * 2^32

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.registry import LIBRARY

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on int64 tensors that hold 32-bit words; arguments broadcast, as do the four results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _multiply(c0, MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, in halves of 16 bits so that int64 does not overflow."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def keep_mask(rng_state: Tensor, row: Tensor, columns: int, p: float) -> Tensor:
    """The elements that dropout keeps.

    Args:
        rng_state: (2,) int64, seed and offset, from `torch.ops.fastlm.new_rng_state`.
        row: (...) int64, the number of each row.
        columns: how many columns each row has.
        p: the probability of dropping an element.

    Returns:
        (..., columns) bool.
    """
    seed, offset = rng_state[0], rng_state[1]
    group = torch.arange((columns + 3) // 4, device=row.device)
    row = row[..., None]
    zero = torch.zeros_like(seed)
    words = philox_4x32(
        (group, row & WORD, (row >> 32) & WORD, zero + (offset & WORD)), (seed & WORD, (seed >> 32) & WORD)
    )
    return torch.stack(words, -1).flatten(-2)[..., :columns] >= round(p * 2**32)


def dropout_scale(p: float) -> float:
    """1 / (1 - p), what kept elements are multiplied by; 0 when nothing is kept."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def _new_rng_state(like: Tensor) -> Tensor:
    """A fresh (seed, offset), (2,) int64, drawn from torch's generator of `like`'s device without a sync."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=like.device)


LIBRARY.define("new_rng_state(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
LIBRARY.impl("new_rng_state", _new_rng_state, "CompositeExplicitAutograd")
torch.library.register_fake("fastlm::new_rng_state", lambda like: like.new_empty(2, dtype=torch.int64), lib=LIBRARY)
