"""The transformer's modules beside torch.nn's: every argument, mask and mode, outputs and gradients, what users do to
them, and what must not work."""

import contextlib
import copy
import dataclasses
import inspect
import io
import pickle
import warnings

import pytest
import torch
from cases import serves_here
from errors import assert_within_rule
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


def compare(modules, inputs, masks=None, *, backend="auto", **how):
    """Asserts that ours is as near to float64 as the error rule asks, and gives what torch gives where that is None."""
    ours, torchs, exact = modules
    masks = masks or {}
    with fastlm.use_backend(backend):
        found = answers(ours, inputs, masks, **how)
    near, true = answers(torchs, inputs, masks, **how), answers(exact, inputs, masks, dtype=torch.float64, **how)
    assert list(found) == list(near)
    for name, expected in near.items():
        if expected is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            assert_within_rule(found[name], expected, true[name], name)
    return found


def compare_inference(modules, inputs, masks=None, *, backend="auto", mode=torch.no_grad, only=None):
    """The same of the outputs alone, after eval(), where torch takes its fast path if it has one for the call."""
    masks, results = masks or {}, []
    for module, dtype, name in zip(modules, (None, None, torch.float64), (backend, "auto", "auto"), strict=True):
        memo = {}
        args = [memo.setdefault(id(x), x if dtype is None else x.to(dtype)) for x in inputs]
        options = {
            key: x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x
            for key, x in masks.items()
        }
        with fastlm.use_backend(name), mode():
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
    compare(attention(), q_k_v(who), masks | WEIGHTS[weights])


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
        compare(attention(**options), inputs, masks)
        compare_inference(attention(**options), inputs, masks)


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
    found = compare(modules, inputs, masks | WEIGHTS[weights])
    compare_inference(modules, inputs, masks | WEIGHTS[weights])
    assert found["output 0"].shape == inputs[0].shape


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
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
    compare(modules, q_k_v(who), masks | WEIGHTS[weights])
    if who != "self":  # torch's fast path takes the mask, whatever the hint
        compare_inference(modules, q_k_v(who), masks | WEIGHTS[weights])


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
    for who in WHO:
        compare(attention(), q_k_v(who), WEIGHTS[weights], wanted=set(wanted))
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


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", ["none", "both bool"])
def test_compiled_attention_is_within_the_error_rule(mask, weights):
    torch._dynamo.reset()
    ours, torchs, exact = attention()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    masks = MASKS[mask](T, S, H, torch.float32) | WEIGHTS[weights]
    compare((compiled, torchs, exact), q_k_v(), masks)
    compare_inference((compiled, torchs, exact), q_k_v("self"), WEIGHTS[weights])
    torch._dynamo.reset()
