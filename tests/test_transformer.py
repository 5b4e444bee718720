"""The transformer's modules beside torch.nn's: every argument, mask and mode, outputs and gradients, what users do to
them, and what must not work."""

import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
from cases import serves_here
from errors import allowed_error, assert_within_rule
from hostile import LAYOUTS, contiguous
from torch import Tensor

import fastlm
import fastlm.functional as F

BACKENDS = ["auto", "reference", "cpu,native"]
SLOW_BACKENDS = ["triton", "emulator"]
B, T, S, E, H = 3, 5, 7, 12, 2  # batch, queries, keys, features, heads
LAYER = (E, H, 20, 0.0)  # d_model, nhead, dim_feedforward, dropout
SMALL = {
    "d_model": E,
    "nhead": H,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 20,
    "dropout": 0,
}
CASES = [
    pytest.param("Linear", (6, 5), {}, id="Linear"),
    pytest.param("Linear", (6, 5), {"bias": False}, id="Linear without bias"),
    pytest.param("MultiheadAttention", (E, H), {}, id="MultiheadAttention"),
    pytest.param("MultiheadAttention", (E, 3, 0.5, False, True, True, 6, 4, True), {}, id="MultiheadAttention, all"),
    pytest.param("TransformerEncoderLayer", (E, H), {}, id="TransformerEncoderLayer"),
    pytest.param(
        "TransformerEncoderLayer",
        (E, H, 20, 0.5, "gelu", 1e-3, True, True, False),
        {},
        id="TransformerEncoderLayer, all",
    ),
    pytest.param("TransformerDecoderLayer", (E, H), {}, id="TransformerDecoderLayer"),
    pytest.param(
        "TransformerDecoderLayer",
        (E, H, 20, 0.5, "gelu", 1e-3, True, True, False),
        {},
        id="TransformerDecoderLayer, all",
    ),
    pytest.param("Transformer", (E, H, 2, 1, 20), {}, id="Transformer"),
    pytest.param(
        "Transformer",
        (E, H, 1, 2, 20, 0.5, torch.tanh, None, None, 1e-3, True, True, False),
        {},
        id="Transformer, all",
    ),
]
NAMES = [
    "Linear",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
]

# torch warns that a stack of layers does not use nested tensors, and of masks of two dtypes; both are meant here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def made(nn, name, *args, seed=0, **options):
    """A module of `nn` from a seed. A stack is made of its layer, which is named by the arguments."""
    torch.manual_seed(seed)
    return getattr(nn, name)(*args, **options)


def stack(nn, kind="Encoder", layers=2, norm=True, seed=0, **options):
    """A TransformerEncoder or TransformerDecoder; `options` are the layer's, but for the encoder's own two."""
    own = {name: options.pop(name) for name in ("enable_nested_tensor", "mask_check") if name in options}
    layer = made(nn, f"Transformer{kind}Layer", *LAYER, seed=seed, **options)
    return getattr(nn, f"Transformer{kind}")(layer, layers, nn.LayerNorm(E) if norm else None, **own)


def three(make, dtype=torch.float32):
    """Ours, torch's and torch's in float64: `make(nn)` of each with the same parameters, none of them a constant."""
    ours, torchs = make(fastlm.nn), make(torch.nn)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in torchs.parameters():
            if parameter.dim() < 2 or parameter.shape[0] == 1:  # biases, norms, bias_k: zeros and ones
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    torchs.to(dtype)
    ours.to(dtype).load_state_dict(torchs.state_dict())
    exact = make(torch.nn).double()
    exact.load_state_dict(torchs.state_dict())
    for module in (ours, exact):
        module.train(torchs.training)
    return ours, torchs, exact


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def upstream_of(y, layout=contiguous):
    """An upstream gradient that is the same in every dtype, in a layout."""
    g = normal(*y.shape, seed=7, dtype=torch.bfloat16).to(y.dtype)
    return layout(g) if g.numel() else g


def answers(module, inputs, masks, *, dtype=None, wanted=None, layout=contiguous, mask_grad=False, only=None):
    """What the module gives, and the gradients of its inputs and parameters, by name.

    Args:
        inputs: by position; the same tensor twice stays the same tensor.
        masks: by name, with everything else that is.
        dtype: of floating point inputs, instead of their own.
        wanted: names of what requires a gradient, "input 0" and names of parameters; None is everything.
        layout: of the upstream gradients.
        mask_grad: whether floating point masks require a gradient too.
        only: bool, (batch, queries): the positions of the first output that count.
    """
    leaves = {}

    def leaf(x, name):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if id(x) not in leaves:
            taken = x.detach().to(dtype or x.dtype)
            grad = mask_grad if name in masks else wanted is None or name in wanted
            leaves[id(x)] = (name, taken.requires_grad_(grad))
        return leaves[id(x)][1]

    args = [leaf(x, f"input {n}") for n, x in enumerate(inputs)]
    options = {name: leaf(x, name) for name, x in masks.items()}
    module.zero_grad()
    parameters = {name.removeprefix("_orig_mod."): parameter for name, parameter in module.named_parameters()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(wanted is None or name in wanted)
    outputs = module(*args, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {n}": y for n, y in enumerate(outputs)}
    if only is not None:
        found["output 0"] = found["output 0"][only]
    differentiable = [y for y in found.values() if y is not None and y.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [upstream_of(y, layout) for y in differentiable])
    found |= {f"gradient of {name}": x.grad for name, x in leaves.values()}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in parameters.items()}
    return found


def compare(modules, inputs, masks=None, *, backend="auto", deep=False, **how):
    """Asserts that ours is as near to float64 as the error rule asks, and gives nothing where torch gives nothing.

    `deep`: through many layers torch's error of one small gradient may be next to none by chance. There, of the
    gradients, torch's largest error relative to the scale stands for all.
    """
    ours, torchs, exact = modules
    masks = masks or {}
    with fastlm.use_backend(backend):
        found = answers(ours, inputs, masks, **how)
    near, true = answers(torchs, inputs, masks, **how), answers(exact, inputs, masks, dtype=torch.float64, **how)
    assert list(found) == list(near)
    gradients = [name for name in near if "gradient" in name and near[name] is not None]
    scale = {name: true[name].abs().max().item() for name in gradients if true[name].numel()}
    worst = max([allowed_error(near[name], true[name]) / size for name, size in scale.items() if size], default=0)
    for name, expected in near.items():
        if expected is None:
            assert found[name] is None, name
            continue
        assert found[name] is not None, name
        if deep and name in gradients:
            assert found[name].dtype == expected.dtype, name
            torch.testing.assert_close(
                found[name].double(),
                true[name],
                rtol=0,
                atol=worst * scale[name],
                msg=lambda m, name=name: f"{name}: {m}",
            )
        else:
            assert_within_rule(found[name], expected, true[name], name)
    return found


@contextlib.contextmanager
def fast_path(enabled):
    """torch's path for inference; it takes additive masks for bool ones and every GELU for the exact one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def compare_inference(modules, inputs, masks=None, *, backend="auto", mode=torch.no_grad, only=None):
    """The same of the outputs alone, after eval(), where torch takes its fast path if it has one for the call."""
    masks, results = masks or {}, []
    additive_mask = any(isinstance(x, Tensor) and x.is_floating_point() for x in masks.values())
    ways = ((None, backend, True), (None, "auto", not additive_mask), (torch.float64, "auto", False))
    for module, (dtype, name, fast) in zip(modules, ways, strict=True):
        memo = {}
        args = [memo.setdefault(id(x), x if dtype is None else x.to(dtype)) for x in inputs]
        options = {
            key: x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x
            for key, x in masks.items()
        }
        with fastlm.use_backend(name), mode(), fast_path(fast):
            y = module.eval()(*args, **options)
        y = y if isinstance(y, tuple) else (y,)
        results.append([y[0] if only is None else y[0][only], *y[1:]])
    for found, near, true in zip(*results, strict=True):
        assert (found is None) == (near is None)
        if near is not None:
            assert_within_rule(found, near, true)


# Masks: key 0 is seen by every query, so that torch's answer is a number.


def some(*shape, seed=2):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[..., 0] = False
    return mask


def additive(mask, dtype):
    """Random numbers, and -inf where the mask is True."""
    return normal(*mask.shape, seed=3).masked_fill(mask, -torch.inf).to(dtype)


def padded(keys, lengths=(7, 4, 1)):
    return torch.arange(keys) >= torch.tensor(lengths)[:, None]


MASKS = {
    "none": lambda t, s, h, d: {},
    "bool 2D": lambda t, s, h, d: {"attn_mask": some(t, s)},
    "bool 3D": lambda t, s, h, d: {"attn_mask": some(B * h, t, s)},
    "float 2D": lambda t, s, h, d: {"attn_mask": normal(t, s, seed=4, dtype=d)},
    "float 3D": lambda t, s, h, d: {"attn_mask": normal(B * h, t, s, seed=4, dtype=d)},
    "float 2D with -inf": lambda t, s, h, d: {"attn_mask": additive(some(t, s), d)},
    "float 3D with -inf": lambda t, s, h, d: {"attn_mask": additive(some(B * h, t, s), d)},
    "causal": lambda t, s, h, d: {"attn_mask": torch.ones(t, s, dtype=torch.bool).triu(1)},
    "bool padding": lambda t, s, h, d: {"key_padding_mask": padded(s)},
    "float padding": lambda t, s, h, d: {"key_padding_mask": additive(padded(s), d)},
    "padding on the left": lambda t, s, h, d: {"key_padding_mask": padded(s).flip(1)},
    "nothing is masked": lambda t, s, h, d: {
        "attn_mask": torch.zeros(t, s, dtype=torch.bool),
        "key_padding_mask": torch.zeros(B, s, dtype=torch.bool),
    },
    "both bool": lambda t, s, h, d: {"attn_mask": some(t, s), "key_padding_mask": padded(s)},
    "both bool, 3D": lambda t, s, h, d: {"attn_mask": some(B * h, t, s), "key_padding_mask": padded(s)},
    "both float": lambda t, s, h, d: {
        "attn_mask": additive(some(t, s), d),
        "key_padding_mask": additive(padded(s), d),
    },
    "bool and float": lambda t, s, h, d: {"attn_mask": some(t, s), "key_padding_mask": additive(padded(s), d)},
    "float and bool": lambda t, s, h, d: {"attn_mask": additive(some(t, s), d), "key_padding_mask": padded(s)},
}
WEIGHTS = {
    "no weights": {"need_weights": False},
    "mean weights": {},
    "weights per head": {"average_attn_weights": False},
}


def by(weights):
    """The backends to try: where the weights are not needed, "auto" may find torch's own forward no slower."""
    return BACKENDS if weights == "no weights" else ["auto"]


WHO = ["self", "key is value", "all different"]


def q_k_v(who="all different", dtype=torch.float32, batch_first=True, kdim=E, vdim=E, t=T, s=S, b=B, embed=E):
    """Query, key and value of self-attention (t keys) or of two sequences."""
    swap = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1).contiguous())
    q = swap(normal(b, t, embed, seed=10, dtype=dtype))
    k = swap(normal(b, s, kdim, seed=11, dtype=dtype))
    if who == "self":
        return q, q, q
    return (q, k, k) if who == "key is value" else (q, k, swap(normal(b, s, vdim, seed=12, dtype=dtype)))


