"""Triton's kernels of attention: many tiles, split keys, dropout's mask, tiles and memory that are not to be touched.

The shared tests (test_ops.py) run every option within one tile; here tiles are made small, so that a few rows are many
of them. On a machine with a GPU the same tests run on it, else under Triton's interpreter.
"""

import contextlib
import itertools

import hostile
import interpreter
import pytest
import torch
from cases import TORCH
from errors import assert_within_rule
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
import fastlm.functional as F
from fastlm.models import GPT, GPTConfig
from fastlm.ops import philox
from fastlm.ops.attention import kernels
from fastlm.ops.compiled import triton_missing

triton = pytest.importorskip("fastlm.ops.attention.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    interpreter.correct()
DENSE, PACKED = F.scaled_dot_product_attention, F.varlen_attention
SMALL = [(16, 16), (16, 32), (32, 16)]  # BLOCK_M and BLOCK_N
NAN, INF = float("nan"), float("inf")

pytestmark = [
    pytest.mark.skipif(triton_missing() != "", reason=triton_missing()),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of nan and infinity under the interpreter
]


@contextlib.contextmanager
def tiles_of(block_m, block_n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "tiles", lambda *_: triton.Tiles(block_m, block_n, 4, 2))
        yield


@pytest.fixture
def small_tiles():
    with tiles_of(16, 16):
        yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def qkv(batch, heads, kv_heads, queries, keys, size=16, value_size=None):
    shapes = (heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, value_size or size)
    return [normal(batch, *shape, seed=n) for n, shape in enumerate(shapes)]


def lengths_of(*lengths):
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def ends_of(*lengths):
    return lengths_of(0, *itertools.accumulate(lengths))


def packing(queries, keys, heads=2, kv_heads=1, size=16, value_size=None):
    """Query, key, value, cu_seqlens and max_seqlen of sequences of so many queries and keys."""
    tensors = qkv(1, heads, kv_heads, sum(queries), sum(keys), size, value_size)
    longest = max(queries, default=0), max(keys, default=0)
    return [x[0].transpose(0, 1) for x in tensors], (ends_of(*queries), ends_of(*keys), *longest)


def answers(backend, function, tensors, *rest, dtype=torch.float32, wanted=(0, 1, 2), **options):
    """Output, log-sum-exp, and gradients of those of query, key and value that are wanted. Dropout has one seed."""
    leaves = [x.detach().to(dtype).requires_grad_(n in wanted) for n, x in enumerate(tensors)]
    torch.manual_seed(3)
    with fastlm.use_backend(backend):
        output, lse = function(*leaves, *rest, return_lse=True, **options)
        upstream = normal(*output.shape, seed=9).bfloat16().to(dtype)  # the same in every dtype
        leaves = [leaves[n] for n in wanted]
        return [output, lse, *(torch.autograd.grad(output, leaves, upstream) if leaves else ())]


NAMES = ("output", "lse", "gradient of query", "gradient of key", "gradient of value")


def assert_right(function, tensors, *rest, **options):
    """Triton's answers, which are returned, are as near to the reference's in float64 as the error rule asks."""
    ours = answers("triton", function, tensors, *rest, **options)
    near = answers("reference", function, tensors, *rest, **options)
    exact = answers("reference", function, tensors, *rest, dtype=torch.float64, **options)
    for name, a, b, c in zip(NAMES, ours, near, exact, strict=False):
        assert_within_rule(a, b, c, name)
    return ours


def assert_same_bits(ours, theirs):
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"{n}: {(a != b).sum()} of {a.numel()} elements differ"


# Every option over many tiles ---------------------------------------------------------------------------------------

HEADS = [(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 1, 2)]  # batch, key heads, group
BOUNDS = st.sampled_from([-1, -1, 0, 1, 5, 16, 17, 40, 69, 500, 2**31])
PROPERTY = settings(derandomize=True, deadline=None, max_examples=24, database=None)


def mask_of(kind, full, layout, shape):
    sizes = [size if whole else 1 for size, whole in zip(shape, full, strict=True)]
    mask = normal(*sizes, seed=5)
    mask = mask > -0.7 if kind == "bool" else mask.masked_fill(mask < -1.0, -INF)
    return hostile.LAYOUTS[layout](mask)


@PROPERTY
@given(
    tile=st.sampled_from(SMALL),
    heads=st.sampled_from(HEADS),
    queries=st.integers(0, 50),
    keys=st.integers(0, 60),
    sizes=st.sampled_from([(16, 16), (8, 24), (20, 5)]),
    window=st.none() | st.tuples(BOUNDS, BOUNDS),
    is_causal=st.booleans(),
    filled=st.none() | st.tuples(st.integers(0, 60), st.integers(0, 60)),
    softcap=st.sampled_from([0.0, 0.0, 1.5]),
    slopes=st.sampled_from([None, (), (2,)]),
    mask=st.none()
    | st.tuples(
        st.sampled_from(["bool", "float"]),
        st.tuples(*[st.booleans()] * 4),
        st.sampled_from(["contiguous", "transposed", "strided", "expanded", "expanded_last"]),
    ),
    scale=st.sampled_from([None, None, -0.4]),
)
def test_many_tiles_with_any_options_give_the_reference_and_its_gradients(
    tile, heads, queries, keys, sizes, window, is_causal, filled, softcap, slopes, mask, scale
):
    batch, kv_heads, group = heads
    tensors = qkv(batch, kv_heads * group, kv_heads, queries, keys, *sizes)
    options = {"enable_gqa": group > 1, "window": window, "is_causal": is_causal, "softcap": softcap, "scale": scale}
    if filled is not None:
        options["key_lengths"] = lengths_of(*(min(n, keys) for n in filled[:batch]))
    if slopes is not None:
        options["alibi_slopes"] = normal(*slopes[:1] and (batch,), kv_heads * group, seed=4).abs()
    if mask is not None:
        options["attn_mask"] = mask_of(*mask, (batch, kv_heads * group, queries, keys))
    with tiles_of(*tile):
        assert_right(DENSE, tensors, **options)


@PROPERTY
@given(
    tile=st.sampled_from(SMALL),
    lengths=st.lists(st.tuples(st.integers(0, 35), st.integers(0, 40)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (1, 1), (2, 1)]),
    sizes=st.sampled_from([(16, 16), (8, 24)]),
    slack=st.sampled_from([0, 0, 40]),
    window=st.none() | st.tuples(BOUNDS, BOUNDS),
    is_causal=st.booleans(),
    softcap=st.sampled_from([0.0, 1.5]),
    slopes=st.sampled_from([None, "heads", "sequences"]),
)
def test_packed_sequences_of_many_tiles_with_any_options_give_the_reference_and_its_gradients(
    tile, lengths, heads, sizes, slack, window, is_causal, softcap, slopes
):
    tensors, (ends_q, ends_k, longest_q, longest_k) = packing(*zip(*lengths, strict=True), *heads, *sizes)
    options = {"window": window, "is_causal": is_causal, "softcap": softcap}
    if slopes is not None:
        shape = heads[:1] if slopes == "heads" else (len(lengths), heads[0])
        options["alibi_slopes"] = normal(*shape, seed=4).abs()
    with tiles_of(*tile):
        assert_right(PACKED, tensors, ends_q, ends_k, longest_q + slack, longest_k + slack, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "names", ["", "is_causal window", "softcap alibi_slopes", "attn_mask is_causal", "key_lengths attn_mask softcap"]
)
def test_16_bits_over_many_tiles_are_as_near_as_torch_in_16_bits(names, dtype, small_tiles):
    every = {
        "is_causal": True,
        "window": (20, 3),
        "softcap": 2.0,
        "alibi_slopes": normal(1, seed=4).abs(),
        "attn_mask": mask_of("float", (True, False, True, True), "contiguous", (2, 1, 40, 50)),
        "key_lengths": lengths_of(25, 50),
    }
    options = {name: every[name] for name in names.split()}
    tensors = [x.to(dtype).float() for x in qkv(2, 1, 1, 40, 50)]
    results = []
    for function, kind in ((DENSE, dtype), (TORCH["scaled_dot_product_attention"], dtype), (DENSE, torch.float64)):
        backend = "reference" if kind == torch.float64 else "triton"
        results.append(answers(backend, function, tensors, dtype=kind, **options))
    for name, ours, torchs, exact in zip(NAMES, *results, strict=True):
        assert_within_rule(ours, torchs, exact, name)


# Dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(2, 2), (3, 1)])
@pytest.mark.parametrize("queries", [3, 40])
def test_dropout_has_the_mask_of_the_reference_forward_and_backward(queries, heads, small_tiles):
    options = {"dropout_p": 0.3, "enable_gqa": True}
    assert_right(DENSE, qkv(1, *heads, queries, 60), is_causal=queries == 40, **options)


@pytest.mark.parametrize("lengths", [((20, 0, 33), (40, 9, 33)), ((3, 16, 1), (70, 20, 66))])
def test_dropout_of_packed_sequences_has_the_mask_of_the_reference_forward_and_backward(lengths, small_tiles):
    tensors, rest = packing(*lengths)
    assert_right(PACKED, tensors, *rest, dropout_p=0.4, is_causal=True, window=(40, -1))


def rng_state(seed, offset):
    return torch.tensor([seed, offset], dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("queries", [5, 37])
@pytest.mark.parametrize(
    ("dropout_p", "state"),
    [(0.25, (0, 0)), (0.5, (-(2**63), 2**63 - 1)), (1e-9, (2**32 + 7, 2**33 + 1)), (1 - 1e-12, (1, 1))],
)
def test_exactly_the_elements_that_philox_keeps_are_kept(dropout_p, state, queries, small_tiles):
    keys, state = 40, rng_state(*state)
    query, key, _ = qkv(2, 2, 1, queries, keys)
    value = torch.eye(keys, device=DEVICE).expand(2, 1, keys, keys)
    rows = torch.arange(2 * 2 * queries, device=DEVICE).view(2, 2, queries)
    keep = philox.keep_mask(state, rows, keys, dropout_p)
    options = (False, 0.25, -1, -1)
    rest = (None, 0.0, None, True, dropout_p, state, "triton")
    output, lse = torch.ops.fastlm.scaled_dot_product_attention_fwd(query, key, value, None, *options, *rest)
    assert torch.equal(output != 0, keep)
    upstream = torch.zeros_like(output)
    upstream[:, 1] = torch.eye(queries, keys, device=DEVICE)
    *_, grad_value, _ = torch.ops.fastlm.scaled_dot_product_attention_bwd(
        upstream, query, key, value, None, None, None, state, output, lse, *options, 0.0, dropout_p,
        [False, False, True, False], "triton",
    )  # fmt: skip
    assert torch.equal(grad_value[..., :queries] != 0, keep[:, 1:].mT)


@pytest.mark.parametrize("function", [DENSE, PACKED])
@pytest.mark.parametrize("queries", [3, 40])
def test_dropout_of_everything_gives_zeros_and_no_gradients(queries, function, small_tiles):
    if function is DENSE:
        tensors, rest = qkv(1, 1, 1, queries, 40), ()
    else:
        tensors, rest = packing((queries, 20), (40, 20), heads=1)
    output, lse, *grads = answers("triton", function, tensors, *rest, dropout_p=1.0)
    assert all((x == 0).all() for x in (output, *grads))
    without = answers("triton", function, tensors, *rest, wanted=(0,))[1]
    assert torch.equal(lse, without)


def test_dropout_follows_the_seed_of_torch(small_tiles):
    query, key, value = qkv(1, 2, 2, 20, 40)
    outputs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        with fastlm.use_backend("triton"):
            outputs += [DENSE(query, key, value, dropout_p=0.5) for _ in range(2)]
    assert_same_bits(outputs[:2], outputs[4:])
    assert len({x.sum().item() for x in outputs}) == 4


# Decode -------------------------------------------------------------------------------------------------------------


def plan(query, key, value, key_lengths=None, architecture=80, output=None):
    problem = kernels.dense(query, key, value, None, None, key_lengths, None, True, 0.25, -1, -1, 0.0, 0.0)
    output = query.new_empty(*query.shape[:3], value.shape[3])
    return triton.plan_fwd(problem, output, query.new_empty(query.shape[:3]), architecture)


def cache(queries, heads, kv_heads, keys, filled, value_size=32):
    """A query and a cache with nan where it is not filled, and how far it is."""
    query, key, value = qkv(len(filled), heads, kv_heads, queries, keys, 32, value_size)
    for n, length in enumerate(filled):
        key[n, :, length:] = value[n, :, length:] = NAN
    return [query, key, value], lengths_of(*filled)


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "is_causal"),
    [(1, 2, 2, False), (1, 8, 1, True), (5, 4, 2, True), (16, 6, 1, False)],
)
def test_decoding_from_a_cache_splits_the_keys_and_never_uses_what_is_not_filled(queries, heads, kv_heads, is_causal):
    tensors, lengths = cache(queries, heads, kv_heads, 2000, (1234, 0, 2000, 3))
    launches = plan(*tensors, lengths)
    assert [launch.kernel for launch in launches] == [triton._fwd_kernel, triton._combine_kernel]
    assert launches[0].grid[1] > 1
    output, lse, *_ = assert_right(DENSE, tensors, enable_gqa=True, key_lengths=lengths, is_causal=is_causal, wanted=())
    assert (output[1] == 0).all()
    assert (lse[1] == -INF).all()


