"""`fastlm.tune` and `fastlm tune`: what is measured, where it is kept, and that "auto" goes by it alone."""

import dataclasses
import json
import threading

import pytest
import torch

import fastlm
import fastlm.functional as F
from fastlm import cli
from fastlm.bench import tune as tuning
from fastlm.bench.harness import Comparison
from fastlm.models import GPT, GPTConfig
from fastlm.ops import measured, registry
from fastlm.ops.compiled import CPU

needs_cpu = pytest.mark.skipif(bool(CPU.missing()), reason="no CPU kernels")
CPU_DEVICE = torch.device("cpu")
USERS = {"native", "reference", "cpu", "onednn"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    for op in registry.OPS.values():  # but for those that users have; conftest.py puts all back
        op.backends = {name: backend for name, backend in op.backends.items() if name in USERS}
    with monkeypatch.context() as patch:
        patch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
        measured.forget()
        yield
        measured.forget()
        patch.setattr(measured.cache, "folder", lambda: tmp_path / "nowhere")
        measured.entries()


def speeds(monkeypatch, **seconds: float) -> list[str]:
    """No clock: every measurement finds these seconds (10 for backends that are not named); -> the cases measured."""
    cases = []

    def compare(case, sides, **options):
        cases.append(case)
        for run in sides.values():
            run()
        return Comparison(case, {name: [seconds.get(name, 10.0)] * 5 for name in sides})

    monkeypatch.setattr(tuning, "compare", compare)
    return cases


def tune(step, **options):
    said = []
    return fastlm.tune(step, tell=said.append, **options), said


def keep(op: str, backend: str, sizes, *, dtype: str = "float32", training: bool = True) -> None:
    """An entry of this device and these versions."""
    device = measured.device_name(CPU_DEVICE, torch.get_num_threads())
    place = device, op, dtype, measured.bucket(sizes, training)
    measured.keep({place: {"backend": backend, "times as fast": 1.0}})


def layer_norm(rows=64, columns=32, **options):
    return lambda: F.layer_norm(torch.randn(rows, columns, requires_grad=True, **options), (columns,))


def chosen(function, *args, **options) -> str:
    return fastlm.explain(function, *args, **options).backend


# --- choosing


@needs_cpu
def test_auto_goes_by_what_was_measured(monkeypatch):
    x = torch.randn(64, 32, requires_grad=True)
    assert chosen(F.layer_norm, x, (32,)) == "native"
    cases = speeds(monkeypatch, native=2.0, cpu=1.0)
    winners, said = tune(layer_norm())
    assert cases == ["layer_norm 64 32 float32"]
    assert [(w.backend, w.ratio) for w in winners] == [("cpu", 2.0)]
    assert said == ["[1/1] layer_norm 64 32 float32: cpu, 2.00 times as fast as torch's own"]
    explanation = fastlm.explain(F.layer_norm, x, (32,))
    assert explanation.backend == "cpu"
    assert explanation.tuned
    assert str(explanation).startswith("layer_norm: cpu (asked for: auto; measured by fastlm tune)\n")
    with fastlm.use_backend("cpu"):
        assert not fastlm.explain(F.layer_norm, x, (32,)).tuned


@needs_cpu
@pytest.mark.parametrize(("seconds", "winner"), [(0.96, "cpu"), (0.98, "native"), (1.5, "native")])
def test_ours_must_be_three_percent_faster(monkeypatch, seconds, winner):
    speeds(monkeypatch, native=1.0, cpu=seconds)
    assert [w.backend for w in tune(layer_norm())[0]] == [winner]


@needs_cpu
def test_what_was_measured_to_be_slower_is_not_taken_although_the_committed_table_has_it(monkeypatch):
    monkeypatch.setitem(measured.TABLE, measured.device_class(CPU_DEVICE), {"layer_norm": {"float32": ["cpu", 1]}})
    measured._entry.cache_clear()
    x = torch.randn(64, 32, requires_grad=True)
    assert chosen(F.layer_norm, x, (32,)) == "cpu"
    keep("layer_norm", "native", (64, 32))
    assert chosen(F.layer_norm, x, (32,)) == "native"
    measured._entry.cache_clear()


@needs_cpu
@pytest.mark.parametrize(
    ("rows", "columns", "same"),
    [(64, 32, True), (33, 17, True), (64, 17, True), (32, 32, False), (65, 32, False), (64, 33, False)],
)
def test_sizes_between_the_same_powers_of_two_share_a_measurement(rows, columns, same):
    keep("layer_norm", "cpu", (64, 32, ""))
    x = torch.randn(rows, columns, requires_grad=True)
    assert chosen(F.layer_norm, x, (columns,)) == ("cpu" if same else "native")


def test_a_bucket_names_sizes_and_options():
    assert measured.bucket((4096, 768, "", "dropout"), True) == "4096 1024 dropout training"
    assert measured.bucket((0, 1, 2, 3), False) == "0 1 2 4 inference"


@needs_cpu
def test_inference_dtypes_and_threads_are_measured_apart():
    keep("layer_norm", "cpu", (64, 32))
    x = torch.randn(64, 32)
    assert chosen(F.layer_norm, x, (32,)) == "cpu"
    assert chosen(F.layer_norm, x.bfloat16(), (32,)) == "native"
    with torch.no_grad():
        assert chosen(F.layer_norm, x, (32,)) == "native"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert chosen(F.layer_norm, x, (32,)) == "native"
    finally:
        torch.set_num_threads(threads)


@needs_cpu
def test_entries_of_other_versions_are_ignored_and_kept(monkeypatch):
    keep("layer_norm", "cpu", (64, 32))
    x = torch.randn(64, 32)
    for name, value in (("torch", "__version__"), ("fastlm", "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr({"torch": torch, "fastlm": fastlm}[name], value, "0.0.0")
            measured.forget()
            assert chosen(F.layer_norm, x, (32,)) == "native"
            keep("rms_norm", "cpu", (64, 32))
    measured.forget()
    assert chosen(F.layer_norm, x, (32,)) == "cpu"
    assert len(json.loads(measured.tuned_file().read_text())) == 3


@needs_cpu
def test_a_backend_that_cannot_serve_or_is_gone_is_passed_over():
    q = torch.randn(2, 4, 16, 32)
    plain = (8, 16, 16, 32, "", "")
    keep("scaled_dot_product_attention", "elsewhere", plain)
    assert chosen(F.scaled_dot_product_attention, q, q, q) == "native"
    F.scaled_dot_product_attention(q, q, q)
    keep("scaled_dot_product_attention", "native", (*plain, "softcap"))  # which torch's own has not
    assert chosen(F.scaled_dot_product_attention, q, q, q, softcap=3.0) == "cpu"
    keep("linear", "elsewhere", (4, 16, 8))
    F.linear(torch.randn(4, 16), torch.randn(8, 16))


def test_a_named_backend_is_not_overruled():
    keep("layer_norm", "native", (64, 32))
    with fastlm.use_backend("reference"):
        assert chosen(F.layer_norm, torch.randn(64, 32), (32,)) == "reference"


# Op -> (a call, its sizes): those that call torch's own op without the registry where nothing speaks against it.
SHORT_WAYS = {
    "layer_norm": (lambda x: F.layer_norm(x, (32,)), (64, 32, "")),
    "rms_norm": (lambda x: F.rms_norm(x, (32,)), (64, 32, "")),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.zeros(64, dtype=torch.int64)), (64, 32, "")),
    "linear": (lambda x: F.linear(x, torch.ones(8, 32)), (64, 32, 8)),
    "add_rms_norm": (lambda x: F.add_rms_norm(x, x, (32,)), (64, 32, "")),
    "add_layer_norm": (lambda x: F.add_layer_norm(x, x, (32,)), (64, 32, "")),
    "scaled_dot_product_attention": (
        lambda x: F.scaled_dot_product_attention(*[x.view(1, 4, 16, 32)] * 3, is_causal=True),
        (4, 16, 16, 32, "causal", ""),
    ),
}


@needs_cpu
@pytest.mark.parametrize("op", SHORT_WAYS)
def test_the_short_way_to_torchs_own_op_asks_too(monkeypatch, op):
    call, sizes = SHORT_WAYS[op]
    ran, record = [], registry.OPS[op].backends["cpu"]

    def fwd(*args):
        ran.append(op)
        return record.fwd(*args)

    registry.OPS[op].register(dataclasses.replace(record, fwd=fwd))
    x, device = torch.randn(64, 32), measured.device_class(CPU_DEVICE)
    ours = ["cpu", 1]
    ways = (([], "cpu", 1), ([], None, 0), (ours, None, 1), (ours, "native", 0), (ours, "reference", 0))
    for table, entry, expected in ways:
        monkeypatch.setitem(measured.TABLE, device, {op: {"float32": table}} if table else {})
        monkeypatch.setattr("fastlm.ops.attention.op.FEW_QUERIES", 1)
        monkeypatch.setattr("fastlm.ops.cross_entropy.op.LONG_ROW", 1)
        measured._entry.cache_clear()
        measured.tuned_file().unlink(missing_ok=True)
        measured.forget()
        if entry:
            keep(op, entry, sizes)
        ran.clear()
        if op == "linear" and table:  # the table is for few rows
            monkeypatch.setattr("fastlm.ops.linear.op.FEW_ROWS", 64)
        call(x)
        assert len(ran) == expected, (table, entry)
    measured._entry.cache_clear()


@needs_cpu
def test_torchs_attention_with_our_kernels_behind_it_asks_too():
    q, mask = torch.randn(1, 4, 16, 32), torch.ones(16, 16, dtype=torch.bool).tril()
    registration = fastlm.register_sdpa(cpu=True)
    counted, record = [], registry.OPS["scaled_dot_product_attention"].backends["cpu"]
    fwd = lambda *args: (counted.append(1), record.fwd(*args))[1]  # noqa: E731
    registry.OPS["scaled_dot_product_attention"].register(dataclasses.replace(record, fwd=fwd))
    with registration:
        for backend, runs in (("cpu", 1), ("native", 0)):
            counted.clear()
            keep("scaled_dot_product_attention", backend, (4, 16, 16, 32, "causal", ""))
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            assert len(counted) == runs
            keep("scaled_dot_product_attention", backend, (4, 16, 16, 32, "", "", "masked"))
            torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
            assert len(counted) == 2 * runs


@needs_cpu
def test_compilers_see_nothing_of_it():
    keep("layer_norm", "cpu", (64, 32))
    keep("scaled_dot_product_attention", "cpu", (4, 16, 16, 32, "causal", ""))
    keep("linear", "onednn", (64, 32, 8))
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)

    def step(x, w):
        y = F.layer_norm(F.add_layer_norm(x, x, (32,))[0], (32,)).view(1, 4, 16, 32)
        return F.linear(F.scaled_dot_product_attention(y, y, y, is_causal=True).reshape(64, 32), w).sum()

    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for rows in (64, 64):
            torch.testing.assert_close(compiled(x[:rows], w), step(x[:rows], w), rtol=1e-4, atol=1e-3)


