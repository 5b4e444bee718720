"""The sdist and wheels of every kind: built as a user's pip builds them, installed elsewhere, asked what they are."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "fastlm")
BUILD_VARIABLES = (
    "FASTLM_BUILD",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "MAX_JOBS",
    "DEBUG",
    "PYTHONPATH",
)
HAS_CXX = any(map(shutil.which, ("c++", "g++", "clang++")))
HAS_NVCC = bool(shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"))

needs_git = pytest.mark.skipif(not (shutil.which("git") and (ROOT / ".git").exists()), reason="not a git clone")
needs_cxx = pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not (HAS_CXX and HAS_NVCC), reason="no nvcc")

# A kernel that the registry of csrc/common/kernel_attributes.h is tried with.
KERNEL = """
#include "common/kernel_attributes.h"

namespace {
__global__ void scale(float* x) { x[threadIdx.x] *= 2.0f; }
const bool registered = (fastlm::register_kernel("test_scale", reinterpret_cast<const void*>(&scale), 128, 1024), true);
}  // namespace
"""


def run(*command, cwd, **variables):
    """Runs a command with none of the build's variables but these; returns the process and all it printed."""
    env = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    env |= {"PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    return subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def source(tmp_path):
    """A copy of what a clone has."""
    folder = tmp_path / "fastlm source"  # a space, as paths may have
    folder.mkdir()
    leftovers = shutil.ignore_patterns("__pycache__", "_C.*", "_build_info.json")
    for name in SOURCES:
        copy = shutil.copy if (ROOT / name).is_file() else lambda a, b: shutil.copytree(a, b, ignore=leftovers)
        copy(ROOT / name, folder / name)
    return folder


def wheel(source, *options, **variables):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "../wheels", *options, "."]
    return run(*command, cwd=source, **variables)


def print_of_setup(expression):
    """Code that runs `setup.py --version` and prints one of its values."""
    return (
        f"import runpy, sys; sys.argv[1:] = ['--version']; globals().update(runpy.run_path('setup.py')); "
        f"print({expression})"
    )


class Installed:
    """The wheel that was built from `source`, installed on its own into a folder."""

    def __init__(self, source):
        [self.wheel] = source.parent.glob("wheels/*.whl")
        self.folder = source.parent / "installed"
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(self.folder), str(self.wheel)]
        done = run(*pip, cwd=source.parent)
        assert done.returncode == 0, done.stdout

    def python(self, *arguments):
        done = run(sys.executable, *arguments, cwd=self.folder.parent, PYTHONPATH=str(self.folder))
        assert done.returncode == 0, done.stdout
        return done.stdout

    def native(self):
        """Lines of `fastlm.info()`, and what the extension says of itself and of its kernels."""
        code = (
            "import json, fastlm, fastlm._C; "
            "print(json.dumps([str(fastlm.info()), fastlm._C.build_info(), fastlm._C.kernel_attributes()]))"
        )
        report, build, kernels = json.loads(self.python("-c", code))
        return lines(report), build, kernels


def lines(report):
    """The lines of a report, with columns one space apart."""
    return [" ".join(line.split()) for line in report.splitlines()]


