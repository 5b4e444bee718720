"""What only attention has: rows without keys, ranks, grouped heads, masks with gradients, empty sequences, autocast."""

import math
import types

import formulas
import hostile
import pytest
import torch
import torch.nn.functional as T
from errors import assert_within_rule
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
import fastlm.functional as F
from fastlm.ops.attention import op as attention

BACKENDS = ["auto", "native", "reference"]
OURS = ["auto", "reference"]  # whatever has all options


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def attend(*arguments, backend, **options):
    with fastlm.use_backend(backend):
        return F.scaled_dot_product_attention(*arguments, **options)


# Rows without keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["boolean", "additive", "window", "key_lengths"])
def test_rows_without_keys_give_zeros_and_take_no_part_in_any_gradient(kind, backend):
    query, key, value = (normal(2, 2, 4, 8, dtype=torch.float32).requires_grad_() for _ in range(3))
    dead = torch.zeros(2, 1, 4, 1, dtype=torch.bool)
    options = {}
    if kind in ("boolean", "additive"):
        dead[0, :, 1] = dead[1, :, 3] = True
        mask = (~dead).expand(2, 1, 4, 4)
        options = {"attn_mask": mask if kind == "boolean" else torch.zeros(2, 1, 4, 4).masked_fill(~mask, -math.inf)}
    elif kind == "window":
        query = normal(2, 2, 9, 8, dtype=torch.float32).requires_grad_()
        dead = (torch.arange(9) > 4).view(1, 1, 9, 1).expand(2, 1, 9, 1)
        options = {"window": (1, 0)}
    else:
        dead[1] = True
        options = {"key_lengths": torch.tensor([4, 0]).int()}
    output = attend(query, key, value, backend=backend, **options)
    hidden = dead.expand(*output.shape[:3], 1)
    assert hidden.any()
    assert (output.masked_select(hidden) == 0).all()
    assert (output.masked_select(~hidden) != 0).all()
    output.sum().backward()
    assert (query.grad.masked_select(hidden) == 0).all()
    alone = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    attend(*alone, backend=backend, **options).masked_select(~hidden).sum().backward()
    for with_dead, without in zip((query, key, value), alone, strict=True):
        assert with_dead.grad.isfinite().all()
        assert_within_rule(with_dead.grad, without.grad, without.grad.double())


@pytest.mark.parametrize("backend", OURS)
def test_the_log_sum_exp_of_a_row_without_keys_is_minus_infinity(backend):
    query, key = normal(1, 1, 3, 4), normal(1, 1, 5, 4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    output, lse = attend(query, key, key, attn_mask=mask, return_lse=True, backend=backend)
    assert (output[0, 0, 1] == 0).all()
    assert (lse[0, 0] == -math.inf).tolist() == [False, True, False]
    assert lse.dtype == torch.float64


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_log_sum_exp_is_fp32_whatever_the_input(dtype, backend):
    query = normal(1, 2, 3, 4, dtype=dtype)
    _, lse = attend(query, query, query, return_lse=True, backend=backend)
    exact = torch.logsumexp(query.double() @ query.double().mT / 2, -1)
    assert_within_rule(lse, torch.logsumexp(query.float() @ query.float().mT / 2, -1), exact)


# Ranks, heads -------------------------------------------------------------------------------------------------------

SHAPES = [
    ((5, 8), (7, 8), (7, 4), None),
    ((2, 5, 8), (2, 7, 8), (2, 7, 4), (5, 7)),
    ((2, 5, 8), (1, 7, 8), (7, 4), (2, 5, 7)),
    ((2, 3, 5, 8), (3, 7, 8), (1, 3, 7, 4), (3, 1, 7)),
    ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 4), (4, 5, 7)),
    ((2, 1, 4, 5, 8), (3, 1, 7, 8), (1, 7, 4), (2, 3, 4, 5, 7)),
    ((1, 2, 5, 8), (3, 1, 7, 8), (3, 2, 7, 4), (1, 1, 1, 7)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("query", "key", "value", "mask"), SHAPES)
