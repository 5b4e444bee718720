"""Breaks kernels in every small way and sees whether a test fails.

    python tests/proof/mutants.py [--op layer_norm] [--file NAME] [--sample N --seed S] [--json FILE] [pattern]

A mutant is one change of a source by one operator: a barrier removed, a comparison moved by one, a condition forced, a
factor dropped (OPERATORS has them all). Sources are read as tokens, of code formatted by clang-format: an operator of
two operands has a blank on either side, a template's bracket has not. Mutants are compiled for the emulator in a copy
of csrc: those whose expressions do not overlap together, each behind a number that is chosen when it runs, and those of
constants alone. The op's checks (checks.py) run until one fails, each mutant in a process of its own; what passes them
all runs in the trace build too; a header's mutants that survive go on to the checks of the next op that includes it. A
mutant that survives must be listed in equivalent_mutants.toml with the reason why it changes nothing, by its text; what
is listed must exist, and must survive.

`pattern` is a regular expression for a mutant's text, as it is printed. New op: one more entry in SUITES.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import functools
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from proof import checks, emulator
from proof.attention_checks import attention_checks
from proof.checks import Check

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TABLE = Path(__file__).with_name("equivalent_mutants.toml")

OPERATORS = {
    "barrier": "a barrier, or a wait for copies, removed",
    "statement": "an assignment or a call removed",
    "leave": "return, continue or break removed",
    "comparison": "< and <=, > and >=, == and != swapped",
    "condition": "of if, while, for or ?: made always true or always false (a loop's: false)",
    "logic": "&& and || swapped, or one side dropped; ! dropped",
    "arithmetic": "+ and -, * and /, << and >>, & and | swapped",
    "dropped": "an offset, a factor, a shift or a mask dropped",
    "assignment": "of += and the like: the operation dropped",
    "literal": "0.0 and 1.0, true and false swapped; other fractions doubled; whole numbers one more, one less",
    "initial": "an initial value of {} left out",
}


class Mutant(NamedTuple):
    file: str  # below csrc
    start: int
    before: str
    after: str
    operator: str
    line: int
    column: int
    text: str  # of the line
    nth: int  # among those of the file that read the same
    unit: tuple[int, int] | None  # the expression or statement around it that may be chosen at run time

    @property
    def key(self) -> str:
        """What names it whatever lines lie before it."""
        change = " ".join(self.before.split()), " ".join(self.after.split())
        return f"{self.file}: {self.text} [{self.operator}: {change[0]} -> {change[1]}]" + f" #{self.nth}" * (
            self.nth > 1
        )

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.key.split(': ', 1)[1]}"

    def apply(self, source: str) -> str:
        end = self.start + len(self.before)
        assert source[self.start : end] == self.before, f"{self}: not a mutant of this source"
        return source[: self.start] + self.after + source[end:]

    def choose(self, source: str, number: int) -> str:
        """Its unit, which changes where the mutant of this number is asked for."""
        start, end = self.unit
        whole = source[start:end]
        if self.operator in ("barrier", "statement", "leave"):
            return f"if (fastlm_mutant() != {number}) {whole}"
        at = self.start - start
        changed = whole[:at] + self.after + whole[at + len(self.before) :]
        return f"(fastlm_mutant() == {number} ? ({changed}) : ({whole}))"


# Tokens -----------------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""(?P<none>\s+|//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n\\]|\\.)*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>0[xX][\da-fA-F]+[uUlL]*|(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?|\d+[uUlL]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<sign><<=|>>=|\.\.\.|->|::|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
PRECEDENCE = {
    sign: level
    for level, signs in enumerate(("* / %", "+ -", "<< >>", "< <= > >=", "== !=", "&", "^", "|", "&&", "||"))
    for sign in signs.split()
}
SWAPS = dict(pair.split() for pair in ("< <=", "> >=", "== !=", "&& ||", "+ -", "* /", "<< >>", "& |"))
SWAPS |= {after: before for before, after in SWAPS.items()}
ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="}
OPEN, CLOSE = {"(": ")", "[": "]", "{": "}", "<": ">"}, {")", "]", "}", ">"}
KEYWORDS = {"return", "else", "case", "throw"}
DECLARE = {
    "const",
    "constexpr",
    "static",
    "inline",
    "using",
    "template",
    "struct",
    "class",
    "enum",
    "typedef",
    "extern",
}
BARRIERS = {"__syncthreads", "__syncwarp", "barrier_sync", "barrier_arrive", "cp_async_wait", "cp_async_commit"}
# Without a kernel's code: what is checked when it is compiled, and the registration that reports are made from.
PASSED_OVER = {"static_assert", "__launch_bounds__", "FASTLM_SHARED", "FASTLM_DYNAMIC_SHARED", "asm"}
FUNCTIONS_PASSED_OVER = {"register_kernels", "register_width", "for_each_pair"}


Change = tuple[str, int, int, str, tuple[int, int] | None]


class Token(NamedTuple):
    text: str
    start: int
    end: int
    kind: str  # string, number, name, sign; "binary" for an operator of two operands


class Source:
    """Tokens of a file, and which brackets belong together."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._tokens())
        self.partner: dict[int, int] = {}  # of a bracket
        self.inside: list[int] = []  # of a token, the bracket around it; -1 outside of all
        self.code: set[int] = set()  # braces of statements
        self.blocks: set[int] = set()  # and of declarations
        stack = [-1]
        for n, token in enumerate(self.tokens):
            bracket = token.kind == "sign"
            if bracket and token.text in CLOSE and stack[-1] >= 0 and OPEN[self.tokens[stack[-1]].text] == token.text:
                self.partner[n] = stack.pop()
                self.partner[self.partner[n]] = n
            self.inside.append(stack[-1])
            if bracket and token.text in OPEN:
                if token.text == "{" and self.at(n - 1) in (")", "]", "else", "do", "const"):
                    self.code.add(n)
                if token.text == "{" and self.text[token.start - 1].isspace() and self.at(n - 1) not in ("=", "return"):
                    self.blocks.add(n)
                stack.append(n)
        assert stack == [-1], f"brackets do not match from {self.text[self.tokens[stack[-1]].start :][:60]!r} on"
        self.passed_over = set(self._passed_over())

    def _tokens(self) -> Iterator[Token]:
        for match in TOKEN.finditer(self.text):
            text, start, end, kind = match[0], match.start(), match.end(), match.lastgroup
            around = self.text[start - 1 : start].isspace() and self.text[end : end + 1].isspace()
            if kind == "sign" and around and text in PRECEDENCE:
                kind = "binary"
            if kind == "sign" and text == ">>":  # of two templates
                yield from (Token(">", start, start + 1, kind), Token(">", start + 1, end, kind))
            elif kind != "none":
                yield Token(text, start, end, kind)

    def at(self, n: int) -> str:
        return self.tokens[n].text if 0 <= n < len(self.tokens) else ""

    def span(self, first: int, last: int) -> str:
        return self.text[self.tokens[first].start : self.tokens[last].end]

    def _passed_over(self) -> Iterator[int]:
        for n, token in enumerate(self.tokens):
            last = n
            if (token.text in PASSED_OVER and self.at(n + 1) == "(") or (
                token.text == "template" and self.at(n + 1) == "<"
            ):
                last = self.partner[n + 1]
            elif token.text == "using" or (token.text == "registered" and self.at(n + 1) == "="):
                last = self.forward(n, (";",))
            elif token.text in FUNCTIONS_PASSED_OVER and self.at(n + 1) == "(" and self.at(n - 1) == "void":
                last = self.partner[self.partner[n + 1] + 1]
            if last > n:
                yield from range(n, last + 1)

    def forward(self, n: int, ends: tuple[str, ...], level: int = 99) -> int:
        """The next of these tokens, an operator that binds no tighter than `level`, or the closing bracket."""
        while n < len(self.tokens):
            token = self.tokens[n]
            loose = token.kind == "binary" and PRECEDENCE[token.text] >= level
            if token.text in ends or loose or (n in self.partner and self.partner[n] < n):
                return n
            n = self.partner.get(n, n) + 1
        return n

    def backward(self, n: int, ends: tuple[str, ...], level: int = 99) -> int:
        """The same to the left; of operators, one that binds less than `level`."""
        while n >= 0:
            token = self.tokens[n]
            loose = token.kind == "binary" and PRECEDENCE[token.text] > level
            if token.text in ends or loose or (n in self.partner and self.partner[n] > n):
                return n
            n = self.partner.get(n, n) - 1
        return n

    def is_constant(self, n: int) -> bool:
        """Whether a token belongs to what must be known when it is compiled."""
        while self.inside[n] >= 0 and self.inside[n] not in self.blocks:
            n = self.inside[n]
            if self.at(n) == "<" or (self.at(n) == "[" and self._is_extent(n)):
                return True
        first = n
        while first > 0 and self.at(first - 1) != ";" and self.partner.get(first - 1, 0) not in self.blocks:
            if self.partner.get(first - 1, 0) >= first:  # an opening bracket
                break
            first = self.partner.get(first - 1, first - 1)
        return any(self.at(m) in ("constexpr", "alignas") for m in range(first, n + 1))

    def _is_extent(self, n: int) -> bool:
        """Of a square bracket: whether it declares an array. After a comma it may."""
        while self.at(n - 1) == "]":
            n = self.partner[n - 1]
        before = self.tokens[n - 2]
        declared = before.kind == "name" and before.text not in KEYWORDS
        return declared or before.text == "," or (self.at(n - 1) == ")" and self.at(n - 3) == "&")

    # What a mutant changes: (operator, first character, last character, new text, unit)

    BOUNDS = (",", ";", "?", ":", "return", *ASSIGNMENTS)

    def changes(self) -> Iterator[Change]:
        for n, token in enumerate(self.tokens):
            if n in self.passed_over:
                continue
            for operator, start, end, after, unit in self._changes(n, token):
                yield operator, start, end, after, None if self.is_constant(n) else unit

    def _changes(self, n: int, token: Token) -> Iterator[Change]:
        if token.kind == "binary":
            yield from self._binary(n)
        elif token.kind == "number" or token.text in ("true", "false"):
            yield from self._literal(n)
        elif token.text in ASSIGNMENTS - {"="}:
            first, last = n - 1, self.forward(n + 1, (";", ",")) - 1
            while self.at(first) == "]":
                first = self.partner[first] - 1
            yield "assignment", token.start, token.end, "=", self.place(first, last)
        elif token.text == "=" and self.at(n + 1) == "{" and self.partner[n + 1] == n + 2:
            yield "initial", self.tokens[n - 1].end, self.tokens[n + 2].end, "", None
        elif token.text == "!":
            yield "logic", token.start, token.end, "", self.place(n, self.forward(n + 1, self.BOUNDS, 0) - 1)
        yield from self._condition(n)
        yield from self._statement(n)

    def place(self, first: int, last: int) -> tuple[int, int]:
        return self.tokens[first].start, self.tokens[last].end

    def _binary(self, n: int) -> Iterator[Change]:
        token, level = self.tokens[n], PRECEDENCE[self.at(n)]
        left, right = self.backward(n - 1, self.BOUNDS, level) + 1, self.forward(n + 1, self.BOUNDS, level) - 1
        unit = self.place(left, right)
        if token.text in SWAPS:
            kind = "comparison" if level in (3, 4) else "logic" if level > 7 else "arithmetic"
            loose = self.place(self.backward(n - 1, self.BOUNDS) + 1, self.forward(n + 1, self.BOUNDS) - 1)
            yield kind, token.start, token.end, SWAPS[token.text], loose if level > 4 else unit
        if level in (3, 4):
            return
        kind = "logic" if level > 7 else "dropped"
        yield kind, self.tokens[n - 1].end, self.tokens[right].end, "", unit
        first = not any(self.at(m) == token.text for m in range(left, n) if self.inside[m] == self.inside[n])
        if token.text in ("*", "&&", "||") and first:
            yield kind, self.tokens[left].start, self.tokens[n + 1].start, "", unit

    def _literal(self, n: int) -> Iterator[Change]:
        text, start, end, kind = self.tokens[n]
        around = self.inside[n]
        if self.at(around) == "<" or (
            self.at(around) == "[" and self._is_extent(around) and self.at(around - 2) != ","
        ):
            return
        if kind == "name":
            new = ["false" if text == "true" else "true"]
        elif "." in text:
            value, suffix = re.fullmatch(r"(.*?)([fF]?)", text).groups()
            new = [{0.0: "1.0", 1.0: "0.0"}.get(float(value), repr(2 * float(value))) + suffix]
        else:
            value, suffix = re.fullmatch(r"(0[xX][\da-fA-F]+|\d+)([uUlL]*)", text).groups()
            number, hexadecimal = int(value, 0), value[:2] in ("0x", "0X")
            others = [number + 1] if number == 0 or hexadecimal else [number + 1, number - 1]
            new = [(f"0x{other:X}" if hexadecimal else str(other)) + suffix for other in others]
        for after in new:
            yield "literal", start, end, after, (start, end)

    def _condition(self, n: int) -> Iterator[Change]:
        text, values = self.at(n), ("true", "false")
        if text == "?":
            first, last = self.backward(n - 1, self.BOUNDS) + 1, n - 1
        elif text in ("if", "while", "for"):
            opening = n + 1 + (self.at(n + 1) == "constexpr")
            first, last = opening + 1, self.partner[opening] - 1
            if text == "for":
                first = self.forward(first, (";", ":")) + 1
                last, values = self.forward(first, (";",)) - 1, ("false",)
                if self.at(first - 1) == ":":
                    return
        else:
            return
        for value in values:
            yield "condition", *self.place(first, last), value, self.place(first, last)

    def _statement(self, n: int) -> Iterator[Change]:
        """Of a statement's first token: the statement; not what follows a condition, which is forced instead."""
        before = self.at(n - 1)
        if self.inside[n] not in self.code or before not in (";", "{", "}", "else", "FASTLM_NO_UNROLL"):
            return
        if before == "}" and self.partner[n - 1] not in self.code:  # of int64_t{x} and the like
            return
        last = self.forward(n, (";",)) - 1
        start, end = self.place(n, last)
        if self.at(n) in ("return", "continue", "break"):
            if self.at(last + 2) != "}":
                yield "leave", start, end, "", (start, end)
        elif self._is_expression(n):
            yield "barrier" if self.at(n) in BARRIERS else "statement", start, end, "", (start, end)

    def _is_expression(self, n: int) -> bool:
        if self.at(n) in ("*", "++", "--"):
            return True
        if self.tokens[n].kind != "name" or self.at(n).startswith("FASTLM_"):
            return False
        if self.at(n) in DECLARE | KEYWORDS | {"if", "for", "while", "do", "switch"}:
            return False
        after = n + 1
        while self.at(after) in ("<", "::"):  # static_cast<float*>(p)[0] = x, std::memcpy(...)
            after = self.partner[after] + 1 if self.at(after) == "<" else after + 2
        return self.at(after) in {"(", ".", "->", "[", "++", "--", *ASSIGNMENTS}


