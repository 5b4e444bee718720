"""What the compilers made of every kernel, held to one table of budgets; and the tool that reports it, checked.

Compiling everything takes minutes, so that the budgets are checked for a part: CUDA and Triton for two architectures,
and of Triton two widths of rows; in `make proof` CUDA for all that setup.py builds, and more of attention.
FASTLM_ALL_KERNELS=1 checks all. Results are cached: a second run takes seconds.
"""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from proof import kernel_report

ROOT = Path(__file__).parent.parent
READERS = ("cuobjdump", "nvdisasm")
ALL = os.environ.get("FASTLM_ALL_KERNELS") == "1"
EVERY = tuple(kernel_report.LIMITS)
BUILT = (75, 80, 90, 100, 120)  # by setup.py; 86 and 89 run the code for 80
PARTS = {
    "cuda": (EVERY if ALL else (80, 90), ""),
    "triton": (EVERY if ALL else (90, 100), "" if ALL else r" (768|5120) |plain 50304|causal (64|128) bf"),
    "cuda in proof": (BUILT, ""),
    "triton in proof": ((80, 120), r"attention ((decode|everything|grouped) 64|causal (64|128)) bf"),
}

pytestmark = pytest.mark.slow
no_readers = [name for name in READERS if not kernel_report.find_tool(name)]
LACKING = {
    "cuda": no_readers + ["nvcc"] * (not kernel_report.find_tool("nvcc")),
    "triton": no_readers + ["triton"] * (not kernel_report._triton),
}
needs = {kind: pytest.mark.skipif(bool(names), reason=f"no {', '.join(names)}") for kind, names in LACKING.items()}
kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[needs[kind.split()[0]], *[pytest.mark.proof] * ("proof" in kind)]) for kind in PARTS],
)