@pytest.mark.parametrize(
    "options",
    [{"window": (150, 0)}, {"window": (700, -1)}, {"window": (-1, 3), "softcap": 1.5}, {"attn_mask": True}, {"p": 0.5}],
)
def test_split_keys_with_every_option_give_the_reference(options):
    tensors, lengths = cache(4, 2, 1, 600, (400, 600), value_size=20)
    more = {"alibi_slopes": normal(2, 2, seed=4).abs() * 0.01}
    for name, value in options.items():
        if name == "attn_mask":
            more[name] = mask_of("float", (True, True, True, True), "contiguous", (2, 2, 4, 600))
            more[name][:, 1, 2] = -INF
        else:
            more[{"p": "dropout_p"}.get(name, name)] = value
    assert len(plan(*tensors, lengths)) == 2
    assert_right(DENSE, tensors, enable_gqa=True, key_lengths=lengths, **more)


def test_split_keys_of_packed_sequences_give_the_reference():
    tensors, rest = packing((1, 0, 3, 16, 2), (600, 30, 0, 1, 257), heads=4, kv_heads=2)
    assert_right(PACKED, tensors, *rest, is_causal=True, wanted=(0,))


def test_the_number_of_splits_does_not_depend_on_the_architecture():
    tensors, lengths = cache(2, 4, 2, 2000, (7, 2000))
    splits = [
        plan(*tensors, lengths, architecture)[0].args["SPLITS"] for architecture in (75, 80, 86, 89, 90, 100, 120)
    ]
    assert splits[0] > 1
    assert len(set(splits)) == 1


