"""Generation: the likeliest token or a draw from the right distribution, one sequence as in a batch, the same again."""

from __future__ import annotations

import pytest
import torch

from fastlm.generation import next_token_probabilities
from fastlm.models import GPT, GPTConfig

V = 37


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=V, max_seq_len=32, hidden_size=16, num_layers=2, num_heads=2)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def prompts(B: int = 3, T: int = 5) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(4))


def greedy(model: GPT, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


def test_greedy_is_the_likeliest_token_at_every_step(model):
    assert torch.equal(model.generate(prompts(), 12), greedy(model, prompts(), 12))


def test_the_stream_yields_the_tokens_that_generate_returns(model):
    options = {"do_sample": True, "seed": 5}
    new = torch.stack(list(model.stream(prompts(), 7, **options)), 1)
    assert torch.equal(torch.cat((prompts(), new), 1), model.generate(prompts(), 7, **options))


def test_the_stream_computes_no_further_than_it_is_read(model, monkeypatch):
    calls = []
    hidden_states = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *args: calls.append(1) or hidden_states(*args))
    stream = model.stream(prompts(), 10)
    next(stream), next(stream)
    assert len(calls) == 2


def test_left_padded_prompts_go_on_as_they_do_alone(model):
    padded, mask = prompts(3, 5), torch.ones(3, 5, dtype=torch.int64)
    padded[1, :2], mask[1, :2] = 0, 0
    padded[2, :4], mask[2, :4] = 0, 0
    out = model.generate(padded, 9, attention_mask=mask)
    for row, length in enumerate((5, 3, 1)):
        alone = greedy(model, padded[row : row + 1, 5 - length :], 9)
        assert torch.equal(out[row, 5 - length :], alone[0])


def test_a_finished_sequence_is_padded_and_the_call_ends_when_all_are(model):
    free = greedy(model, prompts(), 12)
    eos = int(free[0, 7])  # the first sequence is finished there, at the latest
    out = model.generate(prompts(), 12, eos_token_id=eos, pad_token_id=36)
    longest = 0
    for row in range(3):
        new = free[row, 5:].tolist()
        end = new.index(eos) + 1 if eos in new else 12
        longest = max(longest, end)
        assert out[row, 5 : 5 + end].tolist() == new[:end]
        assert (out[row, 5 + end :] == 36).all()
    assert out.shape == (3, 5 + longest)
    alone = model.generate(prompts()[:1], 12, eos_token_id=eos)
    assert alone.shape[1] <= 8
    assert alone[0, -1] == eos


def test_without_a_pad_token_finished_sequences_repeat_the_end_token(model):
    free = greedy(model, prompts(), 12)
    eos = int(free[0, 5])
    out = model.generate(prompts(), 12, eos_token_id=eos)
    assert (out[0, 5:] == eos).all()


def test_a_seed_gives_the_same_text_again_and_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    one, two, other = (model.generate(prompts(), 12, do_sample=True, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_global_generator_decides(model):
    torch.manual_seed(1)
    one, two = (model.generate(prompts(), 12, do_sample=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(model.generate(prompts(), 12, do_sample=True), one)
    assert not torch.equal(one, two)


def test_one_likeliest_token_to_draw_from_is_greedy(model):
    expected = greedy(model, prompts(), 8)
    assert torch.equal(model.generate(prompts(), 8, do_sample=True, top_k=1), expected)
    assert torch.equal(model.generate(prompts(), 8, do_sample=True, top_p=1e-6), expected)


def test_draws_follow_the_probabilities(model):
    many = prompts(1).expand(20_000, -1)
    drawn = model.generate(many, 1, do_sample=True, temperature=1.5, top_k=6, seed=0)[:, -1]
    p = next_token_probabilities(model(prompts(1)).logits[0, -1], temperature=1.5, top_k=6)
    frequencies = torch.bincount(drawn, minlength=V) / len(drawn)
    assert (frequencies[p == 0] == 0).all()
    deviations = (frequencies - p).abs() / (p * (1 - p) / len(drawn)).sqrt().clamp(min=1e-9)
    assert deviations[p > 0].max() < 4.5


P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


def test_temperature_divides_the_logits():
    torch.testing.assert_close(next_token_probabilities(P.log(), temperature=0.5), P**2 / (P**2).sum())


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 9])
def test_top_k_keeps_the_k_likeliest_in_proportion(k):
    keep = torch.zeros(5)
    keep[P.argsort(descending=True)[: k or 5]] = 1
    torch.testing.assert_close(next_token_probabilities(P.log(), top_k=k), P * keep / (P * keep).sum())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, 1), (0.39, 1), (0.41, 2), (0.64, 2), (0.66, 3), (0.86, 4), (0.96, 5), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_likeliest_set_that_holds_p(top_p, kept):
    keep = torch.zeros(5)
    keep[P.argsort(descending=True)[:kept]] = 1
    torch.testing.assert_close(next_token_probabilities(P.log(), top_p=top_p), P * keep / (P * keep).sum())


def test_top_p_counts_what_temperature_and_top_k_left_over():
    got = next_token_probabilities(P.log(), temperature=0.5, top_k=3, top_p=0.6)  # of .16, .0625, .04: .16 holds .61
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))


def test_rows_are_cut_on_their_own():
    rows = torch.stack((P, P.flip(0))).log()
    got = next_token_probabilities(rows, top_k=2, top_p=0.9)
    torch.testing.assert_close(got[0], next_token_probabilities(rows[0], top_k=2, top_p=0.9))
    torch.testing.assert_close(got[1], got[0].flip(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 28}, "prompt and new tokens must fit max_seq_len = 32, got 5 and 28"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 for all tokens, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"input_ids": prompts()[0]}, r"input_ids must have shape \(B, T\), T at least 1, got \(5,\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 3)}, "the padding, on the left of every prompt"),
        ({"attention_mask": torch.tensor([[0, 1, 0, 1, 1]] * 3)}, "the padding, on the left of every prompt"),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask must have the shape of input_ids"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": prompts(), "max_new_tokens": 3, **options})


def test_the_longest_text_that_fits_is_generated(model):
    assert model.generate(prompts(), 27).shape == (3, 32)
