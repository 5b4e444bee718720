"""The CUDA kernels, executed thread by thread on a CPU: backend "emulator", registered by importing this.

    with fastlm.use_backend("emulator"):                  # the .cu files, compiled by g++
        F.layer_norm(x, (768,))
    with emulator.settings(schedule="random", seed=7):    # another of the orders that a GPU may run threads in
        ...
    print(emulator.trace(lambda: F.layer_norm(x, (768,))))

A launcher's blocks run one after another, a block's threads as fibers that switch where they must wait: the schedule
says to whom. Builds: "plain"; "address" with AddressSanitizer and UndefinedBehaviorSanitizer, in processes started with
`environment("build=address")`; "trace", which finds races, reads of what was never written or is still being copied,
accesses out of bounds or misaligned, and counts the traffic; "ptx", in which launchers run the kernels that nvcc made.
FASTLM_EMULATOR="build=trace,schedule=random,seed=7" sets what holds from the start. See docs/proof.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib
import importlib.util
import os
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from proof import toolkit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm.ops import registry
from fastlm.ops.compiled import Launchers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
SCHEDULES = ("adversarial", "round_robin", "random")
BUILDS = {  # flags of kernels, and of everything
    "plain": ("", ""),
    "ptx": ("", ""),
    "address": ("", "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"),
    # A structure is loaded as it is written, by one access, and not field by field.
    "trace": (
        "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-sra -fno-store-merging",
        "-DFASTLM_EMULATOR_TRACE",
    ),
}
COMMON = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -fno-omit-frame-pointer -fno-optimize-sibling-calls"
WARNINGS = "-ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"


class EmulatorError(RuntimeError):
    """What a kernel did wrong: kernel, block, thread, what, and where in the source."""


@dataclasses.dataclass(frozen=True)
class Settings:
    build: str = "plain"
    schedule: str = "adversarial"
    seed: int = 0
    landing: str = "lazy"  # of asynchronous copies: when they are waited for, or "eager", when they are issued
    blocks: str = "in_order"  # or "random"
    module: Path | None = None  # instead of a build

    def __post_init__(self) -> None:
        allowed = {
            "build": BUILDS,
            "schedule": SCHEDULES,
            "landing": ("lazy", "eager"),
            "blocks": ("in_order", "random"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"emulator: {name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")


def _from_environment() -> Settings:
    parts = [part.partition("=") for part in os.environ.get("FASTLM_EMULATOR", "").split(",") if part]
    given = {name if equals else "build": value if equals else name for name, equals, value in parts}
    return Settings(**given | {"seed": int(given.get("seed", 0))})


_current = _from_environment()


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Within it kernels run as said; what is not said stays as it was. See `Settings`."""
    global _current
    before = _current
    _current = dataclasses.replace(before, **changes)
    try:
        yield _current
    finally:
        _current = before


# Building ---------------------------------------------------------------------------------------------------------


def missing() -> str:
    """Why there is no emulator here; "" if there is one."""
    try:
        toolkit.includes()
    except FileNotFoundError as error:
        return str(error)
    return "" if shutil.which(_cxx()) else f"no C++ compiler ({_cxx()})"


def _cxx() -> str:
    return os.environ.get("CXX") or "g++"


def kernels() -> list[Path]:
    """The files with the kernels of csrc."""
    return sorted(path for path in CSRC.rglob("*.cu") if path.name != "kernel_attributes.cu")  # asks the CUDA runtime


def proof_kernels() -> list[Path]:
    """The files with the kernels of tests/proof/kernels, for `run`."""
    return sorted((HERE.parent / "kernels").glob("*.cu"))


