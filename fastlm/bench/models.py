"""Whole models: training steps and generation, FastLM's functions against PyTorch's and against transformers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as plain
from torch import Tensor, nn

import fastlm.functional as F
from fastlm.bench.cases import NAMES, plain_add_norm, plain_linear_cross_entropy
from fastlm.bench.harness import compare
from fastlm.bench.suite import COMPILED, EAGER, OURS, OURS_COMPILED, THEIRS, Job, Result, one_line
from fastlm.models import GPT, BERTConfig, BERTForMaskedLM, GPTConfig, bert, gpt
from fastlm.train import TrainConfig

__all__ = ["PLAIN", "Loop", "jobs"]

INT8 = "FastLM int8"
# Type of device -> model, batch, tokens of a training step; 4 layers of 768.
STEPS = {"cpu": (("GPT", 2, 256), ("BERT", 4, 128)), "cuda": (("GPT", 8, 512), ("BERT", 32, 128))}
LAYERS, WIDTH, HEADS = 4, 768, 12
GPT2_SMALL = {"vocab_size": 50257, "max_seq_len": 1024, "hidden_size": 768, "num_layers": 12, "num_heads": 12}
PROMPT, NEW = 32, 64
GENERATIONS = {"batch 1": (1, 1), "batch 8": (8, 1), "5 beams": (1, 5)}  # name -> batch, beams


def plain_attention(*args: Any, alibi_slopes: None = None, **options: Any) -> Tensor:
    return plain.scaled_dot_product_attention(*args, **options)


# The functions of FastLM that a model uses, in functions of PyTorch.
PLAIN = SimpleNamespace(
    add_layer_norm=plain_add_norm(plain.layer_norm),
    add_rms_norm=plain_add_norm(plain.rms_norm),
    cross_entropy=plain.cross_entropy,
    layer_norm=plain.layer_norm,
    linear=plain.linear,
    linear_cross_entropy=plain_linear_cross_entropy,
    rms_norm=plain.rms_norm,
    scaled_dot_product_attention=plain_attention,
)


class Loop:
    """A training loop as one writes it in PyTorch: autocast, AdamW, clipping.

    Args:
        model: what is trained; its first result is the loss.
        config: rate, decay, clipping and dtype.
        module: of the model, whose functions `F` are replaced; None for a model that is not ours.
        functions: by these.
        compiled: whether the model's forward is compiled.
        optimizer: of another loop with the same model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        module: Any = None,
        functions: Any = PLAIN,
        compiled: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.config, self.module, self.functions = model.train(), config, module, functions
        self.forward: Callable[..., Any] = torch.compile(model.forward, dynamic=False) if compiled else model
        options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": config.weight_decay, "fused": True}
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=config.lr, **options)

    def backward(self, inputs: dict[str, Any]) -> Tensor:
        functions = mock.patch.object(self.module, "F", self.functions) if self.module else nullcontext()
        with functions, self.config.autocast():
            loss = self.forward(**inputs).loss
        loss.backward()
        return loss.detach()

    def step(self, inputs: dict[str, Any], lr: float | None = None) -> Tensor:
        loss = self.backward(inputs)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def found(self, inputs: dict[str, Any]) -> Tensor:
        """The loss and the norm of its gradient, which leave the model as it was."""
        loss = self.backward(inputs)
        norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        return torch.stack([loss.double(), norm.double()])


def jobs(device: torch.device, dtypes: Sequence[torch.dtype], compiled: bool, seconds: float) -> list[Job]:
    """Training steps and generation; on a GPU in the first dtype alone, for compiling them takes long."""
    dtypes = dtypes if device.type == "cpu" else dtypes[:1]
    named = []
    for dtype in dtypes:
        for kind, batch, tokens in STEPS[device.type]:
            name = f"{kind} step {LAYERS}x{WIDTH} B{batch} T{tokens} {NAMES[dtype]}"
            run = functools.partial(_step, name, kind, batch, tokens, dtype, device, compiled, seconds)
            named.append(Job(name, run))
        for case, (batch, beams) in GENERATIONS.items():
            name = f"GPT-2 small generates {NEW}, {case} {NAMES[dtype]}"
            named.append(Job(name, functools.partial(_generation, name, batch, beams, dtype, device, seconds)))
    return named


