"""What the compilers made of every CUDA and Triton kernel, for every architecture; no GPU is needed.

    python tests/proof/kernel_report.py [--arch 80,90] [--only cuda|triton] [--json FILE] [pattern]

Registers, local and shared memory, resident blocks, and instructions of the machine code: of the kernel as a whole and
of its hot loop, which is the loop whose own instructions (not those of loops inside it) access most global bytes, and
among equals has most instructions. Loops are natural ones: their head dominates a branch back to it. Instructions are
counted as they stand in the code, not as they run; in the hot loop without those of functions that it calls. Accesses
are listed as bytes per thread x instructions: `16x4 4x1` is four of 16 bytes and one of 4; `async` are copies from
global to shared memory. `spill` is bytes stored to + loaded from local memory: registers, and arrays that are not in
registers. bf16 to fp32 is a shift: integer.

Where there are tensor instructions, the hot loop is the steady one: of the loops with most tensor FLOP the shortest,
and of the ways through it the shortest that copies the next tile (those of a tile at an edge, or with options, are
longer). `flop/i` is that FLOP per instruction of a warp, from the shapes in the code: of `HMMA.16816` it is 2 * 16 * 8
* 16; each of the four warps of `HGMMA.64x64x16` has a quarter of it; what one thread issues for its block, `UTCHMMA`,
is shared by the block's warps, as if all ran the loop. `-` is not known. Shared memory that a CUDA launcher asks for is
not in machine code: it is not counted, nor are the blocks that it leaves room for.

`pattern` is a regular expression for names. CUDA is compiled with the flags of setup.py. Results are kept in build/.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proof.toolkit import TRITON_TOOLS, find_tool

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "kernel_report"
_triton = TRITON_TOOLS is not None


class Multiprocessor(NamedTuple):
    threads: int
    blocks: int
    shared: int  # KiB
    shared_per_block: int  # KiB
    reserved: int  # bytes of shared memory that the system takes of each block
    granularity: int  # of shared memory, bytes


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the granularity from cuda_occupancy.h.
# All have 65,536 registers in four partitions, given to a warp 256 at a time.
LIMITS = {
    75: Multiprocessor(1024, 16, 64, 64, 0, 256),
    80: Multiprocessor(2048, 32, 164, 163, 1024, 128),
    86: Multiprocessor(1536, 16, 100, 99, 1024, 128),
    89: Multiprocessor(1536, 24, 100, 99, 1024, 128),
    90: Multiprocessor(2048, 32, 228, 227, 1024, 128),
    100: Multiprocessor(2048, 32, 228, 227, 1024, 128),
    120: Multiprocessor(1536, 24, 100, 99, 1024, 128),
}

# An opcode's class is the first that it begins with; those with * are counted by width.
CLASSES = {
    "local load *": r"LDL\b",
    "local store *": r"STL\b",
    "global load *": r"LDG?\b",
    "global store *": r"STG?\b",
    "async copy *": r"LDGSTS\b",
    "bulk copy": r"UBLK|UTMA",
    "atomic": r"ATOM|REDG?\b",
    "shared load *": r"LDSM?\b",
    "shared store *": r"STSM?\b",
    "shuffle": r"SHFL|C?REDUX|VOTE|MATCH|ELECT",
    "barrier": r"BAR|SYNCS|WARPSYNC|WARPGROUP|ENDCOLLECTIVE|DEPBAR|LDGDEPBAR|U?CGABAR|UTCBAR|MEMBAR|FENCE|NANOSLEEP",
    "tensor": r"[A-Z]+MMA\b",
    "tensor memory": r"LDTM|STTM|UTCCP|UTCSHIFT|UTCATOMSWS",
    "conversion": r"HADD2\.F32|U?F2|U?I2|FRND",
    "special": r"MUFU",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)\b",
    "fp16": r"H(ADD|MUL|FMA|MNMX|SETP?)2",
    "fp32": r"U?FH?(ADD|MUL|FMA|MNMX|SEL|SETP?|CHK)\d?\b",
    "branch": r"BR|JM|CALL|RET|EXIT|BSSY|BSYNC|BMOV|YIELD|BPT|LEPC",
    "move": r"U?MOV|IMAD\.MOV|C?S2|R2|U?P2U?R|U?LDC|LDCU",
    "integer": r"U?(I|VI|LOP|SH|LEA|PRMT|SEL|POPC|FLO|BREV|BMSK|SGXT|PLOP)",
    "none": r"NOP",
}
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32, "2": 8, "4": 16}  # 2, 4: of LDSM


def run(name: str, *arguments: object) -> str:
    done = subprocess.run([find_tool(name), *map(str, arguments)], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"kernel_report: {name} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def nvcc_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, which cannot be imported without building."""
    names = {"os": os}
    exec("\n".join(re.findall(r"^(?:OPTIMISE|NVCC_FLAGS) = .*", (ROOT / "setup.py").read_text(), re.M)), names)
    return names["NVCC_FLAGS"]