def mutants_of(text: str, file: str) -> list[Mutant]:
    """All mutants of a source, no two with the same text."""
    lines = [match.end() for match in re.finditer("\n", text)]
    rows, found, seen, count = text.split("\n"), [], {text}, Counter()
    for operator, start, end, after, unit in Source(text).changes():
        line = bisect.bisect(lines, start)
        row = re.sub(r"\s*//.*", "", rows[line]).strip()
        mutant = Mutant(file, start, text[start:end], after, operator, line + 1, 0, row, 1, unit)
        if (whole := mutant.apply(text)) in seen:
            continue
        seen.add(whole)
        count[mutant.key] += 1
        column = start - (lines[line - 1] if line else 0) + 1
        found.append(mutant._replace(column=column, nth=count[mutant.key]))
    return found


def groups_of(mutants: Sequence[Mutant], most: int) -> list[list[Mutant]]:
    """Mutants that can be compiled together, for their units do not overlap; at most so many."""
    groups: list[list[Mutant]] = []
    for mutant in mutants:
        for group in groups:
            if (
                mutant.unit
                and len(group) < most
                and group[0].file == mutant.file
                and all(apart(mutant, m) for m in group)
            ):
                group.append(mutant)
                break
        else:
            groups.append([mutant])
    return groups


def apart(a: Mutant, b: Mutant) -> bool:
    return bool(a.unit and b.unit) and (a.unit[1] <= b.unit[0] or b.unit[1] <= a.unit[0])