def test_sizes_that_are_not_known_yet_have_no_entry():
    from torch.fx.experimental.proxy_tensor import make_fx

    keep("layer_norm", "cpu", (64, 32))
    graph = make_fx(lambda x: F.layer_norm(x, (32,)), tracing_mode="symbolic")(torch.randn(64, 32))
    x = torch.randn(7, 32)
    torch.testing.assert_close(graph(x), F.layer_norm(x, (32,)))


# --- the file


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"b": {"c": {"d": {"e": {}}}}}}', "\ufeff{}"])
def test_a_file_that_is_not_ours_is_said_once_and_replaced(content):
    measured.tuned_file().parent.mkdir()
    measured.tuned_file().write_text(content)
    measured.forget()
    x = torch.randn(64, 32)
    with pytest.warns(UserWarning, match="what was measured is not used, .*tuned.json cannot be read") as said:
        assert [chosen(F.layer_norm, x, (32,)) for _ in range(3)] == ["native"] * 3
    assert len(said) == 1
    with pytest.warns(UserWarning, match="cannot be read"):
        keep("layer_norm", "native", (64, 32))
    assert list(json.loads(measured.tuned_file().read_text())) == [measured.versions()]


def test_a_file_that_cannot_be_written_stays_as_it_was(monkeypatch):
    keep("layer_norm", "native", (64, 32))
    before = measured.tuned_file().read_text()

    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(measured.json, "dump", full)
    with pytest.raises(OSError, match="no space left"):
        keep("rms_norm", "native", (64, 32))
    assert [path.name for path in measured.tuned_file().parent.iterdir()] == ["tuned.json"]
    assert measured.tuned_file().read_text() == before