# Machine code -----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicated: bool
    labels: tuple[str, ...]  # that stand before it


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """Instructions of each kernel by its mangled name, followed by those of functions that it calls."""
    kernels, code, labels = {}, [], []
    for line in run("nvdisasm", "-c", cubin).splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,]+),", line):
            code = kernels[section[1].strip('"')] = []
        elif label := re.match(r"([.$\w]+):", line):
            labels.append(label[1])
        elif parts := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)(.*);", line):
            code.append(Instruction(parts[2], parts[3], bool(parts[1]), tuple(labels)))
            labels = []
    return kernels


def successors(code: list[Instruction]) -> list[set[int]]:
    """Where control may go after each instruction; calls are stepped over."""
    place = {label: n for n, instruction in enumerate(code) for label in instruction.labels}
    after, meeting = [], {}
    for n, (opcode, operands, predicated, _) in enumerate(code):
        name, first = opcode.split(".")[0], operands.split(",")[0].strip()
        targets = {place[label] for label in re.findall(r"\.L\w+", operands) if label in place}
        if name == "BSSY":  # says where the BSYNC of the same register goes on
            meeting[first], targets = targets, set()
        elif name == "BSYNC":
            targets = meeting.get(first, set())
        elif name not in ("BRA", "BRX", "BRXU", "JMP", "JMX", "WARPSYNC"):
            targets = set()
        leaves = name in ("BRX", "BRXU", "JMP", "JMX", "EXIT", "RET") or (opcode == "BRA" and "," not in operands)
        after.append(targets | ({n + 1} if predicated or not leaves else set()) - {len(code)})
    return after


def loops(code: list[Instruction]) -> dict[int, set[int]]:
    """Natural loops: the instructions that they consist of, by their heads."""
    after, before, reached, stack = successors(code), defaultdict(list), set(), [0]
    while stack:
        n = stack.pop()
        if n not in reached:
            reached.add(n)
            stack += after[n]
            for target in after[n]:
                before[target].append(n)
    dominators, changed = dict.fromkeys(reached, (1 << len(code)) - 1) | {0: 1}, True  # sets of instructions as bits
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            common = functools.reduce(int.__and__, (dominators[m] for m in before[n])) | 1 << n
            changed, dominators[n] = changed or common != dominators[n], common
    bodies = {}
    for n in reached:
        for head in after[n] - {n}:
            if dominators[n] >> head & 1:
                body, stack = bodies.setdefault(head, {head}), [n]
                while stack:
                    m = stack.pop()
                    if m not in body:
                        body.add(m)
                        stack += before[m]
    return bodies


def steady(code: list[Instruction], head: int, bodies: dict[int, set[int]], warps: int) -> list[int]:
    """The way through a loop with most tensor FLOP, of those with most copies, and of those the shortest."""
    after, order, seen = successors(code), [], set()
    back = {(n, target) for target, body in bodies.items() for n in body if target in after[n]}
    stack = [(head, False)]
    while stack:  # depth first: what comes later is in `order` before
        n, done = stack.pop()
        if done:
            order.append(n)
        elif n not in seen:
            seen.add(n)
            stack.append((n, True))
            stack += [(m, False) for m in after[n] & bodies[head] if (n, m) not in back]
    best: dict[int, tuple[int, int, int, int]] = {}  # FLOP, copies, less instructions, the next one
    for n in order:
        own = tensor_flop(code[n].opcode, descriptor(code, n), warps) if classify(code[n]) == "tensor" else 0
        ahead = [(*best[m][:3], m) for m in after[n] & bodies[head] if (n, m) not in back and m in best]
        if head in after[n]:
            ahead.append((0, 0, 0, -1))
        if ahead:
            flop, copies, less, following = max(ahead)
            best[n] = flop + (own or 0), copies + classify(code[n]).startswith("async"), less - 1, following
    way = [head]
    while best[way[-1]][3] >= 0:
        way.append(best[way[-1]][3])
    return way


def classify(instruction: Instruction) -> str:
    opcode = instruction.opcode
    if opcode.startswith(("HFMA2", "IMAD.U32")) and re.search(r"-?RZ, -?RZ", instruction.operands):
        return "move"  # of a constant
    return class_of(opcode)


