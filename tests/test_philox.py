"""Philox against its published vectors, the layout of the masks, and dropout in every op that has it."""

import math

import formulas
import pytest
import torch
from cases import device_of, serves_here
from errors import assert_within_rule

import fastlm
import fastlm.functional as F
from fastlm.ops.philox import dropout_scale, keep_mask, philox_4x32
from fastlm.ops.registry import OPS

WORD = 2**32 - 1


def philox_of_ints(counter, key):
    """Ten rounds on Python's own integers, as the paper writes them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def keep_of_ints(rng_state, rows, columns, p):
    """The layout that the module promises, element by element."""
    seed, offset = (int(word) for word in rng_state)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    return torch.tensor(
        [
            [
                philox_of_ints((column // 4, row % 2**32, row >> 32, offset % 2**32), key)[column % 4] >= p * 2**32
                for column in range(columns)
            ]
            for row in rows
        ]
    )


# From the known-answer file of the Random123 distribution.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert philox_4x32(words(counter), words(key)) == words(expected)
    ints = philox_of_ints([int(word) for word in words(counter)], [int(word) for word in words(key)])
    assert ints == tuple(int(word) for word in words(expected))


@pytest.mark.parametrize(
    "rng_state",
    [(0, 0), (1, 2), (2**31, 2**31), (2**62 + 12345, 2**40 + 7), (-1, -1), (-(2**63), 2**63 - 2), (-5, 3)],
)
@pytest.mark.parametrize("columns", [1, 3, 4, 9])
def test_a_mask_has_the_documented_layout(rng_state, columns):
    rows = [0, 1, 2, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3]
    ours = keep_mask(torch.tensor(rng_state), torch.tensor(rows), columns, 0.4)
    assert torch.equal(ours, keep_of_ints(rng_state, rows, columns, 0.4))


def test_a_mask_of_no_rows_or_no_columns_is_empty():
    state = torch.tensor([1, 2])
    assert keep_mask(state, torch.arange(0), 5, 0.5).shape == (0, 5)
    assert keep_mask(state, torch.arange(3), 0, 0.5).shape == (3, 0)


def test_rows_that_differ_by_two_to_the_32_have_different_masks():
    rows = torch.tensor([7, 7 + 2**32, 7 + 2**33])
    masks = keep_mask(torch.tensor([3, 4]), rows, 64, 0.5)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_every_word_of_seed_and_offset_that_counts_changes_the_mask():
    rows = torch.arange(2)
    base = keep_mask(torch.tensor([3, 4]), rows, 64, 0.5)
    for seed, offset in ((4, 4), (3 + 2**32, 4), (3 - 2**63, 4), (3, 5), (3, 4 + 2**31)):
        assert not torch.equal(base, keep_mask(torch.tensor([seed, offset]), rows, 64, 0.5)), (seed, offset)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_keep_rate_is_one_minus_p_in_every_row_and_column(p):
    keep = keep_mask(torch.tensor([11, 22]), torch.arange(400), 400, p).double()
    deviation = math.sqrt(p * (1 - p))
    assert abs(keep.mean() - (1 - p)) < 4 * deviation / 400
    for dim in (0, 1):  # 400 means of 400: five standard deviations
        assert (keep.mean(dim) - (1 - p)).abs().max() < 5 * deviation / 20


def test_p_0_keeps_everything_and_p_1_nothing():
    state, rows = torch.tensor([5, 6]), torch.arange(100)
    assert keep_mask(state, rows, 100, 0.0).all()
    assert not keep_mask(state, rows, 100, 1.0).any()
    assert (dropout_scale(0.0), dropout_scale(0.75), dropout_scale(1.0)) == (1.0, 4.0, 0.0)


def test_the_threshold_is_p_times_two_to_the_32_inclusive():
    state = torch.tensor([0, 0])
    word = int(VECTORS[0][2].split()[0], 16)  # of counter 0: element (0, 0)
    assert keep_mask(state, torch.tensor([0]), 1, word / 2**32).item()
    assert not keep_mask(state, torch.tensor([0]), 1, (word + 1) / 2**32).item()


def test_the_state_follows_torchs_generator_and_never_repeats():
    like = torch.empty(3)
    torch.manual_seed(5)
    first, second = (torch.ops.fastlm.new_rng_state(like) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, torch.ops.fastlm.new_rng_state(like))
    assert not torch.equal(first, second)
    assert (first.shape, first.dtype, first.device) == ((2,), torch.int64, like.device)


# Dropout in the ops: every backend of our own gives the mask of its rng_state -----------------------------------------

P = 0.3
LENGTHS_Q, LENGTHS_K = (3, 0, 4, 2), (5, 2, 3, 6)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def norm_call():
    tensors = {"input": normal(3, 5, 14), "residual": normal(3, 5, 14) + 1, "weight": normal(14) + 1}
    return tensors, {"normalized_shape": (14,), "eps": 1e-5}, torch.arange(15).reshape(3, 5), 14


def layer_norm_call():
    tensors, options, rows, columns = norm_call()
    return tensors | {"bias": normal(14)}, options, rows, columns


def attention_call():
    tensors = {"query": normal(2, 4, 5, 8), "key": normal(2, 2, 7, 8), "value": normal(2, 2, 7, 8) + 1}
    options = {"is_causal": True, "enable_gqa": True}
    return tensors, options, torch.arange(2 * 4 * 5).reshape(2, 4, 5), 7


def varlen_call():
    tensors = {"query": normal(9, 4, 8), "key": normal(16, 2, 8), "value": normal(16, 2, 8) + 1}
    options = {
        "cu_seqlens_q": torch.tensor([0, *LENGTHS_Q]).cumsum(0).int(),
        "cu_seqlens_k": torch.tensor([0, *LENGTHS_K]).cumsum(0).int(),
        "max_seqlen_q": 5,  # one more than the longest
        "max_seqlen_k": 6,
    }
    return tensors, options, torch.arange(4 * 9).reshape(4, 9), 6  # head * total_q + token


CALLS = {
    "add_layer_norm": layer_norm_call,
    "add_rms_norm": norm_call,
    "scaled_dot_product_attention": attention_call,
    "varlen_attention": varlen_call,
}
OURS = [(op, name) for op in CALLS for name, backend in OPS[op].backends.items() if backend.fwd is not None]
EVERY = [(op, name) for op in CALLS for name in OPS[op].backends]


def answers(function, tensors, options, dtype, wide=None):
    """Outputs, and gradients for upstream gradients that are the same in every dtype; parameters and residual wide."""
    wide = dtype if wide is None else wide
    dtypes = dict.fromkeys(("residual", "weight", "bias"), wide)
    leaves = {name: x.to(dtypes.get(name, dtype)).requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(*output.shape).to(torch.bfloat16).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return [y.cpu() for y in (*outputs, *gradients)], [*(f"output {n}" for n in range(len(outputs))), *leaves]


def ours(op, backend, tensors, options, dtype, wide=None):
    """`answers` of a backend, on its device; None where it says that it cannot serve such a call on this machine."""
    device = device_of(op, backend)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    kinds = {name: (wide or dtype) if name in ("residual", "weight", "bias") else dtype for name in tensors}
    with fastlm.use_backend(backend):
        if serves_here(getattr(F, op), **{name: x.to(kinds[name]) for name, x in tensors.items()}, **options):
            return answers(getattr(F, op), tensors, options, dtype, wide)[0]
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("op", "backend"), OURS)
def test_dropout_is_the_formula_with_the_mask_of_its_random_state(op, backend, dtype):
    tensors, options, rows, columns = CALLS[op]()
    tensors = {name: x.to(torch.bfloat16).double() for name, x in tensors.items()}
    like = torch.empty(0, device=device_of(op, backend))
    torch.manual_seed(1)
    keep = keep_mask(torch.ops.fastlm.new_rng_state(like).cpu(), rows, columns, P)
    formula = getattr(formulas, op)
    exact, names = answers(formula, tensors, options | {"keep": keep, "dropout_p": P}, torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    nearest, _ = answers(formula, tensors, options | {"keep": keep, "dropout_p": P}, wide)
    torch.manual_seed(1)
    results = ours(op, backend, tensors, options | {"dropout_p": P}, dtype, wide)
    if results is None:
        return
    for name, our, near, true in zip(names, results, nearest, exact, strict=True):
        expected = wide if name in ("output 1", "residual", "weight", "bias") else dtype
        assert_within_rule(our, near.to(expected), true, name)


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_dropout_repeats_under_one_seed_and_changes_with_it(op, backend):
    tensors, options, _, _ = CALLS[op]()
    results = []
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(ours(op, backend, tensors, options | {"dropout_p": P}, torch.float32))
        if results[0] is None:
            return
    for first, second in zip(results[0], results[1], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[2][0], results[3][0])


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_dropout_of_0_draws_no_random_numbers_and_changes_nothing(op, backend):
    tensors, options, _, _ = CALLS[op]()
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    with_zero = ours(op, backend, tensors, options | {"dropout_p": 0.0}, torch.float32)
    without = ours(op, backend, tensors, options, torch.float32)
    assert all(map(torch.equal, states, [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]))
    for first, second in zip(with_zero or (), without or (), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_dropout_of_1_drops_everything_without_nan(op, backend, dtype):
    tensors, options, rows, columns = CALLS[op]()
    tensors = {name: x.float().double() for name, x in tensors.items()}
    results = ours(op, backend, tensors, options | {"dropout_p": 1.0}, dtype)
    if results is None:
        return
    keep = {"dropout_p": 1.0, "keep": torch.zeros(*rows.shape, columns, dtype=torch.bool)}
    exact, names = answers(getattr(formulas, op), tensors, options | keep, torch.float64)
    nearest, _ = answers(getattr(formulas, op), tensors, options | keep, dtype)
    for name, our, near, true in zip(names, results, nearest, exact, strict=True):
        assert_within_rule(our, near, true, name)


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("backend", ["native", "reference", "auto", "cpu", "triton", "emulator"])
def test_backward_drops_what_forward_dropped(op, backend):
    x = torch.full((64, 32), 5.0, requires_grad=True)
    with fastlm.use_backend(backend):
        if not serves_here(getattr(F, op), x, torch.zeros(64, 32), (32,), dropout_p=P):
            return
        _, stream = getattr(F, op)(x, torch.zeros(64, 32), (32,), dropout_p=P)
    stream.sum().backward()
    assert set(stream.unique().tolist()) == {0.0, torch.tensor(5.0).mul(1 / (1 - P)).item()}
    assert torch.equal(x.grad, stream.detach() / 5)
    assert 0.6 < (stream > 0).double().mean() < 0.8


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_dropout_is_off_when_not_training(op):
    x, residual = torch.randn(4, 8), torch.randn(4, 8)
    for backend in ("native", "reference"):
        with fastlm.use_backend(backend):
            _, stream = getattr(F, op)(x, residual, (8,), dropout_p=0.9, training=False)
        assert torch.equal(stream, residual + x)


@pytest.mark.parametrize("seed", range(3))
def test_packed_sequences_drop_by_token_whatever_max_seqlen_says(seed):
    tensors, options, _, _ = varlen_call()
    results = []
    for longest in (4, 9):
        torch.manual_seed(seed)
        with fastlm.use_backend("reference"):
            results.append(F.varlen_attention(**tensors, **(options | {"max_seqlen_q": longest}), dropout_p=P))
    assert_within_rule(results[1], results[0], results[0])