def together(source: str, group: Sequence[Mutant]) -> str:
    """A source with several mutants, by their places in the group from 1 on; one alone is applied as it is."""
    if len(group) == 1:
        return group[0].apply(source)
    for number, mutant in sorted(enumerate(group, 1), key=lambda pair: -pair[1].unit[0]):
        source = source[: mutant.unit[0]] + mutant.choose(source, number) + source[mutant.unit[1] :]
    return 'extern "C" __attribute__((const)) int fastlm_mutant();\n' + source


# Suites -----------------------------------------------------------------------------------------------------------


class Suite(NamedTuple):
    """Of an op, the files to mutate, below csrc: kernels, and headers of theirs."""

    kernels: tuple[str, ...]
    headers: tuple[str, ...]
    checks: Callable[[], list[Check]]


SUITES = {
    "layer_norm": Suite(
        kernels=("layer_norm/layer_norm_fwd.cu", "layer_norm/layer_norm_bwd.cu"),
        headers=(
            "common/row_tile.cuh",
            *(f"common/{name}" for name in ("reduce.cuh", "vec.cuh", "rows.h", "philox.h", "dispatch.cuh")),
        ),
        checks=checks.norm_checks,
    ),
    "cross_entropy": Suite(
        kernels=("cross_entropy/cross_entropy_fwd.cu", "cross_entropy/cross_entropy_bwd.cu"),
        headers=(
            "cross_entropy/row.cuh",
            *(f"common/{name}" for name in ("online_softmax.cuh", "row_tile.cuh", "reduce.cuh", "vec.cuh", "rows.h")),
        ),
        checks=checks.cross_entropy_checks,
    ),
    "attention": Suite(
        kernels=("attention/attention_fwd.cu", "attention/attention_bwd.cu"),
        headers=(
            "attention/sequence.h",
            *(f"attention/{name}.cuh" for name in ("tile", "product", "scores", "dropout", "softmax")),
        ),
        checks=attention_checks,
    ),
}


