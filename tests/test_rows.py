"""Where rows begin, for tensors of any rank and strides: the documented formula against the tensors themselves."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.ops.rows import MAX_DIMS, as_rows, copies, is_row_contiguous


@st.composite
def views(draw, shape):
    """A tensor of this shape over numbered storage: dimensions permuted, sliced, shifted, expanded."""
    order = draw(st.permutations(range(len(shape))))
    order = order if draw(st.booleans()) else sorted(order)
    kinds = [draw(st.sampled_from(["plain", "plain", "sliced", "shifted", "expanded"])) for _ in shape]
    sizes = [
        {"plain": size, "sliced": 2 * size, "shifted": size + 1, "expanded": 1}[kind]
        for size, kind in zip(shape, kinds, strict=True)
    ]
    x = torch.arange(math.prod(sizes), dtype=torch.float64).reshape([sizes[n] for n in order])
    x = x.permute([order.index(n) for n in range(len(shape))])
    for n, kind in enumerate(kinds):
        if kind == "sliced":
            x = x[(slice(None),) * n + (slice(1, None, 2),)]
        if kind == "shifted":
            x = x.narrow(n, 1, shape[n])
    return x.expand(shape)


@st.composite
def calls(draw):
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    dims = draw(st.integers(1, min(len(shape), 2)))
    tensors = [
        draw(st.none() if draw(st.integers(0, 4)) == 0 else views(shape)) for _ in range(draw(st.integers(1, 3)))
    ]
    if all(x is None for x in tensors):
        tensors[0] = draw(views(shape))
    return tensors, dims


def brute_force_is_run(x, dims):
    """Whether the elements of a row lie one after another, looked at one by one."""
    row = x[(0,) * (x.dim() - dims)]
    places = [
        sum(i * s for i, s in zip(at, row.stride(), strict=True)) for at in itertools.product(*map(range, row.shape))
    ]
    return places == list(range(len(places)))


def documented_offset(r, sizes, strides):
    _, s1, s2, s3 = sizes
    return (
        (r // (s1 * s2 * s3)) * strides[0]
        + (r // (s2 * s3) % s1) * strides[1]
        + (r // s3 % s2) * strides[2]
        + (r % s3) * strides[3]
    )


def assert_rows(tensors, dims):
    """Everything that `as_rows` promises; how many tensors it copied."""
    shape = next(x for x in tensors if x is not None).shape
    outer, columns = shape[: len(shape) - dims], math.prod(shape[len(shape) - dims :])
    ready, sizes, strides = as_rows(tensors, dims)
    assert len(ready) == len(strides) == len(tensors)
    assert len(sizes) == MAX_DIMS
    assert math.prod(sizes) == math.prod(outer)
    copied = 0
    for x, y, places in zip(tensors, ready, strides, strict=True):
        assert (x is None) == (y is None)
        if x is None:
            assert places == (0, 0, 0, 0)
            continue
        assert torch.equal(x, y)
        copied += x is not y
        assert all(stride == 0 for size, stride in zip(sizes, places, strict=True) if size == 1)
        for r, at in enumerate(itertools.product(*map(range, outer))):
            offset = documented_offset(r, sizes, places)
            assert offset == sum(i * s for i, s in zip(at, y.stride(), strict=False)), (r, sizes, places)
            run = y.as_strided((columns,), (1,), y.storage_offset() + offset)
            assert torch.equal(run, x[at].reshape(-1))
    given = [places for x, places in zip(tensors, strides, strict=True) if x is not None]
    used = [n for n in range(MAX_DIMS) if sizes[n] > 1]
    assert used == list(range(len(used)))  # those that are not needed come last
    for n in used[1:]:  # no two could have been one
        assert any(places[n - 1] != sizes[n] * places[n] for places in given)
    return copied


@settings(derandomize=True, deadline=None, max_examples=600, database=None)
@given(calls())
def test_every_row_begins_where_the_formula_says_and_only_what_must_be_is_copied(call):
    tensors, dims = call
    for x in tensors:
        assert x is None or is_row_contiguous(x, dims) == brute_force_is_run(x, dims)
    copied = assert_rows(tensors, dims)
    named = {f"x{n}": x for n, x in enumerate(tensors)}
    ready, _, _ = as_rows(tensors, dims)
    expected = [name for (name, x), y in zip(named.items(), ready, strict=True) if x is not y]
    assert [text.partition(",")[0] for text in copies(dims, **named)] == expected
    broken = [x for x in tensors if x is not None and not brute_force_is_run(x, dims)]
    if copied > len(broken):  # more were copied: then without these copies there are too many dimensions
        whole = [x if x is None or brute_force_is_run(x, dims) else x.contiguous() for x in tensors]
        assert fewest_dimensions([x for x in whole if x is not None], dims) > MAX_DIMS


def fewest_dimensions(tensors, dims):
    """Into how many the outer dimensions fold at best."""
    outer = [(size, [x.stride(n) for x in tensors]) for n, size in enumerate(tensors[0].shape[:-dims]) if size > 1]
    joins = sum(
        first == [size * stride for stride in second] for (_, first), (size, second) in itertools.pairwise(outer)
    )
    return len(outer) - joins


@pytest.mark.parametrize(
    ("make", "dims", "count"),
    [
        (lambda x: x, 1, 0),
        (lambda x: x.mT, 1, 1),
        (lambda x: x.permute(2, 0, 1, 3), 1, 0),
        (lambda x: x[:, ::2], 1, 0),
        (lambda x: x[:1].expand(5, -1, -1, -1), 1, 0),
        (lambda x: x[..., ::2], 1, 1),
        (lambda x: x[..., 1:], 1, 0),
        (lambda x: x[..., 1:], 2, 1),
        (lambda x: x[..., :1], 1, 0),
        (lambda x: x[:, :, :1].mT, 2, 0),
        (lambda x: x[..., :1].mT, 2, 1),
        (lambda x: x[:, :, :, :1].expand(-1, -1, -1, 6), 1, 1),
    ],
)
def test_a_copy_is_made_where_a_row_is_not_one_run_and_nowhere_else(make, dims, count):
    x = make(torch.arange(2.0 * 3 * 4 * 6).reshape(2, 3, 4, 6))
    assert assert_rows([x], dims) == count
    assert copies(dims, x=x) == [f"x, of strides {x.stride()}"] * count


def test_five_dimensions_that_do_not_fold_are_copied_and_four_are_not():
    x = torch.arange(5.0 * 3**5 * 2**5).reshape(6, 6, 6, 6, 6, 5)[::2, ::2, ::2, ::2, ::2]
    assert assert_rows([x], 1) == 1
    assert assert_rows([x[0]], 1) == 0
    assert assert_rows([x[:1]], 1) == 0
    assert copies(1, x=x) == [f"x, of strides {x.stride()}"]
    plain = torch.zeros(3, 3, 3, 3, 3, 5)
    assert assert_rows([plain, x, None], 1) == 1
    assert copies(1, plain=plain, x=x, none=None) == [f"x, of strides {x.stride()}"]


def test_tensors_fold_only_as_far_as_all_of_them_allow():
    plain, swapped = torch.zeros(2, 3, 4, 5), torch.zeros(3, 2, 4, 5).transpose(0, 1)
    assert as_rows([plain], 1)[1:] == ((24, 1, 1, 1), [(5, 0, 0, 0)])
    assert as_rows([swapped], 1)[1:] == ((2, 3, 4, 1), [(20, 40, 5, 0)])
    assert as_rows([plain, None, swapped], 1)[1:] == (
        (2, 3, 4, 1),
        [(60, 20, 5, 0), (0, 0, 0, 0), (20, 40, 5, 0)],
    )
    assert as_rows([plain, plain[:1, :1].expand(2, 3, 4, 5)], 1)[1:] == (
        (6, 4, 1, 1),
        [(20, 5, 0, 0), (0, 5, 0, 0)],
    )


def test_offsets_past_2_to_the_31_are_exact():
    meta = torch.empty_strided((3, 3, 5), (2**33, 2**31, 1), device="meta")
    _, sizes, (strides,) = as_rows([meta], 1)
    assert [documented_offset(r, sizes, strides) for r in (0, 1, 3, 8)] == [0, 2**31, 2**33, 2**34 + 2**32]
