"""torch's own scaled_dot_product_attention on FastLM's kernels: what is registered, what runs, what is as it was."""

import contextlib
import inspect
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as T
from errors import assert_within_rule
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    sdpa_kernel,
)

import fastlm
import fastlm.functional as F
from fastlm import sdpa
from fastlm.ops import compiled, philox
from fastlm.ops.attention import reference
from fastlm.ops.attention.op import SCALED_DOT_PRODUCT_ATTENTION, VARLEN_ATTENTION
from fastlm.ops.measured import fastest
from fastlm.ops.registry import Backend, BackendError

ATEN = torch.ops.aten
FLASH, CPU_FLASH = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"
NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")
OURS = "reference" if compiled.cpu_missing() else "cpu"  # on CPU tensors, whatever their size
RESTORES = hasattr(torch.nn.attention, "restore_flash_attention_impl")

needs_kernels = pytest.mark.skipif(bool(compiled.cpu_missing()), reason="needs the CPU kernels")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch=2, heads=4, kv_heads=4, queries=20, keys=20, size=16, dtype=torch.float32):
    shapes = (heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, size)
    return [normal(batch, *shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]


def tokens_first(x):
    """The same values, the heads of a token side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x):
    """The same values, a third of each row of a larger tensor."""
    return torch.cat([x, x, x], -1)[..., : x.shape[-1]]


def attention(query, key, value, seen=None, keep=None, dropout_p=0.0, scale=None, bias=0.0):
    """The equation, in the dtype of the inputs; queries that see nothing give 0."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale + bias
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool) if seen is None else seen
    dead = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(~seen & ~dead, -math.inf).softmax(-1).masked_fill(dead, 0.0)
    p = p if keep is None else torch.where(keep, p / (1 - dropout_p), 0.0)
    return p @ value


def at_the_end(queries, keys, left=-1, right=0):
    """Which keys are seen where the last query sits at the last key."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    far = queries + keys
    return (distance <= (right if right >= 0 else far)) & (distance >= -(left if left >= 0 else far))


def with_gradients(function, tensors, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    output = function(*leaves)
    upstream = normal(*output.shape, seed=9).bfloat16().to(output)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def assert_right(function, tensors, formula):
    """`function`'s output and gradients are as near to the formula in float64 as the error rule asks."""
    ours, torchs = with_gradients(function, tensors), with_gradients(formula, tensors)
    exact = with_gradients(formula, tensors, torch.float64)
    for name, *three in zip(NAMES, ours, torchs, exact, strict=False):
        assert_within_rule(*three, name)
    return ours


