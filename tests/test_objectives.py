"""Batches: every example once an epoch, the same whoever asks, and what was masked as BERT's authors have it."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import CausalLM, Labelled, MaskedLM
from fastlm.data.objectives import shuffled
from fastlm.models import GPT, BERTConfig, BERTForPreTraining, GPTConfig

SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
VOCAB = 50


def documents(lengths, seed=0) -> np.ndarray:
    """Tokens 5 to 49, each document after a [SEP]."""
    random = np.random.default_rng(seed)
    parts = [np.concatenate(([3], random.integers(5, VOCAB, n))) for n in lengths]
    return np.concatenate(parts).astype(np.uint16)


# --- order


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_an_epoch_is_a_permutation(n, key):
    out = shuffled(np.arange(n), n, np.full(n, key, np.uint64))
    assert sorted(out.tolist()) == list(range(n))


def test_permutations_of_other_keys_are_others_and_move_almost_everything():
    n = 10_000
    one, two = (shuffled(np.arange(n), n, np.full(n, key, np.uint64)) for key in (1, 2))
    for places in (one, two, two[np.argsort(one)]):
        assert (places == np.arange(n)).mean() < 0.002
        assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.05
        assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05


def test_a_permutation_needs_no_array_of_its_length():
    n = 2**61
    out = shuffled(np.array([0, 1, n - 1]), n, np.full(3, 5, np.uint64))
    assert len(set(out.tolist())) == 3
    assert (out >= 0).all()
    assert (out < n).all()


def test_the_order_of_a_seed_is_the_same_in_every_version():
    batch = CausalLM(np.arange(1000, dtype=np.uint16), 4).batch(300, 306, seed=1)
    assert batch["input_ids"][:, 0].tolist() == [30, 370, 146, 766, 826, 250]


@pytest.mark.parametrize(("size", "seq_len"), [(1000, 8), (999, 8), (17, 8), (9, 8), (3000, 1)])
def test_every_window_comes_once_an_epoch_and_windows_do_not_overlap(size, seq_len):
    objective = CausalLM(np.arange(size, dtype=np.uint16), seq_len)
    n, cuts = len(objective), set()
    for epoch in range(16):
        x = objective.batch(epoch * n, (epoch + 1) * n, seed=3)["input_ids"]
        starts = sorted(x[:, 0].tolist())
        assert (x == x[:, :1] + torch.arange(seq_len)).all()
        assert np.diff(starts).tolist() == [seq_len] * (n - 1)
        assert size - n * seq_len <= 2 * seq_len
        cuts.add(starts[0])
    assert len(cuts) > 1 or size - n * seq_len == 1


def test_batches_are_ranges_of_one_sequence_whatever_their_size():
    objective = CausalLM(np.arange(500, dtype=np.uint16), 8)
    whole = objective.batch(0, 200, seed=0)["input_ids"]
    parts = [objective.batch(start, min(start + 7, 200), seed=0)["input_ids"] for start in range(0, 200, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(objective.batch(0, 200, seed=1)["input_ids"], whole)
    masked = MaskedLM(documents([300]), 16, special=SPECIAL, vocab_size=VOCAB)
    whole = masked.batch(0, 40, seed=0)
    parts = [masked.batch(start, start + 5, seed=0) for start in range(0, 40, 5)]
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


# --- the next token


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_evaluation_scores_every_token_after_the_first_exactly_once(draw):
    seq_len = draw.draw(st.integers(1, 20))
    length = draw.draw(st.integers(seq_len + 1, 200))
    overlap = draw.draw(st.integers(0, seq_len - 1))
    batch_size = draw.draw(st.integers(1, 5))
    objective = CausalLM(np.arange(1000, 1000 + length, dtype=np.uint16), seq_len, eval_overlap=overlap)
    scored = []
    for batch in objective.eval_batches(batch_size):
        x, y = batch["input_ids"], batch["shift_labels"]
        assert x.shape == y.shape == (len(x), seq_len)
        assert len(x) <= batch_size
        counted = y != -100
        assert objective.count(batch) == counted.sum()
        assert (y[counted] == x[counted] + 1).all()
        assert counted.any(dim=1).all()
        assert counted[1:, :overlap].sum() == 0  # the context of a window is not scored again
        scored += y[counted].tolist()
    assert scored == list(range(1001, 1000 + length))


@pytest.mark.parametrize("position", ["learned", "alibi", "sinusoidal"])
def test_separate_documents_get_what_each_gets_alone(position):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "position": position}
    model = GPT(GPTConfig(vocab_size=VOCAB, max_seq_len=24, **shape)).double()
    objective = CausalLM(documents([5, 1, 40, 9, 0, 30, 7]), 24, document_id=3)
    batch = objective.batch(0, 3, seed=0)
    cu_seqlens = batch["cu_seqlens"].tolist()
    assert {0, 24, 48, 72} <= set(cu_seqlens)
    logits = model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"]).logits.flatten(0, 1)
    flat = batch["input_ids"].flatten()
    assert all(start % 24 == 0 or flat[start] == 3 for start in cu_seqlens[:-1])
    for start, stop in itertools.pairwise(cu_seqlens):
        assert not (flat[start + 1 : stop] == 3).any()
        alone = model(flat[None, start:stop]).logits[0]
        torch.testing.assert_close(logits[start:stop], alone, rtol=1e-9, atol=1e-9)
    model(**batch).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- masked tokens


def test_of_15_percent_that_are_chosen_80_are_masked_10_random_and_10_stay():
    tokens = documents([99] * 60)
    objective = MaskedLM(tokens, 66, special=SPECIAL, vocab_size=VOCAB)
    fates = collections.Counter()
    for start in range(0, 4000, 100):
        batch = objective.batch(start, start + 100, seed=0)
        ids, labels = batch["input_ids"], batch["labels"]
        chosen = labels != -100
        assert torch.equal(batch["labelled"], chosen.flatten().nonzero().flatten())
        assert (ids[:, 0] == 2).all()
        assert (ids[:, -1] == 3).all()
        assert not chosen[:, 0].any()
        assert (labels[chosen] >= 5).all()  # no special token is to be predicted
        ordinary = torch.where(chosen, labels, ids) >= 5
        assert (chosen.sum(1) == (0.15 * ordinary.sum(1)).round()).all()
        fates["masked"] += int((ids[chosen] == 4).sum())
        fates["kept"] += int((ids[chosen] == labels[chosen]).sum())
        other = chosen & (ids != 4) & (ids != labels)
        assert (ids[other] >= 5).all()
        fates["random"] += int(other.sum())
        fates["distinct"] = max(fates["distinct"], len(set(ids[other].tolist())))
    total = fates["masked"] + fates["kept"] + fates["random"]
    assert fates["masked"] / total == pytest.approx(0.8, abs=0.01)
    assert fates["kept"] / total == pytest.approx(0.1 + 0.1 / 45, abs=0.01)
    assert fates["distinct"] > 20


def test_what_is_masked_changes_with_the_epoch_and_the_text_does_not():
    tokens = documents([30])
    objective = MaskedLM(tokens, 31, special=SPECIAL, vocab_size=VOCAB)
    assert len(objective) == 1
    seen = set()
    for epoch in range(20):
        batch = objective.batch(epoch, epoch + 1, seed=0)
        text = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[0, 1:-1].numpy()
        assert any((tokens[start : start + 29] == text).all() for start in range(3))
        seen.add(tuple((batch["labels"] != -100)[0].tolist()))
    assert len(seen) > 10


def test_pairs_are_of_one_document_and_follow_each_other_in_half_of_the_cases():
    lengths = [40] * 50
    tokens = documents(lengths)
    text = tokens.tolist()
    following = set(itertools.pairwise(text))
    objective = MaskedLM(tokens, 24, special=SPECIAL, vocab_size=VOCAB, next_sentence=True)
    others = 0
    for start in range(0, 1000, 50):
        batch = objective.batch(start, start + 50, seed=0)
        ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        for row, types, mask, other in zip(
            ids, batch["token_type_ids"], batch["attention_mask"], batch["next_sentence_label"], strict=True
        ):
            row, types = row[mask.bool()].tolist(), types[mask.bool()].tolist()
            ends = [i for i, token in enumerate(row) if token == 3]
            assert row[0] == 2
            assert len(ends) == 2
            assert ends[1] == len(row) - 1 <= 23
            assert types == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])
            first, second = row[1 : ends[0]], row[ends[0] + 1 : ends[1]]
            assert first
            assert all(pair in following for part in (first, second) for pair in itertools.pairwise(part))
            if not other:
                assert second
                assert (first[-1], second[0]) in following
            others += int(other)
    assert others / 1000 == pytest.approx(0.5, abs=0.07)  # a rest of one token is never followed
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = BERTForPreTraining(BERTConfig(vocab_size=VOCAB, max_seq_len=24, **shape))
    loss = model(**batch).loss
    loss.backward()
    batch.pop("labelled"), batch.pop("packing")
    torch.testing.assert_close(model(**batch).loss, loss)


def test_labels_of_examples_are_padded_and_counted():
    examples = [
        {"input_ids": [2, 7, 3], "labels": 1},
        {"input_ids": [2, 3], "labels": 0},
        {"input_ids": [9], "labels": 2},
    ]
    objective = Labelled(examples, num_classes=3, pad_token_id=1)
    batches = list(objective.eval_batches(2))
    assert batches[0]["input_ids"].tolist() == [[2, 7, 3], [2, 3, 1]]
    assert [objective.count(batch) for batch in batches] == [2, 1]
    assert sorted(objective.batch(3, 6, seed=0)["labels"].tolist()) == [0, 1, 2]
    assert objective.fingerprint() != Labelled(examples[:2]).fingerprint()


# --- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ids: CausalLM(ids, 100), "CausalLM: the text is too small: 100 tokens, seq_len 100 needs at least 101"),
        (lambda ids: CausalLM(ids, 0), "CausalLM: seq_len must be at least 1, got 0"),
        (lambda ids: CausalLM(ids, 8, eval_overlap=8), "eval_overlap must be from 0 to seq_len - 1, 7, got 8"),
        (lambda ids: MaskedLM(ids, 103, special=SPECIAL, vocab_size=50), "MaskedLM: the text is too small"),
        (lambda ids: MaskedLM(ids, 3, special=SPECIAL, vocab_size=50), "seq_len must be at least 4, got 3"),
        (lambda ids: MaskedLM(ids, 8, special={"[CLS]": 1}, vocab_size=50), r"lacks \[MASK\], \[SEP\]"),
        (lambda ids: MaskedLM(ids, 8, special=SPECIAL, vocab_size=50, probability=0.0), "probability must be above 0"),
        (lambda ids: Labelled([]), "Labelled: there must be at least one example"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(np.arange(100, dtype=np.uint16))
