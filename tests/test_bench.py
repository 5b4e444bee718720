"""`fastlm bench`: cases, the check before timing, peers, budget, report, command, and what runs it on a GPU."""

import dataclasses
import importlib.machinery
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as plain

import fastlm
import fastlm.functional as F
from fastlm import cli
from fastlm.bench import cases, harness, models, peers, suite
from fastlm.bench.cases import STANDARD, Case, parse, standard
from fastlm.bench.harness import Comparison, compare
from fastlm.bench.report import Report, slow
from fastlm.bench.suite import COMPILED, EAGER, OURS, Job, Result, measure, run_jobs
from fastlm.ops.registry import OPS, Backend

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
HERE = ("native", "cpu", "onednn")  # not what other tests register


def one(text):
    (case,) = parse(text, dtypes=[torch.float32])
    return case


@pytest.fixture
def untimed(monkeypatch):
    """Whoever is to be timed is said to take a second."""

    def untimed(case, sides, *, bytes, **_):
        return Comparison(case, {name: [1.0] for name in sides}, bytes)

    monkeypatch.setattr(suite, "compare", untimed)


# --- cases


def test_a_case_is_read_as_it_is_written():
    for device in STANDARD:
        for text in STANDARD[device]:
            for case in parse(text, device, [torch.float32, torch.bfloat16]):
                assert parse(str(case)) == [case]
    assert one("attention:2x4x8x16,window=5,causal") == one("scaled_dot_product_attention 2x4x8x16 causal window=5")
    assert str(one("attention:2x4x8x16,window=5,causal")) == "attention 2x4x8x16 causal window=5 fp32"
    assert str(one("attention:2x4x8x16,window")) == "attention 2x4x8x16 window=256 fp32"
    assert [case.dtype for case in parse("linear:1x2x3")] == [torch.float32, torch.bfloat16]


def test_an_op_alone_means_its_standard_cases():
    found = parse("layer_norm", dtypes=[torch.bfloat16])
    assert [str(case) for case in found] == [f"{t} bf16" for t in STANDARD["cpu"] if t.startswith("layer_norm ")]
    assert parse("varlen") == [case for case in standard("cpu") if case.op == "varlen_attention"]
    assert len(standard("cpu")) == 2 * len(STANDARD["cpu"]) == len(set(standard("cpu")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer_nrom", "unknown op 'layer_nrom'; did you mean layer_norm?"),
        ("layer_nrom:3x4", "unknown op 'layer_nrom'; did you mean layer_norm?"),
        ("", "unknown op ''"),
        ("layer_norm:3", "layer_norm: sizes must be ROWSxCOLUMNS, got 3"),
        ("layer_norm:3x", "'layer_norm:3x': sizes must be ROWSxCOLUMNS, got '3x'"),
        ("attention:1x2", "attention: sizes must be BxHxTxD or BxHxTqxTkxD, got 1x2"),
        ("attention,causal", "'attention,causal': sizes must be BxHxTxD or BxHxTqxTkxD, got 'causal'"),
        ("linear:0x1x2", "linear: sizes must be ROWSxINxOUT, got 0x1x2"),
        ("attention:1x2x3x4,casual", "attention: unknown option 'casual'; did you mean causal?"),
        ("layer_norm:3x4,bf61", "layer_norm: unknown option 'bf61'; did you mean bf16?"),
        ("layer_norm:3x4,causal", "layer_norm has no option causal"),
        ("attention:1x2x3x4,window=x", "attention: window must be a number, got 'x'"),
        ("attention:1x2x3x4,gqa=3", "attention: gqa must divide the 2 heads, got 3"),
        ("add_layer_norm:3x4,dropout=1", "add_layer_norm: dropout must be below 1, got 1"),
        ("attention:1x2x3x4,window=-1", "attention: window must be above 0, got -1"),
        ("attention:1x2x3x4,masked,window", "attention: masked goes with neither window, which .*, nor cached"),
        ("attention:1x2x5x4x8,cached", "attention: a cache of 4 keys must hold the 5 queries' own"),
    ],
)
def test_what_is_wrong_with_a_case_is_named(text, message):
    with pytest.raises(ValueError, match=message if ".*" in message else f"^{re.escape(message)}$"):
        parse(text)


def reduced(case):
    """The case at sizes that take no time."""
    op, sizes = case.op, case.sizes
    if "attention" in op:
        sizes = (min(3, sizes[0]), 4, *(min(20, size) for size in sizes[2:]))
    else:
        sizes = (min(6, sizes[0]), *(min(24, size) for size in sizes[1:]))
    return dataclasses.replace(case, sizes=sizes, options=tuple(o.replace("256", "5") for o in case.options))