@pytest.mark.parametrize("queries", [16, 17])
def test_only_a_few_queries_are_decoded(queries):
    launches = plan(*qkv(1, 4, 2, queries, 300))
    assert launches[0].args["PACKED"] == (queries == 16)


# Tiles that are not read --------------------------------------------------------------------------------------------


def assert_blind(tensors, hidden, *rest, function=DENSE, **options):
    """With nan in the keys and values of a slice, everything but their own gradients is what it is with zeros there."""
    clean, dirty = ([x.clone() for x in tensors] for _ in range(2))
    rows = (slice(None), slice(None), hidden) if function is DENSE else (hidden,)
    for x, y in zip(clean[1:], dirty[1:], strict=True):
        x[rows], y[rows] = 0.0, NAN
        assert y.isnan().any()
    ours = answers("triton", function, dirty, *rest, **options)
    for x in ours[3:]:
        x[rows] = 0.0
    assert_same_bits(ours, assert_right(function, clean, *rest, **options))


@pytest.mark.parametrize("tile", SMALL)
def test_keys_beyond_the_diagonal_of_the_last_query_are_not_read(tile):
    with tiles_of(*tile):
        assert_blind(qkv(1, 2, 1, 40, 100), slice(64, None), is_causal=True, enable_gqa=True)
        assert_blind(qkv(1, 2, 1, 4, 100), slice(32, None), is_causal=True, enable_gqa=True)
        assert_blind(qkv(1, 1, 1, 40, 100), slice(64, None), window=(-1, 7))


