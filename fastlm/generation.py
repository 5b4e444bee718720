"""Text from a language model, with the meaning that `transformers` gives the same options.

    scores = logits, the tokens that are there already less likely by `repetition_penalty`
    p      = softmax(scores / temperature), cut to the `top_k` likeliest tokens, then to the likeliest that hold `top_p`

The prompts go through the model once, as one batch; then every new token alone, beside the keys and values of what
came before (`Decoder`). These are allocated once: nothing grows and nothing is copied, not even where beams part.

Shape suffixes: B prompts, N sequences of each (beams), T tokens of the longest prompt, S places for keys, V vocabulary.

Source: Holtzman et al. 2020 (arXiv 1904.09751) for top_p; Keskar et al. 2019 (arXiv 1909.05858) for the repetition
penalty; Wu et al. 2016 (arXiv 1609.08144) for the length penalty of beams.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

import fastlm.functional as F
from fastlm import recorded
from fastlm.ops.linear.op import quantize as quantize_weight

if TYPE_CHECKING:
    from fastlm.models.gpt import GPT

__all__ = ["Sampling", "generate", "next_token_probabilities", "quantized", "stream"]

LOST = -1e9  # added to the score of what must not be chosen; scores of beams are never -inf


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
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    quantize: Literal["int8"] | None = None,
) -> Tensor:
    """The prompts with what the model adds to them.

    Args:
        input_ids: (B, T) prompts; shorter ones padded on the left, which `attention_mask` says.
        max_new_tokens: at least 1; prompt and new tokens together must fit `max_seq_len`.
        attention_mask: (B, T), 0 where a prompt is padding.
        do_sample: draw from the distribution; otherwise take the likeliest token, and the next three do not count.
        temperature, top_k, top_p: see `next_token_probabilities`.
        repetition_penalty: above 0; scores of tokens that the sequence has so far are divided by it if positive, else
            multiplied.
        num_beams: above 1, the sequences whose tokens together are the likeliest among so many at a time.
        length_penalty: of beams: sums of log-probabilities are compared after division by length ** length_penalty.
        early_stopping: of beams: True ends when there are `num_beams` finished sequences, False when no other looks
            like becoming better, "never" when none can.
        num_return_sequences: sequences for each prompt: draws, or the best beams.
        eos_token_id: a sequence that has produced it, or one of several, is finished; the call ends when all are.
        pad_token_id: what finished sequences go on with; None is the first `eos_token_id`.
        seed: of the draws; None takes them from torch's default generator.
        quantize: "int8": linear layers of the new tokens take their weights in int8, with a scale for each output
            (`quantized`). On a CPU that is up to four times less to read; the prompts go through the model as it is.

    Returns:
        (B * num_return_sequences, T + n) the prompts followed by n new tokens, n at most `max_new_tokens`.

    Raises:
        ValueError: an option out of range, padding that is not on the left, or more tokens than `max_seq_len`.
    """
    options = _Options(
        do_sample, temperature, top_k, top_p, repetition_penalty, num_beams, length_penalty, early_stopping,
        num_return_sequences, eos_token_id, pad_token_id, seed, quantize,
    )  # fmt: skip
    _check_room(model, input_ids, attention_mask, max_new_tokens)
    if num_beams > 1:
        return _beam_search(model, input_ids, attention_mask, max_new_tokens, options)
    new = _tokens(model, input_ids, attention_mask, max_new_tokens, options)
    prompts = input_ids.repeat_interleave(num_return_sequences, 0)
    return torch.cat([prompts, *(token[:, None] for token in new)], dim=1)


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
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    quantize: Literal["int8"] | None = None,
) -> Iterator[Tensor]:
    """As `generate`, but yields the new tokens, (B * num_return_sequences,) at a time, as they come; without beams."""
    options = _Options(
        do_sample, temperature, top_k, top_p, repetition_penalty, 1, 1.0, False, num_return_sequences, eos_token_id,
        pad_token_id, seed, quantize,
    )  # fmt: skip
    _check_room(model, input_ids, attention_mask, max_new_tokens)
    return _tokens(model, input_ids, attention_mask, max_new_tokens, options)


def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What sampling draws from: fp32, shape of `logits`, (..., V).

    Args:
        temperature: above 0; the logits are divided by it.
        top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
        top_p: in (0, 1]; of those keep the smallest set of the likeliest that holds this much probability.
    """
    return Sampling(True, temperature, top_k, top_p).cut(logits.float()).softmax(-1)