def attention(dtype=torch.float32, embed=E, heads=H, **options):
    options = {"batch_first": True} | options
    return three(lambda nn: made(nn, "MultiheadAttention", embed, heads, **options), dtype)


# What a module is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_those_of_torch(name, method):
    ours, torchs = (inspect.signature(getattr(getattr(nn, name), method)) for nn in (fastlm.nn, torch.nn))

    def shape(signature):
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert shape(ours) == shape(torchs)


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_are_subclasses_with_torchs_names(name):
    ours = getattr(fastlm.nn, name)
    assert issubclass(ours, getattr(torch.nn, name))
    assert ours.__name__ == name
    assert ours.__module__.startswith("fastlm")


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_arguments_by_position_and_by_name_make_the_same_module_as_torchs(name, args, options):
    names = list(inspect.signature(getattr(torch.nn, name)).parameters)
    by_name = dict(zip(names, args, strict=False)) | options
    theirs = made(torch.nn, name, *args, **options)
    for ours in (made(fastlm.nn, name, *args, **options), made(fastlm.nn, name, **by_name)):
        assert type(ours) is getattr(fastlm.nn, name)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)  # the same seed
        assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
        for (path, one), two in zip(ours.named_modules(), theirs.modules(), strict=True):
            assert isinstance(one, type(two)), path
            for key in ("dropout", "eps", "batch_first", "norm_first", "num_heads", "head_dim", "p", "kdim", "vdim"):
                if not isinstance(getattr(two, key, None), torch.nn.Module | None):
                    assert getattr(one, key) == getattr(two, key), (path, key)


