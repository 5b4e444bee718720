"""The CUDA kernels of cross-entropy on the emulator: every path through them, every schedule, and what they move."""

import itertools

import hostile
import pytest
import torch
from errors import assert_within_rule
from proof import emulator

import fastlm
import fastlm.functional as F

# A warp to a row, several rows to a block; rows of several warps; of a whole block, which walks along them.
CLASSES = [1, 2, 7, 31, 33, 64, 511, 512, 513, 1000, 4100, 8191, 8192, 8200, 10007]
OPTIONS = {
    "indices": {},
    "smoothed and weighted": {"label_smoothing": 0.1, "z_loss": 0.01, "weight": True},
    "capped": {"softcap": 3.0, "weight": True},
    "probabilities": {"label_smoothing": 0.1, "softcap": 3.0, "weight": True},
}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(rows, classes, dtype, kind):
    """Logits, target and options."""
    options = dict(OPTIONS[kind])
    if options.pop("weight", False):
        options["weight"] = torch.linspace(0.5, 1.5, classes).to(dtype)
    if kind == "probabilities":
        return normal(rows, classes, dtype=dtype), normal(rows, classes, seed=1).softmax(1).to(dtype), options
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    target[rows // 2] = -100
    return normal(rows, classes, dtype=dtype), target, options


def answers(backend, logits, target, options, layout="contiguous"):
    """The loss and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    with fastlm.use_backend(backend):
        loss = F.cross_entropy(leaf, target, **options)
        grad = hostile.LAYOUTS[layout](normal(*loss.shape, seed=3).to(loss.dtype)) if loss.dim() else None
        return [loss, *torch.autograd.grad(loss, [leaf], grad)]


def assert_right(logits, target, options, layout="contiguous"):
    """The emulator's answers are as near to the reference's in float64 as the error rule asks."""
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact_target = target.double() if target.is_floating_point() else target
    exact = answers("reference", logits.double(), exact_target, wide, layout)
    same = answers("reference", logits, target, options, layout)
    for ours, near, true in zip(answers("emulator", logits, target, options, layout), same, exact, strict=True):
        assert_within_rule(ours, near, true)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_of_every_width_are_right_forward_and_backward(classes, dtype, kind):
    rows = 19 if classes < 600 else 3  # not a multiple of the rows of a block
    logits, target, options = arguments(rows, classes, dtype, kind)
    reduction = ("none", "mean", "sum")[classes % 3]
    assert_right(logits, target, options | {"reduction": reduction})


@pytest.mark.parametrize("classes", [20, 520, 8200])
@pytest.mark.parametrize("layout", [name for name in hostile.LAYOUTS if name != "contiguous"])
def test_logits_probabilities_and_upstream_gradients_may_lie_anyhow(layout, classes):
    place = hostile.LAYOUTS[layout]
    for kind in ("indices", "probabilities"):
        logits, target, options = arguments(4, classes, torch.bfloat16, kind)
        target = place(target) if target.is_floating_point() else target
        assert_right(place(logits), target, options | {"reduction": "none"}, layout)


def runs():
    """Ways to run a kernel that must not make a difference: schedule, seed, landing of copies, order of blocks."""
    yield from itertools.product(("adversarial", "round_robin"), (0,), ("lazy", "eager"), ("in_order", "random"))
    yield from (
        ("random", seed, ("lazy", "eager")[seed % 2], ("in_order", "random")[seed // 2 % 2]) for seed in range(6)
    )


@pytest.mark.parametrize("classes", [64, 1001, 8200])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_bits_do_not_depend_on_the_schedule(op, classes):
    logits, target, options = arguments(11, classes, torch.bfloat16, "smoothed and weighted")
    weight, results = normal(classes, 8, dtype=torch.bfloat16), []
    for schedule, seed, landing, blocks in runs():
        leaves = [(logits if op == "cross_entropy" else logits[:, :8]).detach().requires_grad_()]
        leaves += [weight.detach().requires_grad_()] * (op != "cross_entropy")
        with (
            emulator.settings(schedule=schedule, seed=seed, landing=landing, blocks=blocks),
            fastlm.use_backend("emulator"),
        ):
            loss = getattr(F, op)(*leaves, target, **options)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# Traffic ----------------------------------------------------------------------------------------------------------

WIDTHS = [1024, *(pytest.param(n, marks=pytest.mark.proof) for n in (512, 8192, 50304)), 10000]


def traced(classes, dtype, rows=9, **options):
    """Traces of forward and of backward, logits and target; the last row is ignored."""
    logits, target = normal(rows, classes, dtype=dtype).requires_grad_(), torch.arange(rows)
    target[-1] = -100
    with fastlm.use_backend("emulator"):
        fwd = emulator.trace(lambda: F.cross_entropy(logits, target, **options))
        bwd = emulator.trace(lambda: torch.autograd.grad(fwd.result, [logits])[0])
    return fwd, bwd, logits


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_reads_the_logits_once_and_backward_reads_and_writes_once(classes, dtype):
    fwd, bwd, logits = traced(classes, dtype)
    row = logits[0].nbytes
    assert fwd.bytes_read(logits) == 8 * row + 8 * logits.element_size()  # again the target's, for itself
    assert bwd.bytes_read(logits) == 8 * row
    assert bwd.bytes_written(bwd.result) == 9 * row
    for trace, kernel, most in ((fwd, "cross_entropy_fwd", 8 * row), (bwd, "cross_entropy_bwd", 17 * row)):
        moved = [
            line
            for line in trace.lines
            if line.space == "global" and line.kernel.startswith(kernel) and line.width == 16
        ]
        assert sum(line.bytes for line in moved) == most
        for line in moved:
            assert line.sectors == line.ideal_sectors, line
    for line in (*fwd.lines, *bwd.lines):
        assert line.wavefronts == line.ideal_wavefronts, line


@pytest.mark.parametrize("classes", [1001, 50257])
def test_rows_that_begin_anywhere_are_read_in_vectors_but_for_their_ends(classes):
    fwd, bwd, logits = traced(classes, torch.bfloat16)
    row = logits[0].nbytes
    for trace, kernel, most in ((fwd, "cross_entropy_fwd", 8 * row), (bwd, "cross_entropy_bwd", 17 * row)):
        lines = [line for line in trace.lines if line.space == "global" and line.kernel.startswith(kernel)]
        vectors = sum(line.bytes for line in lines if line.width == 16)
        assert most - 2 * 14 * 17 <= vectors <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_backward_moves_no_more_and_takes_no_memory(dtype):
    logits, target = normal(8, 1024, dtype=dtype), torch.arange(8)
    leaf, seen = logits.clone().requires_grad_(), []
    x = leaf * 1
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))
    with fastlm.use_backend("emulator"):
        loss = F.cross_entropy(x, target, inplace_backward=True)
        bwd = emulator.trace(loss.backward)
    assert seen == [x.data_ptr()]
    assert bwd.bytes_read(x) == bwd.bytes_written(x) == x.nbytes
    assert torch.equal(x, leaf.grad)


@pytest.mark.parametrize("classes", [64, 2048])  # several rows to a block, of which the last has fewer; and one
def test_linear_forms_the_gradient_in_forward_where_the_logits_are(classes):
    x, weight, target = normal(5, 16), normal(classes, 16, seed=1), torch.arange(5)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with fastlm.use_backend("emulator"):
        fwd = emulator.trace(lambda: F.linear_cross_entropy(*leaves, target))
        bwd = emulator.trace(fwd.result.backward)
    assert not [line for line in bwd.lines if line.kernel]
    logits = 5 * classes * 4
    own = [
        line
        for line in fwd.lines
        if line.space == "global" and line.kernel.startswith("cross_entropy_fwd") and line.width == 16
    ]
    assert sum(line.bytes for line in own if line.access == "load") == 2 * logits  # the second time from cache
    assert sum(line.bytes for line in own if line.access == "store") == logits