def test_any_rank_and_broadcasting_batch_dimensions_are_taken_as_in_torch(query, key, value, mask, backend):
    tensors = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in (query, key, value)]
    options = {} if mask is None else {"attn_mask": normal(*mask) > -0.5}

    def answer(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        output = function(*leaves, **options)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    exact, torchs = (answer(T.scaled_dot_product_attention, dtype) for dtype in (torch.float64, torch.float32))
    with fastlm.use_backend(backend):
        ours = answer(F.scaled_dot_product_attention, torch.float32)
    for our, near, true in zip(ours, torchs, exact, strict=True):
        assert_within_rule(our, near, true)


OLD = torch.__version__ < (2, 13)
NO_HEADS = pytest.param(0, 0, 0, marks=pytest.mark.skipif(OLD, reason="torch 2.10 divides by their number and dies"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), [(4, 2, 2), (4, 1, 1), (4, 2, 4), (4, 4, 1), NO_HEADS])
def test_query_heads_in_groups_as_in_torch(heads, key_heads, value_heads, backend):
    shapes = ((2, heads, 5, 8), (2, key_heads, 7, 8), (2, value_heads, 7, 4))
    tensors = [normal(*shape, dtype=torch.float32) for shape in shapes]
    exact = T.scaled_dot_product_attention(*(x.double() for x in tensors), enable_gqa=True)
    torchs = T.scaled_dot_product_attention(*tensors, enable_gqa=True)
    assert_within_rule(attend(*tensors, enable_gqa=True, backend=backend), torchs, exact)


# Masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (2, 5, 7), (1, 1, 1, 7), (2, 1, 5, 7), (2, 2, 5, 7)])
def test_a_mask_that_requires_a_gradient_gets_one_of_its_own_shape(shape, backend):
    query, key = normal(2, 2, 5, 8), normal(2, 2, 7, 8)
    value, mask = normal(2, 2, 7, 3), normal(*shape).requires_grad_()

    def attention(mask):
        return attend(query, key, value, attn_mask=mask, is_causal=True, backend=backend)

    assert attention(mask).requires_grad
    assert torch.autograd.gradcheck(attention, [mask])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_and_is_causal_both_apply(backend):
    query, key = normal(1, 2, 5, 8), normal(1, 2, 7, 8)
    mask = normal(5, 7) > -0.7
    ours = attend(query, key, key, attn_mask=mask, is_causal=True, backend=backend)
    exact = T.scaled_dot_product_attention(query, key, key, mask & torch.ones(5, 7).tril().bool())
    assert_within_rule(ours, exact, exact)
    assert not torch.equal(ours, attend(query, key, key, attn_mask=mask, backend=backend))


@pytest.mark.parametrize("backend", OURS)
def test_the_order_is_scale_then_soft_cap_then_alibi_and_mask(backend):
    query, key, value = normal(1, 1, 1, 4) * 9, normal(1, 1, 3, 4), torch.eye(3, dtype=torch.float64)[None, None]
    slopes, mask = torch.tensor([0.7]).double(), torch.tensor([[0.0, 2.0, -1.0]]).double()
    scores = 1.5 * torch.tanh(0.3 * query[0, 0] @ key[0, 0].T / 1.5) - 0.7 * torch.tensor([0.0, 1.0, 2.0]) + mask
    ours = attend(query, key, value, attn_mask=mask, scale=0.3, softcap=1.5, alibi_slopes=slopes, backend=backend)
    exact = scores.softmax(-1)[None, None]
    assert_within_rule(ours, exact, exact)


# Autocast -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_gives_the_dtype_of_torch(masked, dtype, backend):
    query = normal(1, 2, 5, 8, dtype=dtype)
    mask = normal(5, 5, dtype=dtype) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        torchs = T.scaled_dot_product_attention(query, query, query, mask)
        ours = attend(query, query, query, mask, backend=backend)
    rounded = query.to(torchs.dtype).double()
    exact = T.scaled_dot_product_attention(rounded, rounded, rounded, None if mask is None else mask.double())
    assert_within_rule(ours, torchs, exact)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": (2, 0)}])
def test_autocast_of_packed_attention_computes_in_the_dtype_of_autocast(options, backend):
    ends = torch.tensor([0, 3, 5]).int()
    leaves = [normal(5, 2, 8, dtype=torch.float32).requires_grad_() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16), fastlm.use_backend(backend):
        output = F.varlen_attention(*leaves, ends, ends, 3, 3, **options)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}


