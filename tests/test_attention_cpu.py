"""The CPU kernels of attention: several tiles, instruction sets, threads, dropout, masks, caches, memory."""

import itertools
import subprocess
import sys

import pytest
import torch
from errors import assert_within_rule

import fastlm
import fastlm.functional as F
from fastlm.ops import compiled
from fastlm.ops.attention import launch
from fastlm.ops.registry import OPS

pytestmark = pytest.mark.skipif(bool(compiled.cpu_missing()), reason=compiled.cpu_missing())

DENSE, PACKED = F.scaled_dot_product_attention, F.varlen_attention
VARIANTS = [name for name in OPS["layer_norm"].backends if name.startswith("cpu")]  # "cpu" is the best of them
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def qkv(batch, heads, kv_heads, queries, keys, size, value_size=None, dtype=torch.float32):
    shapes = (heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, value_size or size)
    return [normal(batch, *shape, seed=n).to(dtype) for n, shape in enumerate(shapes)]


def answers(backend, function, tensors, *rest, dtype=None, **options):
    """Output, log-sum-exp and the gradients of query, key and value."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    torch.manual_seed(0)
    with fastlm.use_backend(backend):
        output, lse = function(*leaves, *rest, return_lse=True, **options)
        grad = normal(*output.shape, seed=9).to(tensors[0].dtype).to(output.dtype)
        return [output, lse, *torch.autograd.grad(output, leaves, grad)]


def assert_right(backend, function, tensors, *rest, **options):
    ours = answers(backend, function, tensors, *rest, **options)
    torchs = answers("reference", function, tensors, *rest, **options)
    exact = answers("reference", function, tensors, *rest, dtype=torch.float64, **options)
    for name, *each in zip(("output", "lse", "query", "key", "value"), ours, torchs, exact, strict=True):
        assert_within_rule(*each, name)


def assert_same_bits(ours, others):
    for x, y in zip(ours, others, strict=True):
        assert torch.equal(x, y)


def lengths_of(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def starts_of(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


OPTIONS = {
    "everything": {},
    "causal": {"is_causal": True},
    "left": {"window": (150, -1)},
    "narrow": {"window": (20, 3)},
    "right": {"window": (-1, 30)},
    "softcap": {"softcap": 2.0, "is_causal": True},
    "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "negative scale": {"scale": -0.1, "is_causal": True},
    "dropout": {"dropout_p": 0.3, "is_causal": True},
    "dropout of everything": {"dropout_p": 1.0},
    "cache": {"key_lengths": lengths_of(170, 0), "is_causal": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_several_tiles_of_queries_and_keys(name, backend, dtype):
    assert_right(backend, DENSE, qkv(2, 2, 1, 131, 195, 40, 24, dtype), enable_gqa=True, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("size", [7, 16, 33, 64, 80, 96, 128, 200, 249])
def test_head_dimensions(size, backend, dtype):
    assert_right(backend, DENSE, qkv(1, 2, 2, 70, 90, size, 257 - size, dtype), is_causal=True)
    assert_right(backend, DENSE, qkv(1, 4, 2, 3, 300, size, dtype=dtype), enable_gqa=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.4}, {"window": (9, 2), "softcap": 3.0}])
def test_packed_sequences(options, backend, dtype):
    queries, keys = (70, 0, 3, 130), (10, 40, 200, 130)
    tensors = normal(203, 4, 40), normal(380, 2, 40, seed=1), normal(380, 2, 24, seed=2)
    ends = starts_of(*queries), starts_of(*keys)
    assert_right(backend, PACKED, [x.to(dtype) for x in tensors], *ends, 130, 200, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("queries", [5, 100])
@pytest.mark.parametrize("kind", ["bool", "float", "columns", "transposed", "all heads"])
def test_masks(kind, queries, backend, dtype):
    mask = normal(2, 3, queries, 150, seed=7) if kind != "columns" else normal(1, 1, 1, 150)
    mask = {
        "bool": lambda: mask > 0.5,
        "float": lambda: mask.masked_fill(mask > 1, float("-inf")),
        "columns": lambda: mask[..., :1, :],
        "transposed": lambda: mask.transpose(2, 3).contiguous().transpose(2, 3),
        "all heads": lambda: mask[:1, :1] > 0,
    }[kind]()
    assert_right(backend, DENSE, qkv(2, 3, 3, queries, 150, 16, dtype=dtype), mask, is_causal=kind == "float")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_the_dtype_of_query(dtype):
    tensors, mask = qkv(1, 2, 2, 70, 150, 16, dtype=dtype), normal(70, 150).to(dtype)
    assert_same_bits(answers("cpu", DENSE, tensors, mask), answers("cpu", DENSE, tensors, mask.float()))


@pytest.mark.parametrize("backend", VARIANTS)
def test_rows_may_lie_anywhere(backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 3, 3, 70, 70, 48))
    odd = [torch.zeros(2, 3, 70, 51)[..., 2:50].copy_(x) for x in (q, k, v)]
    expected = answers(backend, DENSE, qkv(2, 3, 3, 70, 70, 48), is_causal=True)
    assert_same_bits(answers(backend, DENSE, (q, k, v), is_causal=True), expected)
    assert_same_bits(answers(backend, DENSE, odd, is_causal=True), expected)
    q, k, v = qkv(1, 3, 3, 70, 70, 48)
    wide = [x.expand(2, -1, -1, -1) for x in (q, k, v)]
    assert_same_bits([x[1:] for x in answers(backend, DENSE, wide)[:2]], answers(backend, DENSE, (q, k, v))[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (5, 1)])
@pytest.mark.parametrize("options", [{}, {"window": (100, -1), "softcap": 2.0, "dropout_p": 0.3}])
def test_few_rows_with_keys_and_values_as_they_lie(options, rows, backend, dtype):
    group, queries = rows
    q, k, v = qkv(3, 2 * group, 2, queries, 330, 72, 100, dtype)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    slopes = torch.linspace(0.1, 1, 2 * group) if options else None
    given = {"key_lengths": lengths_of(330, 65, 0), "is_causal": True, "enable_gqa": True, "alibi_slopes": slopes}
    assert_right(backend, DENSE, (q, k, v), **given, **options)


CALLS = {
    "one head": (qkv(1, 1, 1, 300, 1100, 64), {"is_causal": True, "dropout_p": 0.2}),
    "groups": (qkv(2, 6, 2, 200, 600, 32), {"enable_gqa": True, "window": (90, 40)}),
    "decode": (qkv(2, 4, 2, 2, 3000, 64), {"enable_gqa": True, "key_lengths": lengths_of(2900, 13)}),
    "bf16": (qkv(1, 2, 2, 300, 1100, 64, dtype=torch.bfloat16), {"is_causal": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_do_not_depend_on_the_number_of_threads(name):
    tensors, options = CALLS[name]
    torch.set_num_threads(1)
    expected = answers("cpu", DENSE, tensors, **options)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(answers("cpu", DENSE, tensors, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_in_several_parts(dtype, monkeypatch):
    assert launch.splits_bwd_cpu(1100, 1) == 2
    assert_right("cpu", DENSE, qkv(1, 1, 1, 100, 1100, 24, dtype=dtype), window=(-1, 700))
    assert_right("cpu", DENSE, qkv(1, 2, 1, 4, 2100, 24, dtype=dtype), enable_gqa=True, key_lengths=lengths_of(2000))
    monkeypatch.setattr(launch, "splits_bwd_cpu", lambda keys, heads: 5)  # more than there are tiles
    assert_right("cpu", DENSE, qkv(2, 2, 2, 70, 200, 24, dtype=dtype), key_lengths=lengths_of(0, 150))


def test_parts_of_keys_depend_on_the_shape_alone():
    assert [launch.splits_bwd_cpu(keys, 1) for keys in (0, 511, 1024, 1 << 20)] == [1, 1, 2, 8]
    assert [launch.splits_bwd_cpu(1 << 20, heads) for heads in (2, 7, 8, 500)] == [4, 2, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
def test_a_query_that_sees_one_key_has_a_gradient_of_zero(backend, dtype):
    tensors = qkv(1, 2, 2, 70, 70, 24, dtype=dtype)
    output, _, *grads = answers(backend, DENSE, tensors, window=(0, 0))
    assert torch.equal(output, tensors[2])
    assert not grads[0].any()
    assert not grads[1].any()


@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("scale_by", [30.0, 1000.0])
def test_sharp_scores(scale_by, backend):
    q, k, v = qkv(1, 2, 2, 70, 130, 32)
    assert_right(backend, DENSE, (q * scale_by, k, v), is_causal=True)


@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_of_a_query_stay_in_its_row(bad, backend):
    q, k, v = qkv(1, 1, 1, 130, 130, 16)
    with fastlm.use_backend(backend):
        expected = DENSE(q, k, v, is_causal=True)[0, 0]
        q[0, 0, 3, 0] = bad
        output = DENSE(q, k, v, is_causal=True)[0, 0]
    assert output[3].isnan().all()
    assert_same_bits([output[:3], output[4:]], [expected[:3], expected[4:]])


@pytest.mark.parametrize("backend", VARIANTS)
def test_what_is_not_filled_of_a_cache_is_not_read(backend):
    for queries in (1, 80):
        tensors = qkv(2, 2, 2, queries, 150, 24)
        clean = answers(backend, DENSE, tensors, key_lengths=lengths_of(70, 130), is_causal=True)
        for x in tensors[1:]:
            x[0, :, 70:], x[1, :, 130:] = float("nan"), float("nan")
        assert_same_bits(answers(backend, DENSE, tensors, key_lengths=lengths_of(70, 130), is_causal=True), clean)


@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(range(3), n)])
def test_every_subset_of_gradients_has_the_same_bits(wanted):
    tensors = qkv(1, 2, 1, 140, 300, 40)
    expected = answers("cpu", DENSE, tensors, enable_gqa=True)[2:]
    leaves = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(tensors)]
    with fastlm.use_backend("cpu"):
        output = DENSE(*leaves, enable_gqa=True)
    ours = torch.autograd.grad(output, [leaves[n] for n in wanted], normal(*output.shape, seed=9))
    assert_same_bits(ours, [expected[n] for n in wanted])


MEMORY = """
import resource, torch, fastlm, fastlm.functional as F
def run(n):
    q, k, v = (torch.ones(1, 1, n, 8, requires_grad=True) for _ in range(3))
    F.scaled_dot_product_attention(q, k, v, window=(300, 0)).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastlm.use_backend("cpu")
print(-(run(1000) - run(100000)))
"""


def test_memory_does_not_grow_with_the_square_of_the_sequence():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # KB, where 100,000^2 scores would be 40 GB


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="measured with AVX-512")
@pytest.mark.parametrize(
    ("dtype", "queries", "masked", "backend"),
    [
        (torch.float32, 47, False, "native"),
        (torch.float32, 48, False, "cpu"),
        (torch.float32, 256, True, "native"),
        (torch.bfloat16, 16, False, "cpu"),
        (torch.bfloat16, 16, True, "cpu"),
    ],
)
def test_few_queries_and_masks_in_fp32_are_left_to_torch(dtype, queries, masked, backend):
    q = torch.empty(32, 8, queries, 64, dtype=dtype)
    mask = torch.ones(1, queries, dtype=torch.bool) if masked else None
    assert fastlm.explain(F.scaled_dot_product_attention, q, q, q, mask).backend == backend
