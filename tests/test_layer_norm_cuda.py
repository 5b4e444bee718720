"""The CUDA kernels of the norms on the emulator: every path through them, every schedule, and what they move."""

import itertools

import hostile
import pytest
import torch
from errors import assert_within_rule
from proof import emulator

import fastlm
import fastlm.functional as F

NORMS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
# A warp to a row, several rows to a block; rows of several warps; of a whole block; longer than a block.
COLUMNS = [1, 31, 64, 512, 513, 768, 1600, 4096, 4100, 8191, 8192, 8200, 12000]
DTYPES = {  # of input, residual and parameters
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "bf16 in an fp32 stream": (torch.bfloat16, torch.float32, torch.bfloat16),
    "fp16 in an fp32 stream, fp32 parameters": (torch.float16, torch.float32, torch.float32),
}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(op, rows, columns, dtypes):
    """Input, residual if the op has one, weight, bias if the op has one."""
    dtype, residual, parameter = dtypes
    tensors = [normal(rows, columns, dtype=dtype)]
    if "add" in op:
        tensors.append(normal(rows, columns, dtype=residual, seed=1))
    tensors.append(normal(columns, dtype=parameter, seed=2))
    return tensors if "rms" in op else [*tensors, normal(columns, dtype=parameter, seed=3)]