def run_tool(*arguments):
    """The report as the tool's JSON has it; two runs at a time compile nothing twice."""
    command = [sys.executable, kernel_report.__file__, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """Kernels by kind."""
    found = {}

    def of(kind):
        if kind not in found:
            file = tmp_path_factory.mktemp("report") / "report.json"
            architectures, pattern = PARTS[kind]
            run_tool("--only", kind.split()[0], "--arch", ",".join(map(str, architectures)), "--json", file, pattern)
            found[kind] = json.loads(file.read_text())["kernels"]
        return found[kind]

    return of


# Budgets ----------------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """The most that a kernel may use. Of accesses of less than 16 bytes: bytes per thread -> instructions."""

    registers: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


ANY = dict.fromkeys((1, 2, 4, 8), 1000)
# Mean and rstd are 4 bytes each (two rows of them at once 8); seed and offset of dropout are loads of 8 and 4 bytes.
# CUDA: beside fp32 elements a thread takes four of a vector, so that the input, weight or bias in 16 bits is 8 bytes.
# Triton: where a row is more than three pieces, backward has 4 elements of each in a thread: 8 bytes in 16 bits; seed
# and offset are loaded for each piece; partial sums are stored in 8 bytes, once a program.
# Cross-entropy: an index is 8 bytes, the target's logit one element; rows of CUDA's kernels end in single elements.
BUDGETS = {
    r"layer_norm_fwd_kernel<(bf16|fp16), \1, 8>": Budget(64, 256, {8: 1, 4: 1}, {4: 2}),
    r"layer_norm_fwd_kernel<(bf16|fp16), fp32, 4>": Budget(64, 256, {8: 21, 4: 1}, {8: 4, 4: 2}),
    r"layer_norm_fwd_kernel<fp32, fp32, 4>": Budget(64, 256, {8: 17, 4: 1}, {4: 2}),
    r"layer_norm_fwd_kernel<.*, 1>": Budget(96, 256, ANY, ANY),
    r"layer_norm_fwd_long_kernel<.*>": Budget(64, 256, ANY, ANY),
    r"layer_norm_bwd_kernel<(bf16|fp16), \1, 8>": Budget(128, 8448, {8: 1, 4: 3}, {}),
    r"layer_norm_bwd_kernel<(bf16|fp16), fp32, 4>": Budget(128, 8448, {8: 13, 4: 3}, {8: 4}),
    r"layer_norm_bwd_kernel<fp32, fp32, 4>": Budget(128, 8448, {8: 9, 4: 3}, {}),
    r"layer_norm_bwd_kernel<.*, 1>": Budget(128, 8448, ANY, ANY),
    r"layer_norm_bwd_long_kernel<.*>": Budget(64, 256, ANY, ANY),
    r"layer_norm_bwd_sum_kernel": Budget(32, 2048, ANY, ANY),
    r"(add_)?layer_norm \d+ \w+ _sum_kernel": Budget(64, 512, {}, {4: 2, 2: 2}),
    r"layer_norm (768|5120|8192) \w+ _fwd_kernel": Budget(72, 64, {}, {4: 2}),
    r"layer_norm 1600 \w+ _fwd_kernel": Budget(96, 64, {}, {4: 2}),
    r"add_layer_norm (768|5120|8192) bfloat16 _fwd_kernel": Budget(72, 16384, {8: 5, 4: 5}, {4: 2}),
    r"add_layer_norm 1600 bfloat16 _fwd_kernel": Budget(96, 4096, {8: 7, 4: 7}, {4: 2}),
    r"layer_norm 768 \w+ _bwd_kernel": Budget(168, 4096, {4: 4}, {8: 6}),
    r"add_layer_norm 768 bfloat16 _bwd_kernel": Budget(176, 4096, {8: 3, 4: 5}, {8: 6}),
    r"layer_norm 1600 \w+ _bwd_kernel": Budget(168, 2048, {8: 21, 4: 2}, {8: 21}),
    r"add_layer_norm 1600 bfloat16 _bwd_kernel": Budget(200, 2048, {8: 21, 4: 9}, {8: 21}),
    r"layer_norm 5120 float32 _bwd_kernel": Budget(144, 32, {4: 2}, {}),
    r"layer_norm 5120 bfloat16 _bwd_kernel": Budget(128, 32, {8: 15, 4: 2}, {8: 5}),
    r"add_layer_norm 5120 bfloat16 _bwd_kernel": Budget(168, 32, {8: 15, 4: 7}, {8: 5}),
    r"layer_norm 8192 \w+ _bwd_kernel": Budget(128, 16384, {4: 2}, {}),
    r"add_layer_norm 8192 bfloat16 _bwd_kernel": Budget(128, 16384, {8: 2, 4: 4}, {}),
    r"(add_)?layer_norm 32768 \w+ _fwd_wide_kernel": Budget(64, 16384, {8: 2, 4: 2}, {4: 2}),
    r"(add_)?layer_norm 32768 \w+ _bwd_wide_kernel": Budget(64, 16384, {8: 1, 4: 3}, {}),
    r"(add_)?layer_norm 32768 \w+ _bwd_wide_parameters_kernel": Budget(72, 4096, {8: 2}, {}),
    r"cross_entropy_(fwd|bwd)_kernel<.*, false>": Budget(48, 512, ANY, ANY),
    r"cross_entropy_(fwd|bwd)_kernel<.*, true>": Budget(64, 512, ANY, ANY),
    r"cross_entropy_sum_kernel": Budget(64, 256, ANY, ANY),
    r"cross_entropy plain 50304 \w+ _fwd_kernel": Budget(40, 32, {8: 1, 4: 1, 2: 1}, {4: 8}),
    r"cross_entropy plain 50304 \w+ with gradient _fwd_kernel": Budget(48, 32, {8: 1, 4: 2, 2: 1}, {4: 8}),
    r"cross_entropy plain 50304 \w+ _bwd_kernel": Budget(40, 32, {8: 1, 4: 5}, {}),
    r"cross_entropy (everything|probabilities) 50304 .*_(fwd|bwd)_kernel": Budget(80, 32, {8: 1, 4: 7, 2: 2}, {4: 8}),
    r"cross_entropy plain 50257 .*_(fwd|bwd)_kernel": Budget(72, 32, ANY, ANY),
    r"cross_entropy .* _sum_kernel": Budget(64, 256, {8: 4, 4: 16, 2: 4}, {4: 3}),
    r"attention_fwd_kernel<.*>": Budget(255, 0, ANY, ANY),
    r"attention_bwd_kernel<.*>": Budget(255, 0, ANY, {}),
    r"attention_combine_kernel<.*>": Budget(64, 0, ANY, ANY),
    r"attention_stats_kernel<.*>": Budget(64, 0, {4: 2}, {4: 4}),
    r"attention_grad_query_kernel<.*>": Budget(72, 0, {4: 5}, {}),
    r"attention decode \d+ \w+ _fwd_kernel": Budget(168, 73728, ANY, ANY),
    r"attention decode \d+ \w+ _combine_kernel": Budget(64, 64, ANY, ANY),
    r"attention .* _(fwd|dq|dkdv)_kernel": Budget(255, 227 * 1024, ANY, ANY),
}
# Bytes stored to local memory; no other kernel stores any, and no CUDA one. From release 13 on, ptxas keeps to 64 or
# 128 registers, a block more per multiprocessor, where that costs a spilled register or two.
SPILLS = {
    ("add_layer_norm 32768 bfloat16 _bwd_wide_parameters_kernel", 100): 8,
    ("add_layer_norm 5120 bfloat16 _bwd_kernel", 120): 4,
    ("cross_entropy probabilities 50304 float32 with gradient _fwd_kernel", 120): 8,
}


def overdrawn(kernel, budget, spill=0):
    """What of its budget a kernel exceeds."""
    found = []

    def hold(what, used, most):
        if used > most:
            found.append(f"{kernel['kernel']} sm_{kernel['arch']}: {what} {used}, budget {most}")

    hold("registers", kernel["registers"], budget.registers)
    hold("shared memory", kernel["shared"], budget.shared)
    hold("spilled bytes", kernel["spill_stores"], spill)
    hold("local memory", kernel["local"], 2 * spill)  # the stack is aligned to 8 bytes
    hold("registers of 512 threads", kernel["registers"] if kernel["threads"] >= 512 else 0, 128)
    for kind, narrow in (("load", budget.loads), ("store", budget.stores)):
        for size, n in kernel_report.widths(kernel["instructions"], f"global {kind}").items():
            if size < 16:
                hold(f"{kind}s of {size} bytes", n, narrow.get(size, 0))
    return found


@kinds
def test_every_kernel_keeps_to_its_budget(report, kind):
    found = []
    for kernel in report(kind):
        budget = next((b for pattern, b in BUDGETS.items() if re.fullmatch(pattern, kernel["kernel"])), None)
        assert budget is not None, f"{kernel['kernel']} has no budget"
        found += overdrawn(kernel, budget, SPILLS.get((kernel["kernel"], kernel["arch"]), 0))
        assert kernel["blocks"] > 0, f"{kernel['kernel']} does not fit on a multiprocessor of sm_{kernel['arch']}"
        assert kernel.get("tensor_memory", 0) <= 512, f"{kernel['kernel']} does not fit into tensor memory"
    assert not found, "\n".join(found)


@kinds
def test_no_instruction_is_left_unclassified(report, kind):
    left = {kernel["kernel"]: kernel["instructions"].get("other", 0) for kernel in report(kind)}
    assert {name: n for name, n in left.items() if n} == {}


@needs["triton"]
def test_attention_is_formed_by_the_tensor_cores_of_each_architecture(report):
    kernels = [k for k in report("triton") if k["kernel"].startswith("attention causal") and "bfloat16" in k["kernel"]]
    newest = {90: "wgmma", 100: "tcgen05.mma"}
    for kernel in kernels:
        if " 256 " not in kernel["kernel"]:  # where sm_100's tensor memory is too small
            assert kernel["products"] == [newest.get(kernel["arch"], "mma.sync")], kernel["kernel"]
    figures = {(k["kernel"], k["arch"]): k["flop_per_instruction"] for k in kernels}
    # Triton's own tutorial reaches 966, FlashAttention-3 1,217.
    assert figures["attention causal 64 bfloat16 _fwd_kernel", 90] >= 966


FLASH_ATTENTION_2 = {("fwd", 64): 948, ("fwd", 128): 1188, ("bwd", 64): 1058, ("bwd", 128): 1323}  # FLOP, on sm_80


@pytest.mark.parametrize(
    "kind",
    [pytest.param(name, marks=pytest.mark.proof) if "proof" in name else name for name in PARTS if "cuda" in name],
)
@needs["cuda"]
def test_attention_in_cuda_makes_more_of_an_instruction_than_flash_attention_2(report, kind):
    found = {}
    for kernel in report(kind):
        parts = re.fullmatch(r"attention_(fwd|bwd)_kernel<\w+, (64|128)>", kernel["kernel"])
        if parts and kernel["arch"] >= 80:
            found[kernel["kernel"], kernel["arch"]] = kernel["flop_per_instruction"]
            least = FLASH_ATTENTION_2[parts[1], int(parts[2])]
            assert kernel["flop_per_instruction"] >= least, (kernel["kernel"], kernel["arch"])
    assert len(found) == 8 * len([architecture for architecture in PARTS[kind][0] if architecture >= 80])


@needs["cuda"]
def test_report_has_every_instantiation_that_csrc_registers(report):
    pairs = len(re.findall(r"^  function\(", (ROOT / "csrc/common/dispatch.cuh").read_text(), re.M))
    registered, defined = collections.Counter(), set()
    for path in (ROOT / "csrc").rglob("*.cu"):
        text = path.read_text()
        types = len(re.findall(r"^ +register_kernels<\w+>\(\);", text, re.M))
        widths = len(re.findall(r"^ +register_width<T, \d+>\(\);", text, re.M))
        for name, of_types in re.findall(r"^ +register_kernel\(.*?, (\w+_kernel)(<T, R|<T, kWidth|<T)?", text, re.M):
            registered[name] += {"<T, R": pairs, "<T, kWidth": types * widths, "<T": types, "": 1}[of_types]
        defined |= set(re.findall(r"__global__ void[^;{]*?(\w+)\(const", text))
    assert set(registered) == defined
    for architecture in PARTS["cuda"][0]:
        names = [kernel["kernel"] for kernel in report("cuda") if kernel["arch"] == architecture]
        assert len(names) == len(set(names))
        assert collections.Counter(name.split("<")[0] for name in names) == registered


@needs["triton"]
def test_report_has_triton_kernels_of_every_part_for_each_architecture(report):
    by_architecture = collections.defaultdict(list)
    for kernel in report("triton"):
        by_architecture[kernel["arch"]].append(kernel["kernel"])
    assert tuple(by_architecture) == PARTS["triton"][0]
    [names] = {tuple(names) for names in by_architecture.values()}
    assert len(names) == len(set(names)) >= 18


# The tool ---------------------------------------------------------------------------------------------------------

SAMPLE = """
// 64 values that live across a barrier, in 32 registers.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float4* x, float4* y) {
  float4 kept[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 16; ++i) y[i * 1024 + threadIdx.x] = kept[15 - i];
}

// Two loops in a third, each with a branch; the second one moves more bytes.
__global__ void narrow_kernel(const float* x, const short* small, float* y, int rows, int cols) {
  __shared__ float tile[256];
  for (int row = 0; row < rows; ++row) {
    y[row] = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < cols; i += blockDim.x) tile[i % 256] += small[i];
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < cols; i += blockDim.x) y[i] = x[i] > 0.0f ? expf(x[i]) : tile[i % 256] + small[i];
  }
}

__device__ void multiply(float (&d)[4], unsigned a) {  // 16 x 8 x 16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%4,%4,%4},{%4,%4},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a));
}

// A loop without products that moves most bytes, a short one of one product, and two of two products: first at an edge.
__global__ void tensor_kernel(const unsigned* a, const float4* x, float* y, int n) {
  float d[4] = {};
#pragma unroll 1
  for (int i = 0; i < n; ++i) d[0] += x[i].x + x[i].y + x[i].z + x[i].w;
#pragma unroll 1
  for (int i = 0; i < n; ++i) multiply(d, i);
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    multiply(d, a[i]);
    multiply(d, a[i + n]);
    for (int j = 0; j < 4; ++j) d[j] = i + j < threadIdx.x ? exp2f(d[j]) : 0.0f;
  }
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    multiply(d, a[i]);
    multiply(d, a[i + 1]);
  }
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

// Two loops; the first one moves more bytes, to shared memory.
__global__ void async_kernel(const float4* x, const float* small, float* y, int n) {
  __shared__ float4 tile[256];
  const unsigned place = __cvta_generic_to_shared(tile + threadIdx.x);
#pragma unroll 1
  for (int i = 0; i < n; ++i) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(x + i));
  asm volatile("cp.async.wait_all;" ::: "memory");
  float sum = tile[threadIdx.x].x;
#pragma unroll 1
  for (int i = 0; i < n; ++i) sum += expf(small[i]) * expf(small[i + n]);
  y[threadIdx.x] = sum;
}
"""


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "sample.cu").write_text(SAMPLE)
    arguments = ("--only", "cuda", "--arch", "80,90", "--csrc", folder, "--json", folder / "report.json")
    table = run_tool(*arguments).stdout
    return table, {(k["kernel"], k["arch"]): k for k in json.loads((folder / "report.json").read_text())["kernels"]}