@pytest.mark.parametrize("tile", SMALL)
@pytest.mark.parametrize("queries", [3, 20])
def test_keys_before_the_window_of_the_first_query_are_not_read(queries, tile):
    with tiles_of(*tile):
        first = 100 - queries - 10
        hidden = slice(0, first // 32 * 32)
        options = {"window": (10, -1), "key_lengths": lengths_of(100)}
        assert_blind(qkv(1, 2, 1, queries, 100), hidden, enable_gqa=True, **options)
        tensors, rest = packing((queries,), (100,))
        assert_blind(tensors, hidden, *rest, function=PACKED, window=(10, 5))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (16, 0)}, {"window": (-1, 0), "softcap": 1.5}])
def test_a_query_tile_reads_no_key_tile_that_it_does_not_see(options, small_tiles):
    clean = qkv(1, 2, 2, 96, 96)
    dirty = [x.clone() for x in clean]
    dirty[1][:, :, 64:80] = dirty[2][:, :, 64:80] = NAN
    ours, exact = (answers("triton", DENSE, x, **options) for x in (dirty, clean))
    for n in (0, 1, 2):  # output, lse, gradient of query
        assert torch.equal(ours[n][:, :, :64], exact[n][:, :, :64]), NAMES[n]
        assert ours[n][:, :, 64:80].isnan().any(), NAMES[n]
    if options.get("window") == (16, 0):
        assert torch.equal(ours[0][:, :, 96:], exact[0][:, :, 96:])
        for n in (3, 4):  # keys before 48 are seen by no query that sees the nan
            assert torch.equal(ours[n][:, :, :48], exact[n][:, :, :48]), NAMES[n]


