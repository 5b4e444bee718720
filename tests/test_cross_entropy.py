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

BACKENDS = ["auto", "native", "reference", "cpu", "triton", "emulator"]
DOUBLE = BACKENDS[:4]  # those that serve float64
KERNELS = BACKENDS[3:]


@pytest.fixture(autouse=True)
def only_where_it_serves(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (
        missing := OPS["cross_entropy"]
        .backends[parameters.get("backend", "auto").replace("auto", "native")]
        .available()
    ):
        pytest.skip(missing)


TARGET = torch.tensor([0, 3, -100, 6, 2])
needs_torchs_own = pytest.mark.skipif(not hasattr(T, "linear_cross_entropy"), reason="torch has it since 2.13")


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


@pytest.mark.parametrize("backend", DOUBLE)
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


@pytest.mark.parametrize("backend", DOUBLE)
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
            with fastlm.use_backend(f"{backend},reference"), pytest.raises(type(error)):
                F.cross_entropy(x, target, weight, reduction=reduction)
            continue
        with fastlm.use_backend(f"{backend},reference"):
            ours = F.cross_entropy(x, target, weight, reduction=reduction)
        wide = None if weight is None else weight.double()
        assert_within_rule(ours, expected, T.cross_entropy(x.double(), target.double(), wide, reduction=reduction))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["cross_entropy", pytest.param("linear_cross_entropy", marks=needs_torchs_own)])
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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "native")])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_ignored_rows_of_nan_and_inf_are_not_felt_by_the_others(op, reduction, z_loss, backend):
    bad = torch.tensor([[float("nan")], [float("inf")]])
    options = {"reduction": reduction, "z_loss": z_loss, "label_smoothing": 0.1}
    good, weight = logits(3, 6), logits(7, 6)
    rows = torch.cat([good, bad.expand(2, 6)])
    target = torch.tensor([0, 3, 5, -100, -100])
    losses = []
    for x, t in ((good, target[:3]), (rows, target)):
        arguments = (x,) if op == "cross_entropy" else (x, weight)
        with fastlm.use_backend(backend):
            losses.append(getattr(F, op)(*arguments, t, **options))
    expected, ours = losses
    assert_within_rule(ours[:3] if reduction == "none" else ours, expected, expected.double())
    if reduction == "none":
        assert torch.equal(ours[3:], torch.zeros(2))


# Kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**40)])
@pytest.mark.parametrize("weight", [None, torch.ones(7)])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_target_out_of_range_raises_and_reads_nothing(op, weight, bad, backend):
    leaves = [logits(5, 7)] if op == "cross_entropy" else [logits(5, 6), logits(7, 6)]
    target = TARGET.clone()
    target[3] = bad
    for reduction in ("none", "mean", "sum"):
        with fastlm.use_backend(backend), pytest.raises(IndexError, match=rf"target must be in \[0, 7\) .* got {bad}"):
            getattr(F, op)(*leaves, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("backend", KERNELS)
def test_ops_called_with_what_does_not_fit_together_raise_and_read_nothing(backend):
    x, weight, options = logits(), torch.ones(7), (-100, "mean", 0.0, 0.0, 0.0, False)
    fwd, bwd = torch.ops.fastlm.cross_entropy_fwd, torch.ops.fastlm.cross_entropy_bwd
    loss, stats, divisors = fwd(x, TARGET, weight, *options, backend)
    for target, weights in ((TARGET[:4], weight), (TARGET, weight[:6]), (x[:, :6], weight)):
        with pytest.raises(ValueError, match=r"loss kernels: .* must have"):
            fwd(x, target, weights, *options, backend)
    for grad, kept, by in (
        (loss.expand(2), stats, divisors),
        (loss, stats[:2], divisors),
        (loss, stats[:, :4], divisors),
        (loss, stats.half(), divisors),
        (loss, stats, divisors[:1]),
    ):
        with pytest.raises(ValueError, match=r"loss kernels: .* must have"):
            bwd(grad, x, TARGET, weight, kept, by, *options, [True], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inplace_backward_of_the_kernels_returns_the_logits_memory(backend):
    leaf, seen = logits().requires_grad_(), []
    x = leaf * 1
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))
    with fastlm.use_backend(backend):
        F.cross_entropy(x, TARGET, inplace_backward=True).backward()
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_twice_raises_and_leaves_the_first_gradient(backend):
    leaf = logits().requires_grad_()
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(leaf * 1, TARGET, inplace_backward=True)
        loss.backward(retain_graph=True)
        first = leaf.grad.clone()
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()
    assert torch.equal(leaf.grad, first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_second_backward_gives_the_same_bits_and_spoils_no_earlier_gradient(op, reduction, dtype, backend):
    shapes = [(5, 7)] if op == "cross_entropy" else [(5, 6), (7, 6)]
    leaves = [logits(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    with fastlm.use_backend(backend):
        loss = getattr(F, op)(*leaves, TARGET, reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    tripled = torch.autograd.grad(loss, leaves, torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, kept))
    assert all(map(torch.equal, second, kept))
    for three, one in zip(tripled, kept, strict=True):
        torch.testing.assert_close(three.float(), 3 * one.float(), rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_of_more_dimensions_than_fold(backend):
    """Where rows that cannot be read in place are copied, the gradient still arrives."""
    leaf = torch.randn(2, 3, 2, 3, 2, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.arange(72).reshape(2, 3, 2, 3, 2) % 12
    order = [4, 3, 2, 1, 0, 5]

    def gradient(leaf, backend, **options):
        x = (leaf * 1).permute(order).contiguous().permute(order).movedim(-1, 1)
        with fastlm.use_backend(backend):
            return torch.autograd.grad(F.cross_entropy(x, target, **options), leaf)[0]

    exact, near = gradient(leaf.double(), "reference"), gradient(leaf, "reference")
    assert_within_rule(gradient(leaf, backend, inplace_backward=True), near, exact)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_z_part_of_a_mean_with_small_weights_does_not_cancel(op, backend):
    weight, target = torch.full((7,), 1e-3), torch.arange(9) % 7
    leaves = [logits(9, 7) + 300] if op == "cross_entropy" else [logits(9, 6), logits(7, 6)]
    options = {"linear_bias": torch.full((7,), 300.0)} if len(leaves) > 1 else {}

    def loss(dtype, backend):
        with fastlm.use_backend(backend):
            given = {name: x.to(dtype) for name, x in options.items()}
            return getattr(F, op)(*(x.to(dtype) for x in leaves), target, weight=weight.to(dtype), z_loss=0.1, **given)

    exact = loss(torch.float64, "reference")
    assert abs(loss(torch.float32, backend).double() - exact) <= 1e-6 * exact


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_targets_of_no_weight_give_what_the_formula_gives(backend):
    """Smoothed losses over a divisor of 0 are infinite, and the z part stays finite."""
    weight = torch.tensor([0.0, 0.0, 1.0])
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(logits(4, 3), torch.tensor([0, 1, 0, 1]), weight, label_smoothing=0.1, z_loss=0.1)
    assert loss == float("inf")


# Linear -------------------------------------------------------------------------------------------------------------


def linear_gradients(dtype, backend, scale=1.0, by=1.0, **options):
    """Loss, and the gradients of input, weight and bias, for an upstream gradient `by`."""
    leaves = [logits(40, 6), logits(7, 6), logits(1, 7)[0]]
    leaves = [(x * scale).to(dtype).requires_grad_() for x in leaves]
    with fastlm.use_backend(backend):
        loss = F.linear_cross_entropy(leaves[0], leaves[1], torch.arange(40) % 7, linear_bias=leaves[2], **options)
        return [loss, *torch.autograd.grad(loss, leaves, torch.tensor(by, dtype=loss.dtype))]


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_recompute_gives_the_same_gradients_and_keeps_none(reduction, dtype, backend):
    options = {
        "reduction": reduction,
        "z_loss": 0.1,
        "label_smoothing": 0.1,
        "weight": torch.linspace(0.5, 1.5, 7).to(dtype),
    }
    near = linear_gradients(dtype, "native", **{**options, "z_loss": 0.0})
    assert near[0].dtype == dtype
    formed = linear_gradients(dtype, backend, **options)
    again = linear_gradients(dtype, backend, recompute=True, **options)
    options["weight"] = options["weight"].double()
    exact = linear_gradients(torch.float64, "reference", **options)
    for one, two, true in zip(formed, again, exact, strict=True):
        assert_within_rule(two, one, true)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_loss_scale_reaches_fp16_gradients_that_would_be_zero_without_it(recompute, backend):
    """Of a mean whose gradients lie below fp16's smallest normal number, 6e-5, before they are scaled."""
    scale = 2.0**14
    x, weight = ((logits(*shape) * 2.0**-14).half() for shape in ((40, 6), (7, 6)))

    def gradients(dtype, backend):
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight)]
        with fastlm.use_backend(backend):
            loss = F.linear_cross_entropy(*leaves, torch.arange(40) % 7, recompute=recompute)
        return torch.autograd.grad(loss.float(), leaves, torch.tensor(scale))

    for ours, true in zip(gradients(torch.float16, backend), gradients(torch.float64, "reference"), strict=True):
        rounded = (true / scale).half().double() * scale  # what is left where the scale comes too late
        assert (rounded - true).norm() > 0.005 * true.norm()
        assert (ours.double() - true).norm() < 0.002 * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_micro_batches_are_the_mean_of_the_big_batch(backend):
    x, weight, target = logits(40, 6), logits(7, 6), torch.arange(40) % 7
    target[::3] = -100
    leaves = [y.requires_grad_() for y in (x, weight)]
    with fastlm.use_backend(backend):
        big = F.linear_cross_entropy(*leaves, target)
        expected = torch.autograd.grad(big, leaves)
        total = 0.0
        for rows in (slice(0, 7), slice(7, 30), slice(30, 40)):
            loss = F.linear_cross_entropy(leaves[0][rows], leaves[1], target[rows], reduction="sum")
            loss = loss / (target != -100).sum()
            loss.backward()
            total += loss.detach()
    exact = [y.detach().double().requires_grad_() for y in leaves]
    true = T.cross_entropy(exact[0] @ exact[1].T, target)
    for ours, near, right in zip(
        [total, *(y.grad for y in leaves)], [big, *expected], [true, *torch.autograd.grad(true, exact)], strict=True
    ):
        assert_within_rule(ours, near, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_input_weight_and_bias_may_each_need_no_gradient(recompute, wanted, backend):
    leaves = [logits(9, 6), logits(7, 6), logits(1, 7)[0]]
    every = [x.clone().requires_grad_() for x in leaves]
    some = [x.clone().requires_grad_(n in wanted) for n, x in enumerate(leaves)]
    target, results = torch.arange(9) % 7, []
    for tensors, names in ((every, range(3)), (some, wanted)):
        with fastlm.use_backend(backend):
            x, weight, bias = tensors
            loss = F.linear_cross_entropy(x, weight, target, linear_bias=bias, recompute=recompute)
        results.append(dict(zip(names, torch.autograd.grad(loss, [tensors[n] for n in names]), strict=True)))
    for n in wanted:
        torch.testing.assert_close(results[1][n], results[0][n])


# Gradients that only the composite gives ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", DOUBLE[:3])
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


@needs_torchs_own
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


@pytest.mark.parametrize("option", ["z_loss", "softcap"])
def test_an_option_of_several_numbers_is_refused_by_name(option):
    with pytest.raises(TypeError, match=f"cross_entropy: {option} must be a number, got Tensor"):
        F.cross_entropy(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), **{option: torch.zeros(2)})