# --- measuring


def test_a_step_is_measured_op_by_op_and_once(monkeypatch):
    model = GPT(GPTConfig(vocab_size=64, max_seq_len=16, hidden_size=32, num_layers=2, num_heads=2))
    tokens = torch.randint(64, (2, 16))
    cases = speeds(monkeypatch)
    weights = [parameter.clone() for parameter in model.parameters()]
    winners, said = tune(lambda: model(tokens, labels=tokens).loss.backward())
    ops = {winner.call.op.name for winner in winners}
    expected = {"layer_norm", "add_layer_norm", "scaled_dot_product_attention", "linear", "linear_cross_entropy"}
    assert ops <= expected
    assert len(cases) == len(winners) == len(said)
    if not CPU.missing():
        assert ops == expected
        assert "add_layer_norm 32 32 float32" in cases  # one for both layers
        assert len([case for case in cases if case.startswith("linear ")]) >= 3
    assert all(map(torch.equal, weights, model.parameters()))
    assert tune(lambda: model(tokens, labels=tokens))[0] == []
    assert len(tune(lambda: model(tokens, labels=tokens).loss.backward(), again=True)[0]) == len(winners)


def test_only_what_auto_decides_in_this_thread_is_seen(monkeypatch):
    cases = speeds(monkeypatch)

    def step():
        with fastlm.use_backend("reference"):
            layer_norm()()
        thread = threading.Thread(target=layer_norm(128))
        thread.start()
        thread.join()
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(torch.randn(4, 16), torch.randn(8, 16))  # torch keeps the weights that it has cast
        layer_norm(0)()
        torch.func.vmap(lambda x: F.layer_norm(x, (32,)))(torch.randn(2, 4, 32))

    assert tune(step)[0] == []
    assert cases == []