def answers(backend, op, tensors, wanted=None, layout="contiguous", **options):
    """Outputs, then gradients of the inputs whose numbers are wanted (all, if None)."""
    wanted = range(len(tensors)) if wanted is None else wanted
    leaves = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(tensors)]
    given = 2 if "add" in op else 1
    torch.manual_seed(3)
    with fastlm.use_backend(backend):
        outputs = getattr(F, op)(*leaves[:given], tensors[0].shape[-1:], *leaves[given:], **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [hostile.LAYOUTS[layout](normal(*y.shape, seed=4 + n).to(y.dtype)) for n, y in enumerate(outputs)]
        return [*outputs, *torch.autograd.grad(outputs, [leaves[n] for n in wanted], grads)]


def assert_right(op, tensors, **options):
    """The emulator's answers are as near to the reference's in float64 as the error rule asks."""
    ours, same = answers("emulator", op, tensors, **options), answers("reference", op, tensors, **options)
    exact = answers("reference", op, [x.double() for x in tensors], **options)
    for n, (a, b, c) in enumerate(zip(ours, same, exact, strict=True)):
        assert_within_rule(a, b, c, f"{op} {n}")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_of_every_width_are_right_forward_and_backward(columns, dtypes):
    rows = 35 if columns < 1000 else 19  # not a multiple of the rows of a block; two partial rows and more
    op = NORMS[(columns + len(dtypes)) % 4] if dtypes == "fp32" else ("add_layer_norm", "add_rms_norm")[columns % 2]
    options = {"dropout_p": 0.3} if "add" in op else {}
    assert_right(op, inputs(op, rows, columns, DTYPES[dtypes]), **options)


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("columns", [24, 768, 8200])
def test_every_gradient_may_be_wanted_alone(op, columns):
    tensors = inputs(op, 17, columns, DTYPES["bf16"])
    for wanted in range(len(tensors)):
        assert_right(op, tensors, wanted=[wanted], **({"dropout_p": 0.5} if "add" in op else {}))


@pytest.mark.parametrize("columns", [20, 72, 1536, 8200])
@pytest.mark.parametrize("layout", [name for name in hostile.LAYOUTS if name != "contiguous"])
def test_inputs_and_upstream_gradients_may_lie_anyhow(layout, columns):
    tensors = [hostile.LAYOUTS[layout](x) for x in inputs("add_layer_norm", 18, columns, DTYPES["bf16"])]
    assert_right("add_layer_norm", tensors, layout=layout)


@pytest.mark.parametrize("columns", [8, 1024, 12000])
def test_dropout_of_everything_and_of_nothing(columns):
    for p in (0.0, 1.0):
        assert_right("add_layer_norm", inputs("add_layer_norm", 5, columns, DTYPES["fp32"]), dropout_p=p)


def runs():
    """Ways to run a kernel that must not make a difference: schedule, seed, landing of copies, order of blocks."""
    yield from itertools.product(("adversarial", "round_robin"), (0,), ("lazy", "eager"), ("in_order", "random"))
    yield from (
        ("random", seed, ("lazy", "eager")[seed % 2], ("in_order", "random")[seed // 2 % 2]) for seed in range(6)
    )


@pytest.mark.parametrize("columns", [64, 1600, 8200])
@pytest.mark.parametrize("op", ["add_layer_norm", "rms_norm"])
def test_the_bits_do_not_depend_on_the_schedule(op, columns):
    tensors, results = inputs(op, 19, columns, DTYPES["bf16"]), []
    for schedule, seed, landing, blocks in runs():
        with emulator.settings(schedule=schedule, seed=seed, landing=landing, blocks=blocks):
            results.append(answers("emulator", op, tensors))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# Traffic ----------------------------------------------------------------------------------------------------------

WIDTHS = [768, *(pytest.param(n, marks=pytest.mark.proof) for n in (1024, 1600, 4096)), 8192]


def traced(op, columns, dtypes, rows=24):
    """A trace of forward, one of backward, and the tensors by name."""
    tensors = inputs(op, rows, columns, dtypes)
    leaves, given = [x.requires_grad_() for x in tensors], 2 if "add" in op else 1
    with fastlm.use_backend("emulator"):
        fwd = emulator.trace(lambda: getattr(F, op)(*leaves[:given], (columns,), *leaves[given:]))
        outputs = fwd.result if isinstance(fwd.result, tuple) else (fwd.result,)
        upstream = [normal(*y.shape).to(y.dtype) for y in outputs]
        bwd = emulator.trace(lambda: torch.autograd.grad(outputs, leaves, upstream))
    return fwd, bwd, leaves[:given], leaves[given:], outputs, upstream


def code(line):
    """The line of csrc/layer_norm that a traced line stands for."""
    name, number = line.source.split(":")
    return (emulator.ROOT / "csrc" / "layer_norm" / name).read_text().splitlines()[int(number) - 1]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16 in an fp32 stream"])
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm", "add_layer_norm"])
def test_every_row_is_read_once_and_written_once(op, columns, dtypes):
    fwd, bwd, given, parameters, outputs, upstream = traced(op, columns, DTYPES[dtypes])
    for x in given:
        assert fwd.bytes_read(x) == x.nbytes
    for y in outputs:
        assert fwd.bytes_written(y) == y.nbytes
    normalized = outputs[-1] if "add" in op else given[0]
    for x in (normalized, *upstream):
        assert bwd.bytes_read(x) == x.nbytes
    for gradient in bwd.result[: len(given)]:
        assert bwd.bytes_written(gradient) <= gradient.nbytes  # of two that are equal one is copied
    # All that is not a parameter or a partial sum, which come from cache or are counted apart: the bars of 2 and 3
    # times the size of a row, 4 times with a residual, and 2% for the statistics.
    rows = given[0].shape[0]
    minimum = sum(x.nbytes for x in (*given, *outputs))
    statistics = 4 * rows * (1 if "rms" in op else 2)
    assert statistics <= 0.02 * minimum
    stored = fwd.total("layer_norm_fwd", "global", "store").bytes
    assert stored == sum(y.nbytes for y in outputs) + statistics
    loaded = fwd.total("layer_norm_fwd", "global", "load").bytes
    assert loaded == sum(x.nbytes for x in given) + rows * sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16 in an fp32 stream, fp32 parameters"])
def test_rows_are_accessed_16_bytes_at_a_time_in_whole_sectors_and_without_bank_conflicts(columns, dtypes):
    fwd, bwd, *_ = traced("add_layer_norm", columns, DTYPES[dtypes])
    for trace in (fwd, bwd):
        for line in trace.lines:
            # Eight fp32 neighbours of a thread (a partial sum, or parameters of 16-bit rows) are two halves of a sector
            # each: the second access finds the sectors of the first in cache.
            halves = "partial" in code(line) or "load_parameter" in code(line)
            assert line.sectors == line.ideal_sectors or (halves and line.sectors == 2 * line.ideal_sectors), line
            assert line.wavefronts == line.ideal_wavefronts, line
            statistics = "stats" in code(line)
            narrow = "stream" in dtypes and line.width == 8  # the 16-bit side of a mixed pair
            elements = line.space == "shared" or line.kernel == "layer_norm_bwd_sum"
            assert line.width == 16 or statistics or narrow or elements, line


# In a model -------------------------------------------------------------------------------------------------------


def test_a_training_step_of_a_gpt_gives_the_references_loss_and_gradients():
    config = fastlm.models.GPTConfig(
        vocab_size=160, max_seq_len=24, hidden_size=64, num_layers=2, num_heads=4, dropout=0.1
    )
    torch.manual_seed(0)
    model = fastlm.models.GPT(config)
    tokens = torch.randint(160, (2, 24), generator=torch.Generator().manual_seed(1))
    answers = []
    for backend in ("reference", "emulator,reference"):
        model.zero_grad()
        torch.manual_seed(2)
        with fastlm.use_backend(backend):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        answers.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, reference in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)
