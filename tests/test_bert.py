"""BERT: padding that is removed changes nothing, losses are of labelled tokens only, bad input is an error."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fastlm
import fastlm.functional as F
from fastlm.data import collate
from fastlm.models import (
    BERT,
    BERTConfig,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    Packing,
)

SMALL = BERTConfig(vocab_size=61, max_seq_len=24, hidden_size=24, num_layers=2, num_heads=3, ffn_size=40)


def make(kind=BERT, dtype=torch.float64, **changes):
    torch.manual_seed(1)
    model = kind(dataclasses.replace(SMALL, **changes)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def ids(B=4, T=17):
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(2))


def mask_of(*lengths, T=17):
    return (torch.arange(T) < torch.tensor(lengths)[:, None]).long()


MASKS = {
    "right": mask_of(17, 3, 9, 1),
    "left": mask_of(17, 3, 9, 1).flip(1),
    "holes": torch.randint(0, 2, (4, 17), generator=torch.Generator().manual_seed(3)),
    "an empty one": mask_of(5, 0, 17, 2),
    "none": mask_of(17, 17, 17, 17),
}


@pytest.mark.parametrize("name", MASKS)
def test_tokens_get_the_same_with_and_without_padding(name):
    model, mask = make(), MASKS[name]
    types = torch.randint(2, mask.shape, generator=torch.Generator().manual_seed(4))
    removed, kept = model(ids(), mask, types), model(ids(), mask, types, unpad=False)
    tokens = mask.bool()
    torch.testing.assert_close(removed.last_hidden_state[tokens], kept.last_hidden_state[tokens])
    assert not removed.last_hidden_state[~tokens].any()
    if name in ("right", "none"):
        torch.testing.assert_close(removed.pooler_output, kept.pooler_output)


@pytest.mark.parametrize("lengths", [(5, 0, 17, 0), (0, 0, 0, 0)])
def test_a_sequence_without_a_token_pools_zeros(lengths):
    model, mask = make(), mask_of(*lengths)
    pooled, empty = model(ids(), mask).pooler_output, torch.tensor(lengths) == 0
    torch.testing.assert_close(pooled[empty], model.pooler.bias.tanh().expand(int(empty.sum()), -1))
    torch.testing.assert_close(pooled[~empty], model(ids(), mask, unpad=False).pooler_output[~empty])


def test_what_stands_at_padding_does_not_matter():
    model, mask = make(), MASKS["right"]
    other = ids().where(mask.bool(), 7)
    assert torch.equal(model(ids(), mask).last_hidden_state, model(other, mask).last_hidden_state)


def test_a_given_packing_is_used_without_a_look_at_the_mask(monkeypatch):
    model, mask = make(), MASKS["right"]
    packing = Packing.of(mask)
    assert packing.cu_seqlens.tolist() == [0, 17, 20, 29, 30]
    assert packing.cu_seqlens.dtype is torch.int32
    assert packing.max_seqlen == 17
    expected = model(ids(), mask)
    monkeypatch.setattr(Packing, "of", None)
    assert torch.equal(model(ids(), mask, packing=packing).last_hidden_state, expected.last_hidden_state)


def test_every_layer_runs_on_packed_tokens(monkeypatch):
    model, mask, rows = make(), MASKS["right"], []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    model(ids(), mask)
    assert set(rows) == {int(mask.sum()), 4}  # the pooler's four


@pytest.mark.parametrize("kind", [BERTForMaskedLM, BERTForPreTraining])
@pytest.mark.parametrize("unpad", [True, False])
def test_the_loss_is_the_mean_over_labelled_tokens(kind, unpad):
    model, mask = make(kind), MASKS["right"]
    labels = torch.full((4, 17), -100)
    labels[0, 3], labels[1, 1], labels[3, 0] = 5, 0, 60  # token id 0 is a label
    output = model(ids(), mask, labels=labels, return_logits=True, unpad=unpad)
    assert output.logits.shape == (4, 17, 61)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits.mT, labels))
    assert model(ids(), mask, labels=labels).logits is None
    assert model(ids(), mask).loss is None
    assert model(ids(), mask).logits is not None


def test_the_head_runs_on_labelled_tokens_only():
    model, rows = make(BERTForMaskedLM), []
    model.mlm.dense.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    labels = torch.full((4, 17), -100)
    labels[:, 2] = 4
    model(ids(), labels=labels)
    assert rows == [4]


def test_without_a_label_the_loss_is_that_of_no_rows():
    loss = make(BERTForMaskedLM)(ids(), labels=torch.full((4, 17), -100)).loss
    assert loss.isnan()  # a mean over nothing, as torch has it


def test_the_losses_of_pretraining_add_up():
    model, mask = make(BERTForPreTraining), MASKS["right"]
    labels, follows = ids().where(torch.rand(4, 17) < 0.3, -100), torch.tensor([0, 1, 1, 0])
    labels[0, 0] = 3
    both = model(ids(), mask, labels=labels, next_sentence_label=follows)
    one = model(ids(), mask, labels=labels).loss
    other = torch.nn.functional.cross_entropy(both.next_sentence_logits, follows)
    torch.testing.assert_close(both.loss, one + other)


@pytest.mark.parametrize("kind", [BERTForMaskedLM, BERTForPreTraining, BERTForSequenceClassification])
def test_every_parameter_gets_a_gradient(kind):
    model = make(kind).train()
    labels = {"labels": ids()} if kind is not BERTForSequenceClassification else {"labels": torch.tensor([0, 1, 1, 0])}
    if kind is BERTForPreTraining:
        labels["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    model(ids(), MASKS["right"], **labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
def test_labels_of_the_wrong_shape_are_refused(problem, num_labels):
    model = make(BERTForSequenceClassification, num_labels=num_labels, problem_type=problem)
    with pytest.raises(ValueError, match=r"BERTForSequenceClassification: labels must have shape \(4, [13]\) for"):
        model(ids(), labels=torch.zeros(5))


def test_dropout_is_drawn_anew_and_off_in_evaluation():
    model = make(dropout=0.5).train()
    mask = MASKS["right"]
    assert not torch.equal(model(ids(), mask).last_hidden_state, model(ids(), mask).last_hidden_state)
    model.eval()
    assert torch.equal(model(ids(), mask).last_hidden_state, model(ids(), mask).last_hidden_state)


def test_attentions_are_probabilities_and_change_nothing():
    model, mask = make(), MASKS["right"]
    output = model(ids(), mask, output_attentions=True)
    assert [tuple(each.shape) for each in output.attentions] == [(4, 3, 17, 17)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(4, 3, 17, dtype=torch.float64))
    assert not output.attentions[0][1, :, :, 3:].any()
    tokens = mask.bool()
    torch.testing.assert_close(output.last_hidden_state[tokens], model(ids(), mask).last_hidden_state[tokens])
    assert model(ids(), mask).attentions is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(tmp_path, dtype):
    model = make(BERTForSequenceClassification, dtype, num_labels=3, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)
    again = BERTForSequenceClassification.from_pretrained(tmp_path)
    assert again.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.dtype is two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(17, dtype=torch.int64)}, ValueError, r"BERT: input_ids must have shape \(B, T\)"),
        ({"input_ids": torch.zeros(2, 25, dtype=torch.int64)}, ValueError, "at most max_seq_len = 24 tokens, got 25"),
        ({"input_ids": torch.zeros(2, 3)}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": torch.full((2, 3), 61)}, IndexError, "input_ids must be from 0 to 60, got 61"),
        (
            {"attention_mask": torch.ones(4, 16)},
            ValueError,
            r"attention_mask must have the shape of input_ids, \(4, 17\)",
        ),
        ({"token_type_ids": torch.full((4, 17), 2)}, IndexError, "token_type_ids must be from 0 to 1, got 2"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make()(**{"input_ids": ids(), **arguments})


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"BERT: labels must have the shape of input_ids, \(4, 17\), got"):
        make(BERTForMaskedLM)(ids(), labels=ids(T=16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"problem_type": "ranking"}, "problem_type must be one of .* or None, got 'ranking'"),
        ({"position": "alibi"}, "position must be 'learned', got 'alibi'"),
        ({"tie_embeddings": False}, "tie_embeddings must be true, got False"),
    ],
)
def test_configurations_that_are_no_bert_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_no_rows():
    output = make()(ids(B=0), MASKS["right"][:0])
    assert output.last_hidden_state.shape == (0, 17, 24)
    assert output.pooler_output.shape == (0, 24)


def test_packed_attention_is_what_runs(monkeypatch):
    calls = []
    varlen = F.varlen_attention
    monkeypatch.setattr(F, "varlen_attention", lambda *args: calls.append(args[5]) or varlen(*args))
    make()(ids(), MASKS["right"])
    assert calls == [17, 17]
    with fastlm.use_backend("reference"):
        make()(ids(), MASKS["none"])
    assert calls == [17, 17]


def test_a_collated_batch_goes_into_the_model_as_it_is():
    model = make(BERTForMaskedLM)
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 9, -100]}, {"input_ids": [8], "labels": [3]}]
    batch = collate(examples, pad_token_id=60)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 60, 60]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["packing"].indices_N.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(model(**batch).loss, model(**{**batch, "packing": None}).loss)
    classes = collate([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}])
    assert classes["labels"].tolist() == [1, 0]
    for wrong in ([], [{"input_ids": [1]}, {"input_ids": [1], "labels": 0}]):
        with pytest.raises(ValueError, match="collate: examples must be"):
            collate(wrong)


def test_compiled_without_a_graph_break_it_equals_eager():
    model, mask = make(dtype=torch.float32), MASKS["right"]
    compiled = torch.compile(lambda ids, mask: model(ids, mask, unpad=False).last_hidden_state, fullgraph=True)
    torch.testing.assert_close(compiled(ids(), mask), model(ids(), mask, unpad=False).last_hidden_state)


@pytest.mark.parametrize("told", [False, True])
def test_labels_at_padding_are_no_labels(told):
    torch.manual_seed(0)
    shape = BERTConfig(vocab_size=40, max_seq_len=8, hidden_size=16, num_layers=1, num_heads=2)
    model = BERTForMaskedLM(shape).double()
    ids, mask = torch.randint(40, (3, 8)), torch.arange(8) < torch.tensor([[5], [8], [2]])
    labels = torch.where(torch.arange(8) % 2 == 0, ids, -100)
    clean = labels.where(mask, -100)
    labelled = (labels.flatten() != -100).nonzero().flatten() if told else None
    loss = model(ids, mask.long(), labels=labels, labelled=labelled).loss
    torch.testing.assert_close(loss, model(ids, mask.long(), labels=clean).loss)