def test_a_key_tile_reads_no_query_tile_that_does_not_see_it(small_tiles):
    clean = qkv(1, 2, 2, 96, 96)
    options = {"window": (16, 0)}
    dirty = [x.clone() for x in clean]
    dirty[0][:, :, 48:64] = NAN  # sees keys 32 to 63
    ours, exact = (answers("triton", DENSE, x, **options) for x in (dirty, clean))
    for n in (3, 4):
        for seen in (slice(0, 32), slice(64, None)):
            assert torch.equal(ours[n][:, :, seen], exact[n][:, :, seen]), NAMES[n]
        assert ours[n][:, :, 32:64].isnan().all(), NAMES[n]


def test_what_a_cache_does_not_hold_yet_has_zero_gradients(small_tiles):
    tensors, lengths = cache(20, 2, 1, 90, (0, 33, 90))
    *_, grad_key, grad_value = assert_right(DENSE, tensors, enable_gqa=True, key_lengths=lengths)
    for grad in (grad_key, grad_value):
        assert (grad[0] == 0).all()
        assert (grad[1, :, 33:] == 0).all()


# Wrong lengths ------------------------------------------------------------------------------------------------------

MARGIN = 4096  # elements before and after


def surrounded(x, outside=NAN):
    """x as a view in the middle of a storage of `outside`, and what lies before and after it there."""
    storage = x.new_full((x.numel() + 2 * MARGIN,), outside)
    view = storage[MARGIN:-MARGIN].view(x.shape)
    return view.copy_(x), (storage[:MARGIN], storage[-MARGIN:])


def run_surrounded(problem):
    """Output, log-sum-exp and gradients, all zeros before and in the middle of ones that must stay."""
    shape = (*problem.query.shape[:3], problem.value.shape[3])
    around = []

    def blank(*shape):
        view, outside = surrounded(torch.zeros(shape, device=DEVICE), 1.0)
        around.extend(outside)
        return view

    output, lse = blank(*shape), blank(*shape[:3])
    triton.KERNELS.fwd(problem, output, lse)
    upstream, _ = surrounded(normal(*shape, seed=9))
    grads = [blank(*x.shape) for x in problem[:3]]
    triton.KERNELS.bwd(problem, upstream, output, lse, *grads)
    assert all((x == 1.0).all() for x in around)
    results = output, lse, *grads
    assert not any(x.isnan().any() for x in results)
    return results


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("ends_q", "ends_k"),
    [
        ((0, 20, 900), (0, 30, 2**31 - 1)),
        ((0, 900, 901), (0, 10**6, 10**7)),
        ((-50, 20, 40), (-(2**31), 30, 70)),
        ((0, 40, 20), (0, 70, 30)),
        ((900, 0, 40), (0, 0, 900)),
    ],
)
@pytest.mark.parametrize(("queries", "scale_by"), [(40, 1), (16, 0.4)])
def test_wrong_cu_seqlens_on_the_device_touch_nothing_outside(
    queries, scale_by, ends_q, ends_k, is_causal, small_tiles
):
    tensors = [surrounded(x[0].transpose(0, 1).contiguous())[0] for x in qkv(1, 2, 1, queries, 70)]
    ends_q = [end if end in (0, 900) else int(end * scale_by) for end in ends_q]
    results = []
    for least, most_q, most_k in ((-(2**31), 2**31 - 1, 2**31 - 1), (0, queries, 70)):
        ends = (lengths_of(*ends_q).clamp(least, most_q), lengths_of(*ends_k).clamp(least, most_k))
        problem = kernels.packed(*tensors, *ends, None, None, queries, 70, is_causal, 0.25, 20, -1, 0.0, 0.0)
        results.append(run_surrounded(problem))
    assert_same_bits(*results)


@pytest.mark.parametrize("queries", [4, 40])
def test_wrong_key_lengths_on_the_device_touch_nothing_outside(queries, small_tiles):
    tensors = [surrounded(x)[0] for x in qkv(3, 2, 1, queries, 70)]
    results = []
    for lengths in ((71, -1, 2**31 - 1), (70, 0, 70)):
        lengths = lengths_of(*lengths)
        problem = kernels.dense(*tensors, None, None, lengths, None, False, 0.25, -1, -1, 0.0, 0.0)
        results.append(run_surrounded(problem))
    assert_same_bits(*results)


