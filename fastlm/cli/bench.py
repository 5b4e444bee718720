"""`fastlm bench`."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from fastlm.bench import models, suite
from fastlm.bench.cases import DTYPES, OPTIONS, SHORT, SIZES, dtypes_of, parse, standard
from fastlm.bench.report import EQUAL, Report, slow
from fastlm.cli.parser import Parser, tell
from fastlm.config import nearest
from fastlm.ops.registry import OPS

BEFORE_MODELS = 8  # cases that are more important


def bench(argv: list[str]) -> int:
    """measure FastLM here against PyTorch and the peers that are installed"""
    parser = Parser("bench", bench.__doc__)
    parser.add_argument(
        "cases", metavar="CASE", nargs="*", help="OP or OP:SIZES[,OPTION ...] [those of --list, models]"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="[those in which the device is measured]")
    parser.add_argument("--backends", metavar="NAME", nargs="+", help="of FastLM, besides its choice [its own kernels]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cuda where there is a GPU]")
    parser.add_argument("--seconds", metavar="X", type=float, help="of timing, for each case [2; models 5 times that]")
    parser.add_argument("--budget", metavar="MIN", type=float, help="no case begins later than that [none]")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="whether torch.compile takes part [yes]"
    )
    parser.add_argument("--models", action=argparse.BooleanOptionalAction, help="[if no CASE is given]")
    parser.add_argument("--check", action="store_true", help=f"exit code 1 if FastLM is below {EQUAL} of plain PyTorch")
    parser.add_argument("--out", metavar="DIR", type=Path, help="[fastlm-bench/<name of the device>]")
    parser.add_argument(
        "--from", metavar="FILE", dest="file", type=Path, help="write page and charts of earlier results"
    )
    parser.add_argument("--list", action="store_true", help="list the standard cases, and how others are written")
    options = parser.parse(argv)
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.get("list"):
        return _list(device)
    if "file" in options:
        report = Report.read(options["file"])
        _tell_paths(report.write_page(options.get("out") or options["file"].parent))
    else:
        report = _measure(_jobs(options, device), options, device)
    if not options.get("check"):
        return 0
    lines = slow(report.results)
    print("\n".join(lines) or f"nowhere below {EQUAL} of plain PyTorch", file=sys.stderr)
    return 1 if lines else 0


def _jobs(options: dict[str, Any], device: torch.device) -> list[suite.Job]:
    dtypes = [DTYPES[name] for name in options.get("dtypes", ())] or None
    compiled, seconds, backends = options.get("compile", True), options.get("seconds", 2.0), options.get("backends")
    known = {name for op in OPS.values() for name in op.backends}
    for name in backends or ():
        if name not in known:
            raise ValueError(f"--backends: unknown backend {name!r}{nearest(name, known)}")
    texts = options.get("cases", ())
    cases = [case for text in texts for case in parse(text, device, dtypes)] if texts else standard(device, dtypes)
    measure = functools.partial(suite.measure, device=device, backends=backends, compiled=compiled, seconds=seconds)
    jobs = [suite.Job(str(case), functools.partial(measure, case)) for case in cases]
    if options.get("models", not texts):
        whole = models.jobs(device, dtypes or dtypes_of(device), compiled, 5 * seconds)
        jobs = [*jobs[:BEFORE_MODELS], *whole, *jobs[BEFORE_MODELS:]] if not texts else [*jobs, *whole]
    return jobs


def _measure(jobs: list[suite.Job], options: dict[str, Any], device: torch.device) -> Report:
    """Results are written as they come: who interrupts a run keeps them."""
    dtypes = [DTYPES[name] for name in options.get("dtypes", ())] or dtypes_of(device)
    report = Report(suite.environment(device, dtypes))
    folder = options.get("out") or Path("fastlm-bench") / report.stem
    budget = 60 * options["budget"] if "budget" in options else None
    tell(f"{len(jobs)} cases on {report.device}; results go to {folder}")
    try:
        for found in suite.run_jobs(jobs, budget):
            if isinstance(found, str):
                report.skipped.append(found)
            else:
                report.results.append(found)
            report.write_json(folder)
        again = suite.peaks(device, dtypes)  # the best of before and after: other programs come and go
        best = report.environment["peaks"]
        report.environment["peaks"] = {name: max(rate, again[name]) for name, rate in best.items()}
    finally:
        report.skipped += [job.name for job in jobs[len(report.results) + len(report.skipped) :]]
        path = report.write_json(folder)
        _tell_paths([path, *report.write_page(folder)])
    return report


def _tell_paths(paths: list[Path]) -> None:
    tell("wrote " + ", ".join(map(str, paths)))


def _list(device: torch.device) -> int:
    short = {op: name for name, op in SHORT.items()}
    tell("sizes\n" + "\n".join(f"  {short.get(op, op)}:{' or '.join(forms)}" for op, forms in SIZES.items()))
    tell("options")
    for name, (value, ops) in OPTIONS.items():
        written = name if value == 1 else f"{name}={value:g}"
        tell(f"  {written:12}{'all' if len(ops) == len(SIZES) else ', '.join(short.get(op, op) for op in ops)}")
    tell("standard cases, the most important first\n" + "\n".join(f"  {case}" for case in standard(device)))
    return 0
