"""What only the norms have: dtypes of parameters, autocast, residual streams, upstream gradients that are far apart."""

import formulas
import hostile
import pytest
import torch
import torch.nn.functional as T
from cases import serves_here
from errors import assert_within_rule
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
import fastlm.functional as F

BACKENDS = ["auto", "native", "reference", "cpu", "triton", "emulator"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_autocast_gives_the_dtypes_of_torch(op, dtype, backend):
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    for options in ({}, {"weight": weight}, {"weight": weight.float()}):
        with torch.autocast("cpu", torch.bfloat16):
            try:
                expected = getattr(T, op)(x, (8,), **options).dtype
            except RuntimeError as error:
                with fastlm.use_backend(backend), pytest.raises(type(error)):
                    getattr(F, op)(x, (8,), **options)
                continue
            with fastlm.use_backend(backend):
                if serves_here(getattr(F, op), x, (8,), **options):
                    assert getattr(F, op)(x, (8,), **options).dtype == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_add_norms_give_the_inputs_and_the_residuals_dtype(op, dtype, residual_dtype, backend):
    x, residual = torch.randn(9, 8).to(dtype), torch.randn(9, 8).to(residual_dtype)
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    with fastlm.use_backend(backend):
        if not serves_here(getattr(F, op), x, residual, (8,)):
            pair = residual_dtype in (dtype, torch.float32)  # what the CUDA kernels are compiled for
            unserved = backend == "native" or (backend == "emulator" and not pair)
            assert unserved or torch.float64 in (dtype, residual_dtype)
            return
        output, stream = getattr(F, op)(x, residual, (8,))
    gradients = torch.autograd.grad([output, stream], leaves, [torch.ones_like(output), torch.ones_like(stream)])
    assert [y.dtype for y in (output, stream, *gradients)] == [dtype, residual_dtype, dtype, residual_dtype]
    wide = torch.float64 if torch.float64 in (dtype, residual_dtype) else torch.float32
    assert torch.equal(stream, (residual.to(wide) + x.to(wide)).to(residual_dtype))  # rounded once


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_the_sum_is_formed_in_fp32_before_it_is_rounded(op, backend):
    x, residual = torch.full((2, 8), 2.0**-9).bfloat16(), torch.full((2, 8), 1.0).bfloat16()
    with fastlm.use_backend(backend):
        _, wide = getattr(F, op)(x, residual.float(), (8,))
        _, narrow = getattr(F, op)(x, residual, (8,))
    assert (wide == 1 + 2.0**-9).all()
    assert (narrow == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_inputs_and_outputs_share_no_memory(op, backend):
    x, residual = torch.randn(3, 8), torch.zeros(3, 8)
    with fastlm.use_backend(backend):
        output, stream = getattr(F, op)(x, residual, (8,))
    addresses = {y.untyped_storage().data_ptr() for y in (x, residual, output, stream)}
    assert len(addresses) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_input_and_residual_may_be_changed_independently(backend):
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with fastlm.use_backend(backend):
        output, stream = F.add_layer_norm(x, residual, (8,))
    (output.square() + stream).sum().backward()
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_an_upstream_gradient_past_2_to_the_31_elements_is_read_where_it_lies(op, backend):
    x, grad = torch.randn(3, 8), torch.randn(3, 8)
    gradients = []
    for upstream in (grad, hostile.far_apart(grad)):
        leaf = x.clone().requires_grad_()
        with fastlm.use_backend(backend):
            getattr(F, op)(leaf, (8,)).backward(upstream)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_normalized_shape_may_be_a_list_a_tuple_or_a_size(op, backend):
    x = torch.randn(2, 3, 4)
    with fastlm.use_backend(backend):
        results = [getattr(F, op)(x, shape) for shape in ([3, 4], (3, 4), torch.Size((3, 4)), x.shape[1:])]
    for result in results:
        assert_within_rule(result, getattr(T, op)(x, (3, 4)), getattr(T, op)(x.double(), (3, 4)))


def test_rms_norm_without_eps_takes_the_epsilon_of_its_arithmetic():
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-23), (torch.float64, 2.0**-52)):
        x = torch.full((1, 4), 2.0**-12 if dtype != torch.float64 else 2.0**-26, dtype=dtype)
        exact = x.double() / (x.double().square() + eps).sqrt()
        for backend in BACKENDS:
            with fastlm.use_backend(backend):
                if not serves_here(F.rms_norm, x, (4,)):
                    continue
                assert_within_rule(F.rms_norm(x, (4,)), T.rms_norm(x, (4,)), exact)
                assert_within_rule(F.add_rms_norm(x, 0 * x, (4,))[0], T.rms_norm(x, (4,)), exact)


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shift=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_layer_norm_of_anything_is_within_the_error_rule(rows, columns, scale, shift, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale + shift
    with fastlm.use_backend("reference"):
        ours = F.layer_norm(x, (columns,))
    assert_within_rule(ours, T.layer_norm(x, (columns,)), formulas.layer_norm(x.double(), (columns,)))
