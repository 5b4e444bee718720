"""Executes PTX, the text that nvcc and Triton emit, inline assembly included, on a CPU; no GPU is needed.

    module = compile_cuda(Path("csrc/layer_norm/layer_norm_fwd.cu"))  # or parse(text)
    memory = Memory()
    memory.add(x.data_ptr(), x.nbytes, writable=False)
    counts = run(module, module.find("fastlm::layer_norm_fwd_kernel<float, float, 4>"), grid, block, params, memory)

A lane is an element of numpy vectors. Lanes at the same place of the code go on together, those furthest behind first,
so that they meet again; what needs a whole warp waits for it, and is an error where it waits in vain. Warps take turns
at barriers only, in either order, so that a missing barrier shows; or several run in step, which is faster. Memory is
this process's own: an access must lie in one of the regions that were given, or in the block's shared memory, which is
fresh and poisoned, and be aligned. An opcode or modifier that is not known here is an error when it is reached.

What opcodes do is in ptx_instructions.py. Not modelled: time, caches, the memory model between barriers.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from proof import kernel_report, toolkit
from proof.ptx_instructions import DECODERS, ORIGIN, TYPES, WARP, WIDTHS, Fault, Mask, Modifiers, Step, everything

CSRC, CACHE = kernel_report.ROOT / "csrc", kernel_report.ROOT / "build" / "ptx"


class PtxError(Exception):
    """A kernel did what it must not, or what is not known here; says which one, where, and in which thread."""


# Text -------------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    line: int  # of the PTX text
    source: str  # file:line, "" if unknown
    predicate: str  # "%p1", "!%p1" or ""
    opcode: str
    operands: list[str]
    scopes: tuple[int, ...]  # braces that it stands in

    def __str__(self) -> str:
        guard = f"@{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


class Variable(NamedTuple):
    space: str
    name: str
    align: int
    size: int  # 0: the launch tells
    values: bytes


VARIABLE = re.compile(
    r"\.(shared|local|global|const|param)\b(?:\s+\.align\s+(\d+))?\s+\.(\w+)(?:\s+\.ptr(?:\s+\.[a-z]+)?(?:\s+\.align\s+\d+)?)?"
    r"\s+([\w$%]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?",
    re.S,
)
NAME = re.compile(r"[%$_a-zA-Z][\w$]*(?:\.[xyzw]\b)?")


def _constant(text: str, size: int) -> bytes:
    """An immediate operand as it lies in `size` bytes."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = int(text[2:], 16)
    elif re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
        return np.array(float(text), f"f{size}").tobytes()
    else:
        bits = int(text.rstrip("U"), 0)
    return (bits % (1 << 8 * size)).to_bytes(size, "little")


def _variable(text: str) -> Variable:
    space, align, kind, name, extents, values = VARIABLE.search(text).groups()
    width, sizes = WIDTHS[kind], re.findall(r"\d+", extents)
    data = b"".join(_constant(value, width) for value in re.findall(r"-?\w+", values or ""))
    size = 0 if extents and not sizes else width * int(np.prod([int(n) for n in sizes]))
    return Variable(space, name, int(align or width), size, data)


