"""Autograd around every op: derivatives of each order, transforms, modes, checkpointing, and what backward keeps."""

import itertools

import hostile
import pytest
import torch
from cases import BY_NAME, call, function_of
from errors import assert_within_rule
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastlm
import fastlm.functional as F
from fastlm.ops.registry import OPS

# One small case per op that has everything in it, and some whose derivatives take other paths.
ONE_EACH = [
    "layer_norm-odd sizes",
    "rms_norm-odd sizes",
    "add_layer_norm-odd sizes",
    "add_rms_norm-odd sizes",
    "cross_entropy-everything mean",
    "linear_cross_entropy-everything mean",
    "linear-odd sizes",
    "scaled_dot_product_attention-everything",
    "varlen_attention-everything",
]
MORE = [
    "linear-int8, odd sizes",
    "linear-no bias",
    "layer_norm-two dimensions normalised",
    "layer_norm-no parameters",
    "add_layer_norm-only new_residual used",
    "add_rms_norm-residual broadcasts",
    "cross_entropy-everything none",
    "cross_entropy-everything with probabilities mean",
    "cross_entropy-N C d1 d2 sum",
    "linear_cross_entropy-everything none",
    "linear_cross_entropy-everything sum",
    "linear_cross_entropy-probabilities mean",
    "scaled_dot_product_attention-causal, more queries",
    "scaled_dot_product_attention-additive mask by head",
    "scaled_dot_product_attention-groups and additive mask",
    "scaled_dot_product_attention-rows that see no key, additive",
    "varlen_attention-empty keys",
]


def tuple_of(result):
    return result if isinstance(result, tuple) else (result,)


# Derivatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH + MORE)
def test_the_references_gradients_are_the_numerical_ones(name):
    function, tensors = function_of(name, torch.float64)
    with fastlm.use_backend("reference"):
        leaves = [x.requires_grad_() for x in tensors]
        assert torch.autograd.gradcheck(function, leaves, fast_mode="attention" in name)


@pytest.mark.parametrize("name", [*ONE_EACH, "cross_entropy-everything none", "linear_cross_entropy-everything none"])
def test_the_references_second_derivatives_are_the_numerical_ones(name):
    function, tensors = function_of(name, torch.float64)
    with fastlm.use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, [x.requires_grad_() for x in tensors], fast_mode=True)


