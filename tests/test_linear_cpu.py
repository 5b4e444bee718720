"""The linear layer's CPU kernel and int8 weights: threads, rows on their own, large sums, what auto takes."""

import pytest
import torch
from errors import assert_within_rule

import fastlm
import fastlm.functional as F
from fastlm.ops import compiled
from fastlm.ops.linear import op
from fastlm.ops.measured import TABLE
from fastlm.ops.registry import OPS

pytestmark = pytest.mark.skipif(bool(compiled.cpu_missing()), reason=compiled.cpu_missing())

VARIANTS = [name for name in OPS["linear"].backends if name.startswith("cpu")]  # "cpu" is the best of them
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def arguments(rows, features, outputs, dtype, int8):
    x, weight, bias = normal(rows, features), normal(outputs, features, seed=1), normal(outputs, seed=2).to(dtype)
    if not int8:
        return {"input": x.to(dtype), "weight": weight.to(dtype), "bias": bias}
    weight, scale = op.quantize(weight)
    return {"input": x.to(dtype), "weight": weight, "bias": bias, "weight_scale": scale}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
def test_neither_threads_nor_other_rows_change_a_bit(backend, dtype, int8):
    given = arguments(13, 768, 517, dtype, int8)
    with fastlm.use_backend(backend):
        torch.set_num_threads(1)
        alone = F.linear(**given)
        torch.set_num_threads(7)
        assert torch.equal(F.linear(**given), alone)
        for first, last in ((0, 1), (3, 8), (5, 13)):
            some = F.linear(**(given | {"input": given["input"][first:last]}))
            assert torch.equal(some, alone[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [65_536, 65_600])
@pytest.mark.parametrize("backend", VARIANTS)
def test_sums_of_the_largest_bytes_do_not_overflow(backend, features, dtype):
    x, scale = torch.ones(2, features, dtype=dtype), torch.full((3,), 2.0**-10)
    x[1] = -1
    weight = torch.tensor([-128, 127, 1], dtype=torch.int8)[:, None].expand(3, features).contiguous()
    with fastlm.use_backend(backend):
        y = F.linear(x, weight, weight_scale=scale)
    exact = (x.double() @ weight.double().T) * 2.0**-10
    assert_within_rule(y, exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e4])
@pytest.mark.parametrize("backend", VARIANTS)
def test_int8_takes_rows_of_any_size(backend, scale, dtype):
    given = arguments(3, 130, 9, dtype, True)
    given["input"] = (given["input"].double() * torch.tensor([[scale], [1.0], [0.0]])).to(dtype)
    del given["bias"]
    with fastlm.use_backend(backend):
        y = F.linear(**given)
    exact = given["input"].double() @ given["weight"].double().T * given["weight_scale"].double()
    torchs = torch.nn.functional.linear(given["input"], (given["weight"] * given["weight_scale"][:, None]).to(dtype))
    for ours, theirs, true in zip(y, torchs, exact, strict=True):  # each row by its own scale
        assert_within_rule(ours, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
def test_int8_takes_the_largest_of_a_row_whatever_it_is(backend, dtype):
    x = normal(3000, 64).to(dtype)
    weight, scale = torch.eye(64, dtype=torch.int8), torch.ones(64)
    with fastlm.use_backend(backend):
        y = F.linear(x, weight, weight_scale=scale)
    most = x.float().abs().amax(1, keepdim=True)
    assert ((y.float() - x.float()).abs() <= most * (2.0**-22 if dtype == torch.float32 else 2.0**-8)).all()


def test_a_row_that_is_not_finite_leaves_the_others_as_they_are():
    given = arguments(3, 130, 9, torch.float32, True)
    with fastlm.use_backend("cpu"):
        clean = F.linear(**given)
        given["input"][1, 7] = torch.inf
        y = F.linear(**given)
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[[0, 2]], clean[[0, 2]])


def test_quantize_gives_what_is_nearest():
    weight = normal(5, 40)
    weight[2] = 0
    int8, scale = op.quantize(weight)
    assert int8.dtype == torch.int8
    assert int8.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    assert ((int8 * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    half, half_scale = op.quantize(weight.bfloat16())
    assert half.dtype == torch.int8
    assert half_scale.dtype == torch.float32
    assert op.quantize(torch.empty(3, 0))[0].shape == (3, 0)
    for wrong in (weight[0], weight.long()):
        with pytest.raises(ValueError, match=r"quantize: weight must be \(out_features, in_features\)"):
            op.quantize(wrong)


def test_auto_takes_few_rows_of_a_large_weight_and_leaves_the_rest_to_torch(monkeypatch):
    entry = {"linear": {"float32": ["cpu", 1 << 16]}}
    monkeypatch.setitem(TABLE, "a processor", entry)
    monkeypatch.setattr("fastlm.ops.measured.device_class", lambda device: "a processor")
    from fastlm.ops import measured

    measured._entry.cache_clear()
    try:
        x, large, small = torch.randn(2, 256), torch.randn(512, 256), torch.randn(8, 256)
        assert fastlm.explain(F.linear, x, large).backend == "cpu"
        assert fastlm.explain(F.linear, x, small).backend == "native"
        assert fastlm.explain(F.linear, torch.randn(op.FEW_ROWS + 1, 256), large).backend == "native"
        assert fastlm.explain(F.linear, x, torch.randn(256, 512).T).backend == "native"
        assert fastlm.explain(F.linear, x, torch.randn(256, 512).T).reasons["cpu"]
        assert fastlm.explain(F.linear, x.bfloat16(), large.bfloat16()).backend == "native"
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, large).dtype == torch.bfloat16
            with fastlm.use_backend("cpu"):
                assert F.linear(x, large).dtype == torch.bfloat16
    finally:
        measured._entry.cache_clear()


def test_a_transposed_weight_is_copied_when_the_kernel_is_asked_for():
    x, weight = torch.randn(2, 20), torch.randn(20, 11).T
    with fastlm.use_backend("cpu"):
        assert fastlm.explain(F.linear, x, weight).copies == ["weight, of strides (1, 11)"]
        torch.testing.assert_close(F.linear(x, weight), x @ weight.T)


def test_a_scale_that_needs_a_gradient_gets_one():
    given = arguments(3, 20, 9, torch.float32, True)
    scale = given["weight_scale"].requires_grad_()
    F.linear(**given).sum().backward()
    expected = (given["input"] @ given["weight"].float().T).sum(0)
    torch.testing.assert_close(scale.grad, expected)


def test_integers_and_complex_numbers_go_to_torch():
    assert F.linear(torch.ones(2, 3).long(), torch.ones(4, 3).long()).tolist() == [[3] * 4] * 2
    assert F.linear(torch.ones(2, 3).cfloat(), torch.ones(4, 3).cfloat()).dtype == torch.complex64
    assert F.linear(torch.ones(3), torch.ones(3)).item() == 3
