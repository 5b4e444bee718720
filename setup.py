"""Builds the native extension `fastlm._C`; everything declarative is in pyproject.toml.

Builds what the machine can: CUDA and C++ kernels, C++ alone, or pure Python; FASTLM_BUILD=cuda|cpu|none forces one of
these. TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS and DEBUG mean what they mean to PyTorch's extensions. Looks for
no GPU, imports no torch. fastlm/_build_info.json tells what was built, and why the rest was not.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Distribution, setup
from setuptools.command import build_py, sdist

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
MODE = os.environ.get("FASTLM_BUILD", "")
OPTIMISE = ["-O3", "-DNDEBUG"] if os.environ.get("DEBUG", "0") in ("", "0") else ["-O0", "-g"]
CXX_FLAGS = shlex.split("-std=c++17 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -Wall -Wextra") + OPTIMISE
PYTHON = shlex.join(["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")])
NVCC_FLAGS = ["-std=c++17", *OPTIMISE, "-Xcompiler=-fPIC,-fvisibility=hidden,-fopenmp,-Wall"]
X86 = {"avx2": "haswell", "avx512": "skylake-avx512", "avx512_bf16": "cooperlake", "amx": "sapphirerapids"}
CPU_TARGETS = {"baseline": ""} | {n: f"-march={m}" for n, m in X86.items() if "x86_64" in sysconfig.get_platform()}
ARCHITECTURES = ["7.5", "8.0", "9.0", "10.0", "12.0"]  # and PTX of the last one; 8.6 and 8.9 run the code for 8.0


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, text=True, capture_output=True, cwd=ROOT, **options)


def not_built(reason: str) -> dict:
    return {"built": False, "reason": reason}


def find_cxx() -> dict:
    """The C++ toolchain, or the reason there is none: the "cpu" part of the build information."""
    if MODE == "none":
        return not_built("FASTLM_BUILD=none")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    cxx = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    if cxx is None:
        return not_built(f"no C++ compiler on PATH ({', '.join(names)})")
    with tempfile.TemporaryDirectory() as folder:
        probe = [*shlex.split(f"{cxx} {PYTHON}"), *CXX_FLAGS, "-shared", "-xc++", "-", "-o", f"{folder}/probe.so"]
        code = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint n = omp_get_max_threads();\n"
        result = run(*probe, input=code)
    if result.returncode:
        error = next((line for line in result.stderr.splitlines() if "error" in line), "see its output")
        return not_built(f"{cxx} cannot build a C++17 library with OpenMP and Python's headers (python3-dev): {error}")
    version = run(*shlex.split(cxx), "--version").stdout.split("\n")[0]
    return {"built": True, "reason": "", "command": cxx, "compiler": version, "flags": CXX_FLAGS}


def find_nvcc(cpu: dict) -> dict:
    """The CUDA toolchain, or the reason there is none: the "cuda" part of the build information."""
    if not cpu["built"] or MODE == "cpu":
        return not_built(cpu["reason"] or "FASTLM_BUILD=cpu")
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        return not_built("nvcc not found on PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    version = re.search(r"release ([\d.]+), V([\d.]+)", run(nvcc, "--version").stdout)
    known = re.findall(r"sm_(\d+)", run(nvcc, "--list-gpu-code").stdout)
    if version is None or not known:
        return not_built(f"{nvcc} does not run, or is older than CUDA 11")
    asked = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    usual = [name for name in ARCHITECTURES if name.replace(".", "") in known]
    names, flags = asked or [*usual[:-1], f"{usual[-1]}+PTX"], list(NVCC_FLAGS)
    for name in names:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None or parts[1] + parts[2] not in known:
            sys.exit(f"fastlm: TORCH_CUDA_ARCH_LIST: nvcc {version[2]} knows no {name!r}; write it as in '8.0;9.0+PTX'")
        sm = parts[1] + parts[2] + parts[3]
        flags.append(f"-gencode=arch=compute_{sm},code=[sm_{sm}{f',compute_{sm}' if parts[4] else ''}]")
    skipped = [] if asked else [name for name in ARCHITECTURES if name not in usual]
    found = {"architectures": names, "architectures_skipped": skipped, "flags": flags}
    return found | {"built": True, "reason": "", "command": nvcc, "compiler": f"nvcc {version[2]}"}


def compile_extension(cpu: dict, cuda: dict) -> Path:
    """Write build.ninja and compile_commands.json, run ninja, return the module."""
    rules = {".cpp": "cxx", ".cu": "nvcc"} if cuda["built"] else {".cpp": "cxx"}
    folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{rules.get('.cu', 'cxx')}{OPTIMISE[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    info = f'extern const char fastlm_build_info[];\nconst char fastlm_build_info[] = R"({json.dumps(INFO)})";\n'
    (folder / "build_info.cpp").write_text(info)
    with open(folder / "build.ninja", "w") as file:
        ninja = Writer(file, width=10_000)
        unit = f"-I{shlex.quote(str(CSRC))} {'-DFASTLM_CUDA' * cuda['built']} $extra -MMD -MF $out.d -c $in -o $out"
        cxx = link = f"{cpu['command']} {shlex.join(cpu['flags'])}"
        ninja.rule("cxx", f"{cxx} {unit}", depfile="$out.d", deps="gcc")
        if cuda["built"]:
            nvcc = link = shlex.join([cuda["command"], "-ccbin", shlex.split(cpu["command"])[-1], *cuda["flags"]])
            ninja.rule("nvcc", f"{nvcc} {unit}", depfile="$out.d", deps="gcc")
            link += " -cudart=static"  # looks for a driver at its first call, so that the module imports without one
        ninja.rule("link", f"{link} -shared $in -o $out")
        objects = ninja.build("build_info.o", "cxx", "build_info.cpp")
        for source in sorted(path for path in CSRC.rglob("*") if path.suffix in rules):
            for name, flags in (CPU_TARGETS if source.name.endswith("_cpu.cpp") else {"": PYTHON}).items():
                out, extra = f"{source.relative_to(CSRC)}{name}.o", f"{flags} -DFASTLM_CPU_TARGET={name}"
                objects += ninja.build(out, rules[source.suffix], str(source), variables={"extra": extra})
        ninja.build(MODULE, "link", objects)
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder)]
    (ROOT / "build" / "compile_commands.json").write_text(run(*ninja, "-t", "compdb").stdout)
    if subprocess.run([*ninja, f"-j{os.environ.get('MAX_JOBS') or os.cpu_count()}"]).returncode:
        smaller = "FASTLM_BUILD=cpu builds without CUDA, " if cuda["built"] else ""
        sys.exit(f"fastlm: the build failed, see above; {smaller}FASTLM_BUILD=none installs pure Python")
    return folder / MODULE


class Build(build_py.build_py):
    """Copies the Python files, then puts the extension and the build information beside them."""

    def run(self):
        super().run()
        package = ROOT / "fastlm" if self.editable_mode else Path(self.build_lib, "fastlm")
        module = compile_extension(CPU, CUDA) if CPU["built"] else None
        (package / MODULE).unlink(missing_ok=True)  # never written over: a running process may have it mapped
        if module:
            shutil.copy2(module, package)
        (package / "_build_info.json").write_text(json.dumps(INFO, indent=2) + "\n")


class Archive(sdist.sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        Path(base_dir, "REVISION").write_text(INFO["revision"])  # git cannot tell there


if MODE not in ("", "cuda", "cpu", "none"):
    sys.exit(f"fastlm: FASTLM_BUILD must be cuda, cpu, none or unset (build what the machine can), got {MODE!r}")
CPU = find_cxx()
CUDA = find_nvcc(CPU)
if (MODE == "cpu" and not CPU["built"]) or (MODE == "cuda" and not CUDA["built"]):
    sys.exit(f"fastlm: FASTLM_BUILD={MODE} is not possible here: {CPU['reason'] or CUDA['reason']}")
GIT = run("git", "describe", "--always", "--dirty") if (ROOT / ".git").exists() and shutil.which("git") else None
OWN = (ROOT / "REVISION").read_text() if (ROOT / "REVISION").exists() else GIT.stdout.strip() if GIT else ""
INFO = {"revision": OWN, "cpu": CPU, "cuda": CUDA}
Distribution.has_ext_modules = lambda self: CPU["built"]  # decides the wheel's tag: this platform's or py3-none-any
setup(cmdclass={"build_py": Build, "sdist": Archive})