def second_order(function, tensors, seed=3):
    """Gradients of the squared norm of the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    generator = torch.Generator().manual_seed(seed)
    outputs = [y for y in tuple_of(function(*leaves)) if y.requires_grad]
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    norm = sum(g.square().sum() for g in first if g is not None)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(
        leaves, torch.autograd.grad(norm, leaves, allow_unused=True), strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "layer_norm-odd sizes",
        "rms_norm-odd sizes",
        "add_layer_norm-odd sizes",
        "add_rms_norm-odd sizes",
        "cross_entropy-ignored with weight",
        "linear_cross_entropy-ignored",
        "linear-odd sizes",
        "scaled_dot_product_attention-causal",
        "varlen_attention-causal",
    ],
)
def test_double_backward_of_the_reference_is_that_of_torchs_own_op(name):
    function, tensors = function_of(name, torch.float64)
    with fastlm.use_backend("reference"):
        ours = second_order(function, tensors)
    with fastlm.use_backend("native"), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        torchs = second_order(function, tensors)
    assert any(x.abs().max() > 0.01 for x in torchs)
    for our, true in zip(ours, torchs, strict=True):
        assert_within_rule(our, true, true)


def test_double_backward_through_dropout_keeps_the_mask():
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    with fastlm.use_backend("reference"):
        _, stream = F.add_rms_norm(x, torch.zeros_like(x), (8,), dropout_p=0.5)
        torch.manual_seed(3)
        output, _ = F.add_rms_norm(x, torch.zeros_like(x), (8,), dropout_p=0.5)
    (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    kept = stream != 0
    assert 0 < kept.sum() < x.numel()
    assert (first[~kept] == 0).all()
    assert (second[~kept] == 0).all()
    assert (second[kept] != 0).any()


# requires_grad ------------------------------------------------------------------------------------------------------

SUBSETS = [
    "layer_norm-odd sizes",
    "rms_norm-odd sizes",
    "add_layer_norm-odd sizes",
    "add_rms_norm-odd sizes",
    "cross_entropy-plain mean",
    "linear_cross_entropy-everything mean",
    "linear_cross_entropy-everything none",
    "scaled_dot_product_attention-additive mask in full",
    "varlen_attention-everything",
]


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("name", SUBSETS)
def test_any_subset_of_the_inputs_may_require_gradients(name, backend):
    function, tensors = function_of(name, torch.float64)
    expected = call(name, torch.float64, "cpu")
    op = expected.case.op
    with fastlm.use_backend(backend):
        if fastlm.explain(getattr(F, op), **expected.arguments, **expected.case.options).backend is None:
            assert "native" in backend
            return
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        leaves = [x.detach().requires_grad_(needs) for x, needs in zip(tensors, wanted, strict=True)]
        with fastlm.use_backend(backend):
            outputs = tuple_of(function(*leaves))
        grads = list(expected.upstream)
        used = [n for n, y in enumerate(outputs) if y.requires_grad]
        assert bool(used) == any(wanted)
        if used:
            torch.autograd.backward([outputs[n] for n in used], [grads[n] for n in used])
        for argument, leaf, needs in zip(expected.wanted, leaves, wanted, strict=True):
            if needs and leaf.grad is not None:
                exact, torchs = expected.gradients[argument], expected.torch_gradients[argument]
                if len(used) == sum(y.requires_grad for y in expected.torch_outputs):
                    assert_within_rule(leaf.grad, torchs, exact, argument)
            assert (leaf.grad is not None) <= needs


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_new_residual_without_gradient_of_its_own_has_one_through_the_input(backend):
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    with fastlm.use_backend(backend):
        _, stream = F.add_layer_norm(x, residual, (8,))
    stream.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_alibi_slopes_get_a_gradient_when_they_require_one(backend):
    _, (query, key, value) = function_of("scaled_dot_product_attention-plain", torch.float64)
    slopes = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def attention(slopes):
        with fastlm.use_backend(backend):
            return F.scaled_dot_product_attention(query, key, value, alibi_slopes=slopes)

    assert torch.autograd.gradcheck(attention, [slopes.requires_grad_()])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["scaled_dot_product_attention-lse", "varlen_attention-lse"])
def test_the_log_sum_exp_is_not_differentiable(name, backend):
    function, tensors = function_of(name, torch.float32)
    with fastlm.use_backend(backend):
        output, lse = function(*[x.requires_grad_() for x in tensors])
    assert output.requires_grad
    assert not lse.requires_grad


# Modes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_no_grad_and_inference_mode_give_the_same_values_without_a_graph(name, backend):
    function, tensors = function_of(name, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    with fastlm.use_backend(backend):
        expected = tuple_of(function(*leaves))
        with torch.no_grad():
            plain = tuple_of(function(*leaves))
        with torch.inference_mode():
            inference = tuple_of(function(*leaves))
    for one, two, three in zip(expected, plain, inference, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert not two.requires_grad
        assert three.is_inference()


@pytest.mark.parametrize("name", ONE_EACH)
def test_meta_tensors_give_the_shapes_and_dtypes_of_real_ones(name):
    expected = call(name, torch.bfloat16, "cpu")
    arguments = {name: x.to("meta") for name, x in expected.arguments.items()}
    outputs = tuple_of(getattr(F, expected.case.op)(**arguments, **expected.case.options))
    assert [(y.shape, y.dtype, y.device.type) for y in outputs] == [
        (y.shape, y.dtype, "meta") for y in expected.torch_outputs
    ]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm", "scaled_dot_product_attention", "varlen_attention"])
def test_activation_checkpointing_repeats_the_same_dropout(op, backend, reentrant):
    _, tensors = function_of(f"{op}-plain", torch.float32)

    def block(*tensors):
        expected = call(f"{op}-plain", torch.float32, "cpu")
        arguments = expected.arguments | dict(zip(expected.wanted, tensors, strict=True))
        return getattr(F, op)(**arguments, **expected.case.options, dropout_p=0.5)

    gradients = []
    for run in (block, lambda *leaves: checkpoint(block, *leaves, use_reentrant=reentrant)):
        torch.manual_seed(7)
        leaves = [x.clone().requires_grad_() for x in tensors]
        with fastlm.use_backend(backend):
            outputs = tuple_of(run(*leaves))
            sum(y.square().sum() for y in outputs).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_functional_call_takes_parameters_from_outside(backend):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = torch.nn.Parameter(torch.ones(6)), torch.nn.Parameter(torch.ones(5, 6))

        def forward(self, x, target):
            return F.linear_cross_entropy(F.rms_norm(x, (6,), self.weight), self.head, target)

    block, x, target = Block(), torch.randn(4, 6), torch.tensor([0, 1, 4, 2])
    parameters = {"weight": torch.randn(6, requires_grad=True), "head": torch.randn(5, 6, requires_grad=True)}
    with fastlm.use_backend(backend):
        loss = torch.func.functional_call(block, parameters, (x, target))
        loss.backward()
    normed = torch.nn.functional.rms_norm(x, (6,), parameters["weight"].detach())
    exact = torch.nn.functional.cross_entropy(normed.double() @ parameters["head"].detach().double().T, target)
    torchs = torch.nn.functional.cross_entropy(normed @ parameters["head"].detach().T, target)
    assert_within_rule(loss, torchs, exact)
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    assert all(parameter.grad is None for parameter in block.parameters())


# Transforms ---------------------------------------------------------------------------------------------------------

TRANSFORMED = [
    "layer_norm-odd sizes",
    "rms_norm-odd sizes",
    "add_layer_norm-odd sizes",
    "add_rms_norm-odd sizes",
    "cross_entropy-plain mean",
    "linear_cross_entropy-plain mean",
    "scaled_dot_product_attention-additive mask",
]


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_vmap_is_a_loop_over_calls(name, backend):
    function, tensors = function_of(name, torch.float64)
    stacks = [torch.stack([x, x * 0.5 - 0.1, -x]) for x in tensors]
    with fastlm.use_backend(backend):
        ours = tuple_of(torch.func.vmap(function)(*stacks))
        loop = [tuple_of(function(*xs)) for xs in zip(*stacks, strict=True)]
    for our, *each in zip(ours, *loop, strict=True):
        assert_within_rule(our, torch.stack(each), torch.stack(each))


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("name", [*TRANSFORMED, "varlen_attention-causal"])
def test_func_grad_and_per_sample_gradients_are_those_of_backward(name, backend):
    function, tensors = function_of(name, torch.float64)

    def loss(x):
        return sum(y.square().sum() for y in tuple_of(function(x, *tensors[1:])))

    leaf = tensors[0].clone().requires_grad_()
    with fastlm.use_backend(backend):
        ours = torch.func.grad(loss)(tensors[0])
        batched = torch.func.vmap(torch.func.grad(loss))(torch.stack([tensors[0], 2 * tensors[0]]))
        loss(leaf).backward()
    assert_within_rule(ours, leaf.grad, leaf.grad)
    assert_within_rule(batched[0], leaf.grad, leaf.grad)


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("name", [*TRANSFORMED, "varlen_attention-causal"])
def test_forward_mode_is_the_derivative_or_a_clear_error(name, backend):
    function, tensors = function_of(name, torch.float64)
    tangents = [torch.randn(x.shape, dtype=x.dtype) for x in tensors]
    leaves = [x.clone().requires_grad_() for x in tensors]
    outputs = tuple_of(function(*leaves))
    upstream = [torch.randn(y.shape, dtype=y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    exact = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    with fastlm.use_backend(backend):
        try:
            _, ours = torch.func.jvp(function, tuple(tensors), tuple(tangents))
        except (RuntimeError, NotImplementedError) as error:
            assert backend != "reference", "the reference's composite has forward mode"
            assert "forward" in str(error).lower()  # noqa: PT017
            return
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
            direct = [forward_ad.unpack_dual(y).tangent for y in tuple_of(function(*duals))]
    for tangent_outputs in (tuple_of(ours), direct):
        product = sum((u * t).sum() for u, t in zip(upstream, tangent_outputs, strict=True))
        assert_within_rule(product, exact.detach(), exact.detach())


def test_after_a_transform_our_own_implementation_runs_again():
    x = torch.randn(3, 8)
    with fastlm.use_backend("reference"):
        torch.func.grad(lambda x: F.layer_norm(x, (8,)).square().sum())(x)
        y = F.layer_norm(x.requires_grad_(), (8,))
    assert type(y.grad_fn).__name__ == "layer_normBackward"


# What backward keeps ------------------------------------------------------------------------------------------------


def saved_by(function, *arguments, **options):
    """Sizes of the tensors that are kept for backward, one for each storage."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function(*arguments, **options)
    assert any(y.requires_grad for y in tuple_of(result))
    return list(kept.values())