def test_making_a_module_leaves_the_generator_where_torchs_leaves_it():
    states = []
    for nn in (fastlm.nn, torch.nn):
        made(nn, "Transformer", **SMALL)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_stacks_are_those_of_torch(kind):
    ours, torchs = stack(fastlm.nn, kind), stack(torch.nn, kind)
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert all(map(torch.equal, ours.parameters(), torchs.parameters()))
    assert all(type(layer) is getattr(fastlm.nn, f"Transformer{kind}Layer") for layer in ours.layers)
    assert len({id(p) for p in ours.parameters()}) == len(list(torchs.parameters()))  # no layer shares another's


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_a_state_dict_loads_both_ways(name, args, options):
    for to, source in ((fastlm.nn, torch.nn), (torch.nn, fastlm.nn)):
        target, other = made(to, name, *args, **options), made(source, name, *args, seed=1, **options)
        result = target.load_state_dict(other.state_dict(), strict=True)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert all(map(torch.equal, target.parameters(), other.parameters()))


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_copies_pickles_and_saved_modules_are_the_module(name, args, options):
    module = made(fastlm.nn, name, *args, **options).eval()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    twins = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False))
    two_sequences = (normal(B, T, E), normal(B, S, E))
    inputs = {
        "Linear": (normal(2, 6),),
        "MultiheadAttention": q_k_v(kdim=getattr(module, "kdim", E), vdim=getattr(module, "vdim", E)),
        "TransformerEncoderLayer": two_sequences[:1],
    }.get(name, two_sequences)
    if name != "Linear" and not next(m.batch_first for m in module.modules() if hasattr(m, "batch_first")):
        inputs = [x.transpose(0, 1) for x in inputs]
    for twin in twins:
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert all(one is not two for one, two in zip(twin.parameters(), module.parameters(), strict=True))
        for one, two in zip(twin(*inputs), module(*inputs), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(("name", "args", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_device_and_dtype_are_those_asked_for(name, args, options, dtype):
    ours, torchs = (made(nn, name, *args, **options, dtype=dtype) for nn in (fastlm.nn, torch.nn))
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert all(map(torch.equal, ours.parameters(), torchs.parameters()))
    module = made(fastlm.nn, name, *args, **options, device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", dtype)}
    with torch.device("meta"):
        assert {p.device.type for p in made(fastlm.nn, name, *args, **options).parameters()} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
def test_meta_tensors_flow_through_a_transformer(training):
    module = made(fastlm.nn, "Transformer", **SMALL, batch_first=True, device="meta").train(training)
    y = module(torch.empty(B, S, E, device="meta"), torch.empty(B, T, E, device="meta"))
    assert (y.shape, y.device.type) == ((B, T, E), "meta")


def test_a_parameter_is_made_anew_by_reset_parameters_as_torchs_is():
    for name, args in (("Linear", (6, 5)), ("MultiheadAttention", (E, H))):
        ours, torchs = made(fastlm.nn, name, *args), made(torch.nn, name, *args)
        for module in (ours, torchs):
            torch.manual_seed(3)
            (module.reset_parameters if name == "Linear" else module._reset_parameters)()
        assert all(map(torch.equal, ours.parameters(), torchs.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6), (50, 6)])
def test_linear_is_within_the_error_rule(shape, bias, dtype, backend):
    modules = three(lambda nn: made(nn, "Linear", 6, 5, bias=bias), dtype)
    compare(modules, [normal(*shape, dtype=dtype)], backend=backend)


def test_nested_tensors_through_a_linear_layer_and_norms_give_what_torch_gives():
    x = torch.nested.nested_tensor([normal(n, 6) for n in (2, 4)])
    for name, args in (("Linear", (6, 5)), ("LayerNorm", (6,))):
        ours, torchs, exact = three(lambda nn, name=name, args=args: made(nn, name, *args))
        found, near, true = (y.unbind() for y in (ours(x), torchs(x), exact(x.double())))
        for one, two, exactly in zip(found, near, true, strict=True):
            assert_within_rule(one, two, exactly)


@pytest.mark.parametrize("name", ["Linear", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_forward_runs_the_backend_that_is_asked_for(name):
    module = made(fastlm.nn, name, *((E, E) if name == "Linear" else (E, H)))
    inputs = [normal(T, B, E)] * {"Linear": 1, "MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(name, 1)
    with fastlm.use_backend("cuda"), pytest.raises(fastlm.BackendError, match="no backend of 'cuda'"):
        module(*inputs)


@pytest.mark.parametrize(
    "ops", [["scaled_dot_product_attention", "varlen_attention"], ["layer_norm", "add_layer_norm"], ["linear"]], ids=str
)
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_a_layer_calls_every_op(name, ops):
    """One that is broken must be missed."""

    def broken(*args):
        raise ZeroDivisionError

    layer, inputs = made(fastlm.nn, name, *LAYER), [normal(T, B, E)] * (2 if "Decoder" in name else 1)
    with fastlm.use_backend("reference"):
        layer(*inputs)
        for op in (fastlm.ops.registry.OPS[op] for op in ops):
            op.register(dataclasses.replace(op.backends["reference"], fwd=broken))
        with pytest.raises(ZeroDivisionError):
            layer(*inputs)


# MultiheadAttention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_with_every_mask_is_within_the_error_rule(mask, weights, who):
    masks = MASKS[mask](T, T if who == "self" else S, H, torch.float32)
    if who == "self" and "key_padding_mask" in masks:
        masks["key_padding_mask"] = masks["key_padding_mask"][:, :T]
        masks["key_padding_mask"][:, 0] = 0
    for backend in by(weights):
        compare(attention(), q_k_v(who), masks | WEIGHTS[weights], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", ["no weights", "mean weights"])
@pytest.mark.parametrize("mask", ["none", "float 3D with -inf", "causal", "bool padding", "both bool"])
def test_attention_in_every_dtype_is_within_the_error_rule(mask, weights, dtype, backend):
    compare(
        attention(dtype), q_k_v("key is value", dtype), MASKS[mask](T, S, H, dtype) | WEIGHTS[weights], backend=backend
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_by_default_is_within_the_error_rule_in_other_dtypes(mask, weights, dtype):
    compare(attention(dtype), q_k_v("all different", dtype), MASKS[mask](T, S, H, dtype) | WEIGHTS[weights])


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("mask", ["none", "bool 3D", "bool padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_gpu_kernels_is_within_the_error_rule(dtype, mask, backend):
    x = normal(1, 2, 5, 8, dtype=dtype)
    with fastlm.use_backend(backend):
        if not serves_here(F.scaled_dot_product_attention, x, x, x):
            return
    masks = MASKS[mask](T, S, H, dtype) | {"need_weights": False}
    inputs = q_k_v("key is value", dtype, kdim=16, vdim=16, embed=16)
    compare(attention(dtype, embed=16), inputs, masks, backend=f"{backend},native")


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 6},
    "vdim": {"vdim": 5},
    "kdim and vdim, no bias": {"kdim": 6, "vdim": 5, "bias": False},
    "everything": {"kdim": 6, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
    "one head": {"heads": 1},
    "odd heads": {"heads": 3},
    "as many heads as features": {"heads": 12},
    "odd head_dim": {"heads": 3, "embed": 15},
}


@pytest.mark.parametrize("weights", ["no weights", "weights per head"])
@pytest.mark.parametrize("mask", ["none", "float 3D with -inf", "bool padding", "both bool"])
@pytest.mark.parametrize("option", OPTIONS)
def test_attention_with_every_option_is_within_the_error_rule(option, mask, weights):
    options = OPTIONS[option]
    embed, heads = options.get("embed", E), options.get("heads", H)
    widths = {"kdim": options.get("kdim", embed), "vdim": options.get("vdim", embed)}
    for who in ["all different"] + ["self"] * (mask == "none" and set(widths.values()) == {embed}):
        inputs = q_k_v(who, embed=embed, **widths)
        masks = MASKS[mask](T, S, heads, torch.float32) | WEIGHTS[weights]
        for backend in by(weights):
            compare(attention(**options), inputs, masks, backend=backend)
            compare_inference(attention(**options), inputs, masks, backend=backend)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", ["none", "bool 2D", "float 3D", "bool padding", "both bool"])
@pytest.mark.parametrize("who", WHO)
def test_attention_takes_every_order_of_dimensions(who, mask, weights, batch_first, batched):
    keys = T if who == "self" else S
    masks = MASKS[mask](T, keys, H, torch.float32)
    if who == "self" and "key_padding_mask" in masks:
        masks["key_padding_mask"] = padded(keys, (5, 4, 1))
    inputs = q_k_v(who, batch_first=batch_first)
    if not batched:
        chosen = {id(x): x.select(0 if batch_first else 1, 1) for x in inputs}
        inputs = [chosen[id(x)] for x in inputs]
        if masks.get("attn_mask", some(1, 1)).dim() == 3:
            masks["attn_mask"] = masks["attn_mask"][:H]
        if "key_padding_mask" in masks:
            masks["key_padding_mask"] = masks["key_padding_mask"][1]
    modules = attention(batch_first=batch_first)
    for backend in by(weights):
        found = compare(modules, inputs, masks | WEIGHTS[weights], backend=backend)
        compare_inference(modules, inputs, masks | WEIGHTS[weights], backend=backend)
        assert found["output 0"].shape == inputs[0].shape
        for module in modules:
            module.train()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(torch.no_grad, torch.float32), (torch.inference_mode, torch.bfloat16), (torch.no_grad, torch.float64)],
)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_inference_is_within_the_error_rule(mask, weights, dtype, mode):
    masks = MASKS[mask](T, T, H, dtype)
    if "key_padding_mask" in masks:
        masks["key_padding_mask"][:, 0] = 0
    compare_inference(attention(dtype), q_k_v("self", dtype), masks | WEIGHTS[weights], mode=mode)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("mask", ["none", "bool 3D", "both bool"])
def test_attention_in_inference_is_within_the_error_rule_by_every_backend(mask, who, backend):
    masks = MASKS[mask](T, T, H, torch.float32)
    if "key_padding_mask" in masks:
        masks["key_padding_mask"][:, 0] = False
    compare_inference(attention(), q_k_v(who, s=T), masks | {"need_weights": False}, backend=backend)


def test_frozen_attention_gives_the_same_with_autograd_on():
    modules = attention()
    for module in modules:
        module.requires_grad_(False)
    compare_inference(modules, q_k_v("self"), mode=contextlib.nullcontext)
    compare(modules, q_k_v("self"), wanted={"input 0"})


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("padding", [True, False])
def test_the_causal_hint_gives_what_torch_gives(padding, who, weights):
    keys = T if who == "self" else S
    masks = {"attn_mask": torch.ones(T, keys, dtype=torch.bool).triu(1), "is_causal": True}
    if padding:
        masks["key_padding_mask"] = padded(keys, (5, 4, 1))
    modules = attention()
    for backend in by(weights):
        compare(modules, q_k_v(who), masks | WEIGHTS[weights], backend=backend)
    if who != "self":  # torch's fast path takes the mask, whatever the hint
        compare_inference(modules, q_k_v(who), masks | WEIGHTS[weights])


def test_the_causal_hint_leaves_the_keys_that_the_module_adds_where_torch_leaves_them():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}):
        for padding, weights in itertools.product(({}, {"key_padding_mask": padded(T, (5, 4, 1))}), WEIGHTS.values()):
            masks = {"attn_mask": torch.ones(T, T, dtype=torch.bool).triu(1), "is_causal": True}
            for backend in BACKENDS:
                compare(attention(**options), q_k_v("self"), masks | padding | weights, backend=backend)


def test_a_hint_that_no_mask_stands_for_is_refused_as_torch_refuses_it():
    for need_weights in (True, False):
        for module in (*attention(), *(m.eval() for m in attention())):
            with pytest.raises(RuntimeError, match="attn_mask"):
                module(*q_k_v("key is value"), is_causal=True, need_weights=need_weights)


def test_masks_of_two_dtypes_draw_torchs_warning():
    masks = MASKS["bool and float"](T, S, H, torch.float32)
    for module in attention()[:2]:
        with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
            module(*q_k_v(), **masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention()[0](*q_k_v(), **MASKS["both bool"](T, S, H, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["no weights", "mean weights"])
@pytest.mark.parametrize("mask", ["float 2D", "float 3D", "float 3D with -inf", "float padding", "both float"])
def test_a_mask_that_requires_a_gradient_gets_torchs(mask, weights, backend):
    found = compare(
        attention(),
        q_k_v(),
        MASKS[mask](T, S, H, torch.float32) | WEIGHTS[weights],
        mask_grad=True,
        backend=backend,
    )
    assert any("mask" in name and x is not None for name, x in found.items())


PARTS = ["input 0", "input 1", "input 2", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]


@pytest.mark.parametrize("weights", ["no weights", "mean weights"])
@pytest.mark.parametrize(
    "wanted", [*([name] for name in PARTS), ["input 0", "in_proj_bias"], ["input 1", "input 2"], PARTS[3:], []], ids=str
)
def test_gradients_on_any_subset_are_torchs(wanted, weights):
    for who, backend in itertools.product(WHO, by(weights)):
        compare(attention(), q_k_v(who), WEIGHTS[weights], wanted=set(wanted), backend=backend)
    compare_inference(attention(), q_k_v("self"), WEIGHTS[weights])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["no weights", "mean weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_accepts_every_layout_of_inputs_and_upstream_gradients(layout, weights, backend):
    change = LAYOUTS[layout]
    q, k, _ = q_k_v("key is value")
    k = change(k)
    for inputs in ([change(q)] * 3, [change(q), k, k]):
        compare(attention(), inputs, WEIGHTS[weights], layout=change, backend=backend)
        compare_inference(attention(), inputs, WEIGHTS[weights], backend=backend)


def test_masks_of_every_layout_are_taken():
    for change in LAYOUTS.values():
        attn_mask, padding = change(some(B * H, T, S)), change(padded(S))
        attn_mask, padding = (mask & (torch.arange(S) > 0) for mask in (attn_mask, padding))
        wide = torch.zeros(B * H, T, 2 * S, dtype=torch.bool)
        wide[..., ::2] = attn_mask
        for weights in WEIGHTS.values():
            masks = {"attn_mask": wide[..., ::2], "key_padding_mask": padding.mT.contiguous().mT}
            compare(attention(), q_k_v(), masks | weights)
        masks = {"attn_mask": normal(1, S).expand(T, S), "key_padding_mask": normal(1, S).expand(B, S)}
        compare(attention(), q_k_v(), masks | {"need_weights": False})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("b", "t", "s"), [(0, T, S), (B, 1, 1), (1, 1, S), (B, T, 1), (B, 0, S), (1, 65, 130)])
def test_attention_takes_sizes_of_nothing_one_and_more_than_a_tile(b, t, s, weights, backend):
    compare(attention(), q_k_v(b=b, t=t, s=s), WEIGHTS[weights], backend=backend)
    compare_inference(attention(), q_k_v(b=b, t=t, s=s), WEIGHTS[weights], backend=backend)
    compare(attention(), q_k_v("self", b=b, t=t), WEIGHTS[weights], backend=backend)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_keys_give_what_torch_gives(weights):
    compare(attention(), q_k_v(s=0), WEIGHTS[weights])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", ["padding", "float padding", "2D", "3D", "float 3D"])
def test_a_query_that_sees_no_key_gets_nothing_and_harms_nobody(mask, weights, backend):
    """Its attention is 0, so that the output is the bias of the projection; the others are what they are without it."""
    ours, torchs, exact = attention()
    q, k, v = q_k_v()
    hidden = torch.zeros(B, T, S, dtype=torch.bool)
    hidden[1] = True
    if mask in ("padding", "float padding"):
        masks = {"key_padding_mask": hidden[:, 0]}
    elif mask == "2D":
        hidden[:] = False
        hidden[:, 2] = True
        masks = {"attn_mask": hidden[0]}
    else:
        masks = {"attn_mask": hidden.repeat_interleave(H, 0)}
    if "float" in mask:
        masks = {name: torch.zeros(m.shape).masked_fill(m, -torch.inf) for name, m in masks.items()}
    blind = hidden.all(-1)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with fastlm.use_backend(backend):
        output, weight = ours(*inputs, **masks, **WEIGHTS[weights])
        output.backward(upstream_of(output))
    assert torch.equal(output[blind], ours.out_proj.bias.expand_as(output[blind]))
    if weight is not None:
        weight = weight if weight.dim() == 3 else weight.transpose(1, 2)
        assert not weight[blind].any()
        torch.testing.assert_close(weight[~blind].sum(-1), torch.ones_like(weight[~blind].sum(-1)))
    assert_within_rule(output[~blind], torchs(q, k, v)[0][~blind], exact(*(x.double() for x in (q, k, v)))[0][~blind])
    assert all(x.grad.isfinite().all() for x in (*inputs, *ours.parameters()))
    assert not inputs[0].grad[blind].any()
    assert inputs[0].grad[~blind].any(-1).all()
    if "padding" in mask or "3D" in mask:
        assert not inputs[1].grad[1].any()
        assert not inputs[2].grad[1].any()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_query_that_sees_no_key_gets_nothing_in_inference(weights):
    ours, padding = attention()[0].eval(), torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        output, weight = ours(*q_k_v("self"), key_padding_mask=padding, **WEIGHTS[weights])
    assert torch.equal(output[1], ours.out_proj.bias.expand_as(output[1]))
    assert weight is None or not weight[1].any()
    assert output.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_attention_drops_its_share_scales_the_rest_and_has_that_gradient(need_weights, backend):
    """One key whose value is ones: what comes out is 0 or 1 / (1 - p) per query and head."""
    p, heads, embed, b, t = 0.3, 4, 8, 64, 64
    module = made(fastlm.nn, "MultiheadAttention", embed, heads, p, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight[2 * embed :] = torch.eye(embed)
        module.out_proj.weight.copy_(torch.eye(embed))
    q, value = normal(b, t, embed), torch.ones(b, 1, embed, requires_grad=True)

    def run():
        with fastlm.use_backend(backend):
            return module(q, q[:, :1], value, need_weights=need_weights)[0]

    torch.manual_seed(5)
    one, two = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), one)  # the generator decides
    assert not torch.equal(one, two)
    kept = one.detach().view(b, t, heads, -1) > 0
    assert torch.equal(kept, kept[..., :1].expand_as(kept))  # a weight is dropped, not a feature of a value
    torch.testing.assert_close(one.detach(), kept.flatten(2).float() / (1 - p), rtol=1e-6, atol=0)
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / (b * t * heads)) ** 0.5)
    assert 0 < kept[..., 0].float().mean((0, 1)).min() < kept[..., 0].float().mean((0, 1)).max()  # not one mask for all
    one.sum().backward()
    torch.testing.assert_close(value.grad.sum(), one.detach().sum())  # linear in the value
    module.eval()
    assert torch.equal(run(), run())
    torch.testing.assert_close(run(), torch.ones(b, t, embed))


def test_weights_after_dropout_are_returned_as_torch_returns_them():
    ours, torchs, _ = attention(dropout=0.5)
    weights = []
    for module in (ours, torchs):
        torch.manual_seed(0)
        weights.append(module(*q_k_v(b=64), average_attn_weights=False)[1])
    clean = torchs.eval()(*q_k_v(b=64), average_attn_weights=False)[1]
    for weight in weights:
        dropped = weight == 0
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
        torch.testing.assert_close(weight, torch.where(dropped, 0, 2 * clean))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    module = attention(dropout=p)[0]
    x = normal(B, T, E).requires_grad_()
    for need_weights in (True, False):
        y, _ = module(x, x, x, need_weights=need_weights)
        if p:
            assert torch.equal(y, module.out_proj.bias.expand_as(y))
        y.sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("mask", ["none", "bool 3D", "float 2D", "bool padding"])
def test_attention_under_autocast_gives_torchs_dtypes_within_the_error_rule(mask, who, weights):
    keys = T if who == "self" else S
    masks = MASKS[mask](T, keys, H, torch.float32)
    if "key_padding_mask" in masks:
        masks["key_padding_mask"] = padded(keys, (5, 4, 1))
    ours, torchs, exact = attention()
    inputs = q_k_v(who)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, near = (answers(module, inputs, masks | WEIGHTS[weights]) for module in (ours, torchs))
    true = answers(exact, inputs, masks | WEIGHTS[weights], dtype=torch.float64)
    for name, expected in near.items():
        if expected is not None:
            assert_within_rule(found[name], expected, true[name], name)


@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_tensors_give_what_torch_gives(need_weights):
    ours, torchs, exact = (module.eval() for module in attention())
    x = torch.nested.nested_tensor([normal(n, E, seed=n) for n in (4, 2, 5)])
    with torch.no_grad():
        found, near, true = (
            m(y, y, y, need_weights=need_weights) for m, y in ((ours, x), (torchs, x), (exact, x.double()))
        )
    assert found[0].is_nested
    for one, two, three in zip(found[0].unbind(), near[0].unbind(), true[0].unbind(), strict=True):
        assert_within_rule(one, two, three)
    assert (found[1] is None) == (near[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], near[1])
    for module in (ours, torchs):
        with pytest.raises(AssertionError):
            module.train()(x, x, x)


def test_second_derivatives_are_those_of_torch():
    modules = attention(torch.float64)
    x, g = normal(B, T, E, dtype=torch.float64), normal(B, T, E, seed=9, dtype=torch.float64)
    results = []
    for module in modules[:2]:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(leaf, leaf, leaf)[0], leaf, g, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), [leaf, module.in_proj_weight])])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_functional_call_takes_other_parameters():
    ours, torchs, _ = attention()
    other = {name: p + 0.1 for name, p in torchs.named_parameters()}
    for weights in WEIGHTS.values():
        one, two = (torch.func.functional_call(m, other, q_k_v("key is value"), weights)[0] for m in (ours, torchs))
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("mask", "weights"), [("none", "no weights"), *(("both bool", w) for w in WEIGHTS)])
def test_compiled_attention_is_within_the_error_rule(mask, weights):
    torch._dynamo.reset()
    ours, torchs, exact = attention()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    masks = MASKS[mask](T, S, H, torch.float32) | WEIGHTS[weights]
    compare((compiled, torchs, exact), q_k_v(), masks)
    compare_inference((compiled, torchs, exact), q_k_v("self"), WEIGHTS[weights])
    torch._dynamo.reset()