def all_mutants(op: str) -> list[Mutant]:
    suite = SUITES[op]
    return [mutant for file in suite.kernels + suite.headers for mutant in mutants_of((CSRC / file).read_text(), file)]


# Building ---------------------------------------------------------------------------------------------------------

# What kernels include of the system, read once for all mutants.
PRECOMPILED = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>
"""
# Of the plain build: a local array overrun, a shift too far or an access that is not aligned ends the process.
TRAPS = "-O0 -g0 -fsanitize=bounds-strict,shift,alignment -fsanitize-undefined-trap-on-error"
SWITCH = 'extern "C" { int fastlm_mutant_number = 0; int fastlm_mutant() { return fastlm_mutant_number; } }'
LAUNCHER = re.compile(r"^const char\* (\w+)\(const (\w+Params)& \w+, int \w+, void\* \w+\)", re.M)


def without_kernels(source: str, header: str) -> str:
    """Launchers of a file that only say that they are left out."""
    names = [f'const char* {name}(const {params}&, int, void*) {{ return "left out"; }}'
             for name, params in LAUNCHER.findall(source)]  # fmt: skip
    return "\n".join((f'#include "{header}"', "namespace fastlm {", *names, "}", ""))


class Build:
    """The objects of the emulator with the kernels as they are, in a folder of this process, and the commands that
    made them. One for all judges."""

    def __init__(self, kind: str) -> None:
        self.module = emulator.build_module(build=kind)
        command = [sys.executable, "-m", "ninja", "-C", str(self.module.parent), "-t", "compdb"]
        rules = json.loads(subprocess.run(command, text=True, capture_output=True, check=True).stdout)
        commands = {rule["output"]: re.sub(r"-MMD -MF \S+ ", "", rule["command"]) for rule in rules}
        self.temporary = tempfile.TemporaryDirectory(prefix="mutants-")
        self.folder = Path(self.temporary.name)
        ninjas = shutil.ignore_patterns("*.so", "*ninja*", "lock")  # others may be asking it whether all is up to date
        shutil.copytree(self.module.parent, self.folder, ignore=ninjas, dirs_exist_ok=True)
        self.switch = self.folder / "switch.o"
        switch = ["g++", "-O2", "-fPIC", "-c", "-xc++", "-", "-o", str(self.switch)]
        subprocess.run(switch, input=SWITCH, text=True, check=True)
        self.compiler = commands[f"{SUITES['layer_norm'].kernels[0]}.o"].partition(" -c ")[0] + " -w"
        self.linker = re.sub(r" \S+\.cu\.o(?= )", "", commands[self.module.name])
        if kind == "plain":
            header = self.folder / "precompiled.h"
            header.write_text(PRECOMPILED)
            self.compiler += f" {TRAPS}"
            command = self.compiler.replace(" -x c++ ", " -x c++-header ")
            subprocess.run(f"{command} -c {header} -o {header}.gch", shell=True, check=True)
            self.compiler += f" -include {header}"

    def compile(self, source: Path, tree: Path, out: Path) -> bool:
        """Whether a file compiles with the headers of a tree."""
        command = self.compiler.replace(str(CSRC), str(tree)) + f" -c {source} -o {out}"
        return subprocess.run(command, shell=True, capture_output=True, cwd=self.folder).returncode == 0

    def link(self, objects: Iterable[Path], out: Path) -> None:
        """The module with these objects for all kernels. None may have functions of a header as they are beside those
        of a mutant: of two with one name the linker takes the first."""
        command = self.linker.replace(self.module.name, str(out)).replace(" -ldl ", f" {self.switch} -ldl ")
        command = command.replace(" -shared ", f" -shared {' '.join(map(str, objects))} ")
        subprocess.run(command, shell=True, check=True, cwd=self.folder)


# Judging ----------------------------------------------------------------------------------------------------------

PATIENCE = {"plain": 8.0, "trace": 40.0}  # seconds for a check


class Verdict(NamedTuple):
    mutant: Mutant
    status: str
    by: str  # the check that failed, and what it said
    seconds: float


KNOWN = 60  # checks, those that kill most, for a mutant that is known to change nothing, unless all are asked for
STATUS = ("killed", "timed out", "does not compile", "survived")


def run_checks(
    module: Path, build: str, number: int, checks: Sequence[Check], patience: float | None = None
) -> tuple[str, str]:
    """Status and what failed of the mutant of a number; in a process of its own, which may crash or never end."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libc says of a corrupted heap
            if number:
                ctypes.c_int.in_dll(ctypes.CDLL(str(module)), "fastlm_mutant_number").value = number
            for check in checks:
                os.write(send, f"{check.name}\n".encode())
                with emulator.settings(build=build, module=module, **check.settings):
                    check.run()
            os.write(send, b"survived\n")
        except BaseException as error:
            os.write(send, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].encode() + b"\nfailed\n")
        finally:
            os._exit(0)
    os.close(send)
    told = ended = b""
    while select.select([receive], [], [], patience or PATIENCE[build])[0]:
        part = os.read(receive, 1 << 16)
        told += part
        if not part:
            ended = b"ended"
            break
    os.close(receive)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = told.decode(errors="replace").splitlines()
    if lines[-1:] == ["survived"]:
        return "survived", ""
    if lines[-1:] == ["failed"]:
        return "killed", ": ".join(lines[-3:-1])
    return ("killed", f"{lines[-1]}: crashed") if ended else ("timed out", lines[-1])