@needs["cuda"]
@pytest.mark.parametrize("architecture", [80, 90])
def test_deliberate_spill_is_reported(sample, architecture):
    table, kernels = sample
    kernel = kernels["spilling_kernel", architecture]
    assert kernel["registers"] <= 32
    assert kernel["threads"] == 1024
    assert kernel["bounded"]
    assert (kernel["blocks"], kernel["occupancy"]) == (2, 1.0)
    assert kernel["local"] >= kernel["spill_stores"] > 100
    assert kernel["spill_loads"] > 100
    assert kernel["hot_loop"] is None
    assert f"{kernel['spill_stores']}+{kernel['spill_loads']}" in table
    found = overdrawn(kernel, Budget(64, 0, {}, {}))
    assert [line.split(": ")[1].split(" ")[0] for line in found] == ["spilled", "local"]


@needs["cuda"]
@pytest.mark.parametrize("architecture", [80, 90])
def test_narrow_accesses_and_the_hot_loop_are_reported(sample, architecture):
    _, kernels = sample
    kernel = kernels["narrow_kernel", architecture]
    assert (kernel["local"], kernel["shared"]) == (0, 1024)
    assert not kernel["bounded"]
    assert kernel_report.widths(kernel["instructions"], "global load").keys() == {4, 2}
    assert kernel_report.widths(kernel["hot_loop"], "global load") == {4: 1, 2: 1}
    assert kernel_report.widths(kernel["hot_loop"], "global store") == {4: 1}
    assert kernel["hot_loop"]["special"] == 1
    assert "barrier" not in kernel["hot_loop"]
    assert kernel["instructions"]["barrier"] == 1
    assert any("loads of 4 bytes" in line for line in overdrawn(kernel, Budget(64, 1024, {2: 9}, {4: 9})))