# Layers -------------------------------------------------------------------------------------------------------------

LAYER_OPTIONS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "pre-norm, gelu": {"activation": "gelu", "norm_first": True},
    "function": {"activation": torch.tanh},
    "module": {"activation": torch.nn.GELU(approximate="tanh")},
    "module with parameters": {"activation": torch.nn.PReLU()},
    "no bias": {"bias": False},
    "pre-norm, no bias": {"bias": False, "norm_first": True},
    "sequence first": {"batch_first": False},
    "pre-norm, sequence first": {"batch_first": False, "norm_first": True},
    "eps": {"layer_norm_eps": 0.1},
    "pre-norm, eps": {"layer_norm_eps": 0.1, "norm_first": True},
    "odd heads": {"nhead": 3},
}
LAYER_MASKS = {
    "none": lambda t, d: {},
    "bool": lambda t, d: {"src_mask": some(t, t)},
    "float": lambda t, d: {"src_mask": additive(some(t, t), d)},
    "bool 3D": lambda t, d: {"src_mask": some(B * H, t, t)},
    "causal": lambda t, d: {"src_mask": torch.nn.Transformer.generate_square_subsequent_mask(t, dtype=d)},
    "causal with hint": lambda t, d: {
        "src_mask": torch.nn.Transformer.generate_square_subsequent_mask(t, dtype=d),
        "is_causal": True,
    },
    "bool causal with hint": lambda t, d: {"src_mask": torch.ones(t, t, dtype=torch.bool).triu(1), "is_causal": True},
    "padding": lambda t, d: {"src_key_padding_mask": padded(t, (5, 3, 1))},
    "float padding": lambda t, d: {"src_key_padding_mask": additive(padded(t, (5, 3, 1)), d)},
    "both": lambda t, d: {"src_mask": some(t, t), "src_key_padding_mask": padded(t, (5, 3, 1))},
    "bool and float": lambda t, d: {"src_mask": some(t, t), "src_key_padding_mask": additive(padded(t, (5, 3, 1)), d)},
    "causal with hint and padding": lambda t, d: {
        "src_mask": torch.ones(t, t, dtype=torch.bool).triu(1),
        "src_key_padding_mask": padded(t, (5, 3, 1)),
        "is_causal": True,
    },
}
KINDS = ["TransformerEncoderLayer", "TransformerDecoderLayer"]


def layer(kind="TransformerEncoderLayer", dtype=torch.float32, **options):
    options = dict(zip(("d_model", "nhead", "dim_feedforward", "dropout"), LAYER, strict=True)) | options
    options = {"batch_first": True} | options
    # A module with parameters would be shared by the three.
    return three(lambda nn: made(nn, kind, **copy.deepcopy(options)), dtype)


def sequences(kind="TransformerEncoderLayer", dtype=torch.float32, batch_first=True):
    """What a layer of the kind takes, the decoder's memory among it."""
    x, memory = normal(B, T, E, dtype=dtype), normal(B, S, E, seed=1, dtype=dtype)
    inputs = [x, memory] if "Decoder" in kind else [x]
    return inputs if batch_first else [y.transpose(0, 1) for y in inputs]


def decoder_masks(masks, dtype=torch.float32):
    """An encoder layer's masks as a decoder layer has them, and masks for its memory of the same kind."""
    names = {"src_mask": "tgt_mask", "src_key_padding_mask": "tgt_key_padding_mask", "is_causal": "tgt_is_causal"}
    found = {names[name]: mask for name, mask in masks.items()}
    if "src_mask" in masks:
        like, lead = masks["src_mask"], () if masks["src_mask"].dim() == 2 else (B * H,)
        hidden = some(*lead, T, S, seed=5)
        found["memory_mask"] = hidden if like.dtype == torch.bool else additive(hidden, dtype)
    if "src_key_padding_mask" in masks:
        hidden = padded(S, (7, 2, 4))
        like = masks["src_key_padding_mask"]
        found["memory_key_padding_mask"] = hidden if like.dtype == torch.bool else additive(hidden, dtype)
    return found


