"""The GPT is GPT-2's function of its weights, sees no future and no padding, and comes back from disk unchanged."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
import torch
from torch.nn import functional as torch_F
from torch.utils.checkpoint import checkpoint

from fastlm.models import GPT, GPTConfig
from fastlm.models import pretrained as pretrained_module
from fastlm.ops.cross_entropy.op import LINEAR_CROSS_ENTROPY

SMALL = GPTConfig(vocab_size=61, max_seq_len=24, hidden_size=24, num_layers=2, num_heads=3)
POSITIONS = ("learned", "alibi", "sinusoidal")
VARIANTS = {
    "gpt2": SMALL,
    "bloom": dataclasses.replace(SMALL, position="alibi", embedding_norm=True, ffn_size=40),
    "alibi": dataclasses.replace(SMALL, position="alibi", num_heads=4),
    "sinusoidal": dataclasses.replace(SMALL, position="sinusoidal", activation="gelu", norm_eps=1e-3),
    "untied": dataclasses.replace(SMALL, tie_embeddings=False, activation="silu"),
    "relu": dataclasses.replace(SMALL, activation="relu", num_heads=1, num_layers=1),
}


def make(config: GPTConfig = SMALL, dtype: torch.dtype = torch.float64) -> GPT:
    """In evaluation mode, with every parameter away from its initial 0 or 1, so that each of them counts."""
    torch.manual_seed(1)
    model = GPT(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def ids(B: int = 3, T: int = 17, V: int = 61) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


def written_out(model: GPT, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits from the weights, in plain torch, one sequence, one head and one query at a time."""
    config, weights = model.config, model.state_dict()
    C, D = config.hidden_size, config.hidden_size // config.num_heads

    def affine(name, x):
        bias = weights.get(f"{name}.bias")
        return torch_F.linear(x, weights[f"{name}.weight"], bias)

    def norm(name, x):
        return torch_F.layer_norm(x, (C,), weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

    def slope(head):  # Press et al.: halfway between two powers of 2 where the heads are no power of 2
        n = 2 ** int(math.log2(config.num_heads))
        return 2 ** (-8 * (head + 1) / n) if head < n else 2 ** (-8 * (2 * (head - n) + 1) / (2 * n))

    activation = {
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "relu": lambda x: x.clamp(min=0),
        "silu": lambda x: x / (1 + torch.exp(-x)),
    }[config.activation]
    rows = []
    for sequence in input_ids.tolist():
        x = weights["token_embedding.weight"][sequence]
        if config.position == "learned":
            x = x + weights["position_embedding.weight"][: len(sequence)]
        if config.position == "sinusoidal":
            angle = [[t / 10000 ** (2 * (c // 2) / C) for c in range(C)] for t in range(len(sequence))]
            table = [[math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(row)] for row in angle]
            x = x * C**0.5 + torch.tensor(table, dtype=x.dtype)
        if config.embedding_norm:
            x = norm("embedding_norm", x)
        for i in range(config.num_layers):
            block = f"blocks.{i}"
            q, k, v = affine(f"{block}.attention.qkv", norm(f"{block}.attention_norm", x)).split(C, -1)
            y = torch.zeros_like(x)
            for head in range(config.num_heads):
                part = slice(head * D, (head + 1) * D)
                for t in range(len(sequence)):
                    scores = k[: t + 1, part] @ q[t, part] / D**0.5
                    if config.position == "alibi":
                        scores = scores - slope(head) * torch.arange(t, -1, -1)
                    y[t, part] = scores.softmax(0) @ v[: t + 1, part]
            x = x + affine(f"{block}.attention.projection", y)
            x = x + affine(f"{block}.ffn_down", activation(affine(f"{block}.ffn_up", norm(f"{block}.ffn_norm", x))))
        head_weight = weights["token_embedding.weight" if config.tie_embeddings else "head.weight"]
        rows.append(norm("final_norm", x) @ head_weight.T)
    return torch.stack(rows)


# --- the function


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_the_architecture_written_out(config):
    model = make(config)
    torch.testing.assert_close(model(ids()).logits, written_out(model, ids()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_tokens_that_come_later_do_not_change_earlier_logits(position):
    model = make(dataclasses.replace(SMALL, position=position))
    changed = ids()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    one, two = model(ids()).logits, model(changed).logits
    assert torch.equal(one[:, :9], two[:, :9])
    assert (one[:, 9:] != two[:, 9:]).any(-1).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_the_tokens_matters(position):
    model = make(dataclasses.replace(SMALL, position=position, num_layers=1))
    swapped = ids()[:, [1, 0, *range(2, 17)]]
    assert not torch.allclose(model(ids()).logits[:, -1], model(swapped).logits[:, -1])


@pytest.mark.parametrize("return_logits", [None, True])
def test_the_loss_is_the_cross_entropy_of_the_shifted_labels_in_float64(return_logits):
    model, labels = make(dtype=torch.float32), ids()
    labels[0, :5] = -100
    exact = torch_F.cross_entropy(model(ids()).logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    loss = model(ids(), labels=labels, return_logits=return_logits).loss
    assert loss.shape == ()
    assert abs(loss.item() - exact.item()) < 1e-5 * exact.item()


def test_loss_of_shifted_targets_is_that_of_labels():
    model = make()
    loss = model(ids()[:, :-1], shift_labels=ids()[:, 1:]).loss
    torch.testing.assert_close(loss, model(ids(), labels=ids()).loss, rtol=1e-12, atol=0)


def test_logits_are_formed_only_when_asked_for(monkeypatch):
    model, given = make(), []
    op = LINEAR_CROSS_ENTROPY
    monkeypatch.setattr(op, "choose", lambda inputs, choose=op.choose: given.append(inputs) or choose(inputs))
    assert model(ids(), labels=ids()).logits is None
    assert len(given) == 1, "the loss does not come from linear_cross_entropy"
    assert model(ids(), labels=ids(), return_logits=True).logits.shape == (3, 17, 61)
    assert model(ids()).logits.shape == (3, 17, 61)
    assert model(ids()).loss is None
    assert model(ids(), labels=ids(), return_logits=False).logits is None


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logit_and_no_gradient(position, side):
    model = make(dataclasses.replace(SMALL, position=position))
    lengths = (17, 11, 1)
    padded, mask = torch.full((3, 17), 60), torch.zeros(3, 17, dtype=torch.int64)
    for row, length in enumerate(lengths):
        part = slice(17 - length, 17) if side == "left" else slice(0, length)
        padded[row, part], mask[row, part] = ids()[row, :length], 1
    logits = model(padded, attention_mask=mask).logits
    first = (mask.cumsum(1) == 1) & mask.bool()  # of the real tokens: nothing real stands before it
    labels = padded.masked_fill((mask == 0) | first, -100)
    for row, length in enumerate(lengths):
        alone = model(ids()[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-9, atol=1e-9)
    model(padded, mask, labels=labels).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = [
        model(ids()[i : i + 1, :n], labels=ids()[i : i + 1, :n]).loss * (n - 1) for i, n in enumerate(lengths[:2])
    ]
    (sum(losses) / (16 + 10)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_tied_embeddings_are_one_parameter_and_untied_are_two():
    tied, untied = make(), make(VARIANTS["untied"])
    assert tied.head_weight is tied.token_embedding.weight
    assert sum(p.shape == (61, 24) for p in tied.parameters()) == 1
    assert sum(p.shape == (61, 24) for p in untied.parameters()) == 2
    before = untied(ids()).logits
    untied.head.weight.data.zero_()
    assert before.any()
    assert not untied(ids()).logits.any()


def test_the_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4000, max_seq_len=512, hidden_size=128, num_layers=8, num_heads=2))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            narrow = name.endswith(("attention.projection.weight", "ffn_down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / 4 if narrow else 0.02, rel=0.03), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert model(ids(), labels=ids()).loss.item() == pytest.approx(math.log(4000), rel=0.02)


def test_dropout_drops_in_training_and_only_there():
    config = dataclasses.replace(SMALL, dropout=0.3)
    model = make(config)
    assert torch.equal(model(ids()).logits, make()(ids()).logits)
    model.train()
    torch.manual_seed(0)
    one, two = model(ids()).logits, model(ids()).logits
    assert not torch.allclose(one, two)
    torch.manual_seed(0)
    assert torch.equal(model(ids()).logits, one)


# --- how it runs


@pytest.mark.parametrize("position", POSITIONS)
def test_compiled_without_a_graph_break_it_equals_eager(position):
    model = make(dataclasses.replace(SMALL, position=position), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones(3, 17, dtype=torch.int64)
    mask[1, :4] = 0
    arguments = {"attention_mask": mask, "labels": ids(), "return_logits": position == "sinusoidal"}
    output, again = model(ids(), **arguments), compiled(ids(), **arguments)
    torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    again.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_bf16_loss_and_gradients_are_near_those_of_float32(autocast):
    exact, model = make(dtype=torch.float32), make(dtype=torch.float32)
    exact(ids(), labels=ids()).loss.backward()
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(ids(), labels=ids(), return_logits=True)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    for got, expected in zip(model.parameters(), exact.parameters(), strict=True):
        similarity = torch_F.cosine_similarity(got.grad.float().flatten(), expected.grad.flatten(), dim=0)
        assert similarity > 0.98


def test_activation_checkpointing_gives_the_same_gradients():
    model, again = make(), make()
    model(ids(), labels=ids()).loss.backward()
    for block in again.blocks:
        block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
    again(ids(), labels=ids()).loss.backward()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


# --- what it refuses


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be at least 1, got 0"),
        ("vocab_size", "61", "vocab_size must be an integer, got '61'"),
        ("num_layers", 2.0, "num_layers must be an integer, got 2.0"),
        ("num_layers", True, "num_layers must be an integer, got True"),
        ("num_heads", 5, "hidden_size must be a multiple of num_heads, 5, got 24"),
        ("ffn_size", 0, "ffn_size must be at least 1, or None, got 0"),
        ("position", "rotary", "position must be one of 'learned', 'alibi', 'sinusoidal', got 'rotary'"),
        ("activation", "elu", "activation must be one of"),
        ("norm_eps", 0.0, "norm_eps must be above 0, got 0.0"),
        ("norm_eps", math.nan, "norm_eps must be above 0, got nan"),
        ("dropout", 1.0, "dropout must be at least 0 and below 1, got 1.0"),
        ("tie_embeddings", 1, "tie_embeddings must be true or false, got 1"),
        ("embedding_norm", None, "embedding_norm must be true or false, got None"),
    ],
)
def test_a_configuration_out_of_range_is_refused(field, value, message):
    with pytest.raises(ValueError, match=f"GPTConfig: {message}"):
        dataclasses.replace(SMALL, **{field: value})


def test_sinusoidal_positions_need_an_even_hidden_size():
    with pytest.raises(ValueError, match="hidden_size must be even for sinusoidal positions, got 9"):
        dataclasses.replace(SMALL, position="sinusoidal", hidden_size=9)


@pytest.mark.parametrize(
    ("input_ids", "options", "error", "message"),
    [
        (ids(T=25), {}, ValueError, "at most max_seq_len = 24 tokens, got 25"),
        (ids().float(), {}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        (ids()[0], {}, ValueError, r"input_ids must have shape \(B, T\) with T at least 1, got \(17,\)"),
        (ids(T=0), {}, ValueError, r"with T at least 1, got \(3, 0\)"),
        (ids(V=62).fill_(61), {}, IndexError, "input_ids must be from 0 to vocab_size - 1 = 60, got 61"),
        (-ids(), {}, IndexError, "input_ids must be from 0 to vocab_size - 1 = 60, got -"),
        (
            ids(),
            {"labels": ids(T=16)},
            ValueError,
            r"labels must have the shape of input_ids, \(3, 17\), got \(3, 16\)",
        ),
        (ids(), {"attention_mask": torch.ones(17)}, ValueError, r"attention_mask must have the shape of input_ids"),
        (ids(), {"labels": ids() + 40}, IndexError, "target must be in .0, 61."),
    ],
)
def test_input_that_does_not_fit_is_refused(input_ids, options, error, message):
    with pytest.raises(error, match=message):
        make()(input_ids, **options)


def test_a_configuration_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="GPT: config must be a GPTConfig, got dict"):
        GPT(SMALL.to_dict())


def test_int32_ids_and_an_empty_batch_work():
    model = make()
    assert torch.equal(model(ids().int()).logits, model(ids()).logits)
    assert model(ids(B=0)).logits.shape == (0, 17, 61)


# --- saving and loading


@pytest.fixture
def saved(tmp_path):
    make().save_pretrained(tmp_path / "deep" / "model")
    return tmp_path / "deep" / "model"


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_with_the_same_configuration_weights_and_dtype(tmp_path, config, dtype):
    model = make(config, dtype)
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == config
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    for (name, one), (other, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (name, one.dtype) == (other, two.dtype)
        assert torch.equal(one, two), name
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_the_model(saved):
    other = make(VARIANTS["bloom"])
    other.save_pretrained(saved)
    assert GPT.from_pretrained(saved).config == VARIANTS["bloom"]


def test_the_files_have_the_permissions_of_any_new_file(saved):
    (saved / "new").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved / "new").stat().st_mode}


def test_saving_that_fails_leaves_the_old_model_and_nothing_else(saved, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(pretrained_module, "write_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        make(VARIANTS["untied"]).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    os.remove(saved / name)
    with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 3}, "config.json: gpt2: n_layers is not known; did you mean n_layer?"),
        ({"n_head": "3"}, "config.json: GPTConfig: num_heads must be an integer, got '3'"),
        ({"n_layer": 3}, "missing blocks.2.attention_norm.weight"),
        ({"n_layer": 1}, "unexpected transformer.h.1.attn.c_attn.bias"),
        ({"scale_attn_weights": False}, "gpt2: scale_attn_weights must be True, got False"),
        ({"attn_pdrop": 0.5}, "gpt2: embd_pdrop and attn_pdrop must be the same, got 0.0 and 0.5"),
        ({"activation_function": "mish"}, r"activation_function must be one of gelu_new, .*, got 'mish'"),
        ({"model_type": "llama"}, "GPT: model_type must be 'gpt2' or 'bloom', got 'llama'"),
        ({"vocab_size": 62}, r"token_embedding.weight has shape \(61, 24\) instead of \(62, 24\)"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(saved, change, message):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(saved)


def test_a_configuration_that_is_not_hugging_faces_has_our_names(tmp_path):
    make(VARIANTS["sinusoidal"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values == {**VARIANTS["sinusoidal"].to_dict(), "architectures": ["GPT"]}
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_layer": 3}))
    with pytest.raises(ValueError, match=r"GPTConfig: unknown field 'num_layer'; did you mean num_layers\?"):
        GPT.from_pretrained(tmp_path)


def test_a_configuration_with_a_field_left_out_is_refused(saved):
    (saved / "config.json").write_text('{"vocab_size": 61, "num_layers": 2}')
    with pytest.raises(ValueError, match="GPTConfig: max_seq_len, hidden_size, num_heads must be given"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_configuration_is_an_error_of_one_line(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json (is damaged|must hold an object)") as caught:
        GPT.from_pretrained(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_an_error_of_one_line(saved, size):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged") as caught:
        GPT.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(saved):
    torch.save(make().state_dict(), saved / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        GPT.from_pretrained(saved)