def build_module(build: str = "plain") -> Path:
    """The Python module of a build, one of BUILDS; only what has changed since the last time is compiled."""
    from ninja.ninja_syntax import Writer

    folder = ROOT / "build" / "emulator" / build
    folder.mkdir(parents=True, exist_ok=True)
    import pybind11

    kernel_flags, all_flags = BUILDS[build]
    system = [*toolkit.includes(), pybind11.get_include(), sysconfig.get_path("include")]
    paths = [f"-I{path}" for path in (CSRC, HERE, HERE.parent / "kernels")]
    paths += [word for path in system for word in ("-isystem", path)]
    module = folder / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja.new", "w") as file:
            ninja = Writer(file, width=10_000)
            compiler = f"{_cxx()} {COMMON} {WARNINGS} {all_flags} {shlex.join(map(str, paths))}"
            ninja.rule("cxx", f"{compiler} $extra -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", f"rm -f $out && {_cxx()} {all_flags} -shared -Wl,-Bsymbolic $in -ldl -o $out")
            objects = []
            for source in [*kernels(), *proof_kernels()]:
                place = source.relative_to(CSRC) if CSRC in source.parents else source.name
                extra = {"extra": f"-x c++ {kernel_flags}"}
                objects += ninja.build(f"{place}.o", "cxx", str(source), variables=extra)
            for source in sorted(HERE.glob("*.cpp")):
                if source.name != "trace.cpp" or build == "trace":
                    extra = {"extra": "-O0 -g0" if source.name == "module.cpp" else "-O2"}
                    objects += ninja.build(f"{source.name}.o", "cxx", str(source), variables=extra)
            ninja.build(module.name, "link", objects)
        rules = folder / "build.ninja"
        if not rules.exists() or rules.read_text() != (folder / "build.ninja.new").read_text():
            os.replace(folder / "build.ninja.new", rules)
        command = [sys.executable, "-m", "ninja", "-C", str(folder), "--quiet"]
        done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile\n{done.stdout}{done.stderr}")
    return module