build_of = functools.cache(Build)


class Judge:
    """Compiles and runs mutants of one op, in a folder of its own within `folder`."""

    def __init__(self, op: str, checks: list[Check], known: set[str], folder: str) -> None:
        self.suite, self.checks, self.known = SUITES[op], checks, known
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.tree = self.folder / "csrc"
        shutil.copytree(CSRC, self.tree)
        self.kills: Counter[tuple[str, str]] = Counter()

    @functools.cache  # noqa: B019, one judge lives as long as its process
    def prepare(self, kind: str) -> tuple[Build, dict[str, Path]]:
        """The build, and the objects of all kernels as they are; those of other ops are empty. The checks hold."""
        build, objects, others = build_of(kind), {}, []
        for path in emulator.kernels():
            if (kernel := str(path.relative_to(CSRC))) not in self.suite.kernels:
                others.append(without_kernels(path.read_text(), f"{path.parent.name}/{path.parent.name}.h"))
            elif kind == "plain":  # with traps
                objects[kernel] = self.folder / f"{path.name}-unchanged.o"
                assert build.compile(path, CSRC, objects[kernel]), kernel
            else:
                objects[kernel] = build.folder / f"{kernel}.o"
        source, objects["others"] = self.folder / "others.cu", self.folder / f"{kind}-others.o"
        source.write_text("".join(others))
        assert build.compile(source, CSRC, objects["others"])
        module = self.folder / f"unchanged-{build.module.name}"
        build.link(objects.values(), module)
        status, by = run_checks(module, kind, 0, self.checks_for("", kind), 60.0)
        assert status == "survived", f"the checks fail for the kernels as they are: {status}, {by}"
        return build, objects

    def checks_for(self, file: str, kind: str) -> list[Check]:
        """First those that have killed most mutants of this file."""
        checks = [check for check in self.checks if kind in check.builds]
        return sorted(checks, key=lambda check: -self.kills[file, check.name])

    def judge(self, group: list[Mutant]) -> list[Verdict]:
        file = self.tree / group[0].file
        original = file.read_text()
        file.write_text(together(original, group))
        verdicts = self._judge(group)
        file.write_text(original)
        if verdicts is None:  # one of them at least does not compile
            half = len(group) // 2
            return self.judge(group[:half]) + self.judge(group[half:])
        return verdicts

    def _judge(self, group: list[Mutant]) -> list[Verdict] | None:
        verdicts = [Verdict(mutant, "survived", "", 0.0) for mutant in group]
        for kind in ("plain", "trace"):
            known = [kind == "trace" and mutant.key in self.known for mutant in group]
            if all(skip or verdict.status != "survived" for skip, verdict in zip(known, verdicts, strict=True)):
                break
            began = time.monotonic()
            module = self.compiled(group[0].file, kind)
            shared = (time.monotonic() - began) / len(group)
            if module is None:
                return [verdicts[0]._replace(status="does not compile", seconds=shared)] if len(group) == 1 else None
            for n, (mutant, status, _, seconds) in enumerate(verdicts):
                if status == "survived" and not known[n]:
                    began, checks = time.monotonic(), self.checks_for(mutant.file, kind)
                    checks = checks[: KNOWN if mutant.key in self.known else None]
                    status, by = run_checks(module, kind, n + 1 if len(group) > 1 else 0, checks)
                    self.kills[mutant.file, by.split(": ")[0]] += 1
                    verdicts[n] = Verdict(mutant, status, by, round(seconds + shared + time.monotonic() - began, 2))
        return verdicts

    def compiled(self, file: str, kind: str) -> Path | None:
        """The module with the suite's kernels, of which those that `file` is part of are compiled again."""
        (build, objects), kernels = self.prepare(kind), self.suite.kernels
        objects = dict(objects)
        for kernel in [file] if file in kernels else kernels:
            objects[kernel] = self.folder / f"{kind}-{Path(kernel).name}.o"
            if not build.compile(self.tree / kernel, self.tree, objects[kernel]):
                return None
        module = self.folder / build.module.name
        build.link(objects.values(), module)
        return module