@functools.cache  # of some hundred opcodes in a million instructions
def class_of(opcode: str) -> str:
    name = next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), "other")
    return name.replace("*", str(next((WIDTHS[part] for part in opcode.split(".") if part in WIDTHS), 4)))


def count(code: list[Instruction]) -> dict[str, int]:
    counts = Counter(map(classify, code))
    del counts["none"]
    return {"all": counts.total()} | dict(sorted(counts.items()))


def widths(counts: dict[str, int], kind: str) -> dict[int, int]:
    """Bytes per thread -> instructions, of accesses of a kind, widest first."""
    found = {int(name.split()[-1]): n for name, n in counts.items() if name.startswith(kind)}
    return dict(sorted(found.items(), reverse=True))


def moved(counts: dict[str, int], *kinds: str) -> int:
    return sum(size * n for kind in kinds for size, n in widths(counts, kind).items())


def descriptor(code: list[Instruction], n: int) -> int | None:
    """The constant that describes a UTCHMMA's shape, where the same basic block sets it."""
    register = re.search(r"idesc\[UR(\d+)\]", code[n].operands)
    while register and n and not code[n].labels:
        n -= 1
        opcode, operands, predicated, _ = code[n]
        if opcode == "UMOV" and (value := re.match(rf"\s*UR{register[1]}, (0x\w+)", operands)):
            return None if predicated else int(value[1], 16)
        lower = rf"|UR{int(register[1]) - 1}\b" if ".64" in opcode else ""  # the other half of a pair
        if register[0] not in operands and re.search(rf"UR{register[1]}\b{lower}", operands):
            return None
    return None


def tensor_flop(opcode: str, described: int | None = None, warps: int = 1) -> int | None:
    """FLOP of a warp in a tensor instruction; None where it is not known, as of sparse ones."""
    if group := re.match(r"[HIQB]GMMA\.64x(\d+)x(\d+)\b", opcode):  # all four warps of a group issue it
        return 2 * 64 * int(group[1]) * int(group[2]) // 4
    if warp := re.match(r"(?!HMMA\.8)[A-Z]MMA\.(?:SF\.)?(8|16)x?8x?(\d+)\b", opcode):  # Volta's HMMA.884 is a part
        return 2 * int(warp[1]) * 8 * int(warp[2])
    if opcode == "UTCHMMA" and described is not None and not described >> 2 & 1:
        # PTX ISA, "Instruction descriptor" of tcgen05: sparsity at bit 2, type of A (2 is tf32) at 7, N / 8, M / 16
        k = 8 if described >> 7 & 7 == 2 else 16
        return 2 * (described >> 24 & 31) * 16 * (described >> 17 & 63) * 8 * k // warps
    return None


def hot_loop(code: list[Instruction], warps: int) -> tuple[dict[str, int] | None, float | None]:
    """What the hot loop consists of, and the tensor FLOP of each of its instructions."""
    bodies, found = loops(code), []
    for head, body in bodies.items():
        own = sorted(body - set().union(*(inner for inner in bodies.values() if inner < body)))
        if tensor := [n for n in own if classify(code[n]) == "tensor"]:
            own = steady(code, head, bodies, warps)
            tensor = [n for n in own if classify(code[n]) == "tensor"]
        counts = count([code[n] for n in own])
        flop = [tensor_flop(code[n].opcode, descriptor(code, n), warps) for n in tensor]
        known = [one for one in flop if one is not None]
        order = (0, moved(counts, "global load", "global store", "async copy"), counts["all"], 0)
        if tensor:
            order = (1, sum(known), len(tensor), -counts["all"])
        found.append((order, counts, sum(known) / counts["all"] if tensor and len(known) == len(flop) else None))
    return max(found, key=lambda loop: loop[0], default=(None, None, None))[1:]


# Kernels ----------------------------------------------------------------------------------------------------------