def environment(settings: str) -> dict[str, str]:
    """The environment of a process whose kernels are to run so: "build=address,schedule=random"."""
    changed = os.environ | {"FASTLM_EMULATOR": settings}
    if "address" in settings:
        names = ("libasan.so", "libstdc++.so.6")  # the second, so that the first finds what throws exceptions
        commands = ([_cxx(), f"-print-file-name={name}"] for name in names)
        found = (subprocess.run(command, text=True, capture_output=True, check=True) for command in commands)
        changed |= {
            "LD_PRELOAD": ":".join(os.path.realpath(each.stdout.strip()) for each in found),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
    return changed


@functools.cache
def _load(path: Path) -> ModuleType:
    # pybind11 takes modules of one name for one module: the folder makes it another.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _built(build: str) -> ModuleType:
    return _load(build_module(build=build))


@functools.cache
def _ptx() -> Any:
    from proof.emulator.ptx_build import PtxBuild

    return PtxBuild(_built("plain"), [*kernels(), *proof_kernels()])


def _configured() -> ModuleType:
    s, executor = _current, 0
    if s.build == "ptx":
        _ptx().eager, _ptx().reverse, executor = s.landing == "eager", s.schedule == "adversarial", _ptx().address
    module = _load(s.module) if s.module else _built("plain" if executor else s.build)
    module.configure(SCHEDULES.index(s.schedule), s.seed, s.landing == "eager", s.blocks == "random", executor)
    return module


def _checker() -> Any:
    """What checks accesses to memory and has to be told of it, if anything does."""
    if _current.build == "ptx":
        return _ptx()
    module = _configured()
    return module if hasattr(module, "add_region") else None


# Memory that kernels may access, where it is checked ---------------------------------------------------------------


class _Memory(TorchDispatchMode):
    """Tells what checks accesses of the tensors that a backend is given, to be read, and of those it makes."""

    def __init__(self, checker: Any) -> None:
        super().__init__()
        self.checker = checker
        self.kept: list[Tensor] = []  # so that no address is used twice

    def note(self, x: Tensor, writable: bool, initialised: bool) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.numel():
            self.kept.append(x)
            self.checker.add_region(x.data_ptr(), extent * x.itemsize, writable, initialised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            known = {x.untyped_storage().data_ptr() for x in self.kept}
            if result.untyped_storage().data_ptr() not in known:
                self.note(result, True, "empty" not in func.name())
            elif func._schema.is_mutable or func.name() == "aten::detach":
                self.note(result, True, True)  # torch has written to it; or a backend will, and takes what it was given
        return result

    def __enter__(self) -> Any:
        self.checker.forget_regions()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        for listener in _listeners:
            listener(self)
        return super().__exit__(*error)


_listeners: list[Callable[[_Memory], None]] = []


def _observed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        checker = _checker()
        if checker is None:
            return function(*args)
        with _Memory(checker) as memory:
            for x in tree_leaves(args):
                if isinstance(x, Tensor):
                    memory.note(x, False, True)
            return function(*args)

    return run


# Running ----------------------------------------------------------------------------------------------------------


class _Module:
    """What `fastlm._C` is to the backend "cuda"."""

    @property
    def DTYPES(self) -> dict[str, int]:
        return _configured().DTYPES

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            try:
                getattr(_configured(), name)(*args)
            except RuntimeError as error:
                raise EmulatorError(str(error)) from None

        return launch


def register() -> None:
    """Registers the backend for every op that has CUDA kernels."""
    launchers = Launchers("", lambda tensor: (0, 0), missing, _Module)
    for path in sorted((ROOT / "fastlm" / "ops").glob("*/op.py")):
        op = importlib.import_module(f"fastlm.ops.{path.parent.name}.op")
        if hasattr(op, "register_cuda"):
            op.register_cuda("emulator", launchers, device="cpu")
    for each in registry.OPS.values():
        if "emulator" in each.backends:
            record = each.backends["emulator"]
            each.register(dataclasses.replace(record, fwd=_observed(record.fwd), bwd=_observed(record.bwd)))


@dataclasses.dataclass(frozen=True)
class Marked:
    tensor: Tensor
    writable: bool
    initialised: bool


def read_only(x: Tensor) -> Marked:
    """A tensor that `run`'s kernel must not write to."""
    return Marked(x, False, True)


def uninitialised(x: Tensor) -> Marked:
    """A tensor that `run`'s kernel must write to before it reads."""
    return Marked(x, True, False)


def run(
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *arguments: Tensor | Marked | int,
    shared_bytes: int = 0,
    opt_in: bool = True,
) -> None:
    """Runs a kernel of tests/proof/kernels by its name; tensors and numbers become its arguments in their order.

    `opt_in` asks for more than 48 KiB of dynamic shared memory first, as a launcher must.
    """
    marked = [Marked(x, True, True) if isinstance(x, Tensor) else x for x in arguments if not isinstance(x, int)]
    tensors = [x.tensor.data_ptr() for x in marked]
    numbers = [x for x in arguments if isinstance(x, int)]
    params = struct.pack("8Q8q", *tensors, *[0] * (8 - len(tensors)), *numbers, *[0] * (8 - len(numbers)))
    shapes = [(*(x if isinstance(x, Sequence) else (x,)), 1, 1)[:3] for x in (grid, block)]
    module, checker = _configured(), _checker()
    try:
        if checker is None:
            return module.run_kernel(kernel, *shapes, params, shared_bytes, opt_in)
        with _Memory(checker) as memory:
            for x in marked:
                memory.note(x.tensor, x.writable, x.initialised)
            module.run_kernel(kernel, *shapes, params, shared_bytes, opt_in)
    except RuntimeError as error:
        raise EmulatorError(str(error)) from None


def instructions(function: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """What a function's kernels execute of nvcc's PTX: instructions of warps by opcode, by kernel."""
    with settings(build="ptx"):
        _ptx().counts.clear()
        function()
        return {kernel: dict(sum((c.warps for c in counts), Counter())) for kernel, counts in _ptx().counts.items()}


# Counting ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Line:
    """What one line of a kernel did, in all its warps."""

    kernel: str = ""
    source: str = ""  # the innermost line in a .cu file
    chain: tuple[str, ...] = ()  # all of them, innermost first
    space: str = ""  # "global" or "shared"
    access: str = ""  # "load", "store", "copy" (asynchronous) or "atomic"
    width: int = 0  # bytes of a lane
    requests: int = 0  # of warps
    bytes: int = 0
    sectors: int = 0  # of 32 bytes, global
    ideal_sectors: int = 0
    wavefronts: int = 0  # shared
    ideal_wavefronts: int = 0


COUNTS = ("requests", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts")


@dataclasses.dataclass
class Trace:
    """What `trace` saw: `result` of the function, and `lines`."""

    result: Any
    lines: list[Line]
    _moved: dict[int, list[int]]

    def total(self, kernel: str | None = None, space: str | None = None, access: str | None = None) -> Line:
        """The sum of the lines of a kernel (those whose name begins so), of a space, of a kind of access."""
        total = Line(kernel or "", "", (), space or "", access or "")
        for line in self.lines:
            wanted = line.kernel.startswith(kernel or "") and space in (None, line.space)
            if wanted and access in (None, line.access):
                for name in COUNTS:
                    setattr(total, name, getattr(total, name) + getattr(line, name))
        return total

    def bytes_read(self, x: Tensor) -> int:
        """Bytes that threads have read of a tensor, each as often as it was read."""
        return self._moved[x.data_ptr()][0]

    def bytes_written(self, x: Tensor) -> int:
        return self._moved[x.data_ptr()][1]

    def __str__(self) -> str:
        rows = [("kernel", "line", "access", "width", "requests", "bytes", "sectors", "wavefronts")]
        for line in self.lines:
            sectors = f"{line.sectors}/{line.ideal_sectors}" if line.space == "global" else ""
            wavefronts = f"{line.wavefronts}/{line.ideal_wavefronts}" if line.space == "shared" else ""
            access = f"{line.space} {line.access}"
            numbers = (str(line.width), str(line.requests), str(line.bytes))
            rows.append((line.kernel, line.source, access, *numbers, sectors, wavefronts))
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, sizes)).rstrip() for row in rows)


def trace(function: Callable[[], Any]) -> Trace:
    """Runs a function with the trace build, and counts what its kernels do."""
    kept: list[_Memory] = []
    moved: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    def listen(memory: _Memory) -> None:
        kept.append(memory)
        regions = {region[:2]: region for region in memory.checker.regions()}  # each tensor once
        for begin, _, _, read, written in regions.values():
            moved[begin][0] += read
            moved[begin][1] += written

    with settings(build="trace"):
        module = _configured()
        module.take_lines()
        _listeners.append(listen)
        try:
            result = function()
        finally:
            _listeners.remove(listen)
    found = module.take_lines()
    chains = _places(module, [line[1] for line in found])
    lines: dict[tuple[Any, ...], Line] = {}
    for kernel, place, shared, access, width, *counts in found:
        chain = chains[place]
        source = next((each for each in chain if ".cu:" in each), chain[0])
        key = (kernel, chain, "shared" if shared else "global", ("load", "store", "copy", "atomic")[access], width)
        line = lines.setdefault(key, Line(kernel, source, *key[1:]))
        for name, n in zip(COUNTS, counts, strict=True):
            setattr(line, name, getattr(line, name) + n)
    return Trace(result, sorted(lines.values(), key=lambda line: (line.kernel, line.source)), moved)


def _places(module: ModuleType, addresses: list[int]) -> dict[int, tuple[str, ...]]:
    """The lines of code at addresses of a module: file:line, innermost first."""
    offsets = [f"{address - module.base():x}" for address in addresses]
    command = ["addr2line", "-a", "-i", "-s", "-e", str(module.__file__), *offsets]
    output = subprocess.run(command, text=True, capture_output=True, check=True).stdout if addresses else ""
    chains = [[line.split(" ")[0] for line in part.splitlines()[1:]] for part in output.split("0x")[1:]]
    own = {path.name for path in HERE.iterdir()}
    kept = (tuple(place for place in chain if place.split(":")[0] not in own) or ("?",) for chain in chains)
    return dict(zip(addresses, kept, strict=True))


register()
