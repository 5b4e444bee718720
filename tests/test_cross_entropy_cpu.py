"""The CPU kernels of cross-entropy: threads, stores past the caches, instruction sets, exp and tanh, hostile sizes."""

import math

import pytest
import torch
import torch.nn.functional as T
from errors import assert_within_rule

import fastlm
import fastlm.functional as F
from fastlm.ops import compiled
from fastlm.ops.registry import OPS

pytestmark = pytest.mark.skipif(bool(compiled.cpu_missing()), reason=compiled.cpu_missing())

VARIANTS = [name for name in OPS["layer_norm"].backends if name.startswith("cpu")]  # "cpu" is the best of them
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "indices": {},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "weight": True},
    "probabilities": {"label_smoothing": 0.1, "weight": True},
}


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(rows, classes, dtype, kind):
    """Logits, target and options."""
    options = dict(OPTIONS[kind])
    if options.pop("weight", False):
        options["weight"] = torch.linspace(0.5, 1.5, classes).to(dtype)
    if kind == "probabilities":
        return normal(rows, classes, dtype=dtype), normal(rows, classes, seed=1).softmax(1).to(dtype), options
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    target[rows // 2] = -100
    return normal(rows, classes, dtype=dtype), target, options


def answers(backend, x, target, reduction="none", **options):
    """The loss and the gradient of the logits."""
    leaf = x.detach().requires_grad_()
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(leaf, target, reduction=reduction, **options)
        grad = normal(*loss.shape, seed=3).to(loss.dtype)
        return [loss, *torch.autograd.grad(loss, leaf, grad)]


def in_double(target, options):
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return target.double() if target.is_floating_point() else target, wide


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 5, 16, 65, 4095, 4096, 4097, 10007])  # a block of forward is 4,096
@pytest.mark.parametrize("backend", VARIANTS)
def test_every_variant_is_within_the_error_rule_for_rows_of_every_length(backend, classes, dtype, kind):
    x, target, options = arguments(7, classes, dtype, kind)
    wide_target, wide = in_double(target, options)
    exact = answers("reference", x.double(), wide_target, **wide)
    near = answers("reference", x, target, **options)
    for ours, one, true in zip(answers(backend, x, target, **options), near, exact, strict=True):
        assert_within_rule(ours, one, true)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(300, 768), (4096, 64), (7, 20000)])
