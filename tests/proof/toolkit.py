"""Where CUDA's compiler, its headers and the readers of machine code are. No driver and no GPU is asked for.

    python tests/proof/toolkit.py

prints what is found, or fails and says what is not. The order is that of setup.py (CUDA_HOME, CUDA_PATH, PATH,
/usr/local/cuda), then the packages of toolkit.txt, then what Triton brings.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_suffix(".txt")
HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "crt/host_config.h", "nv/target")  # one of each package


def packages(name: str) -> list[Path]:
    """Folders of an installed package; nothing is imported."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


TRITON_TOOLS = next((folder / "backends" / "nvidia" / "bin" for folder in packages("triton")), None)


def find_tool(name: str) -> str | None:
    homes = [f"{os.environ[home]}/bin" for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    machine = [*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    installed = [*(folder / "cu13" / "bin" for folder in packages("nvidia")), TRITON_TOOLS or ""]
    return shutil.which(name, path=os.pathsep.join(map(str, [*machine, *installed])))


def need_tool(name: str) -> str:
    if found := find_tool(name):
        return found
    raise FileNotFoundError(
        f"{name} not found on CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, nor among installed packages; "
        f"those of {PINS} have nvcc and the headers, and those of Triton cuobjdump and nvdisasm"
    )


@functools.cache
def folders_of(nvcc: str) -> list[str]:
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], text=True, capture_output=True)
    lines = " ".join(re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)", done.stderr, re.M))
    return [os.path.normpath(word.removeprefix("-I")) for word in shlex.split(lines) if word != "-isystem"]


def includes() -> list[str]:
    """Folders of CUDA's headers: those where nvcc itself looks."""
    nvcc = need_tool("nvcc")
    found = folders_of(nvcc)
    for header in HEADERS:
        if not any(Path(folder, header).exists() for folder in [*found, "/usr/include"]):
            raise FileNotFoundError(f"{header} is not where {nvcc} looks: {', '.join(found)}")
    return found


if __name__ == "__main__":
    try:
        print(need_tool("nvcc"), *includes(), sep="\n")
    except FileNotFoundError as error:
        sys.exit(f"toolkit: {error}")
