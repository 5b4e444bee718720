"""The mutants themselves, and a fixed sample of them: each is killed by a check, or listed with the reason why not."""

import ctypes
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from proof import emulator, mutants
from proof.mutants import Verdict, mutants_of

SOURCE = """
// a comment with a + b; and if (c)
#include "common/device.cuh"
template <typename T, int kWidth = 4>
__global__ void __launch_bounds__(kMax * 2) kernel(const T* x, int n) {
  static_assert(kWidth < 8, "a + b");
  float sums[2] = {};
  for (int i = 0; i < n; i += 4) {
    if (i == 3 && n > 2) continue;
    sums[1] += load<T, 2>(x + i * n) - 1.0f;
  }
  __syncthreads();
  x[0] = n >= 0x10u ? -sums[0] : call(n)->member;
  call(x,  // two lines
       n / 2 << 1);
}
"""
CHANGES = {
    "initial": "= {} ->",
    "condition": "i < n -> false | i == 3 && n > 2 -> true | i == 3 && n > 2 -> false"
    " | n >= 0x10u -> true | n >= 0x10u -> false",
    "comparison": "< -> <= | == -> != | > -> >= | >= -> >",
    "logic": "&& -> || | && n > 2 -> | i == 3 && ->",
    "arithmetic": "+ -> - | * -> / | - -> + | / -> * | << -> >>",
    "dropped": "+ i * n -> | * n -> | i * -> | - 1.0f -> | / 2 -> | << 1 ->",
    "assignment": "+= -> = | += -> =",
    "literal": "0 -> 1 | 4 -> 5 | 4 -> 3 | 3 -> 4 | 3 -> 2 | 2 -> 3 | 2 -> 1 | 1 -> 2 | 1 -> 0 | 1.0f -> 0.0f | 0 -> 1"
    " | 0x10u -> 0x11u | 0 -> 1 | 2 -> 3 | 2 -> 1 | 1 -> 2 | 1 -> 0",
    "barrier": "__syncthreads() ->",
    "statement": "sums[1] += load<T, 2>(x + i * n) - 1.0f -> | x[0] = n >= 0x10u ? -sums[0] : call(n)->member ->"
    " | call(x, // two lines n / 2 << 1) ->",
}


def test_every_operator_finds_what_it_changes_and_nothing_else():
    found = {name: [] for name in mutants.OPERATORS}
    for mutant in mutants_of(SOURCE, "sample.cu"):
        found[mutant.operator].append(" ".join(f"{mutant.before} -> {mutant.after}".split()))
    for name, changes in found.items():
        assert Counter(changes) == Counter(CHANGES[name].split(" | ") if name in CHANGES else []), name


def test_return_is_removed_where_something_follows():
    found = mutants_of("void f() {\n  if (a) {\n    b = 1;\n    return;\n  }\n  return;\n  c();\n}\n", "f.cu")
    assert [(mutant.line, mutant.operator) for mutant in found if mutant.operator == "leave"] == [(6, "leave")]


@pytest.mark.parametrize("op", mutants.SUITES)
def test_mutants_differ_from_each_other_and_from_the_source_and_have_names_of_their_own(op):
    every = mutants.all_mutants(op)
    assert len({mutant.key for mutant in every}) == len(every)
    texts = set()
    for mutant in every:
        source = (mutants.CSRC / mutant.file).read_text()
        lines = source.split("\n")
        texts.add((mutant.file, mutant.apply(source)))
        assert lines[mutant.line - 1].strip().startswith(mutant.text)
        place = sum(len(line) + 1 for line in lines[: mutant.line - 1]) + mutant.column - 1
        assert place == mutant.start
        assert mutant.apply(source) != source
    assert len(texts) == len(every)


def test_every_kernel_and_header_of_a_suite_has_mutants_of_most_operators():
    for op, suite in mutants.SUITES.items():
        operators = {(mutant.file, mutant.operator) for mutant in mutants.all_mutants(op)}
        for file in suite.kernels:
            assert {"condition", "comparison", "statement", "dropped", "literal"} <= {
                o for f, o in operators if f == file
            }
        assert {file for file, _ in operators} == set(suite.kernels + suite.headers)


def test_brackets_that_do_not_match_are_an_error():
    with pytest.raises(AssertionError, match="brackets do not match"):
        mutants_of("void f() { g(; }", "f.cu")


def test_a_name_does_not_depend_on_what_lies_before_and_tells_equal_lines_apart():
    line = "  a = b + c;\n"
    alone = [mutant.key for mutant in mutants_of("void f() {\n" + line + "}\n", "f.cu")]
    later = [mutant.key for mutant in mutants_of("\n// more\nvoid f() {\n" + line + "}\n", "f.cu")]
    twice = [mutant.key for mutant in mutants_of("void f() {\n" + 2 * line + "}\n", "f.cu")]
    assert alone == later == twice[: len(alone)]
    assert twice[len(alone) :] == [f"{key} #2" for key in alone]


