"""The modules: torch.nn's in everything but what runs forward and backward."""

import copy
import io
import pickle

import pytest
import torch
from cases import serves_here
from errors import assert_within_rule

import fastlm
import fastlm.functional as F

PAIRS = [
    pytest.param(fastlm.nn.LayerNorm, torch.nn.LayerNorm, {}, id="LayerNorm"),
    pytest.param(fastlm.nn.LayerNorm, torch.nn.LayerNorm, {"bias": False}, id="LayerNorm without bias"),
    pytest.param(
        fastlm.nn.LayerNorm, torch.nn.LayerNorm, {"elementwise_affine": False, "eps": 1e-3}, id="LayerNorm, not affine"
    ),
    pytest.param(fastlm.nn.RMSNorm, torch.nn.RMSNorm, {}, id="RMSNorm"),
    pytest.param(fastlm.nn.RMSNorm, torch.nn.RMSNorm, {"eps": 1e-3}, id="RMSNorm with eps"),
    pytest.param(fastlm.nn.RMSNorm, torch.nn.RMSNorm, {"elementwise_affine": False}, id="RMSNorm, not affine"),
]
BACKENDS = ["auto", "reference", "cpu", "triton", "emulator"]


def filled(module, seed=1):
    """The module with parameters that are neither ones nor zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def answers(module, x):
    """Output and gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(torch.bfloat16).to(y.dtype))
    return [y, x.grad, *(parameter.grad for parameter in module.parameters())]


def function_of(module):
    return F.rms_norm if isinstance(module, torch.nn.RMSNorm) else F.layer_norm


@pytest.mark.parametrize(("ours", "torchs", "options"), PAIRS)
@pytest.mark.parametrize("shape", [8, (3, 8), [8], torch.Size((3, 8))])
def test_parameters_state_dict_and_repr_are_those_of_torch(ours, torchs, options, shape):
    our, their = ours(shape, **options), torchs(shape, **options)
    assert repr(our) == repr(their)
    assert our.normalized_shape == their.normalized_shape
    assert list(our.state_dict()) == list(their.state_dict())
    for one, two in zip(our.state_dict().values(), their.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert isinstance(our, torchs)


@pytest.mark.parametrize(("ours", "torchs", "options"), PAIRS)
def test_a_state_dict_loads_both_ways(ours, torchs, options):
    for target, source in ((ours, torchs), (torchs, ours)):
        module, other = target(8, **options), filled(source(8, **options))
        module.load_state_dict(other.state_dict())
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("ours", "torchs", "options"), PAIRS)
def test_outputs_and_gradients_are_within_the_error_rule(ours, torchs, options, dtype, backend):
    x = torch.randn(5, 3, 24).to(dtype)
    their = filled(torchs((3, 24), dtype=dtype, **options))
    our, exact = ours((3, 24), dtype=dtype, **options), torchs((3, 24), dtype=torch.float64, **options)
    if options.get("eps") is None and torchs is torch.nn.RMSNorm:  # the epsilon of the arithmetic, not of float64
        exact.eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for module in (our, exact):
        module.load_state_dict(their.state_dict())
    with fastlm.use_backend(backend):
        parameters = [p for p in (our.weight, getattr(our, "bias", None)) if p is not None]
        if not serves_here(function_of(our), x, our.normalized_shape, *parameters):
            return
        results = answers(our, x)
    for result, near, true in zip(results, answers(their, x), answers(exact, x.double()), strict=True):
        assert_within_rule(result, near, true)


@pytest.mark.parametrize("ours", [fastlm.nn.LayerNorm, fastlm.nn.RMSNorm])
def test_forward_runs_the_backend_that_is_asked_for(ours):
    module, x = ours(8), torch.randn(3, 8, requires_grad=True)
    with fastlm.use_backend("reference"):
        y = module(x)
    op = "rms_norm" if ours is fastlm.nn.RMSNorm else "layer_norm"
    assert type(y.grad_fn).__name__ == f"{op}Backward"
    with fastlm.use_backend("cuda"), pytest.raises(fastlm.BackendError, match=f"{op}: no backend of 'cuda'"):
        module(x)


@pytest.mark.parametrize("ours", [fastlm.nn.LayerNorm, fastlm.nn.RMSNorm])
def test_an_input_of_another_shape_raises_with_the_ops_name(ours):
    with pytest.raises(RuntimeError, match="norm: normalized_shape must be the last dimensions of input"):
        ours(8)(torch.randn(3, 7))


