"""The n-gram model against its equation, written out with dictionaries, and against the laws of probability."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.models.ngram import NGram

SOURCE = "".join(
    f"def f{i}(x, y):\n    if x > {i % 7}:\n        return y * {i * i % 31}\n    return f{i // 2}(y, x)\n\n"
    for i in range(60)
).encode()


class Dictionaries:
    """Interpolated modified Kneser-Ney one probability at a time, straight from the equation."""

    def __init__(self, order: int, text: bytes) -> None:
        self.order = order
        padded = bytes(order - 1) + text
        highest = Counter(padded[i : i + order] for i in range(len(text)))
        self.a = {order: dict(highest)}
        for n in range(order - 1, 0, -1):
            preceding = defaultdict(set)
            for gram in self.a[n + 1]:
                preceding[gram[1:]].add(gram[0])
            self.a[n] = {gram: len(first) for gram, first in preceding.items()}

    def discount(self, n: int, count: int) -> float:
        t = Counter(self.a[n].values())
        small = [0, 0.5, 1, 1.5]
        if not (t[1] and t[2] and t[3]):
            return small[min(count, 3)]
        y = t[1] / (t[1] + 2 * t[2])
        d = [0] + [i - (i + 1) * y * t[i + 1] / t[i] for i in (1, 2, 3)]
        return (d if min(d[1:]) > 0 else small)[min(count, 3)]

    def p(self, byte: int, context: bytes, n: int | None = None) -> float:
        n = self.order if n is None else n
        if n == 0:
            return 1 / 256
        h = context[len(context) - (n - 1) :]
        after = {gram[-1]: count for gram, count in self.a[n].items() if gram[:-1] == h}
        lower = self.p(byte, context, n - 1)
        if not after:
            return lower
        count, total = after.get(byte, 0), sum(after.values())
        back_off = sum(self.discount(n, c) for c in after.values()) / total
        return max(count - self.discount(n, count), 0) / total + back_off * lower


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_equal_those_of_a_dictionary_implementation_of_the_equation(order):
    text = SOURCE[:1500]
    ours, slow = NGram(order).fit(text), Dictionaries(order, text)
    seen_last_only_once_before = text[-3:]
    for context in (b"    return", b"def", b"x, ", b"\xff\xfe\xfd", b"ret\xff", seen_last_only_once_before, bytes(3)):
        padded = bytes(order - 1) + context
        np.testing.assert_allclose(
            ours.next_byte_probabilities(context), [slow.p(b, padded) for b in range(256)], rtol=1e-12
        )


def test_bits_per_byte_is_the_mean_over_every_byte_of_the_text():
    text, other = SOURCE[:1500], b"def f7(x):\n  return zebra\n"
    slow = Dictionaries(3, text)
    padded = bytes(2) + other
    bits = [-math.log2(slow.p(other[i], padded[: i + 2])) for i in range(len(other))]
    assert NGram(3).fit(text).bits_per_byte(other) == pytest.approx(sum(bits) / len(other), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(text=st.binary(min_size=1, max_size=300), context=st.binary(max_size=9), order=st.integers(1, 8))
def test_probabilities_are_positive_and_sum_to_one_over_all_bytes(text, context, order):
    model = NGram(order).fit(text)
    for h in (context, text[-9:], text[: len(text) // 2]):
        p = model.next_byte_probabilities(h)
        assert p.shape == (256,)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_sum_to_one_where_discounts_come_from_the_counts():
    model = NGram(6).fit(SOURCE)
    for context in (b"", b"return", b"def f5", b"\n\n\n", b"        r", b"never seen"):
        assert model.next_byte_probabilities(context).sum() == pytest.approx(1, abs=1e-12)


def test_only_the_last_bytes_of_a_context_count():
    model = NGram(4).fit(SOURCE)
    assert (model.next_byte_probabilities(b"anything\nret") == model.next_byte_probabilities(b"ret")).all()
    assert (model.next_byte_probabilities(b"ret") != model.next_byte_probabilities(b"et")).any()


def test_a_longer_context_predicts_a_text_with_structure_better():
    held_out = SOURCE[-1000:]
    bits = [NGram(order).fit(SOURCE[:-1000]).bits_per_byte(held_out) for order in (1, 2, 4, 6)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < 0.5 * bits[0]


def test_random_bytes_cost_no_less_than_eight_bits_each():
    generator = random.Random(0)
    model = NGram(6).fit(generator.randbytes(50_000))
    assert 8 <= model.bits_per_byte(generator.randbytes(50_000)) < 9


def test_empty_text_unknown_order_and_use_before_fit_are_refused():
    for order in (0, 9):
        with pytest.raises(ValueError, match=f"order must be from 1 to 8, got {order}"):
            NGram(order)
    with pytest.raises(ValueError, match="empty"):
        NGram().fit(b"")
    with pytest.raises(RuntimeError, match="call fit first"):
        NGram().bits_per_byte(b"x")
    with pytest.raises(ValueError, match="empty"):
        NGram().fit(b"x").bits_per_byte(b"")