def test_wrong_lengths_below_the_checks_of_the_public_functions_are_cut(small_tiles):
    query, key, value = qkv(1, 2, 2, 20, 70)
    args = (None, False, 0.25, -1, -1, None, 0.0)
    outputs = [
        kernels.dense_fwd(triton.KERNELS, query, key, value, *args, lengths_of(n), True, 0.0, None) for n in (1000, 70)
    ]
    assert_same_bits(*outputs)
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    outputs = [
        kernels.packed_fwd(triton.KERNELS, *packed, lengths_of(0, n), lengths_of(0, n + 50), 20, 70, *args[1:], True,
                           0.0, None)
        for n in (1000, 20)
    ]  # fmt: skip
    assert_same_bits(*outputs)


# Bits ---------------------------------------------------------------------------------------------------------------

BITS = {
    "dense": (DENSE, lambda: (qkv(1, 2, 1, 24, 40), ()), {"enable_gqa": True, "is_causal": True, "dropout_p": 0.2}),
    "packed": (PACKED, lambda: packing((20, 3), (30, 20)), {"softcap": 1.5, "window": (9, -1)}),
}


@pytest.mark.parametrize("name", BITS)
def test_two_runs_give_the_same_bits_and_so_does_every_subset_of_gradients(name, small_tiles):
    function, make, options = BITS[name]
    tensors, rest = make()
    everything = answers("triton", function, tensors, *rest, **options)
    assert_same_bits(everything, answers("triton", function, tensors, *rest, **options))
    for size in (1, 2):
        for wanted in itertools.combinations(range(3), size):
            ours = answers("triton", function, tensors, *rest, wanted=wanted, **options)
            assert_same_bits(ours, [*everything[:2], *(everything[2 + n] for n in wanted)])


# Layouts and what is served -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [3, 20])
def test_output_and_gradients_lie_in_memory_as_the_inputs_do(queries):
    projected = normal(2, queries, 3, 4, 16)
    inputs = projected.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D) in one tensor
    for tensors in (inputs, [x.contiguous() for x in inputs]):
        output, _, *grads = answers("triton", DENSE, tensors)
        swapped = tensors is inputs
        for x in (output, *grads):
            assert (x.transpose(1, 2) if swapped else x).is_contiguous()
        if swapped:
            rows = output.transpose(1, 2)
            assert rows.reshape(2, queries, 64).data_ptr() == rows.data_ptr()


def test_tensors_whose_head_dimension_is_not_contiguous_are_copied_and_explain_says_so():
    query, key, value = qkv(1, 2, 2, 5, 7)
    with fastlm.use_backend("triton"):
        assert fastlm.explain(DENSE, query, hostile.outer_swapped(key), value).copies == []
        found = fastlm.explain(DENSE, query, hostile.transposed(key), hostile.strided(value))
        assert found.backend == "triton"
        assert [line.partition(",")[0] for line in found.copies] == ["key", "value"]
        assert str(hostile.transposed(key).stride()) in found.copies[0]
        packed = [x[0].transpose(0, 1) for x in (hostile.strided(query), key, value)]
        found = fastlm.explain(PACKED, *packed, ends_of(5), ends_of(7), 5, 7)
        assert [line.partition(",")[0] for line in found.copies] == ["query"]


def assert_declined(reason, function, *args, **options):
    with fastlm.use_backend("triton"), pytest.raises(fastlm.BackendError, match=reason):
        function(*args, **options)


def test_a_mask_that_requires_a_gradient_is_declined():
    tensors, mask = qkv(1, 2, 2, 5, 7), normal(5, 7).requires_grad_()
    assert_declined("triton: gives no gradient of attn_mask", DENSE, *tensors, mask)
    assert fastlm.explain(DENSE, *tensors, mask).reasons["triton"] == ["gives no gradient of attn_mask"]
    with fastlm.use_backend("triton"), torch.no_grad():
        without = DENSE(*tensors, mask)
    with fastlm.use_backend("triton"):
        assert torch.equal(DENSE(*tensors, mask.detach()), without)


