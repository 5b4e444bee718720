"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, all five variants: those with tiles (AMX) have
them in software (tiles.h), whatever the processor.

    environment()   of a process in which `fastlm` is a build of this kind; builds it first
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from proof import emulator

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cpu-address"
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "fastlm")
CHECKED = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -g1 -DFASTLM_TILES_IN_SOFTWARE"
COMPILER = f"""#!/bin/bash
# The compiler, for a processor without tiles.
arguments=()
for argument; do
  if [ "$argument" = -march=sapphirerapids ]; then
    arguments+=(-march=cooperlake -include {ROOT}/tests/proof/tiles.h)
  else
    arguments+=("$argument")
  fi
done
exec g++ "${{arguments[@]}}" {CHECKED} -O1
"""


def environment() -> dict[str, str]:
    source = FOLDER / "source"
    shutil.rmtree(FOLDER, ignore_errors=True)
    source.mkdir(parents=True)
    leftovers = shutil.ignore_patterns("__pycache__", "_C.*", "_build_info.json")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=leftovers)
        else:
            shutil.copy(path, source / name)
    compiler = FOLDER / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(FOLDER)]
    subprocess.run(command, cwd=source, env=os.environ | {"CXX": str(compiler), "FASTLM_BUILD": "cpu"}, check=True)
    return emulator.environment("build=address") | {"PYTHONPATH": str(FOLDER), "PYTHONSAFEPATH": "1"}