@needs_cpu
@pytest.mark.parametrize("what", ["output", "gradient", "exception"])
def test_a_backend_that_is_wrong_does_not_win(monkeypatch, what):
    record = registry.OPS["layer_norm"].backends["cpu"]

    def fwd(*args):
        if what == "exception":
            raise RuntimeError("device lost\nand more")
        output, stats = record.fwd(*args)
        return (output * 1.001 if what == "output" else output), stats

    def bwd(*args):
        grads = record.bwd(*args)
        return (grads[0] * 1.001, *grads[1:]) if what == "gradient" else grads

    fastlm.register_backend("layer_norm", dataclasses.replace(record, name="hasty", fwd=fwd, bwd=bwd))
    speeds(monkeypatch, native=3.0, cpu=2.0, hasty=1.0)
    winners, said = tune(layer_norm())
    assert winners[0].backend == "cpu"
    reason = {"output": "output 0: off by", "gradient": "gradient 0: off by", "exception": "RuntimeError: device lost"}
    assert winners[0].rejected["hasty"].startswith(reason[what])
    assert f"; not hasty: {reason[what]}" in said[0]
    assert "and more" not in said[0]


@needs_cpu
def test_where_torch_has_no_such_op_the_reference_says_what_is_right(monkeypatch):
    record = registry.OPS["scaled_dot_product_attention"].backends["cpu"]

    def fwd(*args):
        output, lse = record.fwd(*args)
        return output * 1.001, lse

    fastlm.register_backend("scaled_dot_product_attention", dataclasses.replace(record, name="sound"))
    fastlm.register_backend("scaled_dot_product_attention", dataclasses.replace(record, fwd=fwd))  # what "auto" takes
    speeds(monkeypatch, cpu=1.0, sound=2.0)
    q = torch.randn(1, 2, 16, 8)
    winners, _ = tune(lambda: F.scaled_dot_product_attention(q, q, q, softcap=3.0))
    assert winners[0].backend == "sound"
    assert winners[0].rejected["cpu"].startswith("output 0: off by")