@pytest.mark.parametrize("ours", [fastlm.nn.LayerNorm, fastlm.nn.RMSNorm])
def test_device_and_dtype_are_those_asked_for(ours):
    module = ours(8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    y = module(torch.empty(3, 8, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 8), torch.bfloat16, "meta")
    module = ours(8).to(torch.float64)
    assert module(torch.randn(3, 8, dtype=torch.float64)).dtype == torch.float64
    torch.testing.assert_close(module.weight.detach(), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize(("ours", "torchs", "options"), PAIRS)
def test_copies_pickles_and_saved_modules_give_the_same_as_the_module(ours, torchs, options):
    module, x = filled(ours(8, **options)), torch.randn(3, 8)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    twins = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False))
    for twin in twins:
        assert type(twin) is ours
        assert repr(twin) == repr(module)
        for one, two in zip(answers(twin, x), answers(module, x), strict=True):
            assert torch.equal(one, two)
        assert all(one is not two for one, two in zip(twin.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize(("ours", "torchs", "options"), PAIRS)
def test_compiled_modules_give_the_same_as_eager_ones(ours, torchs, options, backend):
    torch._dynamo.reset()
    module, x = filled(ours(8, **options)).double(), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with fastlm.use_backend(backend):
        if serves_here(function_of(module), x, (8,)):
            for one, two in zip(answers(compiled, x), answers(module, x), strict=True):
                assert_within_rule(one, two, two)
    torch._dynamo.reset()


def test_modules_take_the_place_of_torchs_in_a_model():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.RMSNorm(8)
    )
    twin = copy.deepcopy(model)
    twin[1], twin[3] = fastlm.nn.LayerNorm(8), fastlm.nn.RMSNorm(8)
    twin.load_state_dict(model.state_dict())
    assert repr(twin) == repr(model)
    x = torch.randn(3, 4)
    for one, two in zip(answers(twin, x), answers(model, x), strict=True):
        assert torch.equal(one, two)  # "auto" is torch's own op here


# Losses -------------------------------------------------------------------------------------------------------------

LOSSES = [{}, {"weight": torch.linspace(0.5, 1.5, 7), "ignore_index": 2}, {"reduction": "none", "label_smoothing": 0.2}]
TARGET = torch.tensor([0, 6, 2, 3, 5])


def loss_answers(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    loss = module(x, TARGET)
    loss.sum().backward()
    return [loss, x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LOSSES)
def test_cross_entropy_loss_is_torchs(options, backend):
    x, ours, torchs = torch.randn(5, 7), fastlm.nn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    with fastlm.use_backend(backend):
        if not serves_here(F.cross_entropy, x, TARGET):
            return
        answers = loss_answers(ours, x)
    exact = loss_answers(torchs.double(), x.double())
    for our, true, near in zip(answers, exact, loss_answers(torchs.float(), x), strict=True):
        assert_within_rule(our, near, true)


def test_cross_entropy_loss_takes_torchs_arguments_by_position_and_ours_by_name():
    with pytest.warns(UserWarning, match="deprecated"):
        ours, torchs = (
            kind(None, False, 3, None, "mean", 0.1) for kind in (fastlm.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)
        )
    assert (ours.reduction, ours.ignore_index, ours.label_smoothing) == ("sum", 3, 0.1)
    assert (torchs.reduction, torchs.ignore_index, torchs.label_smoothing) == ("sum", 3, 0.1)
    x = torch.randn(5, 7)
    options = {"z_loss": 0.1, "softcap": 2.0}
    assert torch.equal(fastlm.nn.CrossEntropyLoss(**options)(x, TARGET), F.cross_entropy(x, TARGET, **options))
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    fastlm.nn.CrossEntropyLoss(inplace_backward=True)(logits, TARGET).backward()
    assert torch.equal(logits, leaf.grad)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [(), (3,)])
@pytest.mark.parametrize("options", LOSSES)
def test_linear_cross_entropy_loss_is_torchs(options, out_features, bias, backend):
    modules = []
    for kind in (fastlm.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
        torch.manual_seed(0)
        modules.append(kind(6, 7, out_features=out_features, bias=bias, **options))
    ours, torchs = modules
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), torchs.state_dict().values()))
    x, target = torch.randn(5, 6), TARGET if not out_features else TARGET[:, None].expand(5, 3)

    def answers(module, x):
        x = x.clone().requires_grad_()
        loss = module(x, target)
        return [loss, *torch.autograd.grad(loss.sum(), [x, *module.parameters()])]

    with fastlm.use_backend(backend):
        if not serves_here(F.linear_cross_entropy, x, ours.linear.weight, TARGET):
            return
        results = answers(ours, x)
    near = answers(torchs, x)
    for our, close, true in zip(results, near, answers(torchs.double(), x.double()), strict=True):
        assert_within_rule(our, close, true)


def test_linear_cross_entropy_loss_takes_what_torchs_lacks_and_refuses_a_wrong_weight():
    loss = fastlm.nn.LinearCrossEntropyLoss(6, 7, z_loss=0.1, softcap=2.0, recompute=True)
    x = torch.randn(5, 6)
    expected = F.linear_cross_entropy(x, loss.linear.weight, TARGET, z_loss=0.1, softcap=2.0)
    assert torch.equal(loss(x, TARGET), expected)
    assert "in_features=6, num_classes=7" in repr(loss)
    with pytest.raises(RuntimeError, match=r"LinearCrossEntropyLoss: weight must have shape \(7,\)"):
        fastlm.nn.LinearCrossEntropyLoss(6, 7, weight=torch.ones(6))
