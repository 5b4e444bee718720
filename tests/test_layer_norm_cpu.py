"""The CPU kernels of the norms: threads, stores past the caches, instruction sets, conversions, and their launchers."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import formulas
import hostile
import pytest
import torch
import torch.nn.functional as T
from cases import serves_here
from errors import assert_within_rule

import fastlm
import fastlm.functional as F
from fastlm.ops import compiled
from fastlm.ops.registry import OPS

pytestmark = pytest.mark.skipif(bool(compiled.cpu_missing()), reason=compiled.cpu_missing())

VARIANTS = [name for name in OPS["layer_norm"].backends if name.startswith("cpu")]  # "cpu" is the best of them
NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *NARROW, torch.float64]
NORMS = ["layer_norm", "rms_norm"]


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def answers(backend, op, x, residual, *parameters, dropout_p=0.0, upstream=None):
    """Outputs, then gradients of the inputs, then those of the parameters."""
    leaves = [y.detach().requires_grad_() for y in (x, residual, *parameters) if y is not None]
    given = leaves[: 1 if residual is None else 2]
    options = {} if residual is None else {"dropout_p": dropout_p}
    torch.manual_seed(3)
    with fastlm.use_backend(backend):
        outputs = getattr(F, op)(*given, x.shape[-1:], *leaves[len(given) :], **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = (
        [normal(*x.shape, dtype=y.dtype, seed=n) for n, y in enumerate(outputs)] if upstream is None else upstream
    )
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


# Threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(300, 768), (4096, 64), (7, 5000)])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"])
def test_results_are_the_same_bits_for_any_number_of_threads_and_every_time(op, rows, columns, dtype):
    x, residual = normal(rows, columns, dtype=dtype), normal(rows, columns, seed=1)
    parameters = [normal(columns, dtype=dtype, seed=2), normal(columns, dtype=dtype, seed=3)]
    parameters, residual = parameters[: 1 if "rms" in op else 2], residual if "add" in op else None
    results = []
    for threads in (1, 2, 3, 3, 1):
        torch.set_num_threads(threads)
        results.append(answers("cpu", op, x, residual, *parameters, dropout_p=0.2))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


SCRIPT = """
import json, os
import torch
import fastlm
import fastlm.functional as F