def elements(tensors, inputs=()):
    own = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(x.numel() for x in tensors if x.untyped_storage().data_ptr() not in own)


ROWS, COLUMNS = 64, 256


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norms_keep_their_inputs_and_statistics(op):
    inputs = [torch.randn(ROWS, COLUMNS, requires_grad=True), torch.randn(COLUMNS, requires_grad=True)]
    with fastlm.use_backend("reference"):
        kept = saved_by(getattr(F, op), inputs[0], (COLUMNS,), inputs[1])
    assert elements(kept, inputs) <= 2 * ROWS


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_add_norms_keep_one_activation_and_statistics(op, dropout_p):
    x, residual = (torch.randn(ROWS, COLUMNS, requires_grad=True) for _ in range(2))
    weight = torch.randn(COLUMNS, requires_grad=True)
    with fastlm.use_backend("reference"):
        kept = saved_by(getattr(F, op), x, residual, (COLUMNS,), weight, dropout_p=dropout_p)
    assert elements(kept, [weight]) <= ROWS * COLUMNS + 2 * ROWS + 2


def test_cross_entropy_keeps_the_logits_and_three_numbers_a_row():
    logits, target = torch.randn(ROWS, 1000, requires_grad=True), torch.randint(0, 1000, (ROWS,))
    with fastlm.use_backend("reference"):
        kept = saved_by(F.cross_entropy, logits, target, label_smoothing=0.1, z_loss=0.1, softcap=5.0)
    assert elements(kept, [logits, target]) <= 3 * ROWS + 2


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_keeps_nothing_as_large_as_the_logits(reduction):
    x, weight = torch.randn(ROWS, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    target = torch.randint(0, 1000, (ROWS,))
    kept = saved_by(F.linear_cross_entropy, x, weight, target, reduction=reduction)
    gradients = 0 if reduction == "none" else x.numel() + weight.numel()
    assert elements(kept, [x, weight, target]) <= gradients + 3 * ROWS + 2
    assert all(y.numel() < ROWS * 1000 for y in kept)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_keeps_inputs_output_and_one_number_a_row(dropout_p):
    inputs = [torch.randn(2, 3, 64, 8, requires_grad=True) for _ in range(3)]
    with fastlm.use_backend("reference"):
        kept = saved_by(F.scaled_dot_product_attention, *inputs, dropout_p=dropout_p, is_causal=True)
    assert elements(kept, inputs) <= inputs[0].numel() + 2 * 3 * 64 + 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_packed_attention_keeps_inputs_output_and_one_number_a_row(dropout_p):
    inputs = [torch.randn(64, 3, 8, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([0, 40, 64], dtype=torch.int32)
    with fastlm.use_backend("reference"):
        kept = saved_by(F.varlen_attention, *inputs, ends, ends, 40, 40, dropout_p=dropout_p, is_causal=True)
    assert elements(kept, [*inputs, ends]) <= inputs[0].numel() + 3 * 64 + 2


# opcheck ------------------------------------------------------------------------------------------------------------

OPCHECKED = [(op, name) for op in OPS for name in ("reference", "cpu") if name in OPS[op].backends]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "outer_swapped"])
@pytest.mark.parametrize(("op", "backend"), OPCHECKED)
def test_opcheck_finds_nothing_in_forward_and_backward(op, backend, layout, dtype):
    name = next(name for name in ONE_EACH if BY_NAME[name].op == op)
    if backend == "cpu" and f"{name}, fixed" in BY_NAME:  # kernels give no gradient of a mask
        name = f"{name}, fixed"
    record, seen = OPS[op].backends[backend], {}
    if missing := record.available():
        pytest.skip(missing)

    def fwd(*args):
        seen["fwd"] = args
        return record.fwd(*args)

    def bwd(*args):
        seen["bwd"] = args[:-1] if OPS[op].in_place else args
        return record.bwd(*args)

    fastlm.register_backend(op, fastlm.Backend("watched", fwd=fwd, bwd=bwd))
    function, tensors = function_of(name, dtype)
    leaves = [hostile.LAYOUTS[layout](x).detach().requires_grad_() for x in tensors]
    with fastlm.use_backend("watched"):
        outputs = tuple_of(function(*leaves))
    sum(y.sum() for y in outputs if y.requires_grad).backward()
    everything = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for suffix, args in seen.items():
        plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
        torch.library.opcheck(
            getattr(torch.ops.fastlm, f"{op}_{suffix}").default,
            (*plain, backend),
            test_utils=everything if (layout, dtype) == ("contiguous", torch.float32) else "test_faketensor",
        )


def test_opcheck_finds_nothing_in_the_draw_of_a_random_state():
    draw = torch.ops.fastlm.new_rng_state.default
    torch.library.opcheck(draw, (torch.randn(2),), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in draw.tags