def assert_same_bits(some, others):
    for name, a, b in zip(NAMES, some, others, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def kernel(name, key):
    """Where the kernel in force was registered; None if there is none."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    return repr(torch.library.get_kernel(f"aten::{name}", key))


def kernels():
    names = [(function.__name__, key) for key, functions in sdpa.OPERATORS.items() for function in functions]
    return {(name, key): kernel(name, key) for name, key in names if hasattr(ATEN, name)}


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """The operators of a GPU on CPU tensors: torch's dispatcher and its derivatives, our functions."""
    monkeypatch.setitem(sdpa.OPERATORS, "CPU", sdpa.OPERATORS["CUDA"])
    override = sdpa.Override("CPU")
    yield
    override.remove()


@pytest.fixture
def ran(monkeypatch):
    """Which passes the CPU's backend of ours has run."""
    calls = []
    for op in (SCALED_DOT_PRODUCT_ATTENTION, VARLEN_ATTENTION):
        record = op.backends[OURS]

        def counted(way, function):
            return lambda *args: calls.append(way) or function(*args)

        fields = {name: getattr(record, name) for name in ("devices", "dtypes", "reasons", "available", "copies")}
        op.register(Backend(OURS, fwd=counted("fwd", record.fwd), bwd=counted("bwd", record.bwd), **fields))
    return calls


# Registration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [f for each in sdpa.OPERATORS.values() for f in each], ids=lambda f: f.__name__)
def test_each_function_takes_the_arguments_of_its_operator(function):
    if not hasattr(ATEN, function.__name__):
        pytest.skip("this release of torch has no such operator")
    parameters = dict(inspect.signature(function).parameters)
    for argument in getattr(ATEN, function.__name__).default._schema.arguments:
        parameter = parameters.pop(argument.name)
        assert (parameter.kind == inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
        assert (parameter.default is not inspect.Parameter.empty) == argument.has_default_value(), argument.name
        assert not argument.has_default_value() or parameter.default == argument.default_value, argument.name
    later = ("block_table", "num_splits")  # which torch 2.10 does not have
    assert all(name in later and parameters[name].default is None for name in parameters)


def test_registering_puts_our_kernels_into_torchs_dispatcher_and_removing_takes_them_out():
    before = kernels()
    handle = fastlm.register_sdpa(cpu=True)
    assert current_flash_attention_impl() == "FASTLM"
    assert "FASTLM" in list_flash_attention_impls()
    assert all("sdpa.py" in registered for registered in kernels().values())
    handle.remove()
    assert kernels() == before
    assert current_flash_attention_impl() is None
    handle.remove()
    assert kernels() == before


def test_the_cpus_operators_are_torchs_own_unless_asked_for():
    with fastlm.register_sdpa():
        assert "sdpa.py" in kernel(FLASH, "CUDA")
        assert "sdpa.py" not in kernel(CPU_FLASH, "CPU")


def test_what_a_call_asked_for_stays_until_its_own_handle_is_removed():
    before = kernels()
    first, second = fastlm.register_sdpa(cpu=True), fastlm.register_sdpa()
    assert "sdpa.py" in kernel(CPU_FLASH, "CPU")
    with fastlm.register_sdpa(cpu=True):
        first.remove()
        assert "sdpa.py" in kernel(CPU_FLASH, "CPU")
    assert "sdpa.py" not in kernel(CPU_FLASH, "CPU")
    assert current_flash_attention_impl() == "FASTLM"
    second.remove()
    assert kernels() == before


@pytest.mark.skipif(not RESTORES, reason="this release of torch cannot restore its own")
def test_torchs_own_calls_switch_between_the_two():
    before = kernel(FLASH, "CUDA")
    with fastlm.register_sdpa():
        torch.nn.attention.restore_flash_attention_impl()
        assert kernel(FLASH, "CUDA") == before
        activate_flash_attention_impl("FASTLM")
        assert "sdpa.py" in kernel(FLASH, "CUDA")
        torch.nn.attention.restore_flash_attention_impl()
        with fastlm.register_sdpa():
            assert "sdpa.py" in kernel(FLASH, "CUDA")
    assert kernel(FLASH, "CUDA") == before


def test_the_implementation_that_was_active_is_active_afterwards():
    class Other:
        active = 0

        def __init__(self):
            Other.active += 1

        def remove(self):
            Other.active -= 1

    torch.nn.attention.register_flash_attention_impl("OTHER", register_fn=Other)
    try:
        activate_flash_attention_impl("OTHER")
        with fastlm.register_sdpa():
            assert current_flash_attention_impl() == "FASTLM"
        assert current_flash_attention_impl() == "OTHER"
        assert Other.active == 1
    finally:
        registry = torch.nn.attention._registry
        registry._FLASH_ATTENTION_IMPLS.pop("OTHER")
        registry._FLASH_ATTENTION_ACTIVE = None


def test_importing_patches_nothing_and_registering_prints_nothing():
    code = """if True:
        import torch, warnings
        name = "aten::_scaled_dot_product_flash_attention_for_cpu"
        before = repr(torch.library.get_kernel(name, "CPU"))
        import fastlm
        assert repr(torch.library.get_kernel(name, "CPU")) == before
        assert torch.nn.attention.current_flash_attention_impl() is None
        assert "FASTLM" not in torch.nn.attention.list_flash_attention_impls()
        warnings.simplefilter("error")
        fastlm.register_sdpa(cpu=True)
        assert repr(torch.library.get_kernel(name, "CPU")) != before
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# The operators of a GPU ---------------------------------------------------------------------------------------------

SHAPES = {
    "square": {},
    "fewer queries": {"queries": 7},
    "queries that see no key": {"queries": 30},
    "shared keys": {"kv_heads": 2, "queries": 13},
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels), "emulator"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_aligns_ends_with_ends_in_both_passes(shape, is_causal, backend, flash_on_cpu):
    tensors = qkv(**SHAPES[shape], dtype=torch.bfloat16)
    seen = at_the_end(tensors[0].shape[2], tensors[1].shape[2]) if is_causal else None
    with fastlm.use_backend(backend):
        assert_right(
            lambda q, k, v: getattr(ATEN, FLASH)(q, k, v, 0.0, is_causal, scale=0.3)[0],
            tensors,
            lambda q, k, v: attention(q, k, v, seen, scale=0.3),
        )


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, tokens_first, sliced], ids=lambda f: f.__name__)
def test_results_lie_as_torchs_compilers_expect(layout, flash_on_cpu):
    tensors = [layout(x) for x in qkv(queries=7)]
    swapped = [x.transpose(1, 2) for x in tensors]
    packed = [x[0].transpose(0, 1) for x in tensors]
    ends = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 4, 20]).int()
    calls = [
        (FLASH, tensors, (0.0, True)),
        ("_flash_attention_forward", swapped, (None, None, 7, 20, 0.0, True, False)),
        ("_flash_attention_forward", packed, (*ends, 4, 16, 0.0, True, False)),
    ]
    for name, inputs, rest in calls:
        forward, backward = getattr(ATEN, name), getattr(ATEN, f"{name.removesuffix('_forward')}_backward")
        with fastlm.use_backend(OURS):
            ours = forward(*inputs, *rest)
            given = (*ours[:2], *(ours[2:6] if name == FLASH else rest[:4]), 0.0, True, *ours[-3:-1])
            gradients = backward(torch.ones_like(ours[0]), *inputs, *given)
        meta = forward(*(x.to("meta") for x in inputs), *rest)
        for a, b in zip((*ours, *gradients), (*meta, *(torch.empty_like(x) for x in inputs)), strict=True):
            if isinstance(a, torch.Tensor):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
            else:
                assert a == b, name


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels), "emulator"])
@pytest.mark.parametrize("window", [(-1, 0), (4, 2), (5, -1), (-1, -1)])
def test_packed_sequences_and_windows_are_right_in_both_passes(window, backend, flash_on_cpu):
    queries, keys, heads = (5, 0, 17, 9), (12, 3, 17, 4), 4
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    shapes = (sum(queries), heads, 16), (sum(keys), 2, 16), (sum(keys), 2, 16)
    tensors = [normal(*shape, seed=n, dtype=torch.bfloat16) for n, shape in enumerate(shapes)]

    def flash(q, k, v):
        output, lse, *_ = ATEN._flash_attention_forward(
            q, k, v, *ends, max(queries), max(keys), 0.0, window == (-1, 0), False, scale=None,
            window_size_left=window[0], window_size_right=window[1],
        )  # fmt: skip
        assert lse.shape == (heads, sum(queries))
        assert lse.dtype == torch.float32
        return output

    def formula(*tensors):
        parts = [x.split(n) for x, n in zip(tensors, (queries, keys, keys), strict=True)]
        each = [[x.transpose(0, 1)[None] for x in three] for three in zip(*parts, strict=True)]
        seen = [at_the_end(q, k, *window) for q, k in zip(queries, keys, strict=True)]
        return torch.cat([attention(*x, s)[0].transpose(0, 1) for x, s in zip(each, seen, strict=True)])

    with fastlm.use_backend(backend):
        assert_right(flash, tensors, formula)


@pytest.mark.skipif(
    not hasattr(ATEN, "_flash_attention_forward_no_dropout_inplace"),
    reason="this release of torch has no such operator",
)
def test_the_operator_that_writes_in_place_does(flash_on_cpu):
    query, key, value = (x.transpose(1, 2) for x in qkv(queries=7))
    out, rest = torch.full_like(query, math.nan), (None, None, 7, 20, 0.0, True, False)
    with fastlm.use_backend(OURS):
        lse = ATEN._flash_attention_forward_no_dropout_inplace(out, query, key, value, *rest)
        results = ATEN._flash_attention_forward(query, key, value, *rest)
    assert torch.equal(out, results[0])
    assert torch.equal(lse, results[1])


def test_torchs_own_varlen_attention_runs_on_it(flash_on_cpu, ran):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    tensors, ends = [x[0].transpose(0, 1) for x in qkv(1)], torch.tensor([0, 8, 20]).int()
    sequence = torch.arange(20) >= 8
    seen = sequence == sequence[:, None]
    with fastlm.use_backend(OURS):
        assert_right(
            lambda q, k, v: varlen.varlen_attn(q, k, v, ends, ends, 12, 12),
            tensors,
            lambda *x: attention(*(each.transpose(0, 1)[None] for each in x), seen)[0].transpose(0, 1),
        )
    assert ran == ["fwd", "bwd"]


def test_keys_in_use_and_alibi_are_served_where_no_gradient_is_needed(flash_on_cpu):
    query, key, value = qkv(queries=3)
    swapped = [x.transpose(1, 2) for x in (query, key, value)]
    lengths, slopes = torch.tensor([20, 11]).int(), torch.tensor([0.5, 0.25, 0.1, 0.0])
    options = {"alibi_slopes": slopes, "seqused_k": lengths}
    with fastlm.use_backend(OURS):
        output = ATEN._flash_attention_forward(*swapped, None, None, 3, 20, 0.0, True, False, **options)[0]
        alone = ATEN._flash_attention_forward(*swapped, None, None, 3, 20, 0.0, False, False, alibi_slopes=slopes)[0]
    for b, n in enumerate(lengths.tolist()):
        one = [query[b : b + 1], key[b : b + 1, :, :n], value[b : b + 1, :, :n]]
        seen, bias = at_the_end(3, n), reference.alibi(slopes, 3, n, n - 3)
        formula = attention(*one, seen, bias=bias), attention(*(x.double() for x in one), seen, bias=bias)
        assert_within_rule(output[b : b + 1].transpose(1, 2), *formula)
    bias = reference.alibi(slopes, 3, 20, 17)
    formula = attention(query, key, value, bias=bias), attention(*(x.double() for x in (query, key, value)), bias=bias)
    assert_within_rule(alone.transpose(1, 2), *formula)
    swapped[1].requires_grad_()
    for name, option in options.items():
        with pytest.raises(RuntimeError, match=f"{name} must be None where gradients are needed"):
            ATEN._flash_attention_forward(*swapped, None, None, 3, 20, 0.0, True, False, **{name: option})


# Dropout ------------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("backend", ["reference", "cpu", "emulator"])
def test_backward_drops_what_forward_dropped_whatever_is_preferred_by_then(backend, flash_on_cpu):
    tensors, states, p = qkv(dtype=torch.bfloat16), [], 0.4

    def flash(*leaves):
        with fastlm.use_backend(backend):
            output, *_, state, _, _ = getattr(ATEN, FLASH)(*leaves, p, True)
        states.append(state)
        return output

    leaves = [x.clone().requires_grad_() for x in tensors]
    output, upstream = flash(*leaves), normal(2, 4, 20, 16, seed=9).bfloat16()
    rows = torch.arange(2 * 4 * 20).view(2, 4, 20)
    keep = philox.keep_mask(states[0].view(torch.int64), rows, 20, p)
    assert 0.3 < keep.double().mean() < 0.9

    def formula(dtype):
        wide = [x.to(dtype).requires_grad_() for x in tensors]
        result = attention(*wide, at_the_end(20, 20), keep, p)
        return [result, *torch.autograd.grad(result, wide, upstream.to(dtype))]

    for preferred in ("auto", "native", "reference"):
        with fastlm.use_backend(preferred):
            ours = [output, *torch.autograd.grad(output, leaves, upstream, retain_graph=True)]
        for name, *three in zip(NAMES, ours, formula(torch.bfloat16), formula(torch.float64), strict=True):
            assert_within_rule(*three, f"{name}, {preferred}")


def test_dropout_follows_torchs_seed_and_changes_from_call_to_call(flash_on_cpu):
    tensors, results = qkv(), []
    with fastlm.use_backend(OURS):
        for seed in (1, None, 1):
            if seed is not None:
                torch.manual_seed(seed)
            results.append(getattr(ATEN, FLASH)(*tensors, 0.5)[0])
    assert torch.equal(results[0], results[2]) is not torch.equal(results[0], results[1])


# What goes on to torch's own kernel ---------------------------------------------------------------------------------


def forward_arguments(**options):
    swapped = [x.transpose(1, 2) for x in qkv()]
    return (*swapped, None, None, 20, 20, options.pop("dropout_p", 0.0), False, options.pop("return_debug_mask", False))


@pytest.mark.parametrize(
    "options",
    [{"return_debug_mask": True}, {"block_table": torch.zeros(2, 1).int()}, {"num_splits": 1}],
    ids=lambda options: next(iter(options)),
)
def test_what_only_torchs_kernel_does_is_left_to_it(options):
    rest = {name: option for name, option in options.items() if name != "return_debug_mask"}
    with fastlm.use_backend(OURS):
        assert sdpa._flash_attention_forward(*forward_arguments(**options), **rest) is None
        if OURS == "cpu":
            with pytest.raises(RuntimeError, match=f"dropout_p must be 0 with {next(iter(options))}, got 0.5"):
                sdpa._flash_attention_forward(*forward_arguments(dropout_p=0.5, **options), **rest)
        assert sdpa._flash_attention_forward(*forward_arguments()) is not None


def test_packed_sequences_with_keys_in_use_and_what_fits_no_attention_are_left_to_torch():
    query, key, value = (x[0].transpose(0, 1) for x in qkv(1))
    ends, options = torch.tensor([0, 8, 20]).int(), (12, 12, 0.0, True, False)
    with fastlm.use_backend(OURS):
        run = sdpa._flash_attention_forward
        assert run(query, key, value, ends, ends, *options) is not None
        assert run(query, key, value, ends, ends, *options, seqused_k=torch.tensor([8, 2]).int()) is None
        assert run(query, key, value, ends.long(), ends.long(), *options) is None
        assert run(query, key, value, ends, None, *options) is None
        assert run(query, key.double(), value, ends, ends, *options) is None
        assert run(query, key[:, :3], value[:, :3], ends, ends, *options) is None
        assert run(query, key[:5], value, ends, ends, *options) is None


def test_dropout_where_no_kernel_of_ours_fits_is_torchs_whatever_is_preferred():
    with fastlm.use_backend("reference"):
        assert sdpa._scaled_dot_product_flash_attention(*qkv(size=264)) is not None
        assert sdpa._scaled_dot_product_flash_attention(*qkv(size=264), 0.5) is None


def test_no_queries_no_keys_and_no_batch_are_served(flash_on_cpu):
    for sizes in ({"queries": 0}, {"keys": 0}, {"batch": 0}):
        tensors = qkv(**sizes, dtype=torch.bfloat16)
        with fastlm.use_backend("emulator"):
            results = with_gradients(lambda *x: getattr(ATEN, FLASH)(*x)[0], tensors)
        assert not any(result.any() for result in results)


def test_the_preference_has_a_say(ran):
    arguments = forward_arguments()
    with fastlm.use_backend("native"):
        assert sdpa._flash_attention_forward(*arguments) is None
    with fastlm.use_backend(OURS):
        assert sdpa._flash_attention_forward(*arguments) is not None
    assert ran == ["fwd"]
    with fastlm.use_backend("cuda,native"):
        assert sdpa._flash_attention_forward(*arguments) is None
    with fastlm.use_backend("cuda"), pytest.raises(BackendError, match="serves cuda tensors, got cpu"):
        sdpa._flash_attention_forward(*arguments)


def test_without_a_kernel_of_torchs_the_error_says_so(flash_on_cpu):
    if kernel(FLASH, "CUDA") is not None:
        pytest.skip("this build of torch has one")
    with (
        fastlm.use_backend("native"),
        pytest.raises(NotImplementedError, match=f"{FLASH}: needs a kernel of PyTorch's"),
    ):
        getattr(ATEN, FLASH)(*qkv())


# On a CPU -----------------------------------------------------------------------------------------------------------

MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": normal(2, 1, 20, 26, seed=5) > 0},
    "additive": {"attn_mask": normal(20, 26, seed=5)},
    "scale": {"scale": -0.2},
    "rows that see nothing": {"attn_mask": (torch.arange(20) % 3 > 0)[:, None].expand(20, 26)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_torchs_function_runs_our_kernels_in_both_passes(mask, dtype, ran):
    options = dict(MASKS[mask])
    additive = mask == "additive"
    if additive:
        options["attn_mask"] = options["attn_mask"].to(dtype)
    tensors = [x.to(dtype) for x in qkv(keys=26, kv_heads=2)]
    seen = options.get("attn_mask") if not additive else None
    if mask == "causal":
        seen = torch.arange(26) <= torch.arange(20)[:, None]  # the first query at the first key

    def formula(q, k, v):
        bias = options["attn_mask"].to(q.dtype) if additive else 0.0
        return attention(q, k, v, seen, scale=options.get("scale"), bias=bias)

    with fastlm.register_sdpa(cpu=True), fastlm.use_backend(OURS):
        ours = assert_right(lambda *x: T.scaled_dot_product_attention(*x, enable_gqa=True, **options), tensors, formula)
    assert ran == ["fwd", "bwd"]
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, tokens_first, sliced], ids=lambda f: f.__name__)
def test_on_a_cpu_results_lie_as_torchs_do(layout):
    tensors = [layout(x) for x in qkv(keys=26)]
    operator, backward = getattr(ATEN, CPU_FLASH), getattr(ATEN, f"{CPU_FLASH}_backward")
    layouts = []
    for backend in ("native", OURS):
        with fastlm.register_sdpa(cpu=True), fastlm.use_backend(backend):
            output, lse = operator(*tensors)
            results = [output, lse, *backward(torch.ones_like(output), *tensors, output, lse, 0.0, False)]
        layouts.append([(x.shape, x.stride(), x.dtype) for x in results])
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize("order", [("native", OURS), (OURS, "native")])
@pytest.mark.parametrize("mask", ["causal", "rows that see nothing"])
def test_either_side_can_run_backward_after_the_other(mask, order):
    tensors = qkv(keys=26)
    leaves = [x.clone().requires_grad_() for x in tensors]
    with fastlm.register_sdpa(cpu=True):
        with fastlm.use_backend(order[0]):
            output = T.scaled_dot_product_attention(*leaves, **MASKS[mask])
        with fastlm.use_backend(order[1]):
            ours = torch.autograd.grad(output, leaves, normal(*output.shape, seed=9).bfloat16().float())
    seen = MASKS[mask].get("attn_mask", torch.arange(26) <= torch.arange(20)[:, None])
    torchs, exact = (with_gradients(lambda *x: attention(*x, seen), tensors, d) for d in (torch.float32, torch.float64))
    for name, *three in zip(NAMES[1:], ours, torchs[1:], exact[1:], strict=True):
        assert_within_rule(*three, name)


PLAIN = {
    "small": ([*qkv()], {}),
    "float64": (qkv(1, 12, 12, 256, 256, 64, torch.float64), {}),
    "dropout": (qkv(1, 12, 12, 128, 128, 64), {"dropout_p": 0.5}),
    "no queries": (qkv(queries=0), {}),
    "no keys": (qkv(keys=0), {}),
    "no batch": (qkv(0), {}),
    "three dimensions": ([x[0] for x in qkv(1, 12, 12, 128, 128, 64)], {}),
    "a mask with a gradient": (qkv(1, 12, 12, 128, 128, 64), {"attn_mask": torch.zeros(128, 128, requires_grad=True)}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_our_kernels_do_not_serve_or_are_not_faster_at_is_torchs_own_to_the_bit(case, ran):
    tensors, options = PLAIN[case]
    if case == "three dimensions":
        torchs = T.scaled_dot_product_attention(*(x.clone().requires_grad_() for x in tensors))
        if "Squeeze" in torchs.grad_fn.name():  # torch 2.15
            pytest.skip("this torch makes them four, which our kernels serve")
    results = []
    for context in (contextlib.nullcontext(), fastlm.register_sdpa(cpu=True), contextlib.nullcontext()):
        torch.manual_seed(1)
        with context:
            results.append(with_gradients(lambda *x: T.scaled_dot_product_attention(*x, **options), tensors))
    assert not ran
    assert_same_bits(*results[:2])
    assert_same_bits(*results[1:])


@needs_kernels
def test_measured_sizes_run_our_kernels_unnamed_and_are_torchs_own_to_the_bit_afterwards(ran):
    tensors = qkv(1, 12, 12, 256, 256, 64)
    if not fastest("scaled_dot_product_attention", tensors[0]):
        pytest.skip("nothing has been measured on such a CPU")

    def run():
        return with_gradients(lambda *x: T.scaled_dot_product_attention(*x, is_causal=True), tensors)

    before = run()
    with fastlm.register_sdpa(cpu=True):
        run()
    assert ran == ["fwd", "bwd"]
    assert_same_bits(before, run())
    assert ran == ["fwd", "bwd"]


def test_dropout_and_what_fits_no_attention_are_torchs_on_a_cpu_too():
    query, key, value = qkv()
    with fastlm.use_backend(OURS):
        run = sdpa._scaled_dot_product_flash_attention_for_cpu
        assert run(query, key, value) is not None
        assert run(query, key, value, 0.5) is None
        assert run(query[0], key[0], value[0]) is None
        assert run(query, key[:1], value[:1]) is None
        assert run(query[:, :, :0], key, value) is None


def test_our_own_native_backend_is_torchs_kernel_and_does_not_go_round_in_circles(ran):
    tensors = qkv(1, 12, 12, 256, 256, 64)
    plain = T.scaled_dot_product_attention(*tensors)
    with fastlm.register_sdpa(cpu=True), fastlm.use_backend("native"):
        assert torch.equal(F.scaled_dot_product_attention(*tensors), plain)
    assert not ran


# torch's machinery over it ------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    with fastlm.register_sdpa(cpu=True), fastlm.use_backend(OURS):
        yield


def of_one_projection(attend, x, weight):
    query, key, value = (x @ weight).view(2, 20, 3, 4, 16).permute(2, 0, 3, 1, 4)
    return attend(query, key, value).sin()


@pytest.mark.parametrize("case", ["a model's projection", "contiguous", "tokens first"])
def test_a_compiled_model_runs_it_in_both_passes_with_no_graph_break(case, registered, ran):
    if case == "a model's projection":
        tensors, model, backend = [normal(2, 20, 16), normal(16, 192, seed=1)], of_one_projection, "aot_eager"
    else:  # Inductor checks the strides of results, and has nothing to build around the operator
        tensors = [x if case == "contiguous" else tokens_first(x) for x in qkv()]
        model, backend = (lambda attend, *tensors: attend(*tensors)), "inductor"
    compiled_model = torch.compile(
        lambda *x: model(T.scaled_dot_product_attention, *x), fullgraph=True, backend=backend
    )
    assert_right(compiled_model, tensors, lambda *x: model(attention, *x))
    assert ran == ["fwd", "bwd"]


def test_autocast_and_no_grad_run_it(registered, ran):
    query, key, value = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        assert T.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
    with torch.no_grad():
        assert not T.scaled_dot_product_attention(query.clone().requires_grad_(), key, value).requires_grad
    assert ran == ["fwd", "fwd"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no rule for a batch of this operator
def test_function_transforms_run_it(registered, ran):
    tensors = qkv()

    def gradients(attend):
        def loss(*tensors):
            return attend(*tensors).square().sum()

        return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))

    def of_each(function, dtype=torch.float32):
        return function(*(x.to(dtype)[:, None] for x in tensors))

    ours = of_each(gradients(T.scaled_dot_product_attention))
    assert "bwd" in ran
    for three in zip(ours, of_each(gradients(attention)), of_each(gradients(attention), torch.float64), strict=True):
        assert_within_rule(*three)


def test_second_derivatives_raise_what_torch_raises(registered):
    leaves, messages = [x.requires_grad_() for x in qkv()], []
    for backend in ("native", OURS):
        with fastlm.use_backend(backend):
            first = torch.autograd.grad(T.scaled_dot_product_attention(*leaves).sum(), leaves, create_graph=True)
            with pytest.raises(RuntimeError) as raised:
                torch.autograd.grad(first[0].sum(), leaves)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_tensors_without_values_never_reach_it(registered, ran):
    tensors = [x.to("meta").requires_grad_() for x in qkv()]
    output = T.scaled_dot_product_attention(*tensors)
    output.sum().backward()
    with torch._subclasses.FakeTensorMode() as mode:
        assert T.scaled_dot_product_attention(*(mode.from_tensor(x) for x in qkv())).shape == output.shape
    assert not ran


# On a GPU -----------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gpu_answers(tensors, *, compiled=False, **options):
    """Of torch's function restricted to flash attention."""

    def function(*leaves):
        return T.scaled_dot_product_attention(*leaves, **options)

    function = torch.compile(function, fullgraph=True) if compiled else function
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return with_gradients(lambda *leaves: function(*leaves), tensors)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_torchs_function_is_as_near_as_torchs_kernel(dtype, is_causal, compiled, monkeypatch):
    tensors = [x.cuda() for x in qkv(2, 8, 8, 500, 500, 64, dtype)]
    torchs = gpu_answers(tensors, is_causal=is_causal)
    calls = []
    for name in ("triton", "cuda"):
        op = SCALED_DOT_PRODUCT_ATTENTION
        record = op.backends[name]
        fields = {field: getattr(record, field) for field in ("devices", "dtypes", "reasons", "bwd", "available")}
        op.register(Backend(name, fwd=lambda *x, f=record.fwd: calls.append(1) or f(*x), **fields))
    with fastlm.register_sdpa():
        ours = gpu_answers(tensors, is_causal=is_causal, compiled=compiled)
    assert calls == [1]
    with sdpa_kernel(SDPBackend.MATH):
        exact = with_gradients(
            lambda *x: T.scaled_dot_product_attention(*x, is_causal=is_causal), tensors, torch.float64
        )
    for name, *three in zip(NAMES, ours, torchs, exact, strict=True):
        assert_within_rule(*three, name)
    assert_same_bits(torchs[:1], gpu_answers(tensors, is_causal=is_causal)[:1])


@on_gpu
@pytest.mark.gpu
def test_on_a_gpu_dropout_is_the_same_in_backward_and_native_goes_on_to_torchs_kernel():
    query, key = (x.cuda() for x in qkv(2, 8, 8, 300, 300, 64, torch.bfloat16)[:2])
    value = torch.eye(300, 64, device="cuda").expand(2, 8, 300, 64).bfloat16().requires_grad_()
    with fastlm.register_sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = T.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        (gradient,) = torch.autograd.grad(output, value, output.detach())
        with fastlm.use_backend("native"):
            plain = T.scaled_dot_product_attention(query, key, value)
    # The output is linear in value: with the same mask both are its square, with another about half of that.
    torch.testing.assert_close((gradient.double() * value).sum(), output.double().square().sum(), rtol=2e-2, atol=0.0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert torch.equal(plain, T.scaled_dot_product_attention(query, key, value))


def test_one_call_is_enough_for_models_of_transformers():
    pytest.importorskip("transformers")
    script = (
        "import sys, torch, fastlm\n"
        "assert 'transformers' not in sys.modules\n"
        "fastlm.register_sdpa().remove()\n"
        "import transformers\n"
        "config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)\n"
        "model = transformers.AutoModel.from_config(config, attn_implementation='fastlm')\n"
        "with fastlm.use_backend('cuda'):\n"
        "    try:\n"
        "        model(torch.tensor([[1, 2]]))\n"
        "    except fastlm.BackendError as error:\n"
        "        assert 'scaled_dot_product_attention' in str(error)\n"
        "    else:\n"
        "        raise AssertionError('not ours')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