def quantized(model: GPT) -> GPT:
    """A copy for inference whose linear layers have int8 weights; it shares everything else with the model.

    Args:
        model: stays as it is.

    Raises:
        ValueError: a weight is not finite.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
    if twin.config.tie_embeddings:
        twin.config = dataclasses.replace(twin.config, tie_embeddings=False)
        twin.add_module("head", Int8Linear(twin.token_embedding.weight, None))
    return twin


class Int8Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        int8, scale = quantize_weight(weight.detach())
        if not bool(scale.isfinite().all()):
            raise ValueError("quantize: the weights must be finite")
        self.weight: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight", int8)
        self.register_buffer("weight_scale", scale)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias, weight_scale=self.weight_scale)


# Options ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; fields as in `generate`."""

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._need(0.0 < self.temperature < math.inf, "temperature", "above 0 and finite")
        self._need(self.top_k >= 0, "top_k", "at least 1, or 0 for all tokens")
        self._need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        self._need(0.0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0")

    def _need(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"generate: {name} must be {what}, got {getattr(self, name)!r}")

    def choose(self, logits: Tensor, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B,) int64 the next tokens, of logits (B, V) after tokens (B, T), which only a repetition penalty reads."""
        scores = self.penalise(logits.float(), ids)
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(self.cut(scores).softmax(-1), 1, generator=generator)[:, 0]

    def penalise(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Scores (B, V), of tokens in `ids` (B, T) less likely by `repetition_penalty`."""
        if self.repetition_penalty == 1.0:
            return scores
        there = scores.gather(-1, ids.long())
        penalty = self.repetition_penalty
        return scores.scatter(-1, ids.long(), torch.where(there < 0, there * penalty, there / penalty))

    def cut(self, scores: Tensor, at_least: int = 1) -> Tensor:
        """Divided by the temperature, and -inf where a token cannot be drawn; so many tokens can be."""
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(min(max(self.top_k, at_least), scores.shape[-1]), dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1.0:
            ascending, order = scores.sort(dim=-1)
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[..., -at_least:] = False
            scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        return scores


@dataclass(frozen=True)
class _Options(Sampling):
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    seed: int | None = None
    quantize: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(self.num_beams >= 1, "num_beams", "at least 1")
        self._need(-math.inf < self.length_penalty < math.inf, "length_penalty", "finite")
        self._need(self.early_stopping in (True, False, "never"), "early_stopping", 'True, False or "never"')
        self._need(self.num_return_sequences >= 1, "num_return_sequences", "at least 1")
        most = self.num_beams if self.num_beams > 1 or not self.do_sample else self.num_return_sequences
        what = f"at most num_beams = {most}: without draws and beams there is but one"
        self._need(self.num_return_sequences <= most, "num_return_sequences", what)
        self._need(self.quantize in (None, "int8"), "quantize", '"int8" or None')

    @property
    def ends(self) -> list[int]:
        """Tokens that end a sequence."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @property
    def sequences(self) -> int:
        """For each prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @staticmethod
    def counted(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What is there already, to `penalise`: the prompts with one of their tokens for padding."""
        return input_ids if attention_mask is None else torch.where(attention_mask.bool(), input_ids, input_ids[:, -1:])

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def _check_room(model: GPT, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"generate: input_ids must have shape (B, T), T at least 1, got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt, longest = input_ids.shape[1], model.config.max_seq_len
    if prompt + max_new_tokens > longest:
        got = f"{prompt} and {max_new_tokens}"
        raise ValueError(f"generate: prompt and new tokens must fit max_seq_len = {longest}, got {got}")
    model._check(input_ids, attention_mask)
    if attention_mask is not None:
        mask = attention_mask.bool()
        if not bool(mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
            raise ValueError("generate: attention_mask must have its zeros, the padding, on the left of every prompt")


# Decoding -----------------------------------------------------------------------------------------------------------


class Decoder:
    """The model, token by token: `start` takes the prompts, `step` a token more of each sequence.

    Keys and values lie in one tensor each, (layers, B, H, S, D). Those of a prompt begin at place 0, without padding,
    once for all its sequences. One sequence of a prompt goes on where the prompt ends. Several write side by side,
    step by step, into places that they share, and a mask says whose each place is: where beams part, the mask is
    copied and not the keys.
    """

    def __init__(
        self, model: GPT, input_ids: Tensor, attention_mask: Tensor | None, sequences: int, steps: int, int8: bool
    ) -> None:
        self.model, self.sequences, self.filled = model, sequences, input_ids.shape[1]
        self.steps_model = quantized(model) if int8 else model
        (B, T), device, config = input_ids.shape, input_ids.device, model.config
        self.ids, self.lengths, self.padded = input_ids, torch.full((B,), T, dtype=torch.int32, device=device), False
        if attention_mask is not None:
            self.lengths = attention_mask.bool().sum(1, dtype=torch.int32)
            self.padded = bool((self.lengths < T).any())
            self.ids = input_ids.gather(1, (torch.arange(T, device=device) - self.lengths[:, None]) % T)
        self.slopes, self.layers = model.alibi_slopes(device), len(model.blocks)
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        places = T + steps * sequences
        cache = model.token_embedding.weight.new_empty((2, self.layers, B, heads, places, size))
        self.keys, self.values = cache.unbind(0)
        if sequences > 1:
            self.sees = torch.zeros(B, sequences, places, dtype=torch.bool, device=device)
            self.sees[..., :T] = (torch.arange(T, device=device) < self.lengths[:, None])[:, None]
            self.own = torch.eye(sequences, dtype=torch.bool, device=device)
            # Where a key is in its sequence: there is no telling from its place.
            self.positions = torch.arange(T, device=device).repeat(B, 1)
            self.mask = self.sees[:, None]
            if self.slopes is not None:
                wide = torch.promote_types(cache.dtype, torch.float32)
                self.mask = cache.new_empty((B, heads, sequences, places), dtype=wide)
        self.recorded: recorded.RecordedStep | None = None
        if recorded.serves(self.steps_model, B * sequences):
            self.places = torch.zeros(B * sequences, dtype=torch.int64)
            # Of the keys that are filled.
            self.ends = self.lengths if sequences == 1 else torch.zeros_like(self.lengths)
            self.recorded = recorded.RecordedStep(
                self.steps_model, self.keys, self.values, self.places, self.ends,
                None if sequences == 1 else self.mask, self.slopes if sequences == 1 else None,
            )  # fmt: skip

    @torch.inference_mode()
    def start(self) -> Tensor:
        """(B, V) logits of the first new token."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, :, :, : self.filled], self.values[layer, :, :, : self.filled] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, alibi_slopes=self.slopes)

        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        hidden_BTC = self._run(self.model, self.ids, positions, attend)
        last = (self.lengths.long() - 1)[:, None, None].expand(-1, 1, hidden_BTC.shape[2])
        return self.model.logits(hidden_BTC.gather(1, last)[:, 0])

    @torch.inference_mode()
    def step(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """(B * N, V) logits after one token more, which the next step may overwrite.

        Args:
            tokens: (B, N) of each sequence.
            parents: (B, N) which sequence of its prompt each goes on from; None: itself.
        """
        first, stop = self.filled, self.filled + self.sequences
        if self.sequences > 1:
            if parents is not None:
                self.sees.copy_(self.sees.gather(1, parents[..., None].expand_as(self.sees)))
            self.sees[:, :, first:stop] = self.own
            if self.slopes is not None:
                self._bias(stop)
        positions = self.lengths.repeat_interleave(self.sequences)[:, None].long()
        self.lengths += 1
        self.filled = stop
        if self.recorded is not None:
            if self.sequences == 1:
                self.places.copy_(positions[:, 0])
            else:
                self.places.copy_(torch.arange(first, stop).repeat(len(tokens)))
                self.ends.fill_(stop)
            with _without_dropout(self.steps_model):
                return self.recorded(self.steps_model.embed(tokens.reshape(-1, 1), positions)[:, 0])
        lengths = self.lengths if self.padded or self.slopes is not None else None
        # Of every layer, here: an index costs more than what it names.
        keys, values = self.keys[..., :stop, :].unbind(0), self.values[..., :stop, :].unbind(0)
        if self.padded and self.sequences == 1:
            each = (torch.arange(len(tokens), device=tokens.device), slice(None), positions[:, 0])
        else:
            new_keys, new_values = self.keys[..., first:stop, :].unbind(0), self.values[..., first:stop, :].unbind(0)

        def alone(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q, k, v (B, H, 1, D)."""
            if self.padded:
                keys[layer][each], values[layer][each] = k[:, :, 0], v[:, :, 0]
            else:
                new_keys[layer].copy_(k)
                new_values[layer].copy_(v)
            return F.scaled_dot_product_attention(
                q, keys[layer], values[layer], alibi_slopes=self.slopes, key_lengths=lengths
            )

        def together(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q, k, v (B * N, H, 1, D): a prompt's sequences are the queries of one attention."""
            q, k, v = (x[:, :, 0].unflatten(0, (-1, self.sequences)).transpose(1, 2) for x in (q, k, v))
            new_keys[layer].copy_(k)
            new_values[layer].copy_(v)
            y_BHND = F.scaled_dot_product_attention(q, keys[layer], values[layer], self.mask[..., :stop])
            return y_BHND.transpose(1, 2).flatten(0, 1)[:, :, None]

        attend = alone if self.sequences == 1 else together
        hidden = self._run(self.steps_model, tokens.reshape(-1, 1), positions, attend)
        return self.steps_model.logits(hidden[:, 0])

    def _run(self, model: GPT, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        with _without_dropout(model):
            return model.run(ids, positions, [functools.partial(attend, layer) for layer in range(self.layers)])

    def _bias(self, stop: int) -> None:
        """Fills the mask: by how much keys before `stop` are seen."""
        assert self.slopes is not None
        now = self.lengths[:, None].expand(-1, self.sequences)
        self.positions = torch.cat((self.positions, now), 1)
        distances = (now[:, None, :, None] - self.positions[:, None, None]).abs()
        bias = -self.slopes[:, None, None] * distances
        self.mask[..., :stop] = bias.masked_fill(~self.sees[:, None, :, :stop], -torch.inf)


@contextlib.contextmanager
def _without_dropout(model: GPT) -> Iterator[None]:
    if not model.training:
        yield
        return
    try:
        model.eval()
        yield
    finally:
        model.train()


@torch.no_grad()
def _tokens(
    model: GPT, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, options: _Options
) -> Iterator[Tensor]:
    """The new tokens, (B * N,) at a time."""
    N, ends = options.sequences, torch.tensor(options.ends, device=input_ids.device)
    generator = options.generator(input_ids.device)
    pad = options.pad_token_id if options.pad_token_id is not None else next(iter(options.ends), 0)
    decoder = Decoder(model, input_ids, attention_mask, N, max_new_tokens, options.quantize == "int8")
    ids = options.counted(input_ids, attention_mask).repeat_interleave(N, 0)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    logits = decoder.start().repeat_interleave(N, 0)
    for step in itertools.count(1):
        new = options.choose(logits, ids, generator).to(ids.dtype)
        if len(ends):
            new = new.masked_fill(finished, pad)
            finished |= torch.isin(new, ends)
        yield new
        if step == max_new_tokens or (len(ends) and bool(finished.all())):
            return
        if options.repetition_penalty != 1.0:
            ids = torch.cat((ids, new[:, None]), 1)
        logits = decoder.step(new.view(-1, N))


@torch.no_grad()
def _beam_search(
    model: GPT, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, options: _Options
) -> Tensor:
    """The best `num_return_sequences` of `num_beams` beams.

    Of all one-token continuations of a prompt's beams the best few are kept: as many as that `num_beams` of them have
    not ended. Those go on. The ended ones among the first `num_beams` compete with what has ended before, by their sum
    of log-probabilities divided by length ** length_penalty.
    """
    (B, T), N, ends, device = input_ids.shape, options.num_beams, options.ends, input_ids.device
    generator = options.generator(device)
    candidates = min(max(2, 1 + len(ends)), model.config.vocab_size) * N
    decoder = Decoder(model, input_ids, attention_mask, N, max_new_tokens, options.quantize == "int8")
    pad = (options.pad_token_id or ends[0]) if ends else 0
    running = input_ids.new_full((B, N, T + max_new_tokens), pad)
    running[:, :, :T] = options.counted(input_ids, attention_mask)[:, None]
    sums = torch.zeros(B, N, device=device)
    sums[:, 1:] = LOST  # the beams of a prompt are all the same, so the first one has all their continuations
    best, best_scores = running.clone(), torch.full((B, N), LOST, device=device)
    best_sizes = torch.zeros(B, N, dtype=torch.int64, device=device)
    has_ended = torch.zeros(B, N, dtype=torch.bool, device=device)
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)
    among_first = torch.arange(candidates, device=device) < N
    logits = decoder.start().repeat_interleave(N, 0)
    for size in range(1, max_new_tokens + 1):
        scores = options.penalise(logits.float().log_softmax(-1), running[..., : T + size - 1].flatten(0, 1))
        if options.do_sample:
            scores = options.cut(scores, 1 + max(1, len(ends)))
        V = scores.shape[-1]
        total = (scores.view(B, N, V) + sums[..., None]).view(B, N * V)
        if options.do_sample:
            places = torch.multinomial(total.softmax(-1), candidates, generator=generator)
            found = total.gather(1, places)
        else:
            found, places = total.topk(candidates)
        parents, tokens = places // V, (places % V).to(running.dtype)
        continued = _pick(running, parents)
        continued[..., T + size - 1] = tokens
        ended = torch.isin(tokens, torch.tensor(ends, device=device)) | (size == max_new_tokens)

        sums, order = (found + LOST * ended).topk(N)
        running, going_on, last = (_pick(x, order) for x in (continued, parents, tokens))

        full = has_ended.all(1, keepdim=True) & (options.early_stopping is True)
        out = ~(ended & among_first) | full | ~improvable
        merged = torch.cat((best_scores, found / size**options.length_penalty + LOST * out), 1)
        best_scores, order = merged.topk(N)
        best = _pick(torch.cat((best, continued), 1), order)
        best_sizes = _pick(torch.cat((best_sizes, torch.full_like(places, size)), 1), order)
        has_ended = _pick(torch.cat((has_ended, ended & among_first), 1), order)

        length = max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else size
        worst = torch.where(has_ended, best_scores.amin(1, keepdim=True), LOST)
        improvable &= (sums[:, :1] / length**options.length_penalty > worst).any(1, keepdim=True)
        enough = has_ended.all() & (options.early_stopping is True)
        if bool(~improvable.any() | enough | ended.all()):
            break
        logits = decoder.step(last, going_on)
    best[:, :, :T] = input_ids[:, None]
    n = options.num_return_sequences
    longest = max(best_sizes[:, :n].flatten().tolist(), default=0)
    return best[:, :n, : T + longest].flatten(0, 1)


def _pick(x: Tensor, order: Tensor) -> Tensor:
    """(B, n, ...) those of x, (B, m, ...), that `order`, (B, n), names."""
    return x.take_along_dim(order.view(*order.shape, *[1] * (x.dim() - 2)), 1)
