"""Generation: the likeliest token or a draw from the right distribution, one sequence as in a batch, the same again."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from errors import assert_within_rule

import fastlm
from fastlm.generation import Decoder, next_token_probabilities, quantized
from fastlm.models import GPT, GPTConfig
from fastlm.ops import compiled
from fastlm.ops.linear import op as linear
from fastlm.ops.measured import fastest

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
    run = model.run
    monkeypatch.setattr(model, "run", lambda *args: calls.append(1) or run(*args))
    with fastlm.use_backend("native"):  # where every token is a run of the modules
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


@pytest.mark.parametrize("position", ["learned", "alibi", "sinusoidal"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_token_by_token_the_logits_are_those_of_the_whole_text(position, sequences):
    """Beams that part and die out, prompts of several lengths."""
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=V, max_seq_len=32, hidden_size=24, num_layers=2, num_heads=3, position=position)
    model = GPT(config).double().eval()
    ids, mask = prompts(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, :2] = mask[2, :5] = 0
    with torch.no_grad():
        decoder = Decoder(model, ids, mask, sequences, 5, False)
        cache = decoder.keys.untyped_storage().data_ptr()
        texts = [[row[kept.bool()]] * sequences for row, kept in zip(ids, mask, strict=True)]
        close(decoder.start(), torch.cat([model(text[0][None]).logits[:, -1] for text in texts]))
        for step in range(5):
            tokens = torch.randint(V, (3, sequences))
            parents = torch.randint(sequences, (3, sequences)) if step else None
            for b, (text, new) in enumerate(zip(texts, tokens, strict=True)):
                come_from = range(sequences) if parents is None else parents[b]
                texts[b] = [torch.cat((text[n], one[None])) for n, one in zip(come_from, new, strict=True)]
            expected = torch.cat([model(text[None]).logits[:, -1] for of_prompt in texts for text in of_prompt])
            close(decoder.step(tokens, parents), expected)
        assert decoder.keys.untyped_storage().data_ptr() == cache  # neither grown nor moved
        assert decoder.keys.shape[3] == 6 + 5 * sequences


def close(ours, exact):
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_draws_of_one_prompt_differ_and_are_those_of_as_many_prompts(model):
    many = model.generate(prompts(2), 12, do_sample=True, num_return_sequences=4, seed=3)
    alone = model.generate(prompts(2).repeat_interleave(4, 0), 12, do_sample=True, seed=3)
    assert torch.equal(many, alone)
    assert len({tuple(row) for row in many.tolist()}) > 4
    new = torch.stack(list(model.stream(prompts(2), 12, do_sample=True, num_return_sequences=4, seed=3)), 1)
    assert torch.equal(new, many[:, 5:])


def log_probability(model, ids, prompt):
    logits = model(ids).logits.log_softmax(-1)[:, prompt - 1 : -1]
    return logits.gather(-1, ids[:, prompt:, None]).sum((1, 2))


def test_beams_as_many_as_there_are_texts_find_the_likeliest(model):
    """With V beams nothing of two tokens is lost."""
    ids = prompts(1, 4)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    every = torch.cat((ids.expand(len(pairs), -1), pairs), 1)
    with torch.no_grad():
        order = log_probability(model, every, 4).argsort(descending=True)
    found = model.generate(ids, 2, num_beams=V, num_return_sequences=10)
    assert torch.equal(found, every[order[:10]])


def test_beams_end_at_once_where_every_token_ends_a_text(model):
    out = model.generate(prompts(), 5, num_beams=3, eos_token_id=list(range(V)))
    assert torch.equal(out, greedy(model, prompts(), 1))


def test_beams_can_be_drawn(model):
    options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "top_k": 9, "temperature": 2.0}
    one, two, other = (model.generate(prompts(2), 9, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(one[:, :5], prompts(2).repeat_interleave(3, 0))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_what_is_generated_can_be_trained_on(model, options):
    out = copy.deepcopy(model).generate(prompts(), 4, **options)
    learner = copy.deepcopy(model).train()
    learner(out, labels=out).loss.backward()
    assert learner.token_embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_no_prompts_give_no_texts(model, options):
    assert model.generate(prompts()[:0], 4, **options).shape[0] == 0


def test_several_tokens_can_end_a_sequence(model):
    free = greedy(model, prompts(), 12)
    ends = [int(free[row, 5 + at]) for row, at in ((0, 6), (1, 3), (2, 2))]
    out = model.generate(prompts(), 12, eos_token_id=ends)
    for row in range(3):
        at = next(n for n, token in enumerate(free[row, 5:].tolist()) if token in ends)
        assert out[row, : 6 + at].tolist() == free[row, : 6 + at].tolist()
        assert (out[row, 6 + at :] == ends[0]).all()


def test_dropout_is_left_out_and_the_mode_of_the_model_left_alone(model):
    config = GPTConfig(vocab_size=V, max_seq_len=32, hidden_size=16, num_layers=2, num_heads=2, dropout=0.5)
    training = GPT(config).train()
    expected = training.eval().generate(prompts(), 9)
    stream = training.train().stream(prompts(), 9)
    for n, token in enumerate(stream):
        assert training.training
        assert torch.equal(token, expected[:, 5 + n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_int8_generates_what_a_model_of_the_rounded_weights_does(tied, dtype):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V,
        max_seq_len=32,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        tie_embeddings=tied,
        embedding_norm=True,
    )
    model = GPT(config).to(dtype).eval()
    small = quantized(model)
    rounded = copy.deepcopy(model)
    for name, module in small.named_modules():
        if hasattr(module, "weight_scale"):
            weight = (module.weight * module.weight_scale[:, None]).to(dtype)
            if name == "head" and tied:
                rounded.logits = functools.partial(torch.nn.functional.linear, weight=weight)
            else:
                rounded.get_submodule(name).weight.data = weight
    logits, expected = small(prompts()).logits, rounded(prompts()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
    assert small.token_embedding.weight is model.token_embedding.weight
    assert model.config.tie_embeddings == tied
    assert not any(hasattr(module, "weight_scale") for module in model.modules())
    if dtype == torch.float32:
        assert torch.equal(model.generate(prompts(), 12, quantize="int8")[:, :6], model.generate(prompts(), 1))
        first = model.generate(prompts(), 1)
        assert torch.equal(model.generate(prompts(), 12, quantize="int8"), greedy_from(model, small, first, 11))


def greedy_from(model, small, ids, steps):
    """The prompts by way of the model, what follows by way of the small one."""
    with torch.no_grad(), fastlm.use_backend("native"):
        decoder = Decoder(model, ids[:, :-1], None, 1, steps + 1, False)
        decoder.start()
        decoder.steps_model = small
        for _ in range(steps):
            ids = torch.cat((ids, decoder.step(ids[:, -1:]).argmax(-1, keepdim=True)), 1)
    return ids


RECORDED = pytest.mark.skipif(
    bool(compiled.cpu_missing()) or not fastest("linear of a whole step", torch.empty(1)),
    reason="steps are recorded where that has been measured to be faster",
)


@RECORDED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
@pytest.mark.parametrize("position", ["learned", "alibi"])
@pytest.mark.parametrize("sequences", [1, 4])
def test_recorded_steps_are_the_modules_own(sequences, position, activation, dtype):
    torch.manual_seed(3)
    options = {"position": position, "activation": activation, "tie_embeddings": position == "alibi"}
    options |= {"embedding_norm": position == "alibi", "ffn_size": 50}
    config = GPTConfig(vocab_size=V, max_seq_len=64, hidden_size=36, num_layers=3, num_heads=3, **options)
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model = model.to(dtype)
    ids, mask = prompts(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[1, :2] = mask[2, :5] = 0
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), fastlm.use_backend("native"):
        others = [Decoder(each, ids, mask, sequences, 6, False) for each in (model, exact)]
        starts = [decoder.start() for decoder in others]
    with torch.no_grad():
        ours = Decoder(model, ids, mask, sequences, 6, False)
        assert ours.recorded is not None
        assert all(decoder.recorded is None for decoder in others)
        assert_within_rule(ours.start(), *starts)
        for step in range(6):
            tokens = torch.randint(V, (3, sequences))
            parents = torch.randint(sequences, (3, sequences)) if step % 2 else None
            with fastlm.use_backend("native"):
                torchs, true = (decoder.step(tokens, parents) for decoder in others)
            logits = ours.step(tokens, parents)
            # What is rounded to 16 bits in another order does not come out twice as near, nor half.
            assert (logits.double() - true).abs().max() <= 3 * (
                torchs.double() - true
            ).abs().max() + 1e-6 * true.abs().max()


@RECORDED
def test_steps_are_recorded_only_where_nothing_is_lost(model):
    def recorded(model, rows=3):
        return Decoder(model, prompts(rows), None, 1, 3, False).recorded is not None

    assert recorded(model)
    assert recorded(quantized(model))
    assert not recorded(model, linear.FEW_ROWS + 1)
    with fastlm.use_backend("reference"):
        assert not recorded(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recorded(model)
    assert not recorded(copy.deepcopy(model).double())

    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    changed = [copy.deepcopy(model) for _ in range(6)]
    changed[0].blocks[0].ffn_up.register_forward_hook(lambda *_: None)
    changed[1].blocks[1].register_forward_pre_hook(lambda *_: None)
    changed[2].blocks[0].ffn_up = Louder(16, 64)
    changed[4].blocks[0].activation = torch.sin
    changed[5].blocks[1].ffn_down = torch.nn.Sequential(changed[5].blocks[1].ffn_down, torch.nn.Tanh())
    weight = changed[3].blocks[0].ffn_up.weight
    weight.data = weight.data.T.contiguous().T
    for each in changed:
        assert not recorded(each)
        with torch.no_grad():
            ids = greedy(each, prompts(), 4)
        assert torch.equal(each.generate(prompts(), 4), ids)


def test_int8_refuses_weights_that_are_not_finite(model):
    broken = copy.deepcopy(model)
    broken.blocks[1].ffn_up.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="quantize: the weights must be finite"):
        broken.generate(prompts(), 3, quantize="int8")


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
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be finite, got nan"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or \"never\", got 'soon'"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ({"num_return_sequences": 2}, "num_return_sequences must be at most num_beams = 1: without draws"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences must be at most num_beams = 2"),
        ({"quantize": "int4"}, "quantize must be \"int8\" or None, got 'int4'"),
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