# Packed sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_attention_of_no_sequences_keeps_the_graph(backend):
    leaves = [torch.empty(0, 2, 4, requires_grad=True) for _ in range(3)]
    ends = torch.zeros(1, dtype=torch.int32)
    with fastlm.use_backend(backend):
        output = F.varlen_attention(*leaves, ends, ends, 0, 0)
    assert output.shape == (0, 2, 4)
    output.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packing_is_the_same_as_one_sequence_after_another(is_causal, backend):
    lengths = [(3, 3), (0, 2), (4, 9), (2, 0), (5, 2)]
    queries, keys = zip(*lengths, strict=True)
    query, key, value = normal(sum(queries), 4, 8), normal(sum(keys), 2, 8), normal(sum(keys), 2, 5)
    ends_q, ends_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (queries, keys))
    with fastlm.use_backend(backend):
        ours = F.varlen_attention(query, key, value, ends_q, ends_k, 5, 9, is_causal=is_causal)
    at_q = at_k = 0
    for rows, columns in lengths:
        mask = torch.ones(rows, columns, dtype=torch.bool)
        mask = mask.tril(columns - rows) if is_causal else mask
        q = query[at_q : at_q + rows].transpose(0, 1)
        k, v = (x[at_k : at_k + columns].transpose(0, 1) for x in (key, value))
        exact = T.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        exact = exact.masked_fill(~mask.any(1)[:, None], 0.0) if columns else torch.zeros(4, rows, 5).double()
        assert_within_rule(ours[at_q : at_q + rows].transpose(0, 1), exact, exact)
        at_q, at_k = at_q + rows, at_k + columns


@pytest.mark.parametrize("backend", OURS)
def test_a_cache_of_which_some_keys_are_filled_is_the_filled_part_aligned_at_its_end(backend):
    query, key, value = normal(2, 2, 3, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 4)
    lengths = torch.tensor([5, 9]).int()
    ours = attend(query, key, value, key_lengths=lengths, is_causal=True, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        mask = torch.ones(3, n).tril(n - 3).bool()
        exact = T.scaled_dot_product_attention(query[b], key[b, :, :n], value[b, :, :n], mask)
        assert_within_rule(ours[b], exact, exact)
    wide = attend(query, key, value, key_lengths=lengths.long(), is_causal=True, backend=backend)
    assert torch.equal(ours, wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 3])
def test_nan_where_a_cache_is_not_filled_is_never_seen(queries, backend):
    query, key, value = (normal(2, 2, n, 8).requires_grad_() for n in (queries, 9, 9))
    lengths = torch.tensor([5, 9]).int()
    unfilled = (torch.arange(9) >= lengths[:, None])[:, None, :, None]
    answers = []
    for fill in (0.0, math.nan):
        cache = [x.masked_fill(unfilled, fill) for x in (key, value)]
        output = attend(query, *cache, key_lengths=lengths, is_causal=True, backend=backend)
        answers.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    for zeros, nans in zip(*answers, strict=True):
        assert torch.equal(zeros, nans)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_past_2_to_the_31_elements_is_read_where_it_lies(backend):
    tensors = [normal(1, 1, 3, 4, dtype=torch.float32) for _ in range(3)]
    grad, gradients = normal(1, 1, 3, 4, dtype=torch.float32), []
    for upstream in (grad, hostile.far_apart(grad, dim=2)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        attend(*leaves, backend=backend).backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    for near, far in zip(*gradients, strict=True):
        assert_within_rule(far, near, near.double())


# The choice ---------------------------------------------------------------------------------------------------------


def inputs_on(device, dtype=torch.bfloat16, **options):
    query = torch.empty(2, 4, 8, 16, dtype=dtype, device=device)
    fields = dict.fromkeys(attention.ScaledDotProductAttentionInputs._fields)
    fields |= {"query": query, "key": query, "value": query, "is_causal": True, "scale": 0.25, "softcap": 0.0}
    fields |= {"window_left": -1, "window_right": -1, "return_lse": False, "dropout_p": 0.0}
    return attention.ScaledDotProductAttentionInputs(**(fields | options))


FIRST = {  # on a device that is no CPU, on a CPU
    "plain": ({}, "", ""),
    "soft cap": ({"softcap": 2.0}, "triton", "cpu"),
    "lse": ({"return_lse": True}, "triton", "cpu"),
    "window": ({"window_left": 3}, "triton", "cpu"),
    "ALiBi": ({"alibi_slopes": torch.ones(4)}, "triton", "cpu"),
    "mask": ({"attn_mask": torch.ones(8, 8), "is_causal": False}, "", ""),
    "mask and causal": ({"attn_mask": torch.ones(8, 8)}, "triton", "cpu"),
    "mask with a gradient": ({"attn_mask": torch.ones(8, 8, requires_grad=True), "softcap": 2.0}, "", ""),
}


@pytest.mark.parametrize("name", FIRST)
def test_kernels_come_first_for_what_torch_lacks_or_makes_a_mask_for(name):
    options, beyond, cpu = FIRST[name]
    assert attention._first("scaled_dot_product_attention", inputs_on("meta", **options)) == beyond
    assert attention._first("scaled_dot_product_attention", inputs_on("cpu", **options)) == cpu
    with torch.no_grad():
        assert attention._first("scaled_dot_product_attention", inputs_on("cpu", **options)) == cpu


def test_with_a_cache_or_one_query_the_keys_decide_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention, "fastest", lambda op, tensor: f"{op}: {tensor.numel()}")
    cache = {"key": torch.empty(2, 4, 32, 16), "key_lengths": torch.ones(2)}
    name = "scaled_dot_product_attention"
    assert attention._first(name, inputs_on("meta", **cache | {"key": inputs_on("meta").key})) == "triton"
    assert attention._first(name, inputs_on("cpu", **cache)) == f"{name} with key_lengths: 4096"
    one = {"query": torch.empty(2, 4, 1, 16), "key": cache["key"]}
    assert attention._first(name, inputs_on("cpu", **one)) == f"{name} of one query: 4096"
    assert attention._first(name, inputs_on("cpu")) == f"{name}: 1024"