@pytest.mark.proof
@pytest.mark.slow
@needs_nvcc
def test_cuda_wheel_holds_the_architectures_asked_for(source):
    (source / "csrc" / "test_scale.cu").write_text(KERNEL)
    done = wheel(source, FASTLM_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0+PTX", MAX_JOBS="2", DEBUG="1")
    assert done.returncode == 0, done.stdout
    report, build, kernels = Installed(source).native()
    assert any(line.startswith("cuda built with nvcc") for line in report)
    assert "cuda architectures 8.0+PTX" in report
    assert "-O0" in build["cpu"]["flags"]
    assert "-gencode=arch=compute_80,code=[sm_80,compute_80]" in build["cuda"]["flags"]
    commands = json.loads((source / "build" / "compile_commands.json").read_text())
    compiled = {command["file"] for command in commands}
    assert {str(source / "csrc" / name) for name in ("bindings.cpp", "test_scale.cu")} <= compiled

    [kernel] = [entry for entry in kernels if entry["name"] == "test_scale"]
    assert kernel["threads_per_block"] == 128
    assert kernel["dynamic_shared_bytes"] == 1024
    if kernel["status"]:  # no driver or no device: said, and no number invented
        assert "registers" not in kernel
    else:
        assert kernel["registers"] > 0
        assert kernel["blocks_per_multiprocessor"] > 0
        assert kernel["local_bytes"] == 0


@pytest.mark.slow
@needs_cxx
def test_cpu_wheel_is_built_without_cuda(source):
    done = wheel(source, FASTLM_BUILD="cpu", DEBUG="1")  # quick to compile
    assert done.returncode == 0, done.stdout
    installed = Installed(source)
    assert "none-any" not in installed.wheel.name
    report, build, kernels = installed.native()
    assert any(line.startswith("cpu built with") for line in report)
    assert "cuda not built: FASTLM_BUILD=cpu" in report
    assert build == json.loads((installed.folder / "fastlm" / "_build_info.json").read_text())
    assert kernels == []
    assert not (source / "fastlm" / "_build_info.json").exists()


@pytest.mark.slow
def test_pure_python_wheel_fits_every_platform(source):
    done = wheel(source, FASTLM_BUILD="none")
    assert done.returncode == 0, done.stdout
    installed = Installed(source)
    assert installed.wheel.name.endswith("-py3-none-any.whl")
    assert not list(installed.folder.glob("fastlm/_C*"))
    assert (installed.folder / "fastlm" / "py.typed").exists()
    report = lines(installed.python("-W", "error::RuntimeWarning", "-m", "fastlm.info"))
    assert "cpu not built: FASTLM_BUILD=none" in report
    assert "cuda not built: FASTLM_BUILD=none" in report
    assert any(line.startswith("layer_norm") for line in report)


def test_importing_loads_no_optional_package_and_wakes_no_gpu(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import fastlm
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(torch.cuda.is_initialized(), *added, sep="\\n")
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    initialised, *modules = done.stdout.splitlines()
    assert initialised == "False"
    assert not {"triton", "transformers", "tokenizers", "safetensors", "rich", "matplotlib", "fastapi"} & set(modules)


def test_without_a_compiler_the_wheel_is_pure_python_and_says_why(source):
    done = wheel(source, "--no-build-isolation", PATH=str(source))
    assert done.returncode == 0, done.stdout
    [built] = source.parent.glob("wheels/*-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        recorded = json.loads(archive.read("fastlm/_build_info.json"))
    nothing = {"built": False, "reason": "no C++ compiler on PATH (c++, g++, clang++)"}
    assert recorded["cpu"] == recorded["cuda"] == nothing


@pytest.mark.parametrize("mode", ["cuda", "cpu"])
def test_a_forced_build_fails_where_it_is_not_possible(source, mode):
    done = wheel(source, "--no-build-isolation", FASTLM_BUILD=mode, PATH=str(source))
    assert done.returncode != 0
    assert f"fastlm: FASTLM_BUILD={mode} is not possible here: no C++ compiler on PATH" in done.stdout
    assert "Traceback" not in done.stdout


def test_an_unknown_build_mode_is_an_error_that_names_the_known_ones(source):
    done = run(sys.executable, "setup.py", "--version", cwd=source, FASTLM_BUILD="gpu")
    assert done.returncode != 0
    [line] = done.stdout.splitlines()
    assert line.startswith("fastlm: FASTLM_BUILD must be cuda, cpu, none or unset")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["Hopper", "3.5"])
def test_an_unknown_architecture_is_an_error(source, architecture):
    done = run(sys.executable, "setup.py", "--version", cwd=source, TORCH_CUDA_ARCH_LIST=f"8.0 {architecture}")
    assert done.returncode != 0
    [line] = done.stdout.splitlines()
    assert f"knows no {architecture!r}" in line


@needs_nvcc
def test_default_architectures_end_with_ptx_for_later_ones(source):
    done = run(sys.executable, "-c", print_of_setup("*INFO['cuda']['flags']"), cwd=source, FASTLM_BUILD="cuda")
    flags = [flag for flag in done.stdout.split() if flag.startswith("-gencode")]
    assert flags[0] == "-gencode=arch=compute_75,code=[sm_75]"
    assert [",compute_" in flag for flag in flags] == [False] * (len(flags) - 1) + [True]


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        pytest.param("cuda", "FASTLM_BUILD=cpu builds without CUDA", marks=needs_nvcc),
        pytest.param("cpu", "FASTLM_BUILD=none installs pure Python", marks=needs_cxx),
    ],
)
def test_a_failed_compilation_shows_the_compilers_words_and_the_way_out(source, mode, advice):
    for broken in (source / "csrc").rglob("*.c*"):  # all, so that nothing is compiled before the first that fails
        broken.write_text('#include "no/such/header.h"\n')
    done = wheel(source, "--no-build-isolation", FASTLM_BUILD=mode, TORCH_CUDA_ARCH_LIST="8.0")
    assert done.returncode != 0
    assert "no/such/header.h" in done.stdout
    assert advice in done.stdout
    assert "Traceback" not in done.stdout