_judge: Judge


def _start(op: str, checks: list[Check], known: set[str], folder: str) -> None:
    global _judge
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what is left unwritten shows
    _judge = Judge(op, checks, known, folder)


def _work(group: list[Mutant]) -> list[Verdict]:
    return _judge.judge(group)


def judge_all(op: str, mutants: list[Mutant], jobs: int, known: set[str]) -> list[Verdict]:
    torch.set_num_threads(1)  # those of OpenMP would be missing after a fork
    checks, verdicts, shown = SUITES[op].checks(), [], 0.0
    for kind in PATIENCE:
        build_of(kind)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _start, (op, checks, known, folder)) as pool,
    ):
        groups = sorted(groups_of(mutants, 48), key=len, reverse=True)
        for future in as_completed([pool.submit(_work, group) for group in groups]):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            verdicts += future.result()
            if sys.stderr.isatty() or time.monotonic() > shown + 30 or len(verdicts) == len(mutants):
                shown, count = time.monotonic(), Counter(verdict.status for verdict in verdicts)
                line = f"{op}: {len(verdicts)} of {len(mutants)}, " + ", ".join(f"{count[s]} {s}" for s in STATUS)
                print(line, end="\r" if sys.stderr.isatty() and len(verdicts) < len(mutants) else "\n", file=sys.stderr)
    order = {mutant: n for n, mutant in enumerate(mutants)}
    return sorted(verdicts, key=lambda verdict: order[verdict.mutant])