@needs["cuda"]
@pytest.mark.parametrize("architecture", [80, 90])
def test_hot_loop_of_products_is_the_steady_one_and_its_flop_are_counted(sample, architecture):
    table, kernels = sample
    kernel = kernels["tensor_kernel", architecture]
    loop = kernel["hot_loop"]
    assert kernel["instructions"]["tensor"] == 5
    assert (loop["tensor"], loop.get("special"), loop["all"] < 30) == (2, None, True)
    assert kernel["flop_per_instruction"] == 2 * 4096 / loop["all"]
    [line] = [line for line in table.splitlines() if f"sm_{architecture}  tensor_kernel" in line]
    assert f" {2 * 4096 / loop['all']:.0f} " in line
    assert kernels["narrow_kernel", architecture]["flop_per_instruction"] is None


@needs["cuda"]
@pytest.mark.parametrize("architecture", [80, 90])
def test_copies_to_shared_memory_are_bytes_moved(sample, architecture):
    loop = sample[1]["async_kernel", architecture]["hot_loop"]
    assert kernel_report.widths(loop, "async copy") == {16: 1}
    assert "special" not in loop


@pytest.mark.parametrize(
    ("opcode", "flop"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.16816.F16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HMMA.1688.F32", 2 * 16 * 8 * 8),
        ("HMMA.1684.F32.TF32", 2 * 16 * 8 * 4),
        ("HGMMA.64x64x16.F32.BF16", 2 * 64 * 64 * 16 // 4),
        ("HGMMA.64x128x8.F32.TF32", 2 * 64 * 128 * 8 // 4),
        ("QGMMA.64x8x32.F32.E4M3.E4M3", 2 * 64 * 8 * 32 // 4),
        ("QMMA.16832.F32.E4M3.E4M3", 2 * 16 * 8 * 32),
        ("OMMA.SF.16864.F32.E2M1.E2M1.E8", 2 * 16 * 8 * 64),
        ("IMMA.8816.S8.S8", 2 * 8 * 8 * 16),
        ("DMMA.884", 2 * 8 * 8 * 4),
        ("DMMA.8x8x4", 2 * 8 * 8 * 4),
        ("HMMA.884.F32.F32.STEP0", None),  # a part of an 8x8x4 of each of four groups of threads
        ("HMMA.SP.16832.F32.BF16", None),
        ("UTCHMMA", None),
        ("FFMA", None),
    ],
)
def test_flop_of_tensor_instructions_follow_from_their_opcodes(opcode, flop):
    assert kernel_report.tensor_flop(opcode) == flop


def code_of(*lines):
    """Instructions as `disassemble` gives them, from lines like "label: @P0 OPCODE operands"."""
    parts = [re.fullmatch(r"(?:(\S+): )?(@\S+ )?(\S+)(.*)", line).groups() for line in lines]
    return [kernel_report.Instruction(op, rest, bool(p), (label,) if label else ()) for label, p, op, rest in parts]


PRODUCT = "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR34], idesc[UR35], UPT"


@pytest.mark.parametrize(
    ("before", "known"),
    [
        (["UMOV UR35, 0x8100490", "UIADD3 UR4, UR4, 0x2"], True),
        (["UMOV UR35, 0x8100490", PRODUCT], True),
        (["UMOV UR35, 0x8100490", "R2UR UR35, R4"], False),
        (["UMOV UR35, 0x8100490", "UIADD3.64 UR34, UR32, 0x2"], False),
        (["UMOV UR35, 0x8100490", ".L_x_1: UIADD3 UR4, UR4, 0x2"], False),  # what jumps there may have set another
        (["@UP0 UMOV UR35, 0x8100490"], False),
        (["UMOV UR3, 0x8100490"], False),
    ],
)
def test_shape_that_a_descriptor_holds_is_read_only_where_it_is_certain(before, known):
    code = code_of("NOP", *before, PRODUCT)
    assert kernel_report.descriptor(code, len(code) - 1) == (0x8100490 if known else None)


def test_product_of_a_block_is_shared_by_its_warps():
    # 128 x 64, bf16, as Triton 3.7 has it for tl.dot of [128, 64] and [64, 64]; then tf32, and N = 128
    assert kernel_report.tensor_flop("UTCHMMA", 0x8100490, 4) == 2 * 128 * 64 * 16 / 4
    assert kernel_report.tensor_flop("UTCHMMA", 0x8100910, 4) == 2 * 128 * 64 * 8 / 4
    assert kernel_report.tensor_flop("UTCHMMA", 0x8200490, 8) == 2 * 128 * 128 * 16 / 8
    assert kernel_report.tensor_flop("UTCHMMA", 0x8100494, 4) is None  # sparse
    assert kernel_report.tensor_flop("UTCHMMA.2CTA", 0x8100490, 4) is None


def test_loop_with_a_product_of_unknown_shape_has_no_flop_per_instruction():
    loop = (".L_x_1: UMOV UR35, 0x8100490", PRODUCT, "IADD3 R0, R0, 0x1, RZ", "@P0 BRA `(.L_x_1)")
    counts, flop = kernel_report.hot_loop(code_of("NOP", *loop, "EXIT"), 4)
    assert (counts["all"], flop) == (4, 2 * 128 * 64 * 16 / 4 / 4)
    unknown = (*loop[:2], "R2UR UR35, R4", PRODUCT, *loop[2:])
    counts, flop = kernel_report.hot_loop(code_of("NOP", *unknown, "EXIT"), 4)
    assert (counts["tensor"], flop) == (2, None)


def test_way_through_a_loop_passes_by_what_is_seldom_executed_but_not_copies_of_the_next_tile():
    product = "HMMA.16816.F32.BF16 R0, R4, R8, R0"
    copy = ("@P0 BRA `(.L_x_2)", "IADD3 R2, R2, 0x1, RZ", "LDGSTS.E.BYPASS.128 [R2], [R4.64]")
    cold = (".L_x_2: @P1 BRA `(.L_x_3)", "FADD R0, R0, R1", "FADD R0, R0, R1", "FADD R0, R0, R1")
    loop = (f".L_x_1: {product}", *copy, *cold, f".L_x_3: {product}", "@P2 BRA `(.L_x_1)")
    counts, flop = kernel_report.hot_loop(code_of("NOP", *loop, "EXIT"), 4)
    assert (counts["all"], counts["tensor"], counts["async copy 16"], counts.get("fp32")) == (7, 2, 1, None)
    assert flop == 2 * 4096 / 7


@needs["cuda"]
def test_spills_are_those_that_ptxas_tells_of(sample, tmp_path):
    (tmp_path / "sample.cu").write_text(SAMPLE)
    command = ["nvcc", "-cubin", "-arch=sm_80", "--resource-usage", "sample.cu", "-o", "sample.cubin"]
    command[0] = kernel_report.find_tool("nvcc")
    told = subprocess.run([*command, "-std=c++17", "-O3"], cwd=tmp_path, text=True, capture_output=True).stderr
    told = re.search(r"(\d+) bytes stack frame, ([1-9]\d*) bytes spill stores, (\d+) bytes spill loads", told)
    kernel = sample[1]["spilling_kernel", 80]
    assert tuple(map(int, told.groups())) == (kernel["local"], kernel["spill_stores"], kernel["spill_loads"])


def test_without_nvcc_the_tool_says_so_and_goes_on(monkeypatch, tmp_path, capsys):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "nvcc" else which(name, path=path))
    monkeypatch.setattr(kernel_report, "triton_jobs", lambda *_: [])
    monkeypatch.setattr(kernel_report, "_triton", None)
    monkeypatch.setattr(kernel_report, "CACHE", tmp_path)
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    kernel_report.main(["--json", str(tmp_path / "report.json")])
    assert "cuda is left out: no nvcc" in capsys.readouterr().out
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["kernels"] == []
    assert "nvcc" in told["left_out"]["cuda"]


WITHOUT_NVCC = """
import shutil, sys
sys.path.insert(0, sys.argv.pop(1))
which = shutil.which
shutil.which = lambda name, path=None: None if name == "nvcc" else which(name, path=path)
from proof import kernel_report
kernel_report.main(sys.argv[1:])
"""


@needs["triton"]
def test_without_nvcc_the_triton_kernels_are_reported(tmp_path):
    file = tmp_path / "report.json"
    arguments = [str(Path(__file__).parent), "--arch", "90", "--json", str(file), "^layer_norm 768 float32 _fwd"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_NVCC, *arguments], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cuda is left out: no nvcc" in done.stdout
    [kernel] = json.loads(file.read_text())["kernels"]
    assert kernel["kind"] == "triton"
    assert kernel["registers"] > 0


OCCUPANCY = r"""
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"

int main() {
  int arch, threads, registers, shared, device_threads, device_shared, block_shared, reserved;
  while (std::scanf("%d %d %d %d %d %d %d %d", &arch, &threads, &registers, &shared, &device_threads, &device_shared,
                    &block_shared, &reserved) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10, device.computeMinor = arch % 10, device.numSms = 1, device.warpSize = 32;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = device_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.reservedSharedMemPerBlock = reserved;
    device.sharedMemPerMultiprocessor = device_shared, device.sharedMemPerBlockOptin = block_shared;
    device.sharedMemPerBlock = 48 * 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers, kernel.numBlockBarriers = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::printf("%d\n", status == 0 ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


@needs["triton"]
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_resident_blocks_are_those_of_cuda_occupancy_h(tmp_path):
    threads, registers = (32, 96, 128, 160, 320, 512, 1024), (16, 33, 40, 64, 96, 168, 255)
    shared = (0, 16, 8448, 16384, 49152, 65536, 101376, 166912, 232448)
    cases = [(a, t, r, s) for a in kernel_report.LIMITS for t in threads for r in registers for s in shared]
    lines = []
    for case in cases:
        limits = kernel_report.LIMITS[case[0]]
        device = limits.threads, limits.shared * 1024, limits.shared_per_block * 1024, limits.reserved
        lines.append(" ".join(map(str, case + device)))
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    include = kernel_report.TRITON_TOOLS.parent / "include"
    subprocess.run(["g++", f"-I{include}", "occupancy.cpp", "-o", "occupancy"], cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "occupancy"], input="\n".join(lines), text=True, capture_output=True).stdout
    assert [kernel_report.resident_blocks(*case) for case in cases] == list(map(int, told.split()))