@pytest.mark.parametrize("mask", LAYER_MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_every_mask_is_within_the_error_rule(kind, norm_first, mask):
    modules, masks = layer(kind, norm_first=norm_first), LAYER_MASKS[mask](T, torch.float32)
    masks = decoder_masks(masks) if "Decoder" in kind else masks
    compare(modules, sequences(kind), masks)
    seen = ~padded(T, (5, 3, 1)) if "padding" in mask or mask == "both" else None
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        compare_inference(modules, sequences(kind), masks, mode=mode, only=seen)


@pytest.mark.parametrize(
    ("mask", "backend"),
    [("none", "auto"), ("none", "cpu,native"), ("causal with hint", "auto"), ("both", "auto"), ("both", "reference")],
)
@pytest.mark.parametrize("option", LAYER_OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_every_option_is_within_the_error_rule(kind, option, mask, backend):
    options, masks = LAYER_OPTIONS[option], LAYER_MASKS[mask](T, torch.float32)
    masks = decoder_masks(masks) if "Decoder" in kind else masks
    modules = layer(kind, **options)
    inputs = sequences(kind, batch_first=options.get("batch_first", True))
    compare(modules, inputs, masks, backend=backend)
    for module in modules:
        module.eval()
    compare(modules, inputs, masks, backend=backend)
    only = None
    if mask == "both":
        only = ~padded(T, (5, 3, 1)) if options.get("batch_first", True) else ~padded(T, (5, 3, 1)).T
    compare_inference(modules, inputs, masks, backend=backend, only=only)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", ["none", "float", "both"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_other_dtypes_is_within_the_error_rule(kind, norm_first, mask, dtype, backend):
    masks = LAYER_MASKS[mask](T, dtype)
    masks = decoder_masks(masks, dtype) if "Decoder" in kind else masks
    # ReLU's gradient jumps at 0, where roundings to bf16 decide.
    modules = layer(kind, dtype, norm_first=norm_first, activation="gelu")
    compare(modules, sequences(kind, dtype), masks, backend=backend)


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_by_gpu_kernels_is_within_the_error_rule(kind, norm_first, backend):
    x = normal(1, 2, T, 8, dtype=torch.bfloat16)
    with fastlm.use_backend(backend):
        if not serves_here(F.scaled_dot_product_attention, x, x, x):
            return
    modules = three(lambda nn: made(nn, kind, 16, 2, 24, 0.0, "gelu", norm_first=norm_first), torch.bfloat16)
    inputs = [normal(n, 2, 16, seed=n, dtype=torch.bfloat16) for n in (T, S)][: 1 + ("Decoder" in kind)]
    compare(modules, inputs, backend=f"{backend},native")


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_takes_sequences_without_a_batch(kind):
    inputs = [x[0] for x in sequences(kind)]
    for batch_first in (True, False):
        modules = layer(kind, batch_first=batch_first)
        name = "src_key_padding_mask" if "Encoder" in kind else "tgt_key_padding_mask"
        compare(modules, inputs, {name: padded(T, (3,))[0]})
        compare(modules, inputs)
        compare_inference(modules, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layer_accepts_every_layout_of_inputs_and_upstream_gradients(change, kind):
    for norm_first in (False, True):
        inputs = [change(x) for x in sequences(kind)]
        compare(layer(kind, norm_first=norm_first), inputs, layout=change)
        compare_inference(layer(kind, norm_first=norm_first), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [["input 0"], ["norm1.weight"], ["norm2.bias"], ["linear1.weight"], []], ids=str)
def test_gradients_of_a_layer_on_any_subset_are_torchs(wanted, kind):
    for norm_first in (False, True):
        compare(layer(kind, norm_first=norm_first), sequences(kind), wanted=set(wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_under_autocast_gives_torchs_dtypes_within_the_error_rule(norm_first, kind):
    for mask, dtype in (("none", torch.float32), ("both", torch.float32), ("none", torch.bfloat16)):
        masks = LAYER_MASKS[mask](T, torch.float32)
        masks = decoder_masks(masks) if "Decoder" in kind else masks
        ours, torchs, exact = layer(kind, norm_first=norm_first, activation="gelu")
        inputs = sequences(kind, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, near = (answers(module, inputs, masks) for module in (ours, torchs))
        true = answers(exact, inputs, masks, dtype=torch.float64)
        for name, expected in near.items():
            assert_within_rule(found[name], expected, true[name], name)


@pytest.mark.parametrize(("name", "norm_first"), [(KINDS[0], False), (KINDS[0], True), (KINDS[1], False)])
def test_a_realistic_layer_is_within_the_error_rule(norm_first, name):
    modules = three(lambda nn: made(nn, name, 512, 8, 768, 0.0, batch_first=True, norm_first=norm_first))
    inputs = [normal(2, 96, 512), normal(2, 64, 512, seed=1)][: 1 + ("Decoder" in name)]
    mask = {"src_key_padding_mask" if "Encoder" in name else "tgt_key_padding_mask": padded(96, (96, 50))}
    compare(modules, inputs, mask)
    compare_inference(modules, inputs, mask, only=~padded(96, (96, 50)))


def test_an_activation_that_is_not_known_is_refused_as_torch_refuses_it():
    for nn, kind in ((nn, kind) for nn in (fastlm.nn, torch.nn) for kind in KINDS):
        with pytest.raises(RuntimeError, match="relu/gelu"):
            made(nn, kind, E, H, activation="selu")


# Dropout: what is dropped shows in the norm after it as the smaller of two values.


def share_kept(y):
    """Of rows that hold two values, the share of the larger one."""
    return (y > (y.amax(-1, keepdim=True) + y.amin(-1, keepdim=True)) / 2).float().mean().item()


def silent(kind, p, **options):
    """A layer in training whose blocks add nothing to zeros."""
    module = made(fastlm.nn, kind, 32, 4, 32, p, batch_first=True, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                parameter.zero_()
    return module


SPEAKING = {
    "TransformerEncoderLayer": ["self_attn.out_proj", "linear2", "hidden"],
    "TransformerDecoderLayer": ["self_attn.out_proj", "multihead_attn.out_proj", "linear2", "hidden"],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("kind", "which"), [(kind, which) for kind in KINDS for which in SPEAKING[kind]])
def test_each_dropout_of_a_layer_drops_its_share(kind, which, norm_first, backend):
    p, module = 0.3, silent(kind, 0.3, norm_first=norm_first)
    with torch.no_grad():
        if which == "hidden":
            module.linear1.bias.fill_(1.0)
            module.linear2.weight.copy_(torch.eye(32))
        else:
            module.get_submodule(which).bias.fill_(1.0)
    inputs = [torch.zeros(16, 64, 32)] * (2 if "Decoder" in kind else 1)

    def run():
        with fastlm.use_backend(backend):
            return module(*inputs).detach()

    torch.manual_seed(3)
    one, two = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), one)
    assert not torch.equal(one, two)
    expected = (1 - p) ** (2 if which == "hidden" else 1)
    assert share_kept(one) == pytest.approx(expected, abs=5 * (expected * (1 - expected) / one.numel()) ** 0.5)
    module.eval()
    assert torch.equal(run(), run())
    assert (run().std(-1) < 1e-3).all()  # all alike


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_dropouts_of_a_layer_and_two_layers_do_not_share_a_mask(backend):
    p, module = 0.3, silent("TransformerEncoderLayer", 0.3, norm_first=True)
    with torch.no_grad():
        module.self_attn.out_proj.bias.fill_(1.0)
        module.linear2.bias.fill_(1.0)
    x = torch.zeros(16, 64, 32)
    with fastlm.use_backend(backend):
        y = (module(x) * (1 - p)).round()
        found = [(y == n).float().mean().item() for n in (0, 1, 2)]
        assert found == pytest.approx([p * p, 2 * p * (1 - p), (1 - p) ** 2], abs=0.02)
        twice = (module(module(x)) * (1 - p)).round()
    assert (twice == 4).float().mean().item() == pytest.approx((1 - p) ** 4, abs=0.02)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_gradient_through_a_layers_dropout_is_that_of_its_own_mask(norm_first):
    """Differences of the function itself, the generator set back each time."""
    module = made(fastlm.nn, "TransformerEncoderLayer", E, H, 20, 0.4, norm_first=norm_first, dtype=torch.float64)
    x = normal(T, 2, E, dtype=torch.float64).requires_grad_()

    def run(x):
        torch.manual_seed(11)
        return module(x).mul(torch.linspace(-1, 1, E, dtype=torch.float64)).sum()

    run(x).backward()
    direction = normal(T, 2, E, seed=5, dtype=torch.float64)
    with torch.no_grad():
        slope = (run(x + 1e-5 * direction) - run(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropout_that_the_user_changes_is_the_one_that_counts(kind):
    for module in layer(kind, dropout=0.5)[:2]:
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            elif name.endswith("attn"):
                part.dropout = 0.0
        assert torch.equal(module(*sequences(kind)), module(*sequences(kind)))
        module.dropout1.p = 0.5
        assert not torch.equal(module(*sequences(kind)), module(*sequences(kind)))
        module.dropout1.eval()
        assert torch.equal(module(*sequences(kind)), module(*sequences(kind)))


# What users do to a layer


def times_two(module, args, output):
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


def observed(module, names, what, inputs):
    """The calls of hooks on these parts while the module runs, in order, with what they saw."""
    calls, handles = [], []
    for name in names:
        part = module.get_submodule(name)

        def note(*args, name=name):
            tensors = [x for x in args[-1] if isinstance(x, Tensor)] if isinstance(args[-1], tuple) else [args[-1]]
            calls.append((name, [x.detach().clone() for x in tensors]))

        handles.append(getattr(part, f"register_{what}")(note))
    y = module(*inputs)
    if y.requires_grad:
        y.backward(upstream_of(y))
    for handle in handles:
        handle.remove()
    return calls, y


def parts_of(module):
    return [name for name, _ in module.named_modules() if name]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_every_part_see_what_they_see_in_torchs_layer(what, kind, norm_first, training):
    modules = layer(kind, norm_first=norm_first, activation=torch.nn.ReLU())
    inputs = [x.requires_grad_() for x in sequences(kind)]
    names = parts_of(modules[1])
    for chosen in (names, *([name] for name in names)):
        (ours, one), (torchs, two) = (observed(m.train(training), chosen, what, inputs) for m in modules[:2])
        assert [name for name, _ in ours] == [name for name, _ in torchs]
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        for (_, seen), (_, expected) in zip(ours, torchs, strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_in_inference_are_called_as_in_torchs_layer(kind):
    for norm_first in (False, True):
        modules = [m.eval() for m in layer(kind, norm_first=norm_first)]
        with torch.no_grad():
            for chosen in (parts_of(modules[1]), ["norm1"], ["linear1"], ["self_attn"], ["dropout1"]):
                ours, torchs = (observed(m, chosen, "forward_hook", sequences(kind))[0] for m in modules[:2])
                assert [name for name, _ in ours] == [name for name, _ in torchs]


@pytest.mark.parametrize("part", ["norm1", "norm2", "dropout1", "dropout2", "linear1", "self_attn"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_changes_an_output_changes_the_layers(kind, part):
    for norm_first in (False, True):
        modules = layer(kind, norm_first=norm_first)
        for module in modules:
            module.get_submodule(part).register_forward_hook(times_two)
        compare(modules, sequences(kind))
        compare_inference(modules, sequences(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_every_module_see_what_they_see_in_torchs_layer(kind):
    seen = []
    for module in layer(kind)[:2]:
        names = {id(part): name for name, part in module.named_modules()}
        calls = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, args, y, names=names, calls=calls: calls.append(names.get(id(m), "?"))
        )
        module(*sequences(kind))
        handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


class Half(torch.nn.Module):
    """A user's own part around one of the layer's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        y = self.inner(*args, **options)
        return (y[0] / 2, *y[1:]) if isinstance(y, tuple) else y / 2


def low_rank(linear):
    """A user's own linear layer, with more parameters than torch's."""
    adapted = torch.nn.Sequential(linear, torch.nn.Linear(linear.out_features, linear.out_features))
    return adapted.to(linear.weight.dtype)


CHANGES = {
    "norm1 is gone": ("norm1", lambda part: torch.nn.Identity()),
    "norm2 is gone": ("norm2", lambda part: torch.nn.Identity()),
    "norm1 is an RMSNorm": ("norm1", lambda part: torch.nn.RMSNorm(E)),
    "norm2 has another eps": ("norm2", lambda part: torch.nn.LayerNorm(E, eps=0.5)),
    "norm1 is over two dimensions": ("norm1", lambda part: torch.nn.LayerNorm((T, E))),
    "norm2 is not affine": ("norm2", lambda part: torch.nn.LayerNorm(E, elementwise_affine=False)),
    "norm1 is a user's": ("norm1", Half),
    "linear1 is a user's": ("linear1", Half),
    "linear2 is two": ("linear2", low_rank),
    "dropout1 is a user's": ("dropout1", Half),
    "dropout2 is gone": ("dropout2", lambda part: torch.nn.Identity()),
    "self_attn is a user's": ("self_attn", Half),
    "activation is a module": ("activation", lambda part: torch.nn.Tanh()),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_the_user_replaces_is_used(change, kind, norm_first):
    part, replaced = CHANGES[change]
    modules = layer(kind, norm_first=norm_first)
    for module in modules:
        torch.manual_seed(0)
        dtype = module.linear1.weight.dtype
        setattr(module, part, replaced(getattr(module, part)))
        module.to(dtype)
    compare(modules, sequences(kind))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["norm1", "norm2", "dropout1", "dropout2", "linear1", "self_attn"])
def test_a_forward_set_on_a_part_is_used(part, kind, norm_first):
    """As libraries do that move parts between devices."""
    modules = layer(kind, norm_first=norm_first)
    for module in modules:
        target = module.get_submodule(part)
        target.forward = lambda *args, old=target.forward, **options: times_two(None, None, old(*args, **options))
    compare(modules, sequences(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["linear1.weight", "norm1.weight", "self_attn.in_proj_weight", "norm2.bias"])
def test_a_parametrization_is_used(part, kind):
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return x * 2

    modules = layer(kind)
    for module in modules:
        path, name = part.rsplit(".", 1)
        torch.nn.utils.parametrize.register_parametrization(module.get_submodule(path), name, Doubled())
    compare(modules, sequences(kind))


def overriding(nn, kind, method):
    """A user's own layer, one of whose blocks does something else."""
    base = getattr(nn, kind)

    def block(self, *args, **options):
        return getattr(base, method)(self, *args, **options) * 0.5

    return type("Mine", (base,), {method: block})


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "method"), [*((k, m) for k in KINDS for m in ("_sa_block", "_ff_block")), (KINDS[1], "_mha_block")]
)
def test_a_subclass_that_overrides_a_block_keeps_working(kind, method, norm_first):
    options = {"batch_first": True, "norm_first": norm_first}
    compare(three(lambda nn: overriding(nn, kind, method)(*LAYER, **options)), sequences(kind))
    modules = layer(kind, norm_first=norm_first)  # and on one layer alone
    for module in modules:
        old = getattr(module, method)
        setattr(module, method, lambda *args, old=old, **given: old(*args, **given) * 0.5)
    compare(modules, sequences(kind))


@pytest.mark.parametrize("mask", LAYER_MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_users_attention_is_called_with_what_torchs_layer_calls_it_with(kind, mask):
    masks = LAYER_MASKS[mask](T, torch.float32)
    masks = decoder_masks(masks) if "Decoder" in kind else masks
    calls = []
    for module in layer(kind)[:2]:
        seen = []
        for name in ("self_attn", "multihead_attn"):
            if hasattr(module, name):
                part = getattr(module, name)
                part.register_forward_pre_hook(
                    lambda m, args, options, seen=seen: seen.append((args, options)), with_kwargs=True
                )
        module(*sequences(kind), **masks)
        calls.append(seen)
    assert len(calls[0]) == len(calls[1]) == (2 if "Decoder" in kind else 1)
    for (args, options), (expected, named) in zip(*calls, strict=True):
        assert len(args) == len(expected)
        assert args[1] is args[2]
        assert options.keys() == named.keys()
        for name, value in named.items():
            if isinstance(value, Tensor):
                assert options[name].dtype == value.dtype, name
                assert torch.equal(options[name], value), name
            else:
                assert options[name] == value, name


# Stacks -------------------------------------------------------------------------------------------------------------

PADDINGS = {
    "right": padded(T, (5, 3, 1)),
    "left": padded(T, (5, 3, 1)).flip(1),
    "in the middle": torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool),
    "nowhere": torch.zeros(B, T, dtype=torch.bool),
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("where", PADDINGS)
@pytest.mark.parametrize("floating", [False, True])
def test_an_encoder_with_padding_anywhere_is_within_the_error_rule(floating, where, nested, norm):
    padding = PADDINGS[where]
    masks = {"src_key_padding_mask": torch.zeros(B, T).masked_fill(padding, -torch.inf) if floating else padding}
    options = {"batch_first": True, "enable_nested_tensor": nested, "norm": norm}
    modules = three(lambda nn: stack(nn, **options))
    compare(modules, [normal(B, T, E)], masks, only=~padding, deep=True)
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        compare_inference(modules, [normal(B, T, E)], masks, only=~padding, mode=mode)


@pytest.mark.parametrize("mask_check", [True, False])
def test_mask_check_and_nested_tensors_do_not_change_what_an_encoder_gives(mask_check):
    padding = PADDINGS["right"]
    for batch_first, norm_first in ((True, False), (False, False), (True, True)):
        options = {"batch_first": batch_first, "norm_first": norm_first, "mask_check": mask_check}
        modules = three(lambda nn, options=options: stack(nn, **options))
        assert modules[0].use_nested_tensor == modules[1].use_nested_tensor
        x, only = (normal(B, T, E), ~padding) if batch_first else (normal(T, B, E), ~padding.T)
        compare_inference(modules, [x], {"src_key_padding_mask": padding}, only=only)
        compare(modules, [x], {"src_key_padding_mask": padding}, only=only, deep=True)


def test_an_encoder_that_cannot_use_nested_tensors_says_so_as_torchs_does():
    for nn in (fastlm.nn, torch.nn):
        with pytest.warns(UserWarning, match="batch_first was not True"):
            stack(nn, enable_nested_tensor=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stack(nn, batch_first=True)
            stack(nn, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [False, True])
def test_nested_tensors_through_an_encoder_give_what_torch_gives(norm_first):
    modules = [m.eval() for m in three(lambda nn: stack(nn, batch_first=True, norm_first=norm_first))]
    parts = [normal(n, E, seed=n) for n in (4, 2, 5)]
    with torch.no_grad():
        found, near, true = (
            module(torch.nested.nested_tensor([x.to(module.norm.weight.dtype) for x in parts])) for module in modules
        )
    assert found.is_nested
    for one, two, three_ in zip(found.unbind(), near.unbind(), true.unbind(), strict=True):
        assert_within_rule(one, two, three_)


def test_a_sequence_of_padding_alone_harms_nobody_in_an_encoder():
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    modules = three(lambda nn: stack(nn, batch_first=True))
    ours, torchs, exact = modules
    x, seen = normal(B, T, E), torch.tensor([0, 2])
    leaf = x.clone().requires_grad_()
    y = ours(leaf, src_key_padding_mask=padding)
    assert_within_rule(y[seen], torchs(x[seen]), exact(x[seen].double()))
    y[seen].backward(upstream_of(y[seen]))
    assert all(g.isfinite().all() for g in (leaf.grad, *(p.grad for p in ours.parameters())))
    assert y.isfinite().all()
    with torch.no_grad():
        y = ours.eval()(x, src_key_padding_mask=padding)
        assert_within_rule(y[seen], torchs.eval()(x[seen]), exact.eval()(x[seen].double()))
        assert y.isfinite().all()


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("mask", ["float causal", "bool causal", "another", "3D", "none"])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_stacks_find_out_that_a_mask_is_causal_as_torchs_do(kind, mask, is_causal):
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T)
    made_masks = {
        "float causal": causal,
        "bool causal": causal < 0,
        "another": additive(some(T, T), torch.float32),
        "3D": causal.expand(B * H, T, T),
        "none": None,
    }
    names = ("mask", "is_causal") if kind == "Encoder" else ("tgt_mask", "tgt_is_causal")
    hint = is_causal if mask not in ("another", "none") else is_causal and None  # else it would be wrong
    modules = three(lambda nn: stack(nn, kind, batch_first=True))
    inputs = [normal(B, T, E), normal(B, S, E, seed=1)][: 1 + (kind == "Decoder")]
    masks = dict(zip(names, (made_masks[mask], hint), strict=True))
    compare(modules, inputs, masks, deep=True)
    compare_inference(modules, inputs, masks)
    hints = []
    for module in modules[:2]:
        module.layers[1].register_forward_pre_hook(
            lambda m, args, options: hints.append(options[names[1].replace("mask", "src_mask")]), with_kwargs=True
        )
        module(*inputs, **masks)
    assert hints[0] == hints[1]


def everything(dtype=torch.float32):
    """Every mask of a Transformer."""
    return {
        "src_mask": additive(some(S, S), dtype),
        "tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(T, dtype=dtype),
        "memory_mask": additive(some(T, S, seed=6), dtype),
        "src_key_padding_mask": additive(padded(S), dtype),
        "tgt_key_padding_mask": additive(padded(T, (5, 2, 4)), dtype),
        "memory_key_padding_mask": additive(padded(S), dtype),
    }


def as_bool(masks):
    return {name: mask == -torch.inf for name, mask in masks.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["none", "bool", "float", "causal", "padding"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_with_all_masks_is_within_the_error_rule(batch_first, norm_first, form, backend):
    masks = {
        "none": {},
        "bool": as_bool(everything()),
        "float": everything(),
        "causal": {"tgt_mask": everything()["tgt_mask"], "tgt_is_causal": True},
        "padding": {name: mask for name, mask in as_bool(everything()).items() if "padding" in name},
    }[form]
    options = {"batch_first": batch_first, "norm_first": norm_first}
    modules = three(lambda nn: made(nn, "Transformer", **SMALL, **options))
    inputs = [normal(B, S, E), normal(B, T, E, seed=1)]
    inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    only = None
    if "tgt_key_padding_mask" in masks:
        only = ~padded(T, (5, 2, 4)) if batch_first else ~padded(T, (5, 2, 4)).T
    compare(modules, inputs, masks, backend=backend, deep=True)
    compare_inference(modules, inputs, masks, backend=backend, only=only)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_transformer_in_other_dtypes_is_within_the_error_rule(dtype):
    modules = three(lambda nn: made(nn, "Transformer", **SMALL, activation="gelu", batch_first=True), dtype)
    inputs = [normal(B, S, E, dtype=dtype), normal(B, T, E, seed=1, dtype=dtype)]
    for masks in ({}, everything(dtype), as_bool(everything())):
        compare(modules, inputs, masks, deep=True)


def test_a_transformer_takes_sequences_without_a_batch():
    modules = three(lambda nn: made(nn, "Transformer", **SMALL))
    masks = {name: mask if mask.shape[0] != B else mask[1] for name, mask in as_bool(everything()).items()}
    compare(modules, [normal(S, E), normal(T, E, seed=1)], masks, deep=True)


class Mean(torch.nn.Module):
    """A user's own encoder or decoder."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(E, E)

    def forward(self, x, memory=None, **masks):
        return self.linear(x) + (0 if memory is None else memory.mean(1, keepdim=True))


@pytest.mark.parametrize("custom", [["custom_encoder"], ["custom_decoder"], ["custom_encoder", "custom_decoder"]])
def test_a_users_own_encoder_and_decoder_are_used(custom):
    def make(nn):
        torch.manual_seed(0)
        parts = {name: Mean() for name in custom}
        return made(nn, "Transformer", **SMALL, batch_first=True, **parts)

    modules = three(make)
    assert repr(modules[0]) == repr(modules[1])
    compare(modules, [normal(B, S, E), normal(B, T, E, seed=1)], deep=True)


def test_stacks_of_torchs_layers_and_torchs_stacks_of_our_layers_work():
    for outer, inner in itertools.product((fastlm.nn, torch.nn), repeat=2):

        def make(nn, outer=outer, inner=inner):
            outer, inner = (torch.nn, torch.nn) if nn is torch.nn else (outer, inner)
            torch.manual_seed(0)
            one = inner.TransformerEncoderLayer(*LAYER, batch_first=True)
            return outer.TransformerEncoder(one, 2, outer.LayerNorm(E))

        modules = three(make)
        for where in ("right", "left"):
            masks = {"src_key_padding_mask": PADDINGS[where]}
            compare(modules, [normal(B, T, E)], masks, only=~PADDINGS[where], deep=True)
            compare_inference(modules, [normal(B, T, E)], masks, only=~PADDINGS[where])


def test_the_causal_mask_is_torchs():
    ours, torchs = (nn.Transformer.generate_square_subsequent_mask for nn in (fastlm.nn, torch.nn))
    assert torch.equal(ours(5), torchs(5))
    assert ours(3, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert ours(3, device="meta").device.type == "meta"
    assert torch.equal(made(fastlm.nn, "Transformer", **SMALL).generate_square_subsequent_mask(4), torchs(4))


# Training and compiling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_a_transformer_follows_torchs_curve(backend, norm_first):
    source, target = (torch.randint(0, 17, (6, n), generator=torch.Generator().manual_seed(n)) for n in (9, 8))
    padding = padded(9, (9, 4, 7, 5, 9, 6))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(7)
    curves = []
    for nn, name in ((fastlm.nn, backend), (torch.nn, "auto")):
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(17, 24), nn.Linear(24, 17)
        model = nn.Transformer(24, 4, 2, 2, 48, 0.0, batch_first=True, norm_first=norm_first)
        parameters = [p for module in (embed, model, head) for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, 3e-3)
        loss_of, curve = nn.CrossEntropyLoss(), []
        with fastlm.use_backend(name):
            for _ in range(30):
                y = model(
                    embed(source),
                    embed(target[:, :-1]),
                    tgt_mask=causal,
                    tgt_is_causal=True,
                    src_key_padding_mask=padding,
                    memory_key_padding_mask=padding,
                )
                loss = loss_of(head(y).flatten(0, 1), target[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < 0.6 * curves[0][0]  # it learns


@pytest.mark.parametrize(("kind", "norm_first"), [(KINDS[0], True), (KINDS[1], False)])
def test_a_compiled_layer_is_within_the_error_rule_and_trains_on_torchs_curve(kind, norm_first):
    torch._dynamo.reset()
    ours, torchs, exact = layer(kind, norm_first=norm_first)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    masks = LAYER_MASKS["both"](T, torch.float32)
    masks = decoder_masks(masks) if "Decoder" in kind else masks
    compare((compiled, torchs, exact), sequences(kind), masks)
    curves = []
    for module in (compiled, torchs):
        optimizer, curve = torch.optim.AdamW(module.parameters(), 1e-2), []
        for _ in range(30):
            loss = (module(*sequences(kind), **masks) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_transformer_gives_what_torch_gives(training):
    torch._dynamo.reset()
    ours, torchs, exact = three(lambda nn: made(nn, "Transformer", E, H, 1, 1, 20, 0.0, batch_first=True))
    modules = (torch.compile(ours, fullgraph=True, backend="aot_eager"), torchs, exact)
    inputs = [normal(B, S, E), normal(B, T, E, seed=1)]
    # torch looks at the values of a mask to see whether it is causal, which no graph can: say so
    masks = everything() | {"src_is_causal": False, "tgt_is_causal": False}
    if training:
        compare(modules, inputs, masks, deep=True)
    else:
        compare_inference(modules, inputs, masks, only=~padded(T, (5, 2, 4)))
    torch._dynamo.reset()


def test_exported_layers_give_what_they_gave():
    module = made(fastlm.nn, "TransformerEncoderLayer", *LAYER, batch_first=True).eval()
    x = normal(B, T, E)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


# Bad calls ----------------------------------------------------------------------------------------------------------


def q(*shape, **options):
    return normal(*(shape or (B, T, E)), **options)


ATTENTION_MISTAKES = {
    "embed_dim of the query": lambda m: m(q(B, T, E + 1), q(), q()),
    "embed_dim of self-attention": lambda m: m(*[q(B, T, E + 1)] * 3),
    "embed_dim of the key": lambda m: m(q(), q(B, S, E + 1), q(B, S, E)),
    "embed_dim of key and value": lambda m: m(q(), *[q(B, S, E - 2)] * 2),
    "lengths of key and value": lambda m: m(q(), q(B, S, E), q(B, S + 1, E)),
    "batch of key and value": lambda m: m(q(), q(B + 1, S, E), q(B + 1, S, E)),
    "batch of the value": lambda m: m(q(), q(B, S, E), q(B + 1, S, E)),
    "one dimension": lambda m: m(*[q(E)] * 3),
    "four dimensions": lambda m: m(*[q(1, B, T, E)] * 3),
    "batched query, other key": lambda m: m(q(), q(S, E), q(S, E)),
    "query without batch, other key": lambda m: m(q(T, E), q(), q()),
    "2D mask": lambda m: m(q(), q(), q(), attn_mask=some(T, T + 1)),
    "2D mask, no weights": lambda m: m(q(), q(), q(), attn_mask=some(T, T + 1), need_weights=False),
    "2D mask that would broadcast": lambda m: m(q(), q(), q(), attn_mask=some(1, T)),
    "3D mask": lambda m: m(q(), q(), q(), attn_mask=some(B, T, T)),
    "3D mask that would broadcast": lambda m: m(q(), q(), q(), attn_mask=some(1, T, T), need_weights=False),
    "1D mask": lambda m: m(q(), q(), q(), attn_mask=some(T)),
    "4D mask": lambda m: m(q(), q(), q(), attn_mask=some(B, H, T, T)),
    "4D mask without batch": lambda m: m(*[q(T, E)] * 3, attn_mask=some(B, H, T, T)),
    "3D mask without batch": lambda m: m(*[q(T, E)] * 3, attn_mask=some(H + 1, T, T)),
    "int mask": lambda m: m(q(), q(), q(), attn_mask=some(T, T).int()),
    "int padding": lambda m: m(q(), q(), q(), key_padding_mask=padded(T).long()),
    "length of the padding": lambda m: m(q(), q(), q(), key_padding_mask=padded(T + 1)),
    "length of the padding, no weights": lambda m: m(q(), q(), q(), key_padding_mask=padded(T + 1), need_weights=False),
    "batch of the padding": lambda m: m(q(), q(), q(), key_padding_mask=padded(T, (3, 2))),
    "padding that would broadcast": lambda m: m(q(), q(), q(), key_padding_mask=padded(T, (3,))),
    "padding turned": lambda m: m(q(), q(), q(), key_padding_mask=padded(T).T),
    "1D padding": lambda m: m(q(), q(), q(), key_padding_mask=padded(T)[0]),
    "2D padding without batch": lambda m: m(*[q(T, E)] * 3, key_padding_mask=padded(T)),
    "query is a list": lambda m: m(q().tolist(), q(), q()),
    "key is None": lambda m: m(q(), None, q()),
    "value is a number": lambda m: m(q(), q(), 3.0),
    "mask is a list": lambda m: m(q(), q(), q(), attn_mask=some(T, T).tolist()),
    "padding is a list": lambda m: m(q(), q(), q(), key_padding_mask=padded(T).tolist()),
    "int query": lambda m: m(*[torch.ones(B, T, E, dtype=torch.long)] * 3),
    "float64 in a float32 module": lambda m: m(*[q().double()] * 3),
    "bf16 in a float32 module": lambda m: m(*[q().bfloat16()] * 3),
    "key in another dtype": lambda m: m(q(), q().double(), q().double()),
    "value in another dtype": lambda m: m(q(), q(), q().double()),
    "hint without mask": lambda m: m(q(), q(), q(), is_causal=True),
    "meta key": lambda m: m(q(), q().to("meta"), q().to("meta")),
    "no value": lambda m: m(q(), q()),
    "an argument too many": lambda m: m(q(), q(), q(), causal=True),
}
LAYER_MISTAKES = {
    "embed_dim": lambda m, more: m(q(B, T, E + 1), *more),
    "one dimension": lambda m, more: m(q(E), *more),
    "four dimensions": lambda m, more: m(q(1, B, T, E), *more),
    "not a tensor": lambda m, more: m(q().tolist(), *more),
    "None": lambda m, more: m(None, *more),
    "int": lambda m, more: m(torch.ones(B, T, E, dtype=torch.long), *more),
    "float64": lambda m, more: m(q().double(), *more),
    "shape of the mask": lambda m, more: m(q(), *more, some(T + 1, T)),
    "shape of a 3D mask": lambda m, more: m(q(), *more, some(2, T, T)),
    "int mask": lambda m, more: m(q(), *more, some(T, T).int()),
    "mask is a list": lambda m, more: m(q(), *more, [[True] * T] * T),
    "an argument too many": lambda m, more: m(q(), *more, attn_mask=some(T, T)),
}
ENCODER_MISTAKES = {
    "shape of the padding": lambda m: m(q(), src_key_padding_mask=padded(T + 1)),
    "padding that would broadcast": lambda m: m(q(), src_key_padding_mask=padded(T, (4,))),
    "padding turned": lambda m: m(q(), src_key_padding_mask=padded(T).T),
    "int padding": lambda m: m(q(), src_key_padding_mask=padded(T).int()),
    "hint without mask": lambda m: m(q(), is_causal=True),
}
DECODER_MISTAKES = {
    "no memory": lambda m: m(q()),
    "memory is None": lambda m: m(q(), None),
    "embed_dim of the memory": lambda m: m(q(), q(B, S, E + 1)),
    "batch of the memory": lambda m: m(q(), q(B + 1, S, E)),
    "memory without batch": lambda m: m(q(), q(S, E)),
    "dtype of the memory": lambda m: m(q(), q(B, S, E).double()),
    "shape of the memory's mask": lambda m: m(q(), q(B, S, E), memory_mask=some(T, T)),
    "int mask for the memory": lambda m: m(q(), q(B, S, E), memory_mask=some(T, S).int()),
    "shape of the padding": lambda m: m(q(), q(B, S, E), tgt_key_padding_mask=padded(T + 1)),
    "shape of the memory's padding": lambda m: m(q(), q(B, S, E), memory_key_padding_mask=padded(T)),
    "hint without mask": lambda m: m(q(), q(B, S, E), tgt_is_causal=True),
    "hint without mask for the memory": lambda m: m(q(), q(B, S, E), memory_is_causal=True),
}
TRANSFORMER_MISTAKES = {
    "batches": lambda m: m(q(B, S, E), q(B + 1, T, E)),
    "features of the source": lambda m: m(q(B, S, E + 1), q()),
    "features of the target": lambda m: m(q(B, S, E), q(B, T, E - 1)),
    "only the source": lambda m: m(q(B, S, E)),
    "not a tensor": lambda m: m(q(B, S, E).tolist(), q()),
    "shape of the source's mask": lambda m: m(q(B, S, E), q(), src_mask=some(T, T)),
    "shape of the target's mask": lambda m: m(q(B, S, E), q(), tgt_mask=some(T, S)),
    "shape of the memory's mask": lambda m: m(q(B, S, E), q(), memory_mask=some(S, T)),
    "shape of the padding": lambda m: m(q(B, S, E), q(), src_key_padding_mask=padded(T)),
    "int mask": lambda m: m(q(B, S, E), q(), tgt_mask=some(T, T).int()),
    "int padding": lambda m: m(q(B, S, E), q(), src_key_padding_mask=padded(S).int()),
    "one with a batch, one without": lambda m: m(q(B, S, E), q(T, E)),
}
CONSTRUCTORS = {
    "heads that do not divide": lambda nn: nn.MultiheadAttention(12, 5),
    "no heads": lambda nn: nn.MultiheadAttention(12, 0),
    "no features": lambda nn: nn.MultiheadAttention(0, 2),
    "no arguments": lambda nn: nn.MultiheadAttention(),
    "an unknown argument": lambda nn: nn.MultiheadAttention(12, 2, heads=3),
    "an unknown dtype": lambda nn: nn.MultiheadAttention(12, 2, dtype="float32"),
    "heads of a layer": lambda nn: nn.TransformerEncoderLayer(12, 5),
    "dropout of a layer": lambda nn: nn.TransformerEncoderLayer(12, 2, dropout=1.5),
    "activation": lambda nn: nn.TransformerDecoderLayer(12, 2, activation="tanh"),
    "heads of a transformer": lambda nn: nn.Transformer(12, 5),
    "a number of layers that is none": lambda nn: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2), "2"),
    "linear with negative sizes": lambda nn: nn.Linear(-1, 2),
}


def raised(call):
    with pytest.raises(Exception) as caught:  # which one, the caller compares
        call()
    return caught.value


def assert_same_mistake(ours, torchs):
    found, expected = raised(ours), raised(torchs)
    assert isinstance(found, type(expected)), f"torch raises {expected!r}, ours {found!r}"
    assert str(found)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("training", "auto"), ("training", "reference"), ("eval", "cpu,native"), ("inference", "auto")],
)
@pytest.mark.parametrize("mistake", ATTENTION_MISTAKES)
def test_a_bad_call_of_attention_raises_what_torch_raises(mistake, mode, backend):
    ours, torchs, _ = attention()
    call = ATTENTION_MISTAKES[mistake]
    with fastlm.use_backend(backend), torch.no_grad() if mode == "inference" else contextlib.nullcontext():
        assert_same_mistake(
            lambda: call(ours.train(mode == "training")), lambda: call(torchs.train(mode == "training"))
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "mistake", dict.fromkeys([*LAYER_MISTAKES, *ENCODER_MISTAKES, *DECODER_MISTAKES, *TRANSFORMER_MISTAKES])
)
def test_a_bad_call_of_a_layer_raises_what_torch_raises(mistake, training):
    def both(make, call):
        assert_same_mistake(*((lambda nn=nn: call(make(nn).train(training))) for nn in (fastlm.nn, torch.nn)))

    def one(kind, norm_first=False):
        return lambda nn: made(nn, kind, *LAYER, batch_first=True, norm_first=norm_first)

    def some_layers(kind):
        return lambda nn: stack(nn, kind, batch_first=True)

    if mistake in LAYER_MISTAKES:
        for norm_first in (False, True):
            both(one(KINDS[0], norm_first), lambda m: LAYER_MISTAKES[mistake](m, []))
            both(one(KINDS[1], norm_first), lambda m: LAYER_MISTAKES[mistake](m, [q(B, S, E)]))
        both(some_layers("Encoder"), lambda m: LAYER_MISTAKES[mistake](m, []))
        both(some_layers("Decoder"), lambda m: LAYER_MISTAKES[mistake](m, [q(B, S, E)]))
    if mistake in ENCODER_MISTAKES:
        both(one(KINDS[0]), ENCODER_MISTAKES[mistake])
        both(some_layers("Encoder"), ENCODER_MISTAKES[mistake])
    if mistake in DECODER_MISTAKES:
        both(one(KINDS[1]), DECODER_MISTAKES[mistake])
        both(some_layers("Decoder"), DECODER_MISTAKES[mistake])
    if mistake in TRANSFORMER_MISTAKES:
        both(lambda nn: made(nn, "Transformer", **SMALL, batch_first=True), TRANSFORMER_MISTAKES[mistake])


@pytest.mark.parametrize("mistake", CONSTRUCTORS)
def test_a_bad_constructor_raises_what_torch_raises(mistake):
    assert_same_mistake(*((lambda nn=nn: CONSTRUCTORS[mistake](nn)) for nn in (fastlm.nn, torch.nn)))
