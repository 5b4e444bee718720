"""Where CUDA's tools are looked for, in what order, and what is said where there are none."""

import re

import pytest
from proof import toolkit

NVCC = r"""#!/bin/sh
echo '#$ TOP=/somewhere' >&2
echo '#$ INCLUDES="-I{0}/../include"  ' >&2
echo '#$ SYSTEM_INCLUDES="-isystem" "{0}/../include/cccl"  ' >&2
"""


def install(home, name="nvcc"):
    """A toolkit of one tool and the headers; the tool."""
    tool = home / "bin" / name
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text(NVCC.format(tool.parent))
    tool.chmod(0o755)
    for header in toolkit.HEADERS:
        file = home / "include" / ("cccl" if header.startswith("nv/") else "") / header
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return str(tool)


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without CUDA: where toolkits may be lies below tmp_path, and nothing is there."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(tmp_path / "PATH" / "bin"))
    monkeypatch.setattr(toolkit, "packages", {"nvidia": [tmp_path / "nvidia"]}.__getitem__)
    monkeypatch.setattr(toolkit, "TRITON_TOOLS", tmp_path / "triton" / "bin")
    which = toolkit.shutil.which

    def inside(name, path):
        return which(name, path=path.replace("/usr/local/cuda", str(tmp_path / "usual")))

    monkeypatch.setattr(toolkit.shutil, "which", inside)


def test_the_machines_own_toolkit_comes_before_installed_packages(tmp_path):
    order = ["home", "path", "PATH", "usual", "nvidia/cu13", "triton"]
    for n in reversed(range(len(order))):
        tool = install(tmp_path / order[n])
        assert toolkit.find_tool("nvcc") == tool, order[n]


def test_unset_and_empty_variables_are_no_places(monkeypatch, tmp_path):
    tool = install(tmp_path / "usual")
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.delenv("CUDA_PATH")
    assert toolkit.find_tool("nvcc") == tool


def test_each_tool_is_looked_for_by_itself(tmp_path):
    nvcc, nvdisasm = install(tmp_path / "usual"), install(tmp_path / "triton", "nvdisasm")
    assert (toolkit.need_tool("nvcc"), toolkit.need_tool("nvdisasm")) == (nvcc, nvdisasm)


def test_what_is_missing_is_named_with_every_place_and_what_would_bring_it():
    for name in ("nvcc", "cuobjdump"):
        assert toolkit.find_tool(name) is None
        with pytest.raises(FileNotFoundError) as raised:
            toolkit.need_tool(name)
        for part in (name, "CUDA_HOME", "CUDA_PATH", "PATH", "/usr/local/cuda", str(toolkit.PINS), "Triton"):
            assert part in str(raised.value)


def test_headers_are_those_that_nvcc_itself_takes(tmp_path):
    home = tmp_path / "nvidia" / "cu13"
    install(home)
    assert toolkit.includes() == [str(home / "include"), str(home / "include" / "cccl")]


@pytest.mark.parametrize("header", toolkit.HEADERS)
def test_a_compiler_without_its_headers_is_not_taken_for_whole(header, tmp_path):
    tool = install(tmp_path / "usual")
    next((tmp_path / "usual").rglob(header)).unlink()
    with pytest.raises(FileNotFoundError, match=f"{header} is not where {re.escape(tool)} looks: .*include/cccl"):
        toolkit.includes()


def test_every_pin_is_exact_and_for_the_one_system_that_has_the_package():
    pins = [line for line in toolkit.PINS.read_text().splitlines() if not line.startswith("#")]
    assert len(pins) == 5
    for pin in pins:
        assert re.fullmatch(r'nvidia-[a-z-]+==13\.0\.\d+; platform_system == "Linux"', pin), pin