def test_head_dimensions_above_256_and_float64_are_declined():
    for sizes in ((257, 16), (16, 257)):
        assert_declined("head dimensions up to 256, got 257", DENSE, *qkv(1, 1, 1, 3, 5, *sizes))
        tensors, rest = packing((3,), (5,), 1, 1, *sizes)
        assert_declined("head dimensions up to 256, got 257", PACKED, *tensors, *rest)
    assert_declined("does not serve torch.float64", DENSE, *(x.double() for x in qkv(1, 1, 1, 3, 5)))
    tensors, rest = packing((3,), (5,))
    assert_declined("does not serve torch.float64", PACKED, *(x.double() for x in tensors), *rest)


@pytest.mark.parametrize("sizes", [(256, 256), (256, 16), (16, 200), (1, 1)])
def test_head_dimensions_from_1_to_256_are_served(sizes):
    with tiles_of(32, 32):
        assert_right(DENSE, qkv(1, 1, 1, 40, 50, *sizes), is_causal=True)
        assert_right(DENSE, qkv(1, 1, 1, 3, 50, *sizes), is_causal=True)


# Rows without keys --------------------------------------------------------------------------------------------------


def dead_rows():
    """Options, and which rows (1, 2, 50, 1) of qkv(1, 2, 2, 50, 40) they leave without a key."""
    dead = torch.zeros(1, 2, 50, 1, dtype=torch.bool, device=DEVICE)
    dead[:, 0, 3] = dead[:, 1, 10:38] = True  # a row, and a whole tile with parts of others
    row = torch.arange(50, device=DEVICE).view(1, 1, 50, 1).expand(1, 2, 50, 1)
    mask = (~dead).expand(1, 2, 50, 40)
    some = torch.zeros(1, 2, 50, 40, device=DEVICE)
    return {
        "boolean": ({"attn_mask": mask}, dead),
        "additive": ({"attn_mask": some.masked_fill(~mask, -INF)}, dead),
        "a mask that hides what the diagonal leaves": (
            {"attn_mask": torch.arange(40, device=DEVICE).expand(50, 40) >= 20, "is_causal": True},
            row < 20,
        ),
        "window": ({"window": (2, 1)}, row > 41),
        "key_lengths": ({"key_lengths": lengths_of(21), "is_causal": True}, row < 29),
        "no keys": ({"key_lengths": lengths_of(0)}, row >= 0),
    }


@pytest.mark.parametrize("kind", dead_rows())
def test_rows_without_keys_give_zeros_minus_infinity_and_take_no_part_in_any_gradient(kind, small_tiles):
    options, dead = dead_rows()[kind]
    tensors = qkv(1, 2, 2, 50, 40)
    output, lse, grad_query, *grads = assert_right(DENSE, tensors, **options)
    assert torch.equal((output == 0).all(-1, keepdim=True), dead)
    assert (grad_query.masked_select(dead) == 0).all()
    assert torch.equal(lse[..., None] == -INF, dead)
    salted = [tensors[0].masked_fill(dead, 1e4), *tensors[1:]]
    assert_same_bits(answers("triton", DENSE, salted, **options)[3:], grads)


# torch.compile, opcheck ---------------------------------------------------------------------------------------------


def compiled_and_eager(function, tensors):
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output, lse = run(*leaves)
        results.append([output, lse, *torch.autograd.grad(output.square().sum(), leaves)])
    torch._dynamo.reset()
    return results


@pytest.mark.parametrize("queries", [3, 20])
def test_compiled_calls_are_whole_graphs_and_equal_eager(queries, small_tiles):
    def dense(query, key, value):
        return DENSE(query, key, value, window=(9, 0), softcap=2.0, enable_gqa=True, return_lse=True)

    tensors, rest = packing((queries, 5), (40, 2))

    def packed(query, key, value):
        return PACKED(query, key, value, *rest, is_causal=True, return_lse=True)

    with fastlm.use_backend("triton"):
        assert_same_bits(*compiled_and_eager(dense, qkv(1, 2, 1, queries, 40)))
        assert_same_bits(*compiled_and_eager(packed, tensors))


EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck_finds_nothing_in_the_four_ops(small_tiles):
    ops = torch.ops.fastlm
    tensors = qkv(1, 2, 1, 17, 20)
    for x in tensors:
        x.requires_grad_()
    options, slopes = (True, 0.25, 9, -1), normal(2, seed=4).abs()
    mask, lengths = normal(17, 20), lengths_of(18)
    args = (*tensors, mask, *options, slopes, 1.5, lengths, True, 0.0, None, "triton")
    torch.library.opcheck(ops.scaled_dot_product_attention_fwd.default, args, test_utils=EVERYTHING)
    plain = [x.detach() for x in tensors]
    saved = [x.detach() for x in ops.scaled_dot_product_attention_fwd(*args)]
    args = (*options, 1.5, 0.0, [True, False, True, False], "triton")
    args = (saved[0], *plain, mask, slopes, lengths, None, *saved, *args)
    torch.library.opcheck(ops.scaled_dot_product_attention_bwd.default, args, test_utils=EVERYTHING)

    tensors, rest = packing((2, 5), (70, 5))
    for x in tensors:
        x.requires_grad_()
    slopes = normal(2, seed=4).abs()
    args = (*tensors, *rest, *options, slopes, 1.5, True, 0.0, None, "triton")
    torch.library.opcheck(ops.varlen_attention_fwd.default, args, test_utils=EVERYTHING)
    plain = [x.detach() for x in tensors]
    saved = [x.detach() for x in ops.varlen_attention_fwd(*args)]
    args = (saved[0], *plain, *rest[:2], slopes, None, *saved, *rest[2:], *options, 1.5, 0.0, [True] * 3, "triton")
    torch.library.opcheck(ops.varlen_attention_bwd.default, args, test_utils=EVERYTHING)


# Precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["tf32", "ieee", "none"])
def test_products_of_fp32_are_in_tf32_only_if_torch_is_told_so(asked):
    setting, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        setting.fp32_precision = asked
        used = [triton._precision(torch.float32)]
        used += [plan(*qkv(1, 1, 1, queries, 50))[0].args["PRECISION"] for queries in (3, 40)]
    finally:
        setting.fp32_precision = before
    assert [name == "tf32" for name in used] == [asked == "tf32"] * 3


# In a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "alibi"])
def test_a_gpt_has_the_loss_and_the_gradients_of_the_reference(position, small_tiles):
    config = GPTConfig(vocab_size=61, max_seq_len=40, hidden_size=32, num_layers=2, num_heads=2, position=position)
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones(2, 20, dtype=torch.int64, device=DEVICE)
    mask[1, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def loss_and_gradients(backend, dtype):
        torch.manual_seed(1)
        model = GPT(config).to(DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * normal(*parameter.shape, seed=parameter.numel())
        model = model.to(dtype)
        with fastlm.use_backend(backend):
            loss = model(ids, attention_mask=mask, labels=labels).loss
            loss.backward()
        return {"loss": loss} | {name: parameter.grad for name, parameter in model.named_parameters()}

    calls, fwd = [], triton.KERNELS.fwd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "KERNELS", triton.KERNELS._replace(fwd=lambda *args: calls.append(1) or fwd(*args)))
        ours = loss_and_gradients("triton,native,reference", torch.float32)
    assert len(calls) == config.num_layers
    near, exact = loss_and_gradients("reference", torch.float32), loss_and_gradients("reference", torch.float64)
    for name, gradient in exact.items():
        assert_within_rule(ours[name], near[name], gradient, name)


# On a GPU -----------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_many_programs_give_the_same_bits_each_time(dtype):
    tensors = [x.to(dtype) for x in qkv(4, 8, 2, 1000, 1100, 64)]
    options = {"enable_gqa": True, "is_causal": True, "dropout_p": 0.1, "dtype": dtype}
    first = answers("triton", DENSE, tensors, **options)
    for _ in range(5):
        assert_same_bits(first, answers("triton", DENSE, tensors, **options))
    tensors, lengths = cache(2, 8, 2, 8000, (8000, 1, 5000))
    first = answers("triton", DENSE, tensors, enable_gqa=True, key_lengths=lengths, wanted=())
    for _ in range(5):
        assert_same_bits(first, answers("triton", DENSE, tensors, enable_gqa=True, key_lengths=lengths, wanted=()))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu_a_long_sequence_in_bf16_is_as_near_as_torch(size, is_causal):
    tensors = [x.bfloat16() for x in qkv(1, 2, 2, 4096, 4096, size)]
    upstream, results = normal(*tensors[0].shape, seed=9).bfloat16(), []
    for function, dtype in (
        (DENSE, torch.bfloat16),
        (torch.nn.functional.scaled_dot_product_attention, torch.bfloat16),
        (torch.nn.functional.scaled_dot_product_attention, torch.float64),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        with fastlm.use_backend("triton"):
            output = function(*leaves, is_causal=is_causal)
        results.append([output, *torch.autograd.grad(output, leaves, upstream.to(dtype))])
    for name, ours, torchs, exact in zip((NAMES[0], *NAMES[2:]), *results, strict=True):
        assert_within_rule(ours, torchs, exact, name)
