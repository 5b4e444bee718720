"""Generation is that of transformers: the same tokens for the same weights, and the same distribution to draw from."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_huggingface import CAUSAL, causal

import fastlm
from fastlm.generation import Decoder, _Options
from fastlm.models import GPT

transformers = pytest.importorskip("transformers")

V, NEW = 61, 9
ENDS = {"none": None, "one": [7], "several": [7, 11, 30, 31]}


@pytest.fixture(scope="module", params=CAUSAL)
def both_models(request):
    theirs = causal(request.param).float()  # BLOOM's padding in float64 is NaN to theirs
    theirs.generation_config = transformers.GenerationConfig()
    return theirs, GPT.from_pretrained(theirs)


@pytest.fixture(params=["auto", "native"])
def models(request, both_models):
    """Steps recorded, where they are, and as runs of the modules."""
    with fastlm.use_backend(request.param):
        yield both_models


def prompts(B, T, seed=2, padded=True):
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(V, (B, T), generator=generator), torch.ones(B, T, dtype=torch.int64)
    for row in range(padded * B):
        mask[row, : row * 2 % T] = 0
    return ids.masked_fill(mask == 0, 3), mask


def both(models, ids, mask, **options):
    theirs, ours = models
    eos, pad = options.get("eos_token_id"), options.pop("pad_token_id", 5)
    with torch.no_grad():
        expected = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=pad, use_cache=True, **options
        )
    given = {name: value for name, value in options.items() if value is not None}
    if eos is not None and len(eos) == 1:
        given["eos_token_id"] = eos[0]
    return expected, ours.generate(ids, NEW, attention_mask=mask, pad_token_id=pad, **given)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.6])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 6), (4, 7)])
def test_greedy_gives_the_same_tokens(models, B, T, penalty, ends):
    expected, got = both(models, *prompts(B, T), repetition_penalty=penalty, eos_token_id=ENDS[ends])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.5])
@pytest.mark.parametrize("ends", ENDS)
def test_beams_give_the_same_tokens(models, ends, length_penalty, early_stopping):
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping, "eos_token_id": ENDS[ends]}
    for beams, returned, seed in ((2, 1, 1), (3, 3, 2), (5, 2, 3)):
        ids, mask = prompts(3, 5, seed)
        expected, got = both(models, ids, mask, num_beams=beams, num_return_sequences=returned, **options)
        assert torch.equal(got, expected), (beams, returned)


@pytest.mark.parametrize("B", [1, 2])
def test_beams_with_a_repetition_penalty_give_the_same_tokens(models, B):
    options = {"num_beams": 4, "repetition_penalty": 1.5, "eos_token_id": [7, 20], "num_return_sequences": 4}
    expected, got = both(models, *prompts(B, 6), **options)
    assert torch.equal(got, expected)
    expected, got = both(models, *prompts(B, 6), **options, pad_token_id=0)  # where theirs takes the end for it
    assert torch.equal(got, expected)


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_where_most_tokens_end_a_text_give_the_same_tokens(models, beams):
    ends = [token for token in range(V) if token % 5]
    expected, got = both(models, *prompts(3, 5), num_beams=beams, num_return_sequences=beams, eos_token_id=ends)
    assert torch.equal(got, expected)


def test_to_the_last_place_of_the_context(models):
    theirs, ours = models
    ids, _ = prompts(2, 6, padded=False)
    with torch.no_grad():
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=18, do_sample=False)
    assert torch.equal(ours.generate(ids, 18), expected)


WARPS = [
    dict(zip(("temperature", "top_k", "top_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((1.0, 0.7), (0, 5, 100), (1.0, 0.6), (1.0, 1.3))
]


@pytest.mark.parametrize("warp", WARPS, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_sampling_has_the_same_distribution(both_models, beams, warp):
    """What theirs draws from, at every step of a text that theirs has drawn."""
    theirs, ours = both_models
    ids, mask = prompts(2, 5)
    eos = [7, 11]
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=1 if beams > 1 else 4, do_sample=True, num_beams=beams,
            eos_token_id=eos, pad_token_id=5, output_scores=True, return_dict_in_generate=True, **warp,
        )  # fmt: skip
        options = _Options(True, **warp, num_beams=beams, eos_token_id=eos)
        decoder = Decoder(ours, ids, mask, 1, 4, False)
        logits = decoder.start()
        for step, scores in enumerate(drawn.scores):
            logits = logits.float().log_softmax(-1) if beams > 1 else logits.float()
            text = torch.cat((options.counted(ids, mask), drawn.sequences[: len(ids), 5 : 5 + step]), 1)
            got = options.cut(options.penalise(logits, text), 3 if beams > 1 else 1).softmax(-1)
            torch.testing.assert_close(got, scores[::beams].softmax(-1), rtol=1e-4, atol=1e-6)
            if step + 1 < len(drawn.scores):
                logits = decoder.step(drawn.sequences[:, 5 + step, None])