def test_results_are_the_same_bits_for_any_number_of_threads_and_every_time(rows, classes, dtype, kind):
    x, target, options = arguments(rows, classes, dtype, kind)
    results = []
    for threads in (1, 2, 3, 3, 1):
        torch.set_num_threads(threads)
        results.append(answers("cpu", x, target, "mean", **options))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("classes", [1024, 1001, 1004])  # aligned rows, rows at any address, and at every fourth
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
def test_gradients_past_the_caches_are_those_of_small_calls_row_by_row(backend, dtype, classes):
    rows = (1 << 22) // (classes * dtype.itemsize) + 5
    x, target, _ = arguments(rows, classes, dtype, "indices")
    grads, results = normal(rows).to(dtype), []
    for step in (rows, rows // 3):
        parts = []
        for start in range(0, rows, step):
            leaf = x[start : start + step].detach().requires_grad_()
            with fastlm.use_backend(backend):
                loss = F.cross_entropy(leaf, target[start : start + step], reduction="none")
            parts.append(torch.autograd.grad(loss, leaf, grads[start : start + step])[0])
        results.append(torch.cat(parts))
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", VARIANTS)
def test_exp_is_within_2_ulp_down_to_its_smallest_normal_result(backend):
    """Of a row (0, x) with x so small that lse is 0 the gradient at x is e^x."""
    x = torch.cat([torch.linspace(-87, -17.5, 200_001), torch.tensor([-87.33, -104.0, -math.inf])])
    leaf = torch.stack([torch.zeros_like(x), x], 1).requires_grad_()
    with fastlm.use_backend(backend):
        F.cross_entropy(leaf, torch.zeros(len(x)).long(), reduction="sum").backward()
    ours, exact = leaf.grad[:-2, 1].double(), x[:-2].double().exp()
    ulp = (torch.frexp(exact)[1] - 24).double().exp2()
    assert ((ours - exact).abs() / ulp).max() <= 2
    assert leaf.grad[-1, 1] == 0
    assert 0 <= leaf.grad[-2, 1] < 2e-38


@pytest.mark.parametrize("backend", VARIANTS)
def test_soft_caps_keep_small_logits_exact_and_bound_large_ones(backend):
    x = torch.cat([torch.logspace(-20, 1.5, 4000), torch.tensor([0.0, 0.624999, 0.625001, 100.0, math.inf])])
    x = torch.cat([x, -x])
    pairs = torch.stack([torch.zeros_like(x), x], 1)
    for cap in (1.0, 30.0):
        leaf = pairs.clone().requires_grad_()
        with fastlm.use_backend(backend):
            loss = F.cross_entropy(leaf, torch.ones(len(x)).long(), reduction="none", softcap=cap)
            loss.sum().backward()
        exact = pairs.double().requires_grad_()
        true = T.cross_entropy(cap * torch.tanh(exact / cap), torch.ones(len(x)).long(), reduction="none")
        finite = x.isfinite()
        torch.testing.assert_close(loss.double()[finite], true.detach()[finite], rtol=1e-6, atol=3e-7)
        true[finite].sum().backward()
        torch.testing.assert_close(leaf.grad.double()[finite], exact.grad[finite], rtol=2e-6, atol=3e-7)
        assert loss[~finite].isfinite().all()


@pytest.mark.parametrize("classes", [262_144, 262_143])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_vocabularies_are_within_the_error_rule(classes, dtype):
    x, target, _ = arguments(3, classes, dtype, "indices")
    exact, near = answers("reference", x.double(), target), answers("reference", x, target)
    for ours, one, true in zip(answers("cpu", x, target), near, exact, strict=True):
        assert_within_rule(ours, one, true)


def test_more_than_2_to_the_31_logits():
    """In bytes of one row that is repeated: every row is the same, and so is its loss."""
    rows, classes = 43_000, 50_304
    row = normal(classes, dtype=torch.bfloat16)
    x = row.expand(rows, classes)
    assert x.numel() > 2**31
    target = torch.full((rows,), 7)
    target[1:-1] = -100
    with fastlm.use_backend("cpu"):
        losses = F.cross_entropy(x, target, reduction="none")
        mean = F.cross_entropy(x, target)
    assert losses[0] == losses[-1] == mean
    assert (losses[1:-1] == 0).all()
    near = T.cross_entropy(row[None].float(), torch.tensor([7]))
    assert abs(losses[0].float() - near) <= 2**-8 * near


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch has no such function")
def test_linear_cross_entropy_of_16_bits_is_right_in_one_chunk_and_in_many(monkeypatch):
    from fastlm.ops.cross_entropy import kernels

    x, weight, target = (
        normal(50, 16, dtype=torch.bfloat16),
        normal(99, 16, dtype=torch.bfloat16, seed=1),
        torch.arange(50),
    )

    def gradients(dtype, backend):
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight)]
        with fastlm.use_backend(backend):
            loss = F.linear_cross_entropy(*leaves, target)
        return [loss, *torch.autograd.grad(loss, leaves)]

    exact, torchs = gradients(torch.float64, "reference"), gradients(torch.bfloat16, "native")
    for size in (2**27, 2000):
        monkeypatch.setitem(kernels.CHUNK_BYTES, "cpu", size)
        assert kernels._chunk_count(x, 99) == (1 if size > 2000 else 5)
        for ours, near, true in zip(gradients(torch.bfloat16, "cpu"), torchs, exact, strict=True):
            assert_within_rule(ours, near, true)