FUNCTION = """\
extern "C" int f(int a, int b) {
  int sums[4] = {a, 0, 0, 0};
  const bool odd = a % 2 == 1 && b > 2 || a < b;
  for (int i = 0; i < 3; ++i) {
    if (i == b) continue;
    sums[1] += a * b - (i << 1);
    sums[0] ^= odd ? i & 3 : b;
  }
  if (!odd) return sums[0];
  sums[0] = sums[0] / 2 + b;
  return sums[0] - sums[1];
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_mutants_compiled_together_do_what_each_does_alone(tmp_path):
    every = mutants_of(FUNCTION, "f.cpp")
    groups = mutants.groups_of(every, 48)
    assert sorted(mutant for group in groups for mutant in group) == sorted(every)
    assert 2 * len(groups) < len(every)

    def renamed(text, name):
        return text.replace(" f(int", f" {name}(int")

    texts = [mutants.SWITCH, FUNCTION, *(renamed(mutants.together(FUNCTION, g), f"g{n}") for n, g in enumerate(groups))]
    texts += [renamed(mutant.apply(FUNCTION), f"m{n}") for n, mutant in enumerate(every)]
    (tmp_path / "all.cpp").write_text("\n".join(texts))
    subprocess.run(["g++", "-w", "-shared", "-fPIC", "all.cpp", "-o", "all.so"], cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "all.so"))

    def answers(name, number=0):
        ctypes.c_int.in_dll(library, "fastlm_mutant_number").value = number
        return [library[name](a, b) for a in (1, 2, 7) for b in (1, 2, 3, 5)]

    correct, differ = answers("f"), 0
    for g, group in enumerate(groups):
        assert answers(f"g{g}") == correct or len(group) == 1
        for number, mutant in enumerate(group, 1):
            alone = answers(f"m{every.index(mutant)}")
            assert answers(f"g{g}", number) == alone, mutant
            differ += alone != correct
    assert differ > 0.8 * len(every)


def test_survivors_that_are_not_listed_and_listed_mutants_that_are_killed_or_gone_are_told():
    one, two, three = mutants_of("void f() {\n  a = b + c;\n}\n", "f.cu")
    verdicts = [Verdict(one, "survived", "", 1.0), Verdict(two, "killed", "check: off", 1.0)]
    verdicts += [Verdict(three, "survived", "", 1.0)]
    exist = {mutant.key for mutant in (one, two, three)}
    told = mutants.complaints(verdicts, {two.key: "why", three.key: "why", "gone": "why"}, exist)
    assert told == ["no such mutant is left: gone", f"survives: {one}", f"killed, by check: off: {two}"]


def test_launchers_are_left_out_by_their_names():
    kernel = mutants.SUITES["layer_norm"].kernels[0]
    text = mutants.without_kernels((mutants.CSRC / kernel).read_text(), "layer_norm/layer_norm.h")
    assert 'const char* layer_norm_fwd(const LayerNormFwdParams&, int, void*) { return "left out"; }' in text


def test_what_is_listed_exists_and_has_a_reason():
    exist = {mutant.key for op in mutants.SUITES for mutant in mutants.all_mutants(op)}
    known = mutants.listed()
    assert set(known) <= exist
    assert all(len(reason) > 20 for reason in known.values())


def test_a_headers_mutants_go_from_op_to_op_until_one_kills_them(monkeypatch):
    judged = []

    def judge_all(op, chosen, jobs, known):
        judged.append((op, chosen))
        killed = {"layer_norm": {header[0], kernel}, "cross_entropy": {header[1]}}[op]
        return [Verdict(m, "killed" if m in killed else "survived", op, 1.0) for m in chosen]

    kernel = mutants.all_mutants("layer_norm")[0]
    header = [m for m in mutants.all_mutants("cross_entropy") if m.file == "common/reduce.cuh"][:3]
    monkeypatch.setattr(mutants, "judge_all", judge_all)
    verdicts = mutants.judge_in_turn(["layer_norm", "cross_entropy"], [kernel, *header], 1, set())
    assert judged == [("layer_norm", [kernel, *header]), ("cross_entropy", header[1:])]
    assert [verdict.status for verdict in verdicts] == ["killed", "killed", "killed", "survived"]


@pytest.mark.slow
@pytest.mark.parametrize("op", mutants.SUITES)
@pytest.mark.skipif(bool(emulator.missing()), reason=f"no emulator: {emulator.missing()}")
def test_a_sample_of_mutants_is_killed(op):
    options = ["--op", op, "--file", f"{op}_fwd", "--sample", "8", "--seed", "3", "--jobs", "1"]
    command = [sys.executable, mutants.__file__, *options]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{op}: 8 of 8, \d+ killed, \d+ timed out, 0 does not compile, \d+ survived", done.stderr)
