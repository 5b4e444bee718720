"""What only the losses have: inplace_backward, dtypes, gradients of probabilities and weights, and no full logits."""

import formulas
import hostile
import pytest
import torch
import torch.nn.functional as T
from errors import assert_within_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
import fastlm.functional as F
from fastlm.ops.registry import OPS

BACKENDS = ["auto", "native", "reference"]
TARGET = torch.tensor([0, 3, -100, 6, 2])


def logits(rows=5, classes=7, dtype=torch.float32):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows)).to(dtype)


# inplace_backward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "misaligned"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_inplace_backward_writes_the_gradient_over_the_logits(reduction, layout, backend):
    leaf = logits().requires_grad_()
    expected = leaf.detach().clone().requires_grad_()
    T.cross_entropy(expected, TARGET, reduction=reduction).sum().backward()
    x = hostile.LAYOUTS[layout](leaf) if layout != "contiguous" else leaf.clone()
    with fastlm.use_backend(backend):
        F.cross_entropy(x, TARGET, reduction=reduction, inplace_backward=True).sum().backward()
    exact = logits().double().requires_grad_()
    T.cross_entropy(exact, TARGET, reduction=reduction).sum().backward()
    assert_within_rule(leaf.grad, expected.grad, exact.grad)
    assert torch.equal(x, leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_refuses_a_leaf_and_logits_without_memory_of_their_own(backend):
    with fastlm.use_backend(backend):
        with pytest.raises(RuntimeError, match=r"cross_entropy: inplace_backward .*got a leaf"):
            F.cross_entropy(logits().requires_grad_(), TARGET, inplace_backward=True)
        with pytest.raises(RuntimeError, match=r"cross_entropy: inplace_backward .*got an expanded tensor"):
            F.cross_entropy(logits(1).requires_grad_().expand(5, 7), TARGET, inplace_backward=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_without_a_gradient_changes_nothing(backend):
    x = logits()
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(x, TARGET, inplace_backward=True)
        with torch.no_grad():
            F.cross_entropy(x.clone().requires_grad_(), TARGET, inplace_backward=True)
    assert not loss.requires_grad
    assert torch.equal(x, logits())


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_is_noticed_by_whoever_kept_the_logits(backend):
    x = logits().requires_grad_().exp()  # exp keeps its result for backward
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(x, TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_refuses_a_second_derivative(backend):
    leaf = logits().requires_grad_()
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(leaf * 1, TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# Dtypes, shapes -----------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["indices", "weighted", "float32 weight", "probabilities"])
def test_autocast_gives_the_dtype_and_the_value_of_torch(kind, dtype, backend):
    x = logits(dtype=dtype)
    target = x.softmax(1) if kind == "probabilities" else TARGET
    options = {"weighted": {"weight": torch.ones(7, dtype=dtype)}, "float32 weight": {"weight": torch.ones(7)}}
    arguments = {"input": x, "target": target, **options.get(kind, {})}
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = T.cross_entropy(**arguments)
        except RuntimeError as error:
            with fastlm.use_backend(backend), pytest.raises(type(error)):
                F.cross_entropy(**arguments)
            return
        with fastlm.use_backend(backend):
            ours = F.cross_entropy(**arguments)
    exact = T.cross_entropy(x.double(), target.double() if kind == "probabilities" else target)
    assert_within_rule(ours, expected, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_under_autocast_is_linear_then_cross_entropy(dtype, backend):
    x, weight, bias = logits(64, 6, dtype), logits(7, 6, dtype), logits(1, 7, dtype)[0]
    target = torch.arange(64) % 7
    leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        with fastlm.use_backend(backend):
            ours = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction="none")
        expected = T.cross_entropy(T.linear(x, weight, bias), target, reduction="none")
    ours.sum().backward()
    exact = T.cross_entropy(T.linear(x.double(), weight.double(), bias.double()), target, reduction="none")
    assert_within_rule(ours, expected, exact)
    assert [leaf.grad.dtype for leaf in leaves] == [dtype] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_dtype", [None, *DTYPES])
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_probabilities_promote_dtypes_as_torch_does(dtype, target_dtype, weight_dtype, backend):
    x, target = logits(dtype=dtype), logits().softmax(1).to(target_dtype)
    weight = None if weight_dtype is None else torch.linspace(0.5, 1.5, 7).to(weight_dtype)
    for reduction in ("none", "mean"):
        try:
            expected = T.cross_entropy(x, target, weight, reduction=reduction)
        except RuntimeError as error:
            with fastlm.use_backend(backend), pytest.raises(type(error)):
                F.cross_entropy(x, target, weight, reduction=reduction)
            continue
        with fastlm.use_backend(backend):
            ours = F.cross_entropy(x, target, weight, reduction=reduction)
        wide = None if weight is None else weight.double()
        assert_within_rule(ours, expected, T.cross_entropy(x.double(), target.double(), wide, reduction=reduction))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_one_row_of_logits_takes_a_target_of_no_or_of_one_dimension(op, backend):
    arguments = (logits(1)[0],) if op == "cross_entropy" else (logits(1, 6)[0], logits(7, 6))
    for target in (torch.tensor(3), torch.tensor([3])):
        for reduction in ("none", "mean", "sum"):
            with fastlm.use_backend(backend):
                ours = getattr(F, op)(*arguments, target, reduction=reduction)
            expected = getattr(T, op)(*arguments, target, reduction=reduction)
            assert ours.shape == expected.shape == ()
            exact = getattr(T, op)(*(x.double() for x in arguments), target, reduction=reduction)
            assert_within_rule(ours, expected, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_all_targets_ignored_give_nan_for_the_mean_and_no_gradient(op, backend):
    leaves = [logits().requires_grad_()] if op == "cross_entropy" else [
        logits(5, 6).requires_grad_(), logits(7, 6).requires_grad_()]  # fmt: skip
    with fastlm.use_backend(backend):
        loss = getattr(F, op)(*leaves, torch.full((5,), -100))
        loss.backward()
        none = getattr(F, op)(*leaves, torch.full((5,), -100), reduction="none")
    assert loss.isnan()
    assert torch.equal(none, torch.zeros(5))
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_ignored_rows_of_nan_and_inf_are_not_felt_by_the_others(op, reduction, z_loss):
    bad = torch.tensor([[float("nan")], [float("inf")]])
    options = {"reduction": reduction, "z_loss": z_loss, "label_smoothing": 0.1}
    good, weight = logits(3, 6), logits(7, 6)
    rows = torch.cat([good, bad.expand(2, 6)])
    target = torch.tensor([0, 3, 5, -100, -100])
    losses = []
    for x, t in ((good, target[:3]), (rows, target)):
        arguments = (x,) if op == "cross_entropy" else (x, weight)
        with fastlm.use_backend("reference"):
            losses.append(getattr(F, op)(*arguments, t, **options))
    expected, ours = losses
    assert_within_rule(ours[:3] if reduction == "none" else ours, expected, expected.double())
    if reduction == "none":
        assert torch.equal(ours[3:], torch.zeros(2))


# Gradients that only the composite gives ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_probabilities_and_their_weights_get_gradients(op, backend):
    arguments = [logits(5, 7)] if op == "cross_entropy" else [logits(5, 6), logits(7, 6)]
    target, weight = logits(5, 7).sin().softmax(1), torch.linspace(0.5, 1.5, 7)
    tensors = [x.double().requires_grad_() for x in (*arguments, target, weight)]

    def loss(*tensors):
        *arguments, target, weight = tensors
        with fastlm.use_backend(backend):
            return getattr(F, op)(*arguments, target, weight=weight, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, tensors)


def test_the_reference_gives_the_gradient_of_probabilities_with_z_loss_and_softcap():
    tensors = [x.double().requires_grad_() for x in (logits(5, 7), logits(5, 7).sin().softmax(1))]
    assert torch.autograd.gradcheck(lambda x, t: F.cross_entropy(x, t, z_loss=0.1, softcap=2.0), tensors)


# No full logits -----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any storage that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def measured(record, largest):
    """A backend that is watched inside our op, where a mode outside it does not look."""

    def inside(run):
        def watched(*args):
            with largest:
                return run(*args)

        return watched

    return fastlm.Backend("measured", fwd=inside(record.fwd), bwd=inside(record.bwd))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [2, 3, 7, 64])
def test_linear_cross_entropy_never_makes_a_tensor_of_the_size_of_the_logits(rows, reduction):
    classes, features = 3000, 4 if rows > 4 else 1
    x, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    bias, target = torch.randn(classes, requires_grad=True), torch.randint(0, classes, (rows,))
    options = {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.1, "linear_bias": bias, "reduction": reduction}
    largest = Largest()
    fastlm.register_backend(
        "linear_cross_entropy", measured(OPS["linear_cross_entropy"].backends["reference"], largest)
    )
    with fastlm.use_backend("measured"):
        F.linear_cross_entropy(x, weight, target, **options).sum().backward()
    assert classes <= largest.elements < rows * classes


@pytest.mark.parametrize("classes", [(7,), (3, 4)])
def test_linear_cross_entropy_sums_its_chunks(classes, monkeypatch):
    from fastlm.ops.cross_entropy import kernels, reference

    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(*classes, 6, dtype=torch.float64)
    target = torch.randint(0, classes[0], (50, *classes[1:]))
    leaves = [y.requires_grad_() for y in (x, weight)]
    results = []
    for size in (2**27, 400):  # bytes of one chunk of logits
        monkeypatch.setitem(kernels.CHUNK_BYTES, "cpu", size)
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", size // 16)
        for reduction in ("mean", "none"):
            loss = F.linear_cross_entropy(x, weight, target, reduction=reduction)
            results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for whole, pieces in zip(results[:2], results[2:], strict=True):
        for one, other in zip(whole, pieces, strict=True):
            assert_within_rule(other, one, one)


def test_linear_cross_entropy_sums_the_gradients_of_its_parameters_in_fp32(monkeypatch):
    from fastlm.ops.cross_entropy import kernels

    monkeypatch.setitem(kernels.CHUNK_BYTES, "cpu", 200)  # a chunk of 14 rows
    x, weight, bias = logits(2000, 6), logits(7, 6), logits(1, 7)[0]
    target, tensors = torch.arange(2000) % 7, [y.bfloat16() for y in (x, weight, bias)]

    def gradients(function, dtype):
        leaves = [y.to(dtype).requires_grad_() for y in tensors]
        return torch.autograd.grad(function(leaves[0], leaves[1], target, linear_bias=leaves[2]), leaves)

    exact, torchs = (gradients(T.linear_cross_entropy, dtype) for dtype in (torch.float64, torch.bfloat16))
    for our, near, true in zip(gradients(F.linear_cross_entropy, torch.bfloat16), torchs, exact, strict=True):
        assert_within_rule(our, near, true)


# Properties ---------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    rows=st.integers(0, 6),
    classes=st.integers(1, 20),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.5]),
    softcap=st.sampled_from([0.0, 3.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    seed=st.integers(0, 99),
)
def test_the_loss_of_anything_is_the_formula(rows, classes, smoothing, z_loss, softcap, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 5
    target = torch.randint(-1, classes, (rows,), generator=generator)
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
    exact = formulas.cross_entropy(x, target, ignore_index=-1, **options)
    with fastlm.use_backend("reference"):
        assert_within_rule(F.cross_entropy(x, target, ignore_index=-1, **options), exact, exact)
        eye = torch.eye(classes, dtype=torch.float64)
        assert_within_rule(F.linear_cross_entropy(x, eye, target, ignore_index=-1, **options), exact, exact)