def judge_in_turn(ops: Sequence[str], mutants: list[Mutant], jobs: int, known: set[str]) -> list[Verdict]:
    """Of a header that several ops include, what survives the checks of one goes on to the next."""
    verdicts: dict[Mutant, Verdict] = {}
    for op in ops:
        files = SUITES[op].kernels + SUITES[op].headers
        left = [m for m in mutants if m.file in files and (m not in verdicts or verdicts[m].status == "survived")]
        verdicts |= {verdict.mutant: verdict for verdict in (judge_all(op, left, jobs, known) if left else ())}
    return [verdicts[mutant] for mutant in mutants]


# The table --------------------------------------------------------------------------------------------------------


def listed() -> dict[str, str]:
    """Mutants that change nothing, by their key, and why."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    reasons: dict[str, str] = {}
    for entry in tomllib.loads(TABLE.read_text())["equivalent"]:
        for key in entry["mutants"]:
            assert key not in reasons, f"{TABLE.name}: listed twice: {key}"
            reasons[key] = entry["reason"]
    return reasons


def complaints(verdicts: Sequence[Verdict], known: dict[str, str], exist: set[str]) -> list[str]:
    found = [f"no such mutant is left: {key}" for key in known if key not in exist]
    for verdict in verdicts:
        if verdict.status == "survived" and verdict.mutant.key not in known:
            found.append(f"survives: {verdict.mutant}")
        # What changes nothing but the speed may run out of time.
        if verdict.status not in ("survived", "timed out") and verdict.mutant.key in known:
            found.append(f"{verdict.status}, by {verdict.by}: {verdict.mutant}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression for mutants, as they are printed")
    parser.add_argument("--op", choices=SUITES, help="default: all")
    parser.add_argument("--file", default="", help="part of a file's name")
    parser.add_argument("--sample", type=int, help="so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--all-checks", action="store_true", help="also for mutants that are known to change nothing")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument("--json", type=Path, help="file to write every verdict to")
    args = parser.parse_args(arguments)
    ops = sorted(SUITES, key=lambda op: op != args.op)  # the one that is asked for first
    every = dict.fromkeys(mutant for op in ops[: 1 if args.op else None] for mutant in all_mutants(op))
    chosen = [m for m in every if args.file in m.file and re.search(args.pattern, str(m))]
    if args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        print(*chosen, sep="\n")
        chosen = []
    verdicts = judge_in_turn(ops, chosen, args.jobs, set() if args.all_checks else set(listed()))
    if args.json:
        rows = [verdict._asdict() | {"mutant": str(verdict.mutant), "key": verdict.mutant.key} for verdict in verdicts]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if verdicts:
        print(f"{'file':34}{'mutants':>9}" + "".join(f"{status:>18}" for status in STATUS) + f"{'seconds':>9}")
    for file in dict.fromkeys(verdict.mutant.file for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.mutant.file == file]
        count = Counter(verdict.status for verdict in own)
        numbers = "".join(f"{count[status]:>18}" for status in STATUS)
        print(f"{file:34}{len(own):>9}{numbers}{sum(verdict.seconds for verdict in own):>9.0f}")
    wrong = complaints(verdicts, listed(), {mutant.key for op in SUITES for mutant in all_mutants(op)})
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