@dataclass
class Entry:
    """A kernel. What is in its body is parsed when it is first asked for."""

    name: str
    parameters: list[tuple[str, int, int]]  # name, offset, size
    parameter_bytes: int
    threads: int | None  # of a block at most: .maxntid
    exact: tuple[int, ...] | None  # .reqntid
    module: Module = field(repr=False)
    body: tuple[int, int] = field(repr=False)  # where it begins in the text, and in which line
    compiled: dict[Any, Code] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def shared(self) -> list[Variable]:
        """Static shared variables, and then those whose size the launch tells."""
        named = {name for instruction in self.code for op in instruction.operands for name in NAME.findall(op)}
        own = [v for v in [*self.module.variables, *self._parsed[3]] if v.space == "shared" and v.name in named]
        return sorted(own, key=lambda v: v.size == 0)

    code = property(lambda self: self._parsed[0])
    labels = property(lambda self: self._parsed[1])
    registers = property(lambda self: self._parsed[2])
    variables = property(lambda self: self._parsed[3])

    @functools.cached_property
    def _parsed(self) -> tuple[list[Instruction], dict[tuple[int, str], int], dict[str, str], list[Variable]]:
        """Instructions, labels by scope and name, types of registers by name or by prefix, variables."""
        code, labels, registers, variables = [], {}, {}, []
        scopes, numbers, buffer, source = [], itertools.count(), "", ""
        start, line = self.body
        for number, text in enumerate(self.module.text[start:].split("\n"), line):
            text = text.split("//")[0].strip()
            if re.match(r"\.loc\s", text):
                file, row = text.split()[1:3]
                source = f"{self.module.files.get(file, file)}:{row}" if row != "0" else source
                continue
            buffer += f" {text}"
            while buffer := buffer.lstrip():
                if buffer[0] == "{":
                    scopes.append((next(numbers), {}))
                    buffer = buffer[1:]
                elif buffer[0] == "}":
                    scopes.pop()
                    buffer = buffer[1:]
                    if not scopes:
                        return code, labels, registers, variables
                elif label := re.match(r"([\w$]+):(?!:)", buffer):
                    labels[scopes[-1][0], label[1]] = len(code)
                    buffer = buffer[label.end() :]
                elif ";" not in buffer:
                    break
                else:
                    statement, buffer = buffer.split(";", 1)
                    if statement.startswith(".reg"):
                        depth, names = scopes[-1]
                        kind, declared = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
                        for name in declared.replace(" ", "").split(","):
                            names[name] = name if depth == 0 else f"{name}${depth}"  # asm in braces has its own
                            registers[names[name]] = kind
                    elif statement.startswith(".pragma"):
                        pass
                    elif VARIABLE.match(statement):
                        variables.append(_variable(statement))
                    else:
                        code.append(self._instruction(statement, number, source, scopes))
        raise PtxError(f"{self.name}: the text ends before the kernel does")

    @staticmethod
    def _instruction(statement: str, line: int, source: str, scopes: list[tuple[int, dict[str, str]]]) -> Instruction:
        if len(scopes) > 1:
            names = {old: new for _, declared in scopes for old, new in declared.items()}
            statement = NAME.sub(lambda found: names.get(found[0], found[0]), statement)
        parts = re.fullmatch(r"(?:@\s*(!?\s*[\w%$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement.strip(), re.S)
        if parts is None:
            raise PtxError(f"line {line}: cannot read {statement!r}")
        operands = re.findall(r"(?:[^,{}\[\]]|\{[^}]*\}|\[[^\]]*\])+", parts[3])
        tidy = [re.sub(r"\s+", "", operand) for operand in operands]
        return Instruction(line, source, parts[1] or "", parts[2], tidy, tuple(number for number, _ in scopes))


class Module:
    """What `parse` gives: kernels by mangled name, and variables of the module."""

    def __init__(self, text: str) -> None:
        self.text, self.entries = text, {}
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
        declared = r"^(?:\.(?:extern|visible|weak)\s+)*\.(?:global|const|shared)\b[^;]*;"
        self.variables = [_variable(found[0][:-1]) for found in re.finditer(declared, text, re.M)]
        self.addresses: dict[str, np.ndarray] = {}  # of variables in global memory, made when a kernel names them
        for found in re.finditer(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)", text):
            parameters, end = [], 0
            for declaration in filter(str.strip, (found[2] or "").split(",")):
                v = _variable(declaration)
                end = -(-end // v.align) * v.align
                parameters.append((v.name, end, v.size))
                end += v.size
            bounds = {
                kind: tuple(map(int, sizes.split(",")))
                for kind, sizes in re.findall(r"\.(\w+ntid)\s+([\d, ]+)", found[3])
            }
            most = int(np.prod(bounds["maxntid"])) if "maxntid" in bounds else None
            place = found.end(), text.count("\n", 0, found.end()) + 1
            self.entries[found[1]] = Entry(found[1], parameters, end, most, bounds.get("reqntid"), self, place)

    @functools.cached_property
    def demangled(self) -> dict[str, str]:
        """Mangled names by normal form of what c++filt makes of them."""
        names = subprocess.run(["c++filt"], input="\n".join(self.entries), text=True, capture_output=True, check=True)
        return dict(zip(map(normal_name, names.stdout.splitlines()), self.entries, strict=True))

    def find(self, demangled: str) -> str:
        """The mangled name of a kernel, whatever the compilers call its anonymous namespace."""
        if normal_name(demangled) not in self.demangled:
            raise KeyError(f"{demangled} is none of {', '.join(self.demangled)}")
        return self.demangled[normal_name(demangled)]


def normal_name(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b_(?:GLOBAL__N_|INTERNAL_)\w*::|^void |\(\w+\)(?=\d)|\s", "", name)
    return name[: name.index("(")] if "(" in name else name


def parse(text: str) -> Module:
    return Module(text)


def compile_cuda(source: Path, arch: int = 80) -> Module:
    """What nvcc makes of a source, with our headers and the flags of setup.py; kept in build/."""
    toolkit.need_tool("nvcc")
    headers = [(str(path), path.read_bytes()) for path in sorted(CSRC.rglob("*.*h"))]
    flags = [*kernel_report.nvcc_flags(), f"-I{CSRC}", f"-arch=sm_{arch}", "-lineinfo", "-ptx"]
    kept = CACHE / f"{kernel_report.key(str(source), source.read_bytes(), headers, flags, _nvcc_version())}.ptx"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            part = kept.with_suffix(".part")
            kernel_report.run("nvcc", *flags, "-o", part, source)
            part.replace(kept)  # whole or not at all
    return parse(kept.read_text())


@functools.cache
def _nvcc_version() -> str:
    return kernel_report.run("nvcc", "--version")


# Memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """The regions of this process's memory that kernels may access."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, bool]] = []  # begin, end, whether it may be written to

    def add(self, address: int, nbytes: int, writable: bool = True) -> None:
        if nbytes:
            self.regions.append((address, address + nbytes, writable))


def _region(space: np.ndarray) -> tuple[int, int, bool]:
    return space.ctypes.data, space.ctypes.data + space.nbytes, True


def _aligned(nbytes: int, alignment: int = 1024) -> np.ndarray:
    space = np.empty(nbytes + alignment, np.uint8)
    start = -space.ctypes.data % alignment
    return space[start : start + nbytes]


# Code for so many lanes -------------------------------------------------------------------------------------------

SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid", "%warpid"}
COLLECTIVES = ("shfl", "vote", "bar.warp", "ldmatrix", "mma")
MEETING = (*COLLECTIVES, "bar", "barrier")
ENDS = (*MEETING, "bra", "ret", "exit")


@dataclass
class Segment:
    """Instructions that run one after the other, and what comes then: where all go on, or None if they part."""

    first: int
    steps: list[tuple[int, Step]]
    end: Callable[[Team, Mask, np.ndarray], int | None]
    length: int
    warps: int = 0  # how many have run it
    threads: int = 0


class Code:
    """An entry made into closures over the registers of the warps whose turn it is."""

    def __init__(self, entry: Entry, lanes: int, shared_bytes: int) -> None:
        self.entry, self.lanes = entry, lanes
        self.ones, self.zeros, self.all = b"\1" * lanes, bytes(lanes), np.ones(lanes, bool)
        self.everyone = b"\xff" * (4 * lanes)  # what masks of whole warps are
        exact = {name: kind for name, kind in entry.registers.items() if "<" not in name}
        counted = {name[: name.index("<")]: kind for name, kind in entry.registers.items() if "<" in name}
        used: dict[str, str] = {}
        for i in entry.code:
            for name in itertools.chain(*map(NAME.findall, i.operands), NAME.findall(i.predicate)):
                kind = exact.get(name) or counted.get(name.rstrip("0123456789"))
                if kind or name in SPECIAL:
                    used[name] = kind or "u32"
        ordered = sorted(used, key=lambda name: used[name] == "pred")
        self.slots: dict[str, np.ndarray] = {}
        self.registers = np.empty(sum(lanes * WIDTHS[kind] for kind in used.values()), np.uint8)
        self.predicates, at = len(self.registers) - lanes * [*used.values()].count("pred"), 0  # where these begin
        for name in ordered:
            self.slots[name] = self.registers[at : at + lanes * WIDTHS[used[name]]]
            at += self.slots[name].size
        self.parameters = _aligned(entry.parameter_bytes)
        self.symbols = {name: offset for name, offset, _ in entry.parameters}
        self.shared = _aligned(self._place(entry.shared) + shared_bytes)
        self.frame = self._place([v for v in entry.variables if v.space == "local"])
        self.local = _aligned(self.frame * lanes)
        targets = {self.target(i) for i in entry.code if i.opcode.startswith("bra")}
        self.leaders = targets | {n for n, i in enumerate(entry.code) if self.kind(i) in MEETING}
        self.segments: dict[int, Segment] = {}
        self.found: list[tuple[np.ndarray, np.ndarray]] = []  # by accesses, of the regions of a launch
        self.views: dict[tuple[str, str], np.ndarray] = {}

    def _place(self, variables: Iterable[Variable]) -> int:
        """Gives variables their offsets; returns where the last one ends."""
        end = 0
        for v in variables:
            self.symbols[v.name] = -(-end // v.align) * v.align
            end = self.symbols[v.name] + v.size
        return end

    # Operands

    def is_register(self, text: str) -> bool:
        return text in self.slots

    def is_predicate(self, text: str) -> bool:
        return text.lstrip("!") in self.slots and self.slots[text.lstrip("!")].size == self.lanes

    def read(self, text: str, kind: str) -> np.ndarray:
        """An operand's elements, always up to date."""
        if (text, kind) not in self.views:
            width = WIDTHS[kind]
            if text in self.slots:
                view = self._narrowed(text, kind)
            elif re.match(r"-?\d", text):
                value = _constant(text, width) if kind != "pred" else bytes([int(text, 0) != 0])
                view = np.frombuffer(value * self.lanes, TYPES[kind])
            else:
                view = np.full(self.lanes, self.symbol(text), f"u{width}")
            self.views[text, kind] = view
        return self.views[text, kind]

    def _narrowed(self, name: str, kind: str) -> np.ndarray:
        slot, width = self.slots[name], WIDTHS[kind]
        if (slot.size == self.lanes) != (kind == "pred") or slot.size < width * self.lanes:
            raise Fault(f"{name} cannot hold .{kind}")
        return slot.view(TYPES[kind])[:: slot.size // (width * self.lanes)]

    def write(self, name: str, kind: str) -> np.ndarray:
        """What a register's elements are assigned to; a wider register than .kind is extended."""
        if name == "_":
            return np.empty(self.lanes * WIDTHS[kind], np.uint8).view(TYPES[kind])
        if name not in self.slots:
            raise Fault(f"{name} is no register")
        self._narrowed(name, kind)
        width = self.slots[name].size // self.lanes
        if width == WIDTHS[kind]:
            return self.slots[name].view(TYPES[kind])
        if TYPES[kind].kind == "f" or kind.endswith("x2"):
            raise Fault(f"{name} is wider than .{kind}")
        return self.slots[name].view(f"{TYPES[kind].kind}{width}")

    def predicate(self, text: str) -> Callable[[], np.ndarray]:
        view = self.read(text.lstrip("!"), "pred")
        return (lambda: ~view) if text[0] == "!" else (lambda: view)

    def symbol(self, name: str) -> int:
        """An address within its space; in global memory, the address itself."""
        if name in self.symbols:
            return self.symbols[name]
        module = self.entry.module
        found = next((v for v in module.variables if v.name == name and v.space in ("global", "const")), None)
        if found is None:
            raise Fault(f"{name} is not known")
        if name not in module.addresses:
            space = module.addresses[name] = _aligned(found.size)
            space[:] = 0
            space[: len(found.values)] = np.frombuffer(found.values, np.uint8)
        return module.addresses[name].ctypes.data

    def parameter(self, place: str, dtype: np.dtype, count: int) -> np.ndarray | None:
        """Elements of the parameters, if they are always the same ones."""
        name, offset = self._parts(place)
        if name not in self.symbols:
            return None
        begin = self.symbols[name] + offset
        end = begin + count * dtype.itemsize
        if begin < 0 or end > len(self.parameters) or begin % (end - begin):
            raise Fault(f"reads bytes {begin} to {end} of {len(self.parameters)} of parameters")
        return self.parameters[begin:end].view(dtype)

    @staticmethod
    def _parts(place: str) -> tuple[str, int]:
        name, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\w+))?\]", place).groups()
        return name, int(offset or "0", 0)

    def windows(self, space: str) -> np.ndarray:
        """Where a space begins in memory, for each lane."""
        starts = {"shared": self.shared, "param": self.parameters, "local": self.local}
        start = starts[space].ctypes.data if space in starts else 0
        return start + np.arange(self.lanes, dtype=np.uint64) * np.uint64(self.frame if space == "local" else 0)

    # Accesses

    def address(self, place: str, space: str, size: int, write: bool = False) -> Callable[..., np.ndarray]:
        """A function from a mask, and sizes if smaller than `size`, to checked addresses less ORIGIN, as int64."""
        name, offset = self._parts(place)
        base = self.read(name, f"b{8 * self.slots[name].size // self.lanes}" if name in self.slots else "b64")
        shift = self.windows(space) + np.uint64((offset - ORIGIN) % 2**64)
        constant, grain = shift if space == "local" else np.array(shift[0]), np.array(size - 1, np.uint64)
        good = (
            np.zeros((), np.uint64),
            np.zeros((), np.uint64),
        )  # the first good address found last, and how many follow
        self.found.append(good)

        def at(m: Mask, sizes: np.ndarray | None = None) -> np.ndarray:
            if m is True:
                places = base + constant
            else:
                places = base[m] + (shift[m] if space == "local" else constant)
            strange = np.count_nonzero(places - good[0] >= good[1]) or np.count_nonzero(places & grain)
            if strange or (sizes is not None and sizes.min(initial=size) < size):
                lanes = np.flatnonzero(self.all if m is True else m)
                self._check(places, lanes, space, size, write, good, sizes)
            return places.view(np.int64)

        return at

    def _check(self, places, lanes, space, size, write, good, sizes) -> None:
        """Looks at each lane by itself, and remembers the last one's region for the next access."""
        own = {
            "shared": _region(self.shared),
            "param": (*_region(self.parameters)[:2], False),
            "local": _region(self.local),
        }
        given = [*self.team.launch.memory.regions, *map(_region, self.entry.module.addresses.values())]
        regions = [own[space]] if space in own else given if space else [*given, *own.values()]
        low = high = 0
        for n, (lane, place) in enumerate(zip(lanes.tolist(), places.tolist(), strict=True)):
            begin, count = place + ORIGIN, size if sizes is None else int(sizes[n])
            if space == "local":
                start = own["local"][0] + lane * self.frame
                regions = [(start, start + self.frame, True)]
            elif low <= begin and begin + count <= high and not begin % size:
                continue
            near = [region for region in regions if region[0] <= begin < region[1]]
            found = [region for region in near if begin + count <= region[1] and region[2] >= write]
            if begin % size or (count and not found):
                what = f"{'writes' if write else 'reads'} {count} bytes at"
                if space in own:
                    what += f" {begin - regions[0][0]} of {regions[0][1] - regions[0][0]} of {space} memory"
                else:
                    what += f" 0x{begin:x}"
                why = "outside of every region" if not near else "past the end" if begin + count > near[0][1] else ""
                why = "which is not aligned" if begin % size else why or "which may only be read"
                raise Fault(f"{what}, {why}", lane)
            low, high, _ = found[0] if found else (0, 0, True)
        if high and space != "local":
            good[0][...], good[1][...] = low - ORIGIN, max(0, high - low - size + 1)

    # Control

    @staticmethod
    def kind(i: Instruction) -> str:
        return "bar.warp" if i.opcode.startswith("bar.warp.") else i.opcode.partition(".")[0]

    def target(self, i: Instruction) -> int:
        for scope in reversed(i.scopes):
            if (scope, i.operands[0]) in self.entry.labels:
                return self.entry.labels[scope, i.operands[0]]
        raise PtxError(f"{self.entry.name}: line {i.line}: no label {i.operands[0]}")

    def packed(self, mask: np.ndarray) -> np.ndarray:
        """A word for each warp, a bit for each lane."""
        return np.packbits(mask, bitorder="little").view(np.uint32)

    def warps(self, m: Mask) -> Any:
        return slice(None) if m is True else m.reshape(-1, WARP)[:, 0]

    def segment(self, first: int) -> Segment:
        """The instructions from `first` to the next place where lanes may part or meet."""
        code, steps, n = self.entry.code, [], first
        while n < len(code) and self.kind(code[n]) not in ENDS and (n == first or n not in self.leaders):
            self.pc = n
            steps.append((n, self._step(code[n])))
            n += 1
        if n == len(code):
            end = self._leave("", n)
        elif n != first and n in self.leaders:
            end = self._go_on(n)
        else:
            self.pc = n
            end, n = self._end(n, code[n]), n + 1
        self.segments[first] = Segment(first, steps, end, n - first)
        return self.segments[first]

    def _step(self, i: Instruction) -> Step:
        mods, decode = Modifiers(i.opcode), DECODERS.get(self.kind(i))
        if decode is None:
            mods.unknown()
        try:
            step = decode(self, mods, *i.operands)
        except (TypeError, ValueError, AttributeError) as error:
            raise Fault(f"operands that are not understood ({error})") from error
        if not i.predicate or self.kind(i) in COLLECTIVES:
            return step
        holds = self.predicate(i.predicate)

        def guarded(m: Mask) -> None:
            active = holds() if m is True else holds() & m
            seen = active.tobytes()
            if seen == self.ones:
                step(True)
            elif seen != self.zeros:
                step(active.copy())

        return guarded

    def _split(self, predicate: str) -> Callable[[Mask, np.ndarray], np.ndarray]:
        """A function from the lanes that are here to those that take part."""
        if not predicate:
            return lambda m, mask: mask
        holds = self.predicate(predicate)
        return lambda m, mask: holds() & mask

    def _end(self, n: int, i: Instruction) -> Callable[[Team, Mask, np.ndarray], int | None]:
        kind, mods = self.kind(i), Modifiers(i.opcode)
        if kind == "bra":
            mods.drop("uni")
        if kind in ("bra", "ret", "exit"):
            mods.take(kind)
            mods.done()
            return self._branch(n, i) if kind == "bra" else self._leave(i.predicate, n)
        return self._collective(n, i) if kind in COLLECTIVES else self._barrier(n, i, mods)

    @staticmethod
    def _go_on(place: int) -> Callable[[Team, Mask, np.ndarray], int | None]:
        return lambda team, m, mask: place

    def _branch(self, n: int, i: Instruction) -> Callable[[Team, Mask, np.ndarray], int | None]:
        target = self.target(i)
        if not i.predicate:
            return self._go_on(target)
        split = self._split(i.predicate)

        def end(team: Team, m: Mask, mask: np.ndarray) -> int | None:
            taken = split(m, mask)
            seen = taken.tobytes()
            if seen == self.zeros:
                return n + 1
            if seen == mask.tobytes():
                return target
            team.join(target, taken)
            team.join(n + 1, mask & ~taken)
            return None

        return end

    def _leave(self, predicate: str, n: int) -> Callable[[Team, Mask, np.ndarray], int | None]:
        split = self._split(predicate)

        def end(team: Team, m: Mask, mask: np.ndarray) -> int | None:
            leaving = split(m, mask)
            team.exited |= leaving
            team.join(n + 1, mask & ~leaving)
            return None

        return end

    def _gather(self, n: int, i: Instruction, members: str) -> Callable[[Team, Mask, np.ndarray], np.ndarray]:
        """A function to the lanes that take part in a collective and whose fellows are all here; others wait."""
        split, wanted = self._split(i.predicate), self.read(members or "-1", "u32")

        def gather(team: Team, m: Mask, mask: np.ndarray) -> np.ndarray:
            if m is True and not (members or i.predicate):
                return mask
            taking = split(m, mask)
            team.join(n + 1, mask & ~taking)
            arrived = taking | team.waiting.pop(n, False)
            here, needed = np.repeat(self.packed(arrived), WARP), wanted & np.repeat(self.packed(team.exist), WARP)
            if members and (lost := np.flatnonzero(arrived & (wanted >> np.arange(self.lanes) % WARP & 1 == 0))).size:
                raise Fault("a lane executes it that is not in its mask", int(lost[0]))
            ready = arrived & (here & needed == needed)
            if (late := arrived & ~ready).any():
                team.waiting[n] = late
            return ready

        return gather

    def _collective(self, n: int, i: Instruction) -> Callable[[Team, Mask, np.ndarray], int | None]:
        step, members = self._step(i), "" if "aligned" in i.opcode else i.operands[-1]
        gather, whole = self._gather(n, i, members), self.read(members or "-1", "u32")

        def end(team: Team, m: Mask, mask: np.ndarray) -> int | None:
            if m is True and not i.predicate and whole.tobytes() == self.everyone:
                step(True)
                return n + 1
            ready = gather(team, m, mask)
            if ready.any():
                step(True if ready.all() else ready)
                team.join(n + 1, ready)
            return None

        return end

    def _barrier(self, n: int, i: Instruction, mods: Modifiers) -> Callable[[Team, Mask, np.ndarray], int | None]:
        mods.take("cta")
        mods.take("aligned")
        sync = mods.need("sync", "arrive") == "sync"
        mods.done()
        gather = self._gather(n, i, "")
        numbers, sizes = (self.read(text, "u32") for text in (*i.operands, "0")[:2])

        def end(team: Team, m: Mask, mask: np.ndarray) -> int | None:
            ready = gather(team, m, mask)
            for lane in np.flatnonzero(ready)[:1].tolist():
                number, threads = int(numbers[lane]), int(sizes[lane])
                if np.count_nonzero(((numbers != number) | (sizes != threads)) & ready):
                    raise Fault("threads name different barriers, or different numbers of threads", lane)
                team.launch.arrive(number, threads, team, ready, n + 1, sync)
            return None

        return end


# Running ----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What ran: instructions by opcode, of warps and of their active threads, those that are predicated off included.

    Bytes are of loads, stores, copies and atomics of global memory and of generic addresses.
    """

    warps: Counter[str] = field(default_factory=Counter)
    threads: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0


class Team:
    """Warps of a block that go in step."""

    def __init__(self, launch: Launch, first: int) -> None:
        code = launch.code
        self.launch, self.first = launch, first
        self.exist = np.arange(first, first + code.lanes) < launch.threads
        self.ready = {0: self.exist.copy()}  # lanes by where they are
        self.waiting: dict[int, np.ndarray] = {}  # at collectives, for others of their warps
        self.blocked: dict[tuple[int, int], np.ndarray] = {}  # at barriers, by where they will go on and at which
        self.exited = np.zeros(code.lanes, bool)
        self.registers, self.local = np.full_like(code.registers, 0xFF), np.full_like(code.local, 0xFF)
        self.registers[code.predicates :] = 0
        self.groups = np.zeros(code.lanes, np.int64)  # of cp.async, committed
        self.copies: list[tuple[np.ndarray, ...]] = []  # not yet landed

    def join(self, place: int, lanes: np.ndarray) -> None:
        if lanes.any():
            self.ready[place] = self.ready[place] | lanes if place in self.ready else lanes

    def enter(self) -> None:
        """Makes the code's registers this team's."""
        code = self.launch.code
        if (last := code.team) is self:
            return
        if last is not None:
            last.registers[:], last.local[:] = code.registers, code.local
        code.registers[:], code.local[:], code.team = self.registers, self.local, self
        thread = np.arange(self.first, self.first + code.lanes)
        x, y, _ = self.launch.block
        values = {"%tid.x": thread % x, "%tid.y": thread // x % y, "%tid.z": thread // x // y}
        values |= {"%laneid": thread % WARP, "%warpid": thread // WARP}
        for name, sizes in (("ntid", self.launch.block), ("nctaid", self.launch.grid), ("ctaid", self.launch.at)):
            values |= {f"%{name}.{axis}": size for axis, size in zip("xyz", sizes, strict=True)}
        for name in SPECIAL & code.slots.keys():
            code.slots[name].view(np.uint32)[:] = values[name]

    def run(self) -> None:
        """Goes on until all lanes have left or wait at barriers."""
        self.enter()
        launch, code, ready = self.launch, self.launch.code, self.ready
        warps = code.lanes // WARP
        while ready:
            place: int | None = min(ready)
            mask = ready.pop(place)
            full = mask.tobytes() == code.ones
            m: Mask = True if full else mask
            active = (warps, code.lanes) if full else (np.count_nonzero(code.packed(mask)), np.count_nonzero(mask))
            while place is not None:
                segment = code.segments.get(place) or code.segment(place)
                segment.warps += active[0]
                segment.threads += active[1]
                for code.pc, step in segment.steps:
                    step(m)
                code.pc = segment.first + segment.length - 1
                launch.left -= segment.length
                if launch.left < 0:
                    raise Fault("is reached, and so many instructions have run that the kernel seems not to end")
                place = segment.end(self, m, mask)
                if place is not None and ready and min(ready) <= place:
                    self.join(place, mask)
                    place = None
        for code.pc, lanes in self.waiting.items():
            missing = np.repeat(code.packed(self.exist & ~lanes), WARP) != 0
            lane = int(np.flatnonzero(lanes & missing)[0]) if (lanes & missing).any() else int(np.flatnonzero(lanes)[0])
            fellows = slice(lane // WARP * WARP, lane // WARP * WARP + WARP)
            here, gone = np.count_nonzero(lanes[fellows]), np.count_nonzero(self.exited[fellows])
            raise Fault(f"is executed by {here} lanes of a warp only; {gone} of the others have exited", lane)

    # cp.async

    def commit(self, m: np.ndarray) -> None:
        self.groups[m] += 1

    def copy(self, lanes, targets, sources, size, sizes) -> None:
        if self.launch.eager:
            self._move(targets, sources, size, sizes)
        else:
            self.copies.append((self.groups[lanes], lanes, targets, sources, np.full(len(lanes), size), sizes))

    def land(self, m: np.ndarray, left: int) -> None:
        """Completes the copies of lanes, but for the last `left` groups; -1 completes uncommitted ones as well."""
        copies, self.copies = self.copies, []
        for groups, lanes, *rest in copies:
            done = m[lanes] & (groups < self.groups[lanes] - left)
            if done.any():
                targets, sources, size, sizes = (part[done] for part in rest)
                self._move(targets, sources, int(size[0]), sizes)
            if not done.all():
                self.copies.append(tuple(part[~done] for part in (groups, lanes, *rest)))

    @staticmethod
    def _move(targets: np.ndarray, sources: np.ndarray, size: int, sizes: np.ndarray) -> None:
        memory, offsets = everything("u1"), np.arange(size)
        inside = offsets < sizes[:, None]
        places = np.where(inside, sources[:, None] + offsets, targets[:, None])
        memory[targets[:, None] + offsets] = np.where(inside, memory[places], 0)


class Launch:
    """A kernel that runs, a block at a time."""

    def __init__(self, code: Code, grid, block, memory: Memory, eager: bool, reverse: bool, limit: int) -> None:
        self.code, self.grid, self.block, self.memory = code, grid, block, memory
        self.eager, self.reverse, self.left = eager, reverse, limit
        self.threads = int(np.prod(block))
        self.at = (0, 0, 0)

    def run_block(self, at: tuple[int, int, int]) -> None:
        self.at, self.code.team = at, None
        self.code.shared[:] = 0xFF
        self.barriers: dict[int, tuple[int, int]] = {}  # threads that have arrived, and that must
        self.teams = [Team(self, first) for first in range(0, self.threads, self.code.lanes)]
        order = self.teams[::-1] if self.reverse else self.teams
        while any(team.ready for team in self.teams):
            for team in order:
                if team.ready:
                    team.run()
        for team in self.teams:
            for place, lanes in team.blocked.items():
                team.enter()
                self.code.pc = place[0] - 1
                waiting = ", ".join(f"{n} of {most} threads at barrier {k}" for k, (n, most) in self.barriers.items())
                gone = sum(np.count_nonzero(team.exited) for team in self.teams)
                raise Fault(f"waits for ever: {waiting}; {gone} threads have exited", int(np.flatnonzero(lanes)[0]))

    def arrive(self, number: int, threads: int, team: Team, lanes: np.ndarray, place: int, sync: bool) -> None:
        """Counts whole warps in; the last one lets all go on at `place`."""
        most = threads or -(-self.threads // WARP) * WARP
        arrived, expected = self.barriers.get(number, (0, most))
        arrived += WARP * np.count_nonzero(self.code.packed(lanes))
        if most != expected or most % WARP or arrived > most:
            raise Fault(f"{arrived} threads arrive at barrier {number}, which is for {expected} or {most}")
        if sync:
            team.blocked[place, number] = team.blocked.get((place, number), False) | lanes
        else:
            team.join(place, lanes)
        self.barriers[number] = arrived, most
        if arrived == most:
            del self.barriers[number]
            for other in self.teams:
                for key in [key for key in other.blocked if key[1] == number]:
                    other.join(key[0], other.blocked.pop(key))


def run(
    module: Module,
    entry: str,
    grid: Iterable[int],
    block: Iterable[int],
    parameters: bytes,
    memory: Memory,
    shared_bytes: int = 0,
    *,
    together: int = 1,
    reverse: bool = False,
    eager: bool = False,
    limit: int = 10**8,
) -> Counts:
    """Executes a kernel; blocks one after another.

    Args:
        module, entry: what `parse` gave, and a kernel's mangled name.
        grid, block: up to three numbers each.
        parameters: the bytes of the parameter space.
        memory: the regions that may be accessed.
        shared_bytes: of dynamic shared memory.
        together: warps that go in step; 1 finds most, more is faster.
        reverse: warps take turns in falling order.
        eager: cp.async lands when it is issued, not when it is waited for.
        limit: of instructions, those of warps in step counted once.

    Raises:
        PtxError: what the kernel must not do, or what is not known here.
    """
    kernel = module.entries[entry]
    grid, block = ((*map(int, sizes), 1, 1)[:3] for sizes in (grid, block))
    threads = int(np.prod(block))
    if threads > (kernel.threads or 1024) or (kernel.exact and threads != np.prod(kernel.exact)):
        raise PtxError(f"{entry}: {threads} threads in a block; .maxntid {kernel.threads}, .reqntid {kernel.exact}")
    if len(parameters) != kernel.parameter_bytes:
        raise PtxError(f"{entry}: takes {kernel.parameter_bytes} bytes of parameters, got {len(parameters)}")
    warps = -(-threads // WARP)
    lanes = WARP * -(-warps // -(-warps // together))
    code = kernel.compiled.get((lanes, shared_bytes))
    if code is None:
        code = kernel.compiled[lanes, shared_bytes] = Code(kernel, lanes, shared_bytes)
    code.parameters[:] = np.frombuffer(parameters, np.uint8)
    code.counts, code.pc = Counts(), 0
    for segment in code.segments.values():
        segment.warps = segment.threads = 0
    for _, count in code.found:
        count[...] = 0
    launch = Launch(code, grid, block, memory, eager, reverse, limit)
    try:
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*map(range, grid[::-1])):
                launch.run_block((x, y, z))
    except Fault as fault:
        raise PtxError(_explained(launch, fault)) from fault
    for segment in code.segments.values():
        for i in kernel.code[segment.first : segment.first + segment.length]:
            code.counts.warps[i.opcode] += segment.warps
            code.counts.threads[i.opcode] += segment.threads
    return code.counts


def _explained(launch: Launch, fault: Fault) -> str:
    code = launch.code
    i = code.entry.code[code.pc]
    thread = ""
    if fault.lane is not None:
        n, (x, y, _) = code.team.first + fault.lane, launch.block
        thread = f", thread {(n % x, n // x % y, n // x // y)}"
    source = f" ({i.source})" if i.source else ""
    return f"{code.entry.name}, block {launch.at}{thread}, line {i.line}{source}: {i}: {fault}"