def resident_blocks(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time; 0 if not even one."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    per_block = -(-(shared + limits.reserved) // limits.granularity) * limits.granularity
    if shared > limits.shared_per_block * 1024 or per_warp * -(-warps // 4) * 4 > 65536:
        return 0
    fits = limits.blocks, limits.threads // 32 // warps, 65536 // 4 // per_warp * 4 // warps
    return min(*fits, limits.shared * 1024 // per_block if per_block else limits.blocks)


def demangle(name: str) -> str:
    """Without namespaces, parameters and what is returned: layer_norm_fwd_kernel<bf16, fp32, 4>."""
    tool = next((tool for tool in ("c++filt", "cu++filt") if find_tool(tool)), None)
    name = run(tool, name).strip() if tool else name
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void |\(\w+\)(?=\d)", "", name)
    name = name[: name.rindex("(")] if name.endswith(")") else name
    short = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}
    return re.sub(rf"\b({'|'.join(short)})\b", lambda match: short[match[1]], name)


def read_cubin(cubin: Path, arch: int, dynamic_shared: int = 0) -> list[dict]:
    usage = run("cuobjdump", "-res-usage", cubin)
    parts = re.split(r"^\.nv\.info\.(\S+)$", run("cuobjdump", "-elf", cubin), flags=re.M)
    infos, kernels = dict(zip(parts[1::2], parts[2::2], strict=True)), []
    for name, code in disassemble(cubin).items():
        found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        registers, stack, shared, local = map(int, found.groups())
        if arch >= 90:  # what the system reserves is counted in
            shared = max(0, shared - LIMITS[arch].reserved)
        bounds = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", infos[name])
        x, y, z = (int(size, 16) for size in bounds.groups()) if bounds else (1024, 1, 1)
        blocks = resident_blocks(arch, x * y * z, registers, shared + dynamic_shared)
        counts = count(code)
        loop, flop = hot_loop(code, -(-x * y * z // 32))
        kernels.append(
            {
                "kernel": demangle(name),
                "arch": arch,
                "registers": registers,
                "local": stack + local,
                "spill_stores": moved(counts, "local store"),
                "spill_loads": moved(counts, "local load"),
                "shared": shared + dynamic_shared,
                "threads": x * y * z,
                "bounded": bool(bounds),  # without launch bounds 1,024 threads are assumed
                "blocks": blocks,  # per multiprocessor
                "occupancy": round(blocks * x * y * z / LIMITS[arch].threads, 3),
                "instructions": counts,
                "hot_loop": loop,
                "flop_per_instruction": flop,  # of a warp in the hot loop, by tensor instructions; None: not known
            }
        )
    return sorted(kernels, key=lambda kernel: kernel["kernel"])


class Job(NamedTuple):
    """One compilation: a CUDA file of a folder, or one of a Triton module's compilations."""

    folder: str
    source: str
    index: int
    arch: int
    key: str  # of the result in the cache

    @property
    def result(self) -> Path:
        return CACHE / f"{self.key}.json"


def key(*parts: object) -> str:
    return hashlib.sha256(repr((Path(__file__).read_bytes(), parts)).encode()).hexdigest()[:32]


def cuda_jobs(folder: Path, arch: int, version: str) -> list[Job]:
    headers = [(str(path), path.read_bytes()) for path in sorted(folder.rglob("*.*h"))]
    sources = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.cu"))}
    same = headers, nvcc_flags(), arch, version
    return [Job(str(folder), name, 0, arch, key(name, code, same)) for name, code in sources.items()]


@functools.cache
def compilations(module: str, arch: int) -> list[tuple]:
    """Names, sources and options, as Triton's compiler takes them."""
    from triton.compiler import ASTSource

    of_module = importlib.import_module(module).compilations
    found = of_module(arch) if inspect.signature(of_module).parameters else of_module()  # tiles may depend on it
    return [(c.name, ASTSource(c.kernel, c.signature, c.constexprs, c.attrs), c.options) for c in found]


def triton_jobs(pattern: str, arch: int, version: str) -> list[Job]:
    modules = [f"fastlm.ops.{path.parent.name}.triton" for path in sorted(ROOT.glob("fastlm/ops/*/triton.py"))]
    return [
        Job("", module, n, arch, key(name, source.hash(), options, arch, version))
        for module in modules
        for n, (name, source, options) in enumerate(compilations(module, arch))
        if re.search(pattern, name)
    ]


def work(job: Job) -> None:
    """Compiles, and leaves what is to be reported in the cache; in a process of its own."""
    same, shared = {"kind": "cuda" if job.folder else "triton", "source": job.source}, 0
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        if job.folder:
            flags = [*nvcc_flags(), f"-I{job.folder}", f"-arch=sm_{job.arch}", "-cubin", "-o", cubin]
            run("nvcc", *flags, Path(job.folder, job.source))
        else:
            import triton
            from triton.backends.compiler import GPUTarget

            same["kernel"], source, options = compilations(job.source, job.arch)[job.index]
            compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
            cubin.write_bytes(compiled.asm["cubin"])
            shared = compiled.metadata.shared
            same["tensor_memory"] = getattr(compiled.metadata, "tmem_size", 0)  # columns, of 512 on sm_100
            same["products"] = sorted(set(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)\b", compiled.asm["ptx"])))
        kernels = [kernel | same for kernel in read_cubin(cubin, job.arch, shared)]
    part = job.result.with_suffix(".part")
    part.write_text(json.dumps(kernels))
    part.replace(job.result)  # whole or not at all


def report(jobs: list[Job]) -> list[dict]:
    """The kernels of all jobs; what the cache does not have is compiled, by one run of this tool at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new, shown = {job.key: job for job in jobs if not job.result.exists()}, time.monotonic()
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            try:
                for done, future in enumerate(as_completed([pool.submit(work, job) for job in new.values()]), 1):
                    future.result()
                    if time.monotonic() > shown + 5:
                        print(f"kernel_report: compiled {done} of {len(new)}", file=sys.stderr)
                        shown = time.monotonic()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [kernel for job in jobs for kernel in json.loads(job.result.read_text())]


# The table --------------------------------------------------------------------------------------------------------

HEAD = (
    "arch kernel regs spill shared threads blocks occup. of instr. flop/i"
    " gld gst async sld sst shfl bar fp32 mufu cvt int mov br"
)


def row(kernel: dict) -> list[str]:
    part = kernel["hot_loop"] or kernel["instructions"]
    kinds = ("global load", "global store", "async copy", "shared load", "shared store")
    accesses, flop = [widths(part, kind) for kind in kinds], kernel["flop_per_instruction"]
    names = ("shuffle", "barrier", "fp32", "special", "conversion", "integer", "move", "branch")
    return [
        f"sm_{kernel['arch']}",
        kernel["kernel"],
        str(kernel["registers"]),
        f"{kernel['spill_stores']}+{kernel['spill_loads']}",
        str(kernel["shared"]),
        f"{kernel['threads']}{'' if kernel['bounded'] else '?'}",
        str(kernel["blocks"]),
        f"{kernel['occupancy']:.0%}",
        "loop" if kernel["hot_loop"] else "all",
        str(part["all"]),
        "-" if flop is None else f"{flop:.0f}",
        *(" ".join(f"{size}x{n}" for size, n in found.items()) or "-" for found in accesses),
        *(str(part.get(name, 0)) for name in names),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression for names of kernels")
    parser.add_argument("--arch", default=",".join(map(str, LIMITS)), help="default: %(default)s")
    parser.add_argument("--only", choices=("cuda", "triton"))
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="folder of CUDA sources")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    args = parser.parse_args(arguments)
    if unknown := set(args.arch.split(",")) - set(map(str, LIMITS)):
        parser.error(f"--arch: nothing is known of {', '.join(unknown)}")
    os.environ.pop("TRITON_INTERPRET", None)  # it would take the compiler's place
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")

    own = sorted(TRITON_TOOLS.glob("ptxas*")) if TRITON_TOOLS else []
    tools = {"nvcc": "nvcc"} | {f"triton's {path.name}": str(path) for path in own}
    versions = {"triton": importlib.metadata.version("triton")} if _triton else {}
    for name, tool in tools.items():
        if find_tool(tool):
            versions[name] = re.search(r"V([\d.]+)", run(tool, "--version"))[1]
    jobs, left_out = [], {}
    for kind in (args.only,) if args.only else ("cuda", "triton"):
        needed = ("nvcc" if kind == "cuda" else "triton", "cuobjdump", "nvdisasm")
        if missing := [name for name in needed if name not in versions and not find_tool(name)]:
            left_out[kind] = f"no {', '.join(missing)}"
            continue
        for arch in map(int, args.arch.split(",")):
            if kind == "cuda":
                jobs += cuda_jobs(args.csrc.resolve(), arch, versions["nvcc"])
            else:
                jobs += triton_jobs(args.pattern, arch, versions["triton"])
    kernels = [kernel for kernel in report(jobs) if re.search(args.pattern, kernel["kernel"])]
    if args.json:
        everything = {"versions": versions, "left_out": left_out, "kernels": kernels}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    rows = [HEAD.split(), *map(row, kernels)]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        left, right = cells[:2], cells[2:]
        padded = [*map(str.ljust, left, sizes), *map(str.rjust, right, sizes[2:])]
        print("  ".join(padded))
    print("\n" + ", ".join(f"{name} {number}" for name, number in versions.items()))
    for kind, why in left_out.items():
        print(f"{kind} is left out: {why}")


if __name__ == "__main__":
    main()
