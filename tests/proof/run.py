"""Runs the tests of CUDA kernels in every build of the emulator, under several schedules; Triton's as PTX; the CPU
kernels' under sanitizers.

    python tests/proof/run.py [--only PATTERN] [arguments of pytest]

Each line of RUNS is a process of its own: what FASTLM_EMULATOR is, and which tests run with it.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPS = ["tests/test_ops.py", "tests/test_layer_norm.py"]
CUDA, CPU = (
    [f"tests/test_{op}_{name}.py" for op in ("layer_norm", "cross_entropy", "attention")] for name in ("cuda", "cpu")
)
CPU.append("tests/test_linear_cpu.py")
# fp16's kernels are bf16's with another conversion; widths are for the first two runs. Of attention over many tiles the
# second has what one block goes on with where another, or an earlier tile, has left off.
ALL = "emulator or cuda"
TILES = "emulator or cuda and (not attention or sums or decoding)"
FEW = "emulator and not -float16-"
RUNS = {
    "build=plain,schedule=random,seed=1,landing=eager,blocks=random": ([*OPS, *CUDA], ALL),
    "build=trace": ([*OPS, *CUDA], TILES),
    "build=trace,schedule=random,seed=2,landing=eager,blocks=random": (OPS, FEW),
    "build=address": (OPS, FEW),
    "build=ptx": (OPS, FEW),
}
# Compiling takes longest: of the norms those that the others leave something out of, of the rest every feature once;
# of attention also many tiles, and keys that are split.
LOSSES, ATTENTION = "cross_entropy and (plain or everything or ignored)", "attention and (everything or longer or many)"
TRITON = f"triton_ptx and bfloat16 and (add or ({LOSSES}) or ({ATTENTION}))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression for runs")
    args, rest = parser.parse_known_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from proof import cpu, emulator

    runs = [(name, *what, functools.partial(emulator.environment, name)) for name, what in RUNS.items()]
    runs.append((TRITON, OPS[:1], TRITON, lambda: os.environ | {"TRITON_INTERPRET": "0"}))
    runs.append(("cpu, address", CPU, "cpu", cpu.environment))
    pytest = Path(sys.executable).with_name("pytest")  # with python -m the sources here would come before the build
    failed = []
    for settings, paths, tests, environment in runs:
        if not re.search(args.only, settings):
            continue
        start = time.perf_counter()
        command = [pytest, "-n", "2", "-q", "-k", tests, *paths, *rest]
        done = subprocess.run(command, cwd=ROOT, env=environment() | {"OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - start
        print(f"== {settings}: {'failed' if done.returncode else 'passed'} in {seconds:.0f} s", flush=True)
        failed += [settings] * (done.returncode != 0)
    if failed:
        sys.exit(f"failed: {' and '.join(failed)}")


if __name__ == "__main__":
    main()