def norm():
    with fastlm.use_backend("cpu"):
        F.layer_norm(x, (1024,))

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x = torch.zeros(512, 1024)
norm()
counts = [threads()]
norm()
counts.append(threads())
torch.set_num_threads(3)
norm()
counts.append(threads())
x.exp()
counts.append(threads())
maps = {line.split()[-1] for line in open("/proc/self/maps") if line.rstrip().endswith(".so") or ".so." in line}
pools = [path for path in maps if any(name in path for name in ("libgomp", "libomp", "libiomp"))]
print(json.dumps([counts, pools]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_kernels_run_in_torchs_own_threads_and_in_no_more_than_torch_is_told():
    variables = os.environ | {"PYTHONPATH": str(Path(fastlm.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, check=True)
    (before, one, three, after_torch), pools = json.loads(run.stdout)
    assert one == before  # the calling thread alone
    assert three == one + 2  # two more
    assert after_torch == three  # which torch's exp finds there
    assert len(pools) == 1, pools


# Results larger than the caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1024, 1001, 1004])  # aligned rows, rows at any address, and at every fourth
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", VARIANTS)
def test_results_past_the_caches_are_those_of_small_calls_row_by_row(backend, dtype, columns):
    rows = (1 << 22) // (columns * dtype.itemsize) + 5
    x, residual = (normal(rows, columns, dtype=dtype, seed=seed) for seed in (1, 2))
    grads = [normal(rows, columns, dtype=dtype, seed=seed) for seed in (3, 4)]
    weight, bias = normal(columns, dtype=dtype, seed=5), normal(columns, dtype=dtype, seed=6)
    large = answers(backend, "add_layer_norm", x, residual, weight, bias, upstream=grads)
    assert large[0].numel() * dtype.itemsize >= 1 << 22
    step = rows // 3
    for start in range(0, rows, step):
        part = slice(start, start + step)
        small = answers(
            backend, "add_layer_norm", x[part], residual[part], weight, bias, upstream=[g[part] for g in grads]
        )
        for whole, piece in list(zip(large, small, strict=True))[:4]:
            assert torch.equal(whole[part], piece)


# Instruction sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [5000, 5003])
@pytest.mark.parametrize(("dtype", "residual_dtype"), list(itertools.product([torch.float32, *NARROW], repeat=2)))
@pytest.mark.parametrize("backend", VARIANTS)
def test_every_variant_is_within_the_error_rule_for_every_pair_of_dtypes(backend, dtype, residual_dtype, columns):
    x, residual = normal(3, columns, dtype=dtype), normal(3, columns, dtype=residual_dtype, seed=1)
    weight, bias = (normal(columns, dtype=dtype, seed=seed) for seed in (2, 3))
    ours = answers(backend, "add_layer_norm", x, residual, weight, bias)
    leaves = [y.double().requires_grad_() for y in (x, residual, weight, bias)]
    exact = formulas.add_layer_norm(leaves[0], leaves[1], (columns,), *leaves[2:])
    upstream = [normal(3, columns, dtype=y.dtype, seed=n) for n, y in enumerate(ours[:2])]
    exact = [*exact, *torch.autograd.grad(exact, leaves, [g.double() for g in upstream])]
    reference = answers("reference", "add_layer_norm", x, residual, weight, bias)
    for n, (our, near, true) in enumerate(zip(ours, reference, exact, strict=True)):
        assert_within_rule(our, near, true, f"result {n}")


def patterns(dtype):
    """Every value of a dtype of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def neighbourhood(dtype):
    """In fp32, every value of `dtype`, the point half way to the next one, and what lies just beside each of these."""
    before, values, after = ((patterns(dtype).view(torch.int16) + n).view(dtype).float() for n in (-1, 0, 1))
    step = torch.where(after.isfinite(), after - values, values - before)  # past the largest, as if there were a next
    points = torch.cat([values, values + step / 2, values * 1.1])
    infinity = torch.tensor(torch.inf)
    return torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])


def streamed(backend, x, dtype, columns):
    """x + -0 as new_residual, in `dtype`: x itself, converted."""
    short = -len(x) % columns
    x = torch.cat([x, x[:short]]).reshape(-1, columns)
    with fastlm.use_backend(backend):
        _, stream = F.add_layer_norm(x, torch.full_like(x, -0.0, dtype=dtype), (columns,))
    return x, stream


def assert_same_bits(ours, expected):
    """NaN is NaN, of whatever bits; everything else is equal, its sign too."""
    assert torch.equal(ours.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    bits = {2: torch.int16, 4: torch.int32}[ours.itemsize]
    wrong = ours[numbers].view(bits) != expected[numbers].view(bits)
    assert not wrong.any(), (wrong.sum(), ours[numbers][wrong][:5], expected[numbers][wrong][:5])


@pytest.mark.parametrize("columns", [256, 3])  # whole vectors, and less than any
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("backend", VARIANTS)
def test_every_value_of_16_bits_is_read_exactly(backend, dtype, columns):
    x, stream = streamed(backend, patterns(dtype), torch.float32, columns)
    assert_same_bits(stream, x.float())


@pytest.mark.parametrize("columns", [256, 3])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("backend", VARIANTS)
def test_fp32_is_rounded_to_16_bits_as_torch_rounds_it(backend, dtype, columns):
    x, stream = streamed(backend, neighbourhood(dtype), dtype, columns)
    expected = x.to(dtype)
    target = list(compiled.extension().CPU_TARGETS)[-1] if backend == "cpu" else backend.removeprefix("cpu_")
    if dtype == torch.bfloat16 and target in ("avx512_bf16", "amx"):
        below = x.abs() < torch.finfo(dtype).smallest_normal  # of these the processor's own instruction makes 0
        expected = torch.where(below, torch.copysign(torch.zeros_like(expected), x.to(dtype)), expected)
    assert_same_bits(stream, expected)


@pytest.mark.parametrize("backend", VARIANTS)
def test_a_nan_whose_upper_half_looks_like_infinity_stays_nan(backend):
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F80FFFF, 0x7FC00000] * 8, dtype=torch.int32)
    for dtype in NARROW:
        for columns in (48, 3):
            _, stream = streamed(backend, x.view(torch.float32), dtype, columns)
            assert stream.isnan().all()


# Layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", VARIANTS)
@pytest.mark.parametrize("op", NORMS)
def test_rows_past_2_to_the_31_elements_give_the_same_twice_and_as_near_rows(op, backend):
    x, grad = normal(3, 40), normal(3, 40, seed=1)
    far, far_grad = hostile.far_apart(x), hostile.far_apart(grad)
    near = answers(backend, op, x, None, upstream=[grad])
    for _ in range(2):
        for one, two in zip(answers(backend, op, far, None, upstream=[far_grad]), near, strict=True):
            assert torch.equal(one, two)


LAYOUTS = {
    "transposed": (lambda x: x.mT.contiguous().mT, 1),
    "strided": (hostile.strided, 1),
    "constant rows": (hostile.expanded_last, 1),
    "contiguous": (hostile.contiguous, 0),
    "permuted": (lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), 0),
    "rows sliced": (hostile.sliced_rows, 0),
    "rows expanded": (hostile.expanded, 0),
    "misaligned": (hostile.misaligned, 0),
    "one element": (hostile.from_sum, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_explain_says_what_is_copied_and_it_is_only_rows_that_are_not_one_run(layout):
    make, count = LAYOUTS[layout]
    x = make(normal(2, 3, 4, 6))
    with fastlm.use_backend("cpu"):
        copies = fastlm.explain(F.layer_norm, x, (6,)).copies
        both = fastlm.explain(F.add_layer_norm, normal(2, 3, 4, 6), x, (6,)).copies
    assert copies == [f"input, of strides {x.stride()}"][:count]
    assert both == [f"residual, of strides {x.stride()}"][:count]


# Launchers ----------------------------------------------------------------------------------------------------------


def forward_arguments(**changes):
    """What the forward launcher takes for a call of one row of four columns."""
    x = torch.zeros(1, 4)
    names = [
        "input", "residual", "weight", "bias", "rng_state", "output", "new_residual", "stats", "rows", "input_strides",
        "residual_strides", "cols", "eps", "dropout_p", "rms", "dtype", "residual_dtype", "parameter_dtype", "target",
    ]  # fmt: skip
    codes = compiled.extension().DTYPES
    values = [x.data_ptr(), 0, 0, 0, 0, (y := torch.ones(1, 4)).data_ptr(), 0, (stats := torch.ones(2)).data_ptr(), 1]
    values += [4, 4, 4, 1e-5, 0.0, False, codes["float32"], codes["float32"], codes["float32"], 0]
    arguments = dict(zip(names, values, strict=True)) | changes
    return list(arguments.values()), (x, y, stats)


def test_a_launcher_takes_the_fields_of_its_struct():
    arguments, (_, y, stats) = forward_arguments()
    compiled.extension().layer_norm_fwd_cpu(*arguments)
    assert (y == 0).all()
    assert stats[0] == 0


@pytest.mark.parametrize("name", ["layer_norm_fwd_cpu", "layer_norm_bwd_cpu"])
def test_a_launcher_with_too_few_or_too_many_arguments_raises(name):
    arguments, _ = forward_arguments()
    for count in ([], arguments[:-1], [*arguments * 2]):
        with pytest.raises(TypeError, match=rf"{name} takes \d+ arguments, got {len(count)}"):
            getattr(compiled.extension(), name)(*count)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": "text"},
        {"input": None},
        {"rows": "text"},
        {"rows": (1, 1, 1)},
        {"rows": (1, 1, 1, "text")},
        {"input_strides": [4, 0, 0, 0]},
        {"cols": 4.0},
        {"eps": "text"},
        {"dtype": "float32"},
        {"target": "baseline"},
    ],
    ids=str,
)
def test_a_launcher_with_an_argument_of_the_wrong_type_raises(wrong):
    arguments, (_, y, _) = forward_arguments(**wrong)
    with pytest.raises(TypeError):
        compiled.extension().layer_norm_fwd_cpu(*arguments)
    assert (y == 1).all()


@pytest.mark.parametrize("wrong", [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float64")])
def test_dtypes_that_do_not_go_together_raise_with_the_launchers_name(wrong):
    codes = compiled.extension().DTYPES
    arguments, (_, y, _) = forward_arguments(dtype=codes[wrong[0]], residual_dtype=codes[wrong[1]])
    with pytest.raises(RuntimeError, match="layer_norm_fwd_cpu: the dtypes of input and residual do not go together"):
        compiled.extension().layer_norm_fwd_cpu(*arguments)
    assert (y == 1).all()


def test_a_variant_that_the_processor_does_not_have_raises_with_the_launchers_name():
    for target in (-1, 99):
        arguments, (_, y, _) = forward_arguments(target=target)
        with pytest.raises(RuntimeError, match="layer_norm_fwd_cpu: this processor does not have"):
            compiled.extension().layer_norm_fwd_cpu(*arguments)
        assert (y == 1).all()


# One gradient for input and residual --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "dropout_p", "one"),
    [
        (torch.float32, torch.float32, 0.0, True),
        (torch.bfloat16, torch.bfloat16, 0.0, True),
        (torch.bfloat16, torch.float32, 0.0, False),
        (torch.float32, torch.bfloat16, 0.0, False),
        (torch.float32, torch.float32, 0.3, False),
    ],
)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_equal_gradients_of_input_and_residual_are_written_once(op, dtype, residual_dtype, dropout_p, one):
    record, asked = OPS[op].backends["cpu"], []

    def bwd(*args):
        asked.append(list(args[-1]))
        return record.bwd(*args)

    fastlm.register_backend(op, fastlm.Backend("spy", fwd=record.fwd, bwd=bwd))
    places, leaves = {}, {}
    for name, kind in (("input", dtype), ("residual", residual_dtype)):
        leaves[name] = normal(5, 8, dtype=kind, seed=len(name)).requires_grad_()
    inner = {name: leaf * 1 for name, leaf in leaves.items()}  # a leaf may get a copy
    for name, x in inner.items():
        x.register_hook(lambda grad, name=name: places.update({name: (grad.data_ptr(), grad.clone())}))
    with fastlm.use_backend("spy"):
        output, _ = getattr(F, op)(inner["input"], inner["residual"], (8,), dropout_p=dropout_p)
    output.square().sum().backward()
    assert asked[0][:2] == [not one, True]
    assert (places["input"][0] == places["residual"][0]) == one
    assert torch.equal(places["input"][1], places["residual"][1]) == one
    assert [x.grad.dtype for x in leaves.values()] == [dtype, residual_dtype]


@pytest.mark.parametrize("wanted", ["input", "residual"])
def test_one_of_the_two_gradients_alone_is_what_it_is_with_the_other(wanted):
    gradients = []
    for alone in (False, True):
        leaves = {
            name: normal(5, 8, seed=len(name)).requires_grad_(not alone or name == wanted)
            for name in ("input", "residual")
        }
        with fastlm.use_backend("cpu"):
            output, stream = F.add_layer_norm(*leaves.values(), (8,))
        (output.square() + stream).sum().backward()
        gradients.append(leaves[wanted].grad)
    assert torch.equal(*gradients)


# Values that break sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", VARIANTS)
def test_the_variance_of_rows_far_from_zero_does_not_cancel(backend):
    x = normal(4, 999) + 1e4
    assert serves_here(F.layer_norm, x, (999,))
    with fastlm.use_backend(backend):
        ours = F.layer_norm(x, (999,))
    assert_within_rule(ours, T.layer_norm(x, (999,)), formulas.layer_norm(x.double(), (999,)))


def test_ops_called_with_what_does_not_fit_together_raise_and_read_nothing():
    x, weight, bias = normal(3, 8), torch.ones(8), torch.zeros(8)
    fwd, bwd = torch.ops.fastlm.layer_norm_fwd, torch.ops.fastlm.layer_norm_bwd
    _, stats = fwd(x, (8,), weight, bias, 1e-5, "cpu")
    for wrong in ((x, (8,), weight[:4], bias), (x, (8,), weight, bias[:4]), (x, (4,), weight[:4], bias[:4])):
        with pytest.raises(ValueError, match=r"norm kernels: .* must"):
            fwd(*wrong, 1e-5, "cpu")
    needs = [True, True, True]
    for grad, kept in ((x.half(), stats), (x[:2], stats), (x, stats[:1]), (x, stats[:, :2]), (x, stats.half())):
        with pytest.raises(ValueError, match=r"norm kernels: .* must"):
            bwd(grad, x, weight, bias, kept, (8,), 1e-5, needs, "cpu")
