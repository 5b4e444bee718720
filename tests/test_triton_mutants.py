"""The mutants of Triton's kernels themselves, and a fixed sample of them: each is killed, or listed with a reason."""

import os
import random
from collections import Counter

import pytest

pytest.importorskip("triton")

from proof import triton_mutants
from proof.triton_mutants import all_checks, all_mutants, mutants_of

SOURCE = '''
@triton.jit
def kernel(x, y, n, SIZE: tl.constexpr = 4):
    """a + b < 1"""
    i = tl.arange(0, SIZE)
    if n == 3 and not SIZE:
        return
    m = tl.load(x + i, mask=(i < n) & y, other=0.0)
    m += tl.where(y, -m, float("-inf"))
    tl.store(x, tl.minimum(m, 1.0) if n is None else m)


def launch(x):
    kernel[1](x + 1)
'''
CHANGES = {
    "statement": "i = tl.arange(0, SIZE) -> pass | return -> pass | m += tl.where(y, -m, float(\"-inf\")) -> pass"
    " | m = tl.load(x + i, mask=(i < n) & y, other=0.0) -> pass"
    " | tl.store(x, tl.minimum(m, 1.0) if n is None else m) -> pass",
    "assignment": "+ -> - | m += tl.where(y, -m, float(\"-inf\")) -> m = tl.where(y, -m, float(\"-inf\"))",
    "condition": "n == 3 and not SIZE -> True | n == 3 and not SIZE -> False | n is None -> True | n is None -> False",
    "comparison": "== -> != | < -> <=",
    "logic": "and -> or | n == 3 and not SIZE -> ((not SIZE)) | n == 3 and not SIZE -> ((n == 3)) | not SIZE -> SIZE",
    "arithmetic": "+ -> - | & -> |",
    "dropped": "x + i -> x | x + i -> i | (i < n) & y -> (i < n) | (i < n) & y -> y | -m -> m",
    "constant": "0 -> 1 | 0 -> -1 | 3 -> 4 | 3 -> 2 | 0.0 -> 1.0 | 1.0 -> 0.0 | float(\"-inf\") -> float(\"inf\")"
    " | float(\"-inf\") -> 0.0",
    "call": "tl.where(y, -m, float(\"-inf\")) -> tl.where(y, float(\"-inf\"), (-m)) | tl.minimum -> tl.maximum"
    " | tl.where(y, -m, float(\"-inf\")) -> (-m) | tl.where(y, -m, float(\"-inf\")) -> float(\"-inf\")"
    " | tl.minimum(m, 1.0) -> m | tl.minimum(m, 1.0) -> 1.0",
    "access": ", mask=(i < n) & y, other=0.0 -> | , other=0.0 ->",
}  # fmt: skip


def test_every_operator_finds_what_it_changes_and_nothing_else():
    found = {name: [] for name in triton_mutants.OPERATORS}
    for mutant in mutants_of(SOURCE, "sample.py"):
        found[mutant.operator].append(" ".join(f"{mutant.before} -> {mutant.after}".split()))
        assert compile(mutant.apply(SOURCE), "sample.py", "exec")
    for name, changes in found.items():
        assert Counter(changes) == Counter(CHANGES[name].replace(" ->|", " -> |").split(" | ")), name


def test_only_functions_under_jit_are_changed_and_of_these_only_those_asked_for():
    assert {mutant.line for mutant in mutants_of(SOURCE, "sample.py")} <= set(range(5, 11))
    assert mutants_of(SOURCE, "sample.py", ["launch"]) == []


def test_mutants_differ_from_each_other_and_compile_and_have_names_of_their_own():
    every = all_mutants()
    assert len({mutant.key for mutant in every}) == len(every)
    changed = {(mutant.file, mutant.apply(triton_mutants.texts()[mutant.file])) for mutant in every}
    assert len(changed) == len(every)
    assert {mutant.operator for mutant in every} == set(triton_mutants.OPERATORS)
    for file, text in random.Random(0).sample(sorted(changed), 100):
        compile(text, file, "exec")


def test_mutants_listed_as_equivalent_exist():
    assert set(triton_mutants.listed()) <= {mutant.key for mutant in all_mutants()}


# One of a kind: a rescaling, an edge, a side of a window, an access, a gradient, what dropout keeps.
KILLED = (
    "total = total * shrink + tl.sum(p, 1) [dropped: total * shrink -> total]",
    "seen = j < keys [comparison: < -> <=]",
    "seen &= j >= i + offset - left [comparison: >= -> >]",
    "tl.store(lse + row, base + tl.log(total), mask=exists) [access: , mask=exists ->",
    "ds *= 1.0 - ratio * ratio [assignment: ds *= 1.0 - ratio * ratio -> ds = 1.0 - ratio * ratio]",
    "group = ((start // 4) + tl.arange(0, SIZE // 4)[None, :]).to(tl.uint32) [dropped: start // 4 -> start]",
)


@pytest.mark.proof
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="mutants run under Triton's interpreter")
def test_a_sample_of_mutants_is_killed():
    every = all_mutants()
    sample = [next(mutant for mutant in every if text in mutant.key) for text in KILLED]
    for verdict in triton_mutants.judge_all(sample, 1, checks=all_checks()[:10]):
        assert verdict.status == "killed", str(verdict.mutant)
