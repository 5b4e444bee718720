"""Text from a language model, token by token, with the meaning that `transformers` gives the same options.

    p = softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the likeliest that hold `top_p`

This runs the whole sequence through the model again for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastlm.functional as F

if TYPE_CHECKING:
    from fastlm.models.gpt import GPT

__all__ = ["generate", "next_token_probabilities", "stream"]


def generate(
    model: GPT,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """The prompts with what the model adds to them.

    Args:
        input_ids: (B, T) prompts; shorter ones padded on the left, which `attention_mask` says.
        max_new_tokens: at least 1; prompt and new tokens together must fit `max_seq_len`.
        attention_mask: (B, T), 0 where a prompt is padding.
        do_sample: draw from the distribution; otherwise take the likeliest token, and the next three do not count.
        temperature, top_k, top_p: see `next_token_probabilities`.
        eos_token_id: a sequence that has produced it is finished; the call ends when all are.
        pad_token_id: what finished sequences go on with; None is `eos_token_id`.
        seed: of the draws; None takes them from torch's default generator.

    Returns:
        (B, T + n) the prompts followed by n new tokens, n at most `max_new_tokens`.

    Raises:
        ValueError: an option out of range, padding that is not on the left, or more tokens than `max_seq_len`.
    """
    new = stream(
        model,
        input_ids,
        max_new_tokens,
        attention_mask=attention_mask,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        seed=seed,
    )
    return torch.cat([input_ids, *(token[:, None] for token in new)], dim=1)


def stream(
    model: GPT,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """As `generate`, but yields the new tokens, (B,) at a time, as they come."""
    _check_options(temperature, top_k, top_p)
    _check_room(model, input_ids, attention_mask, max_new_tokens)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    pad = eos_token_id if pad_token_id is None else pad_token_id

    @torch.no_grad()
    def tokens() -> Iterator[Tensor]:
        ids, mask = input_ids, attention_mask
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits = F.linear(model.hidden_states(ids, mask)[:, -1], model.head_weight)
            if do_sample:
                probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
                new = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            else:
                new = logits.argmax(-1)
            new = new.to(ids.dtype)
            if eos_token_id is not None and pad is not None:
                new = new.masked_fill(finished, pad)
                finished |= new == eos_token_id
            yield new
            if eos_token_id is not None and finished.all():
                return
            ids = torch.cat((ids, new[:, None]), 1)
            mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), 1)), 1)

    return tokens()


def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What sampling draws from: fp32, shape of `logits`, (..., V).

    Args:
        temperature: above 0; the logits are divided by it.
        top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
        top_p: in (0, 1]; of those keep the smallest set of the likeliest that holds this much probability.
    """
    _check_options(temperature, top_k, top_p)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits.softmax(-1)


def _check_options(temperature: float, top_k: int, top_p: float) -> None:
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"generate: temperature must be above 0, got {temperature} (do_sample=False is greedy)")
    if top_k < 0:
        raise ValueError(f"generate: top_k must be at least 1, or 0 for all tokens, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}")


def _check_room(model: GPT, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"generate: input_ids must have shape (B, T), T at least 1, got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt, longest = input_ids.shape[1], model.config.max_seq_len
    if prompt + max_new_tokens > longest:
        got = f"{prompt} and {max_new_tokens}"
        raise ValueError(f"generate: prompt and new tokens must fit max_seq_len = {longest}, got {got}")
    if attention_mask is not None:
        mask = attention_mask.bool()
        if not bool(mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
            raise ValueError("generate: attention_mask must have its zeros, the padding, on the left of every prompt")