def git(folder, *arguments):
    me = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = run("git", *me, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout


def built(hook, folder, *, into, **variables):
    """What the hook of pyproject.toml's build backend makes of a folder; no build isolation, so no network."""
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    done = run(sys.executable, "-c", code, str(into), cwd=folder, **variables)
    assert done.returncode == 0, done.stdout
    [archive] = into.iterdir()
    return archive


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with all that is changed here, in which Python and a build have left things behind."""
    folder = tmp_path_factory.mktemp("clone") / "fastlm clone"
    for name in git(ROOT, "ls-files", "-z").split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    for left in ("tests/__pycache__/cases.cpython-311.pyc", "fastlm/_C.so", "fastlm/_build_info.json", "build/a.o"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).touch()
    return folder


@pytest.fixture(scope="module")
def sdist(clone):
    return built("build_sdist", clone, into=clone.parent / "sdist", FASTLM_BUILD="none")


@pytest.fixture
def unpacked(sdist, tmp_path):
    """The sdist, unpacked inside the clone of something else."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "something else")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "a folder", filter="data")
    [folder] = (tmp_path / "a folder").iterdir()
    return folder


@needs_git
def test_the_sdist_is_the_repository_without_hidden_files_and_with_the_charts_that_documents_show(clone, unpacked):
    tracked = set(git(clone, "ls-files", "-z").rstrip("\0").split("\0"))
    charts = {path.relative_to(clone).as_posix() for path in clone.glob("benchmarks/results/*.png")}
    needless = charts | {name for name in tracked if name.startswith(".")}
    generated = {"PKG-INFO", "REVISION", "setup.cfg"}
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("fastlm.egg-info/")}
    assert sorted(files - generated - charts) == sorted(tracked - needless)
    assert "csrc/layer_norm/layer_norm_fwd.cu" in files
    for path in [*unpacked.glob("*.md"), *unpacked.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^):#]+\.png)\)", path.read_text("utf-8")):
            assert (path.parent / link).exists(), f"{path.name} shows {link}, which MANIFEST.in leaves out"
    assert not charts <= files


@needs_git
@pytest.mark.parametrize("mode", ["none", pytest.param("cpu", marks=[pytest.mark.proof, pytest.mark.slow, needs_cxx])])
def test_the_wheel_from_the_sdist_is_that_from_the_clone_revision_included(clone, unpacked, tmp_path, mode):
    found = []
    for folder in (clone, unpacked):
        wheel = built("build_wheel", folder, into=tmp_path / f"{len(found)}", FASTLM_BUILD=mode, DEBUG="1")
        with zipfile.ZipFile(wheel) as archive:
            info = json.loads(archive.read("fastlm/_build_info.json"))
            found.append((wheel.name, sorted(archive.namelist()), info))
    assert found[0] == found[1]
    _, files, info = found[0]
    assert info["revision"] == git(clone, "describe", "--always").strip()
    python = {path.relative_to(clone).as_posix() for path in (clone / "fastlm").rglob("*.py")}
    native = [name for name in files if name.startswith("fastlm/_C.")]
    assert len(native) == (mode == "cpu")
    others = {"fastlm/_build_info.json", "fastlm/py.typed", "fastlm/ops/measured.json", *native}
    assert {name for name in files if not name.startswith("fastlm-")} == python | others


@needs_git
def test_a_folder_without_a_revision_takes_none_from_the_repository_around_it(unpacked):
    (unpacked / "REVISION").unlink()
    done = run(sys.executable, "-c", print_of_setup("INFO['revision']"), cwd=unpacked, FASTLM_BUILD="none")
    assert done.stdout.splitlines() == ["0.1.0", ""]


@needs_git
def test_the_metadata_are_valid_and_the_extras_refer_to_each_other(unpacked):
    metadata = Metadata.from_email((unpacked / "PKG-INFO").read_bytes(), validate=True)
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert (metadata.license_expression, metadata.license_files) == ("Apache-2.0", ["LICENSE"])
    needed = [requirement for requirement in metadata.requires_dist if not requirement.marker]
    assert {requirement.name for requirement in needed} == {"torch", "numpy"}
    own = [requirement.extras for requirement in metadata.requires_dist if requirement.name == "fastlm"]
    assert own
    assert set().union(*own) <= set(metadata.provides_extra)


@needs_cxx
def test_without_pythons_headers_there_are_no_kernels_and_it_says_what_to_install(source):
    code = """
import sysconfig
path_of = sysconfig.get_path
sysconfig.get_path = lambda name, *args, **kw: "/no/such" if name == "include" else path_of(name, *args, **kw)
"""
    done = run(sys.executable, "-c", code + print_of_setup("INFO['cpu']['reason']"), cwd=source)
    [_, reason] = done.stdout.splitlines()
    assert "Python's headers (python3-dev)" in reason
    assert "Python.h" in reason.split("python3-dev")[1]