@needs_cpu
def test_calls_are_repeated_with_their_shapes_strides_and_values_that_matter(monkeypatch):
    target, mask = (
        torch.tensor([1, 4, -100]),
        torch.zeros(16, 16).masked_fill(torch.ones(16, 16).triu(1) > 0, -torch.inf),
    )
    table, seen = torch.randn(64, 8), []

    def compare(case, sides, **options):
        return Comparison(case, {name: [1.0] for name in sides})

    monkeypatch.setattr(tuning, "compare", compare)
    monkeypatch.setattr(tuning, "_timed", lambda call, name, inputs: seen.append(inputs) or (lambda: None))

    def step():
        F.layer_norm(table.T, (64,))
        F.layer_norm(torch.randn(4, 1, requires_grad=True).expand(4, 48), (48,))
        F.cross_entropy(torch.randn(3, 9, requires_grad=True), target)
        F.scaled_dot_product_attention(*(torch.randn(1, 2, 16, 8) for _ in range(3)), attn_mask=mask)

    tune(step)
    norm, expanded, loss, attention = [seen[i] for i in range(0, len(seen), 2)]
    assert norm.input.shape == (8, 64)
    assert norm.input.stride() == (1, 8)
    assert not torch.equal(norm.input, table.T)
    assert not norm.input.requires_grad
    assert expanded.input.stride() == (1, 0)
    assert expanded.input.requires_grad
    assert expanded.input.is_leaf
    assert torch.equal(loss.target, target)
    assert torch.equal(attention.attn_mask, mask)


@needs_cpu
def test_inference_is_measured_without_gradients_and_dropout_with_any_mask(monkeypatch):
    modes, record = [], registry.OPS["layer_norm"].backends["native"]
    call = lambda *args: (modes.append(torch.is_grad_enabled()), record.call(*args))[1]  # noqa: E731
    registry.OPS["layer_norm"].register(dataclasses.replace(record, call=call))
    cases = speeds(monkeypatch, native=2.0, cpu=1.0)
    x = torch.randn(64, 32, requires_grad=True)

    def step():
        with torch.no_grad():
            F.layer_norm(x, (32,))
            F.layer_norm(x[:40], (32,))  # of the same bucket: the first that was seen stands for both
        F.add_layer_norm(x, x, (32,), dropout_p=0.5)

    winners, _ = tune(step)
    assert cases == ["layer_norm 64 32 float32 inference", "add_layer_norm 64 32 dropout float32"]
    assert [(winner.backend, winner.rejected) for winner in winners] == [("cpu", {})] * 2
    assert modes
    assert not any(modes[-1:])


@needs_cpu
def test_logits_that_are_large_are_not_held_however_fast(monkeypatch):
    def step():
        return F.linear_cross_entropy(torch.randn(32, 8), torch.randn(64, 8), torch.zeros(32, dtype=torch.int64))

    speeds(monkeypatch, native=1.0, cpu=2.0, reference=3.0)
    assert [w.backend for w in tune(step)[0]] == ["native"]
    monkeypatch.setattr(tuning, "LOGITS_BYTES", 32 * 64 * 4 - 1)
    winners, said = tune(step, again=True)
    assert [w.backend for w in winners] == ["cpu"]
    assert "native" not in said[0]