def _transformers() -> Any:
    """The library, None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _models(kind: str, tokens: int, device: torch.device) -> tuple[nn.Module, nn.Module | None]:
    """FastLM's model and transformers' with the same weights, without dropout."""
    library = _transformers()
    if kind == "GPT":
        if library is None:
            return GPT(GPTConfig(50304, tokens, WIDTH, LAYERS, HEADS)).to(device), None
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        sizes = {"n_positions": tokens, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        config = library.GPT2Config(vocab_size=50304, **sizes, **off)
        theirs = library.GPT2LMHeadModel(config)
        return GPT.from_pretrained(theirs).to(device), theirs.to(device)
    if library is None:
        return BERTForMaskedLM(BERTConfig(30522, 512, WIDTH, LAYERS, HEADS)).to(device), None
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    theirs = library.BertForMaskedLM(library.BertConfig(intermediate_size=4 * WIDTH, **sizes, **off))
    return BERTForMaskedLM.from_pretrained(theirs).to(device), theirs.to(device)


def _step(
    name: str,
    kind: str,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    seconds: float,
) -> Result:
    """A training step: forward, backward, clipping and AdamW. All sides but transformers train one model."""
    torch.manual_seed(0)
    torch.compiler.reset()
    ours, theirs = _models(kind, tokens, device)
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 0, "weight_decay": 0.01}
    settings |= {"steps": 10**6, "batch_size": batch, "seq_len": tokens, "dtype": NAMES[dtype], "device": device.type}
    config = TrainConfig(**settings)
    module = gpt if kind == "GPT" else bert
    ids = torch.randint(30000, (batch, tokens), device=device)
    inputs = {"input_ids": ids, "labels": ids}
    loops = {EAGER: Loop(ours, config, module)}
    shared = loops[EAGER].optimizer
    loops[OURS] = Loop(ours, config, module, F, optimizer=shared)
    if compiled:
        loops[COMPILED] = Loop(ours, config, module, compiled=True, optimizer=shared)
        loops[OURS_COMPILED] = Loop(ours, config, module, F, compiled=True, optimizer=shared)
    missing = {}
    if theirs is None:
        missing[THEIRS] = "not installed"
    else:
        loops[THEIRS] = Loop(theirs, config)
    wrong = _disagreeing(loops, inputs, config, module, dtype, missing)
    runs: dict[str, Callable[[], object]] = {
        side: functools.partial(loop.step, inputs)
        for side, loop in loops.items()
        if not (side in wrong or side in missing)
    }
    timed = compare(name, runs, seconds=seconds, least=5, memory=True, settle=True, device=device)
    return Result(**vars(timed), kind="step", dtype=NAMES[dtype], wrong=wrong, missing=missing)


def _disagreeing(
    loops: dict[str, Loop],
    inputs: dict[str, Any],
    config: TrainConfig,
    module: Any,
    dtype: torch.dtype,
    missing: dict[str, str],
) -> dict[str, str]:
    """Sides whose loss or norm of the gradient is further from that in float64 than the dtype explains."""
    double = Loop(copy.deepcopy(loops[EAGER].model).double(), dataclasses.replace(config, dtype="fp32"), module)
    exact = double.found(inputs)
    eager = (loops[EAGER].found(inputs) - exact).abs()
    allowed = 2 * eager + 32 * torch.finfo(dtype).eps * exact.abs()
    wrong = {}
    for side, loop in loops.items():
        try:
            found = loop.found(inputs)
        except Exception as error:
            missing[side] = one_line(error)
            continue
        if not ((found - exact).abs() <= allowed).all():
            wrong[side] = f"loss and norm of the gradient are {found.tolist()}, in float64 {exact.tolist()}"
    return wrong


def _generation(name: str, batch: int, beams: int, dtype: torch.dtype, device: torch.device, seconds: float) -> Result:
    """`NEW` tokens after a prompt of `PROMPT`, with a cache, greedily or by beams."""
    torch.manual_seed(0)
    library, missing = _transformers(), {}
    ours = GPT(GPTConfig.from_dict(GPT2_SMALL))
    ids = torch.randint(ours.config.vocab_size, (batch, PROMPT), device=device)
    runs: dict[str, Callable[[], object]] = {}
    if library is None:
        missing[THEIRS] = "not installed"
    else:
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        config = library.GPT2Config(**dict(zip(names, GPT2_SMALL.values(), strict=True)))
        theirs = library.GPT2LMHeadModel(config)
        ours = GPT.from_pretrained(theirs)
        theirs = theirs.to(device, dtype).eval()
        theirs.generation_config = library.GenerationConfig()
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW}
        runs[THEIRS] = lambda: theirs.generate(ids, **options, do_sample=False, num_beams=beams)
    ours = ours.to(device, dtype).eval()
    runs[OURS] = lambda: ours.generate(ids, NEW, num_beams=beams)
    runs[INT8] = lambda: ours.generate(ids, NEW, num_beams=beams, quantize="int8")
    found, wrong = dict[str, Any](), {}
    for side, run in list(runs.items()):
        try:
            found[side] = run()
        except Exception as error:
            missing[side] = one_line(error)
            del runs[side]
    if dtype == torch.float32 and THEIRS in found and OURS in found and not torch.equal(found[THEIRS], found[OURS]):
        wrong[OURS] = "its tokens are not those of transformers"
        del runs[OURS]
    weights = [p for key, p in ours.named_parameters() if p.dim() == 2 and "position" not in key]
    # What every token must read: the weights of all linear layers, the embedding as the last layer's.
    bytes = NEW * sum(p.nbytes for p in weights)
    timed = compare(name, runs, bytes=bytes, seconds=seconds, least=3, memory=True, device=device)
    return Result(**vars(timed), kind="generation", dtype=NAMES[dtype], wrong=wrong, missing=missing)