def test_kernels_are_for_compute_capability_8_and_newer(monkeypatch):
    class OnGPU:
        is_cuda, device, shape, requires_grad = True, "cuda:0", (1, 1, 1, 8), False

    inputs = inputs_on("cpu", query=OnGPU(), value=OnGPU())
    for capability, reasons in (((7, 5), ["needs a GPU of compute capability 8.0, got 7.5"]), ((8, 0), [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert attention._kernel_reasons(inputs) == reasons


@pytest.mark.parametrize(
    ("capability", "head", "dtype", "first"),
    [
        ((8, 0), 64, torch.bfloat16, "cuda"),
        ((12, 0), 128, torch.float16, "cuda"),
        ((9, 0), 64, torch.bfloat16, "triton"),
        ((8, 6), 64, torch.float32, "triton"),
        ((8, 0), 136, torch.bfloat16, "triton"),
        ((8, 0), 20, torch.bfloat16, "triton"),
        ((7, 5), 64, torch.bfloat16, ""),
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_cuda_kernels_come_before_triton_where_tensor_cores_are_used_alike(
    capability, head, dtype, first, built, monkeypatch
):
    class OnGPU:
        is_cuda, is_cpu, device, shape, requires_grad = True, False, "cuda:0", (1, 1, 1, head), False

    query = OnGPU()
    query.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "CUDA", types.SimpleNamespace(missing=lambda: "" if built else "not built"))
    inputs = inputs_on("cpu", query=query, value=query, return_lse=True)
    expected = "triton" if first == "cuda" and not built else first
    assert attention._first("scaled_dot_product_attention", inputs) == expected


# Properties ---------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(
    queries=st.integers(0, 5),
    keys=st.integers(0, 6),
    left=st.integers(-1, 4),
    right=st.integers(-1, 4),
    is_causal=st.booleans(),
    filled=st.none() | st.integers(0, 6),
    softcap=st.sampled_from([0.0, 1.5]),
    slopes=st.booleans(),
)
def test_attention_with_any_options_is_the_formula(queries, keys, left, right, is_causal, filled, softcap, slopes):
    query, key, value = normal(1, 2, queries, 4), normal(1, 2, keys, 4), normal(1, 2, keys, 3)
    options = {
        "window": (left, right),
        "is_causal": is_causal,
        "softcap": softcap,
        "alibi_slopes": torch.tensor([0.5, 0.25]).double() if slopes else None,
        "key_lengths": None if filled is None else torch.tensor([min(filled, keys)]).int(),
        "return_lse": True,
    }
    exact = formulas.scaled_dot_product_attention(query, key, value, **options)
    for our, true in zip(attend(query, key, value, backend="reference", **options), exact, strict=True):
        assert_within_rule(our, true, true)