# What no standard case has: windows to both sides, queries that are fewer than the keys, options together.
MORE = (
    "attention 2x4x20x16 window=5",
    "attention 2x4x7x20x16",
    "attention 2x4x20x16 causal masked gqa=2",
    "attention 2x4x20x16 softcap=3 alibi window=5 gqa=2",
    "attention 2x4x3x20x16 cached window=5",
    "varlen 3x4x20x16 window=5",
    "varlen 3x4x20x16 causal alibi gqa=2 dropout=0.2",
)
REDUCED = list(dict.fromkeys(reduced(parse(t)[0]) for texts in (*STANDARD.values(), MORE) for t in texts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", REDUCED, ids=lambda case: str(case).removesuffix(" fp32"))
def test_every_standard_case_passes_the_check(untimed, case, dtype):
    result = measure(dataclasses.replace(case, dtype=dtype), CPU, HERE, compiled=False)
    assert not result.wrong
    assert result.shares[OURS] <= 1
    assert f"{OURS} native" in (result.missing if case.option("softcap") else result.shares)
    assert result.bytes > 0
    assert result.flops > 0
    named = {f"{OURS} {name}" for name in HERE}
    assert set(result.missing) <= named | {peer.name for peer in peers.PEERS}


def test_what_is_moved_and_computed_is_counted():
    norm = one("add_layer_norm:6x8").build()
    assert norm.bytes == 8 * 6 * 8 * 4  # four of them each way
    assert one("cross_entropy:6x8,in_place").build().bytes == 2 * 6 * 8 * 4
    causal, full = (one(f"attention:2x3x5x4{option}").build() for option in (",causal", ""))
    assert causal.flops == 14 * 2 * 3 * 4 * 15
    assert full.flops == 14 * 2 * 3 * 4 * 25
    assert full.bytes == 12 * 2 * 3 * 5 * 4 * 4
    decode = one("attention:2x3x1x10x4,cached,forward").build()
    assert decode.flops == 4 * 3 * 4 * (10 + 1)  # caches of 10 and 1 keys
    assert decode.bytes == (2 * 2 + 2 * 11) * 3 * 4 * 4
    assert one("linear_cross_entropy:2x3x5").build().flops == 6 * 2 * 3 * 5


def test_a_step_goes_both_ways_or_forward_alone():
    grads = []
    problem = one("layer_norm:3x4").build()
    problem.inputs[0].register_hook(grads.append)
    problem.step(problem.plain)()
    assert len(grads) == 1
    assert problem.inputs[0].grad is None
    seen = []
    one("layer_norm:3x4,forward").build().step(lambda *_: seen.append(torch.is_grad_enabled()))()
    assert seen == [False]


# --- the check


@pytest.fixture
def backend():
    """Registers a backend of layer_norm for the test."""

    def register(call):
        fastlm.register_backend("layer_norm", Backend("bench_trial", devices=frozenset({"cpu"}), call=call))

    yield register
    op = OPS["layer_norm"]
    op.backends.pop("bench_trial", None)
    op.calls.pop("bench_trial", None)
    op._chosen.clear()


def test_a_wrong_backend_is_not_timed(backend, untimed, capsys):
    backend(lambda x, *rest: plain.layer_norm(x, *rest) * 1.001)
    result = measure(one("layer_norm:8x16"), CPU, ["native", "bench_trial"], compiled=False)
    assert set(result.wrong) == {f"{OURS} bench_trial"}
    assert set(result.times) == {EAGER, OURS, f"{OURS} native"}
    assert re.search(r"output 0: off by .* where .* is allowed .*; gradient 0", result.wrong[f"{OURS} bench_trial"])
    assert "WRONG  FastLM bench_trial output 0" in capsys.readouterr().out


def test_a_wrong_gradient_alone_is_found(backend, untimed):
    backend(lambda x, *rest: plain.layer_norm(x * 1.0 + (x - x.detach()) * 0.001, *rest))
    result = measure(one("layer_norm:8x16"), CPU, ["bench_trial"], compiled=False)
    assert result.wrong[f"{OURS} bench_trial"].startswith("gradient 0: off by")


def test_a_backend_that_raises_is_said(backend, untimed):
    def broken(x, *rest):
        raise RuntimeError("no such\n  luck")

    backend(broken)
    result = measure(one("layer_norm:8x16"), CPU, ["bench_trial"], compiled=False)
    assert result.missing[f"{OURS} bench_trial"] == "no such luck"
    assert set(result.times) == {EAGER, OURS}


def test_a_backend_that_cannot_serve_is_said(untimed):
    result = measure(parse("linear:2x4x4", dtypes=[torch.bfloat16])[0], CPU, ["onednn"], compiled=False)
    assert result.missing[f"{OURS} onednn"] == "does not serve torch.bfloat16"


def test_the_compiler_takes_part_and_its_errors_are_said(untimed, monkeypatch):
    def compile(function, dynamic):
        raised = RuntimeError("compile error")

        def run(*_):
            raise raised

        return run

    monkeypatch.setattr(torch, "compile", compile)
    result = measure(one("layer_norm:8x16"), CPU, [])
    assert result.missing[COMPILED] == "compile error"
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    assert COMPILED in measure(one("layer_norm:8x16"), CPU, []).times


def test_others_are_timed_in_spite_of_a_little_more_rounding(backend, untimed, monkeypatch):
    def off(factor):
        monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *x: function(*x) * (1 + factor))
        return measure(one("layer_norm:8x16,forward"), CPU, [])

    little = off(2e-6)
    assert 1 < little.shares[COMPILED] < suite.LENIENCE
    assert COMPILED in little.times
    assert COMPILED in off(1e-3).wrong
    backend(lambda x, *rest: plain.layer_norm(x, *rest) * (1 + 2e-6))
    ours = measure(one("layer_norm:8x16,forward"), CPU, ["bench_trial"], compiled=False)
    assert f"{OURS} bench_trial" in ours.wrong


# --- peers


def installed(monkeypatch, name, **members):
    """Puts a module, and those above it, where an import finds it."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__spec__ = importlib.machinery.ModuleSpec(path, None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """Peers take the CPU for a GPU."""
    monkeypatch.setattr(peers, "SERVED", ("cpu",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def timed_peers(result):
    return {peer.name for peer in peers.PEERS} & set(result.times)


def applied(function):
    return type("Function", (), {"apply": staticmethod(function)})


def test_a_peer_says_why_it_does_not_take_part(monkeypatch):
    problem = one("attention:1x2x4x8,masked").build()
    flash = next(peer for peer in peers.PEERS if peer.name == "flash-attn")
    with pytest.raises(peers.Unfit, match=r"^not installed$"):
        flash.side(problem)
    installed(monkeypatch, "flash_attn")
    with pytest.raises(peers.Unfit, match=r"^serves GPUs, not cpu$"):
        flash.side(problem)
    monkeypatch.setattr(peers, "SERVED", ("cpu",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(peers.Unfit, match=r"^serves bf16 and fp16, on GPUs from Ampere on$"):
        flash.side(problem)
    problem = parse("attention:1x2x4x8,masked", dtypes=[torch.bfloat16])[0].build()
    with pytest.raises(peers.Unfit, match=r"^does not serve masked$"):
        flash.side(problem)


def test_norms_of_peers_are_called_as_they_are_written(monkeypatch, gpu, untimed):
    def add_rms_norm(x, residual, weight, eps, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "llama", False)
        return plain.rms_norm(x + residual, x.shape[1:], weight, eps), x + residual

    layer_norm = applied(lambda x, weight, bias, eps: plain.layer_norm(x, x.shape[1:], weight, bias, eps))
    rms_norm = applied(lambda x, weight, eps, *_: plain.rms_norm(x, x.shape[1:], weight, eps))
    installed(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=layer_norm)
    installed(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=rms_norm)
    installed(monkeypatch, "liger_kernel.ops.fused_add_rms_norm", LigerFusedAddRMSNormFunction=applied(add_rms_norm))
    installed(
        monkeypatch,
        "apex.normalization.fused_layer_norm",
        fused_layer_norm_affine=lambda x, weight, bias, shape, eps: plain.layer_norm(x, shape, weight, bias, eps),
        fused_rms_norm_affine=lambda x, weight, shape, eps: plain.rms_norm(x, shape, weight, eps),
    )
    installed(monkeypatch, "transformer_engine.pytorch", LayerNorm=torch.nn.LayerNorm, RMSNorm=torch.nn.RMSNorm)
    for op, all_three in (("layer_norm", True), ("rms_norm", True), ("add_rms_norm", False)):
        result = measure(one(f"{op}:5x16"), CPU, [], compiled=False)
        assert not result.wrong
        assert timed_peers(result) == (
            {"liger-kernel", "apex", "transformer-engine"} if all_three else {"liger-kernel"}
        )
    missing = measure(one("add_rms_norm:5x16,dropout"), CPU, [], compiled=False).missing
    assert missing["liger-kernel"] == "does not serve dropout"


def test_losses_of_peers_may_overwrite_what_they_are_given(monkeypatch, gpu, untimed):
    def cross_entropy(x, target, weight):
        loss = plain.cross_entropy(x * 1.0, target, weight)
        x.data.zero_()  # as Liger, which writes the gradient there
        return loss, None, None, None

    def linear_cross_entropy(x, weight, target):
        return plain.cross_entropy(x @ weight.mT, target), None, None, None

    installed(monkeypatch, "liger_kernel.ops.cross_entropy", LigerCrossEntropyFunction=applied(cross_entropy))
    name = "liger_kernel.ops.fused_linear_cross_entropy"
    installed(monkeypatch, name, LigerFusedLinearCrossEntropyFunction=applied(linear_cross_entropy))
    for text in ("cross_entropy:5x16", "linear_cross_entropy:5x8x16"):
        result = measure(one(text), CPU, ["native"], compiled=False)
        assert not result.wrong
        assert timed_peers(result) == {"liger-kernel"}
    problem = one("cross_entropy:5x16").build()
    liger = next(peer for peer in peers.PEERS if peer.name == "liger-kernel").side(problem)
    problem.step(liger.function, liger.inputs)()
    assert problem.inputs[0].abs().sum() > 0


def heads_outside(q, k, v, **options):
    return plain.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def test_attention_of_peers_has_its_heads_inside(monkeypatch, gpu, untimed):
    class DotProductAttention:
        def __init__(self, heads, width, *, num_gqa_groups, attention_dropout, qkv_format, attn_mask_type):
            assert (heads, width, qkv_format, attention_dropout) == (4, 8, "bshd", 0.0)
            self.causal = {"causal": True, "no_mask": False}[attn_mask_type]

        def __call__(self, q, k, v):
            return heads_outside(q, k, v, is_causal=self.causal, enable_gqa=True).flatten(2)

    def flash(q, k, v, causal, window_size=(-1, -1), **options):
        assert not options
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        left, right = window_size
        assert right == (0 if causal and left > 0 else left)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, window=(left, -1 if causal else right), enable_gqa=True
        ).transpose(1, 2)

    def cached(q, k, v, causal, cache_seqlens):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, key_lengths=cache_seqlens).transpose(1, 2)

    installed(monkeypatch, "flash_attn", flash_attn_func=flash, flash_attn_with_kvcache=cached)
    installed(
        monkeypatch,
        "xformers.ops",
        LowerTriangularMask=lambda: "causal",
        memory_efficient_attention=lambda q, k, v, attn_bias, p: heads_outside(
            q, k, v, is_causal=attn_bias == "causal"
        ),
    )
    installed(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    everyone = {"flash-attn", "xformers", "transformer-engine"}
    for text, served in {
        "attention:2x4x12x8": everyone,
        "attention:2x4x12x8,causal": everyone,
        "attention:2x4x12x8,causal,gqa=2": everyone - {"xformers"},
        "attention:2x4x12x8,window=3": {"flash-attn"},
        "attention:2x4x12x8,causal,window=3": {"flash-attn"},
        "attention:2x4x1x12x8,causal,cached,forward": {"flash-attn"},
        "attention:2x4x3x12x8": set(),
    }.items():
        result = measure(parse(text, dtypes=[torch.bfloat16])[0], CPU, [], compiled=False)
        assert not result.wrong
        assert timed_peers(result) == served, result.missing


def test_packed_attention_of_flash_attn_gets_the_bounds(monkeypatch, gpu, untimed):
    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, alibi_slopes=None):
        return F.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=causal, alibi_slopes=alibi_slopes)

    installed(monkeypatch, "flash_attn", flash_attn_varlen_func=varlen)
    for options in ("", ",causal", ",causal,alibi"):
        case = parse(f"varlen:3x4x12x8{options}", dtypes=[torch.bfloat16])[0]
        result = measure(case, CPU, [], compiled=False)
        assert not result.wrong
        assert timed_peers(result) == {"flash-attn"}


def test_a_peer_that_is_wrong_or_raises_ends_nothing(monkeypatch, gpu, untimed):
    twice = applied(lambda x, weight, bias, eps: 2 * plain.layer_norm(x, x.shape[1:], weight, bias, eps))
    installed(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=twice)
    installed(monkeypatch, "apex")  # there, but not its part in C++
    result = measure(one("layer_norm:5x16"), CPU, [], compiled=False)
    assert list(result.wrong) == ["liger-kernel"]
    assert result.missing["apex"] == "No module named 'apex.normalization'"
    assert set(result.times) == {EAGER, OURS}


# --- timing, budget


def test_short_runs_are_repeated_within_one_timing():
    runs = []
    result = compare("short", {"a": lambda: runs.append(1)}, seconds=0.0, least=2, number=0)
    assert len(runs) > 100
    assert result.median("a") < 1e-3


def test_on_a_gpu_its_own_time_is_taken_beside_the_wall_s(monkeypatch):
    """With events that read the clock of a pretended GPU, which runs for 3 ms what takes the host nothing."""
    now = [0.0]
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Filler:
        def zero_(self):
            events.append("fill")
            now[0] += 1e-4

    def run():
        events.append("run")
        now[0] += 3e-3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(harness.torch, "empty", lambda *_, **__: Filler())
    result = compare("on a GPU", {"a": run}, seconds=0.0, least=3, device="cuda")
    assert result.times["a"] == pytest.approx([3e-3] * 3)
    assert len(result.wall["a"]) == 3
    assert events[-2:] == ["fill", "run"]  # launched while the GPU fills


def test_what_begins_after_the_budget_is_skipped(monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 7.0])
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    jobs = [Job(name, lambda name=name: Result(name, {})) for name in "abc"]
    first, *rest = run_jobs(jobs, 5.0)
    assert first.case == "a"
    assert rest == ["b", "c"]


def test_a_case_that_fails_ends_nothing(capsys):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    first, second = run_jobs([Job("a", fail), Job("b", lambda: Result("b", {}))])
    assert first.missing == {"everything": "CUDA out of memory"}
    assert second.case == "b"
    assert "a: CUDA out of memory" in capsys.readouterr().err


# --- models


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"LAYERS": 1, "WIDTH": 16, "HEADS": 2, "PROMPT": 3, "NEW": 3}.items():
        monkeypatch.setattr(models, name, value)
    monkeypatch.setitem(models.STEPS, "cpu", (("GPT", 1, 8), ("BERT", 2, 8)))
    sizes = {"vocab_size": 50, "max_seq_len": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    monkeypatch.setattr(models, "GPT2_SMALL", sizes)


@pytest.mark.parametrize("there", [True, False])
def test_models_are_measured_with_and_without_transformers(monkeypatch, tiny, there):
    if there:
        pytest.importorskip("transformers")
    else:
        monkeypatch.setattr(models, "_transformers", lambda: None)
    for job in models.jobs(CPU, [torch.float32], False, 0.0):
        result = job.run()
        assert not result.wrong
        assert ("transformers" in result.times) == there
        assert result.missing == ({} if there else {"transformers": "not installed"})
        assert OURS in result.times
        assert (EAGER in result.times) == (result.kind == "step")


def test_a_model_with_other_gradients_is_wrong(monkeypatch, tiny):
    monkeypatch.setattr(models, "_transformers", lambda: None)
    halved = types.SimpleNamespace(**{name: getattr(F, name) for name in F.__all__})
    halved.layer_norm = lambda x, *rest: F.layer_norm(x + (x.detach() - x) * 0.5, *rest)
    halved.add_layer_norm = lambda x, residual, *rest, **options: F.add_layer_norm(
        x + (x.detach() - x) * 0.5, residual, *rest, **options
    )
    monkeypatch.setattr(models, "F", halved)
    result = models.jobs(CPU, [torch.float32], False, 0.0)[0].run()
    assert list(result.wrong) == [OURS]
    assert list(result.times) == [EAGER]


# --- the report


FACTS = {"device": "Some GPU 3000", "command": "fastlm bench"}


def report():
    """One case that wins, one that loses, one on a tie, and who was left out."""

    def result(case, eager, ours, **more):
        return Result(
            case, {EAGER: [eager] * 3, OURS: [ours] * 3}, 2**20, {EAGER: 2**23, OURS: 2**22}, dtype="fp32", **more
        )

    results = [
        result(
            "layer_norm 1x2 fp32",
            2.0,
            1.0,
            flops=2**21,
            chosen="cuda",
            missing={"apex": "not installed"},
            shares={OURS: 0.25},
        ),
        result(
            "rms_norm 1x2 fp32",
            1.0,
            2.0,
            chosen="native",
            shares={OURS: 0.125},
            wrong={f"{OURS} cuda": "output 0: off by 3"},
        ),
        result("linear 1x2x3 fp32", 1.0, 1.01, chosen="native", missing={"apex": "not installed"}),
        Result("GPT step", {EAGER: [3.0], COMPILED: [2.0], OURS: [4.0], "FastLM compiled": [1.0]}, kind="step"),
        Result("generates", {"transformers": [3.0], OURS: [1.0]}, kind="generation", dtype="fp32"),
    ]
    environment = {"facts": FACTS, "info": "what is built", "peaks": {"copy": 2.0**20, "fp32": 2.0**22}}
    return Report(environment, results, ["attention 1x2x3x4 fp32"])


def test_the_page_is_made_from_the_file_alone(tmp_path):
    path = report().write_json(tmp_path)
    assert path.name == "some-gpu-3000.json"
    assert Report.read(path) == report()
    page, *charts = Report.read(path).write_page(tmp_path / "again")
    assert [chart.name for chart in charts] == [f"some-gpu-3000{s}.png" for s in ("", "-roofline", "-memory")]
    assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts)
    text = page.read_text()
    assert all(f"({chart.name})" in text for chart in charts)
    assert (
        "Of 5 cases FastLM is faster than the better of eager PyTorch and torch.compile in 3, as fast within 3% in 1"
        in text
    )
    assert "| layer_norm 1x2 fp32 | 2000 (2000 to 2000) | 1000 (1000 to 1000) | cuda | 2.00 | 100% | 8 / 4 |" in text
    assert "| GPT step | 3000 (3000 to 3000) | 2000 (2000 to 2000) | 4000 (4000 to 4000) |" in text
    assert "what is built" in text
    assert "| FastLM | 0.25 | layer_norm 1x2 fp32 |" in text


def test_losing_cases_and_what_was_left_out_are_shown():
    text = report().markdown({})
    losses = text.split("## Where FastLM loses")[1].split("## Ops")[0]
    assert "| rms_norm 1x2 fp32 | 0.50 | eager | native | - |" in losses
    assert "layer_norm" not in losses
    assert "linear" not in losses
    left_out = text.split("## Not measured")[1]
    assert "- apex: not installed (2 cases)" in left_out
    assert "- WRONG: FastLM cuda: output 0: off by 3 (rms_norm 1x2 fp32)" in left_out
    assert "- 1 cases, for the time was over: attention 1x2x3x4 fp32" in left_out
    winning = dataclasses.replace(report(), results=report().results[:1])
    assert "Nowhere among these cases." in winning.markdown({})


def test_a_side_that_is_wrong_has_no_time_in_the_table():
    result = Result("a", {EAGER: [1.0]}, wrong={"liger-kernel": "off"})
    other = Result("b", {EAGER: [1.0], "liger-kernel": [1.0]})
    text = dataclasses.replace(report(), results=[result, other]).markdown({})
    assert "| a | 1000 (1000 to 1000) | WRONG |" in text


def test_launching_counts_where_it_takes_longer_than_the_work():
    result = Result("a", {EAGER: [2.0], OURS: [1.0]}, wall={EAGER: [3.0], OURS: [6.0]})
    assert result.speed_up() == 0.5
    text = dataclasses.replace(report(), results=[result]).markdown({})
    assert "wall, eager / FastLM" in text
    assert "3000 / 6000" in text


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (page,) = report().write_page(tmp_path)
    assert "No charts: matplotlib is not installed" in page.read_text()


# --- the command


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """In an empty folder, without measuring what the machine can reach."""
    monkeypatch.chdir(tmp_path)
    copies = itertools.count(2)
    monkeypatch.setattr(suite, "peaks", lambda device, dtypes: {"copy": 1e10 * next(copies), "fp32": 1e11})
    monkeypatch.setattr(suite, "device_name", lambda device: "Test CPU")


def test_the_command_measures_and_writes(quick, capsys):
    options = ["--dtypes", "fp32", "--backends", "cpu", "native", "--seconds", "0", "--no-compile", "--device", "cpu"]
    assert cli.main(["bench", "layer_norm:16x32", "attention:1x2x8x16,causal", *options]) == 0
    folder = Path("fastlm-bench/test-cpu")
    data = json.loads((folder / "test-cpu.json").read_text())
    assert [result["case"] for result in data["results"]] == ["layer_norm 16x32 fp32", "attention 1x2x8x16 causal fp32"]
    for result in data["results"]:
        assert set(result["times"]) == {EAGER, OURS, f"{OURS} cpu", f"{OURS} native"}
        assert all(len(times) >= 7 for times in result["times"].values())
        assert result["shares"][OURS] <= 1
    assert data["environment"]["facts"]["torch"] == torch.__version__
    assert data["environment"]["info"] == str(fastlm.info())
    assert data["environment"]["peaks"] == {"copy": 3e10, "fp32": 1e11}  # the best of before and after
    page = (folder / "test-cpu.md").read_text()
    assert "test-cpu.png" in page
    assert "wrote fastlm-bench/test-cpu/test-cpu.json" in capsys.readouterr().out
    assert cli.main(["bench", "--from", str(folder / "test-cpu.json"), "--out", "again"]) == 0
    assert Path("again/test-cpu.md").read_text() == page


def test_checking_fails_where_the_default_is_slower(quick, capsys):
    report().write_json(Path())
    command = ["bench", "--from", "some-gpu-3000.json", "--check"]
    assert cli.main(command) == 1
    assert capsys.readouterr().err == "".join(
        f"{line}\n"
        for line in (
            "rms_norm 1x2 fp32: FastLM is 0.500 of eager, at least 0.97 wanted",
            "GPT step: FastLM is 0.750 of eager, at least 0.97 wanted",
        )
    )
    dataclasses.replace(report(), results=report().results[::2]).write_json(Path())
    assert cli.main(command) == 0
    assert capsys.readouterr().err == "nowhere below 0.97 of plain PyTorch\n"


def test_checking_fails_where_the_default_is_wrong_or_did_not_run():
    wrong = Result("a", {EAGER: [1.0]}, wrong={OURS: "output 0: off"})
    missing = Result("b", {}, missing={"everything": "out of memory"})
    peer = Result("c", {EAGER: [1.0], OURS: [1.0]}, wrong={"apex": "off"}, missing={"xformers": "not installed"})
    assert slow([wrong, missing, peer]) == ["a: FastLM: output 0: off", "b: everything: out of memory"]


def test_who_interrupts_a_run_keeps_its_results(quick, monkeypatch):
    def measure(case, **_):
        if case.op == "rms_norm":
            raise KeyboardInterrupt
        return Result(str(case), {EAGER: [1.0], OURS: [1.0]})

    monkeypatch.setattr(suite, "measure", measure)
    texts = ["layer_norm:2x3", "rms_norm:2x3", "linear:2x3x4"]
    assert cli.main(["bench", *texts, "--dtypes", "fp32", "--device", "cpu"]) == 130
    kept = Report.read(Path("fastlm-bench/test-cpu/test-cpu.json"))
    assert [result.case for result in kept.results] == ["layer_norm 2x3 fp32"]
    assert kept.skipped == ["rms_norm 2x3 fp32", "linear 2x3x4 fp32"]
    assert Path("fastlm-bench/test-cpu/test-cpu.md").exists()


def test_without_a_case_the_standard_ones_and_models_are_measured(quick, monkeypatch):
    monkeypatch.setattr(suite, "measure", lambda case, **_: Result(str(case), {}))
    monkeypatch.setattr(models, "jobs", lambda *_: [Job("model", lambda: Result("model", {}))])
    assert cli.main(["bench", "--device", "cpu"]) == 0
    names = [result.case for result in Report.read(Path("fastlm-bench/test-cpu/test-cpu.json")).results]
    assert names.index("model") == 8
    assert [name for name in names if name != "model"] == [str(case) for case in standard("cpu")]
    for options, there in (
        (["layer_norm:2x3"], False),
        (["layer_norm:2x3", "--models"], True),
        (["--no-models"], False),
    ):
        assert cli.main(["bench", "--device", "cpu", *options]) == 0
        names = [result.case for result in Report.read(Path("fastlm-bench/test-cpu/test-cpu.json")).results]
        assert ("model" in names) == there


def test_the_command_lists_what_there_is(capsys):
    assert cli.main(["bench", "--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "attention:BxHxTxD or BxHxTqxTkxD" in out
    assert re.search(r"window=256 +attention, varlen", out)
    assert all(str(case) in out for case in standard("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench layer_nrom", "unknown op 'layer_nrom'; did you mean layer_norm?"),
        ("bench layer_norm:2x3 --backends cpuu", "--backends: unknown backend 'cpuu'; did you mean cpu?"),
        ("bench --chek", "unknown option --chek; did you mean --check?"),
        ("bench --dtypes fp23", "--dtypes: invalid choice: 'fp23' (choose from "),
        ("bench --from nowhere.json", "[Errno 2] No such file or directory: 'nowhere.json'"),
        ("bench --from other.json", "other.json has no results of fastlm bench: KeyError('environment')"),
    ],
)
def test_a_mistake_is_one_line(quick, capsys, arguments, message):
    Path("other.json").write_text("{}")
    assert cli.main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastlm: {message}")
    assert [path.name for path in Path().iterdir()] == ["other.json"]


def test_importing_fastlm_does_not_import_what_measures_it():
    command = "import sys, fastlm; assert not [name for name in sys.modules if name.startswith('fastlm.bench')]"
    subprocess.run([sys.executable, "-c", command], check=True)


# --- on a GPU


SCRIPT = ROOT / "benchmarks/gpu.sh"


def test_without_a_gpu_the_script_says_so(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu.sh: nvidia-smi finds no NVIDIA GPU here; --cpu tries the script without one\n"


def test_the_script_builds_for_that_gpu_and_measures_within_its_time(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 7.5\n")
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$FASTLM_BUILD|$TORCH_CUDA_ARCH_LIST|$*"\n'
        'case "$*" in *liger*) exit 1;; *bench*) exit 124;; esac\n'
    )
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": str(tmp_path / "python")}
    command = [SCRIPT, "--tests", "--out", "there", "--no-models"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "cuda|7.5|-m pip install --quiet --editable .[train,hf]" in lines
    assert "liger-kernel cannot be installed: it is left out" in lines
    assert "||-m pytest -q -m gpu tests" in lines
    assert "||-m fastlm bench --device cuda --out there --seconds 0.5 --budget 6 --no-models" in lines
    text = SCRIPT.read_text()
    limit, after = (int(re.search(rf"{name}[= ]\"?(\d+)", text)[1]) for name in ("LIMIT", "--kill-after"))
    assert limit + after < 8 * 60


@pytest.mark.proof
def test_the_script_runs_on_a_cpu(tmp_path):
    command = [SCRIPT, "--cpu", "--out", tmp_path]
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=True)
    (path,) = tmp_path.glob("*.json")
    results = Report.read(path)
    assert [result.case.split()[0] for result in results.results] == ["layer_norm", "attention", "cross_entropy"]
    assert not any(result.wrong for result in results.results)
    assert path.with_suffix(".md").exists()


def cells(kind):
    notebook = json.loads((ROOT / "benchmarks/gpu.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        expected = {"cell_type", "id", "metadata", "source"}
        expected |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == expected
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_measures_shows_and_says_how_to_send(tmp_path, monkeypatch, capsys):
    shown = []
    display = types.SimpleNamespace(Image=str, Markdown=str, display=shown.append)
    installed(monkeypatch, "IPython.display", **vars(display))
    checkout = tmp_path / "checkout"
    folder = checkout / "benchmarks/results/gpu"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / "benchmarks")
    report().write_json(folder)
    report().write_page(folder)
    monkeypatch.chdir(tmp_path)
    names = {}
    for source in cells("code"):
        if source.startswith("!"):
            subprocess.run(["bash", "-n", "-c", source[1:]], check=True)
            assert source == "!bash benchmarks/gpu.sh"
            continue
        code = compile(source, "cell", "exec")
        if names.get("REPOSITORY") == "":
            with pytest.raises(SystemExit, match="REPOSITORY"):
                exec(code, names)
            names["REPOSITORY"] = str(checkout)
        exec(code, names)
    assert Path.cwd() == checkout
    assert len(shown) == 4
    assert shown[0] == "benchmarks/results/gpu/some-gpu-3000.png"
    assert "Where FastLM loses" in shown[-1]
    assert "![" not in shown[-1]
    assert "some-gpu-3000.json" in capsys.readouterr().out
    section = "Sending results from your GPU"
    assert section in "".join(cells("markdown"))
    assert f"## {section}" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("text", ["layer_norm:512x256", "attention:1x4x128x64,causal", "varlen:3x4x64x64"])
def test_a_gpu_is_measured(text):
    for case in parse(text, "cuda"):
        result = measure(case, torch.device("cuda"), seconds=0.05, compiled=False)
        assert not result.wrong
        assert set(result.times) == set(result.wall) >= {EAGER, OURS}
        assert all(time > 0 for times in result.times.values() for time in times)
    report = Report(suite.environment(torch.device("cuda"), [torch.float16]), [result])
    assert "Times are the GPU's own" in report.markdown({})


def test_no_bf16_where_a_gpu_only_imitates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cases.dtypes_of("cuda") == (torch.float16, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cases.dtypes_of("cuda") == (torch.bfloat16, torch.float16, torch.float32)
    assert Case("layer_norm", (2, 3)) == one("layer_norm:2x3")