@needs_cpu
def test_everything_is_measured_for_real():
    """Every op, with a clock: what is kept is what "auto" takes."""
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(40, 32, requires_grad=True)
    q, target = torch.randn(2, 4, 16, 32, requires_grad=True), torch.randint(32, (64,))
    cu = torch.tensor([0, 20, 64], dtype=torch.int32)
    packed = torch.randn(64, 2, 16, requires_grad=True)
    calls = [
        (F.layer_norm, (x, (32,))),
        (F.rms_norm, (x, (32,))),
        (F.add_layer_norm, (x, x, (32,))),
        (F.add_rms_norm, (x, x, (32,))),
        (F.cross_entropy, (x, target)),
        (F.linear_cross_entropy, (x, w, target)),
        (F.linear, (x, w)),
        (F.scaled_dot_product_attention, (q, q, q)),
        (F.varlen_attention, (packed, packed, packed, cu, cu, 44, 44)),
    ]
    winners, _ = tune([lambda call=call: call[0](*call[1]) for call in calls], seconds=0.01)
    assert [winner.call.op.name for winner in winners] == [call[0].__name__ for call in calls]
    assert not any(winner.rejected for winner in winners)
    for winner, (function, args) in zip(winners, calls, strict=True):
        assert chosen(function, *args) == winner.backend


# --- the command


def fastlm_tune(*argv: str) -> int:
    return cli.main(["tune", *argv])


@needs_cpu
def test_the_command_measures_shows_and_forgets(monkeypatch, capsys):
    cases = speeds(monkeypatch, native=2.0, cpu=1.0)
    assert fastlm_tune("layer_norm:64x32", "cross_entropy:8x600,forward", "--dtypes", "fp32") == 0
    assert cases == ["layer_norm 64 32 float32", "cross_entropy 8 600 float32 inference"]
    out = capsys.readouterr().out
    assert f"2 measured, ours the fastest in 2; kept in {measured.tuned_file()}" in out
    assert fastlm_tune("layer_norm:60x30", "--dtypes", "fp32") == 0
    assert "nothing to measure" in capsys.readouterr().out
    assert fastlm_tune("layer_norm:60x30", "--dtypes", "fp32", "--again") == 0
    assert len(cases) == 3
    capsys.readouterr()
    assert fastlm_tune("--show") == 0
    assert "  layer_norm float32 64 32 training: cpu, 2.00 times as fast\n" in capsys.readouterr().out
    assert fastlm_tune("--clear") == 0
    assert not measured.tuned_file().exists()
    assert fastlm_tune("--show") == 0
    assert capsys.readouterr().out == "nothing has been measured with these versions\n"
    assert fastlm_tune("--clear") == 0


@needs_cpu
@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        ("GPT", {"layer_norm", "scaled_dot_product_attention", "add_layer_norm", "linear_cross_entropy"}),
        ("BERTForPreTraining", {"layer_norm", "varlen_attention", "add_layer_norm"}),
    ],
)
def test_the_shapes_of_a_run_are_measured(monkeypatch, tmp_path, kind, ops):
    file = tmp_path / "run.toml"
    shape = "hidden_size = 32\nnum_layers = 1\nnum_heads = 2\nmax_seq_len = 16\n"
    train = 'batch_size = 8\nmicro_batch_size = 4\nseq_len = 16\ndtype = "fp32"\ncompile = true\n'
    file.write_text(f'[model]\ntype = "{kind}"\n{shape}[data]\nvocab_size = 300\n[train]\n{train}')
    cases = speeds(monkeypatch)
    assert fastlm_tune("--config", str(file), "--device", "cpu") == 0
    assert {case.split()[0] for case in cases} >= ops
    if kind == "GPT":
        assert "layer_norm 64 32 float32" in cases
        assert "scaled_dot_product_attention 8 16 16 16 causal alibi float32" in cases


def test_without_cases_the_standard_ones_are_measured(monkeypatch):
    from fastlm.bench import cases

    asked = []
    monkeypatch.setattr(cases, "standard", lambda device, dtypes: asked.append((device, dtypes)) or [])
    assert fastlm_tune("--device", "cpu", "--dtypes", "bf16") == 0
    assert asked == [(CPU_DEVICE, [torch.bfloat16])]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["layer_nrom"], "unknown op 'layer_nrom'; did you mean layer_norm?"),
        (["layer_norm:3xx"], "sizes must be ROWSxCOLUMNS"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0.0"),
        (["--dtypes", "fp8"], "invalid choice: 'fp8'"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(capsys, argv, error):
    assert fastlm_tune(*argv) in (1, 2)
    err = capsys.readouterr().err
    assert error in err
    assert err.count("\n") == 1
