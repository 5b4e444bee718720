"""What the documentation shows is run, what it links to is there, and what is made of the code is up to date."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastlm import cli
from fastlm.cli.parser import Parser

ROOT = Path(__file__).parents[1]
PAIRS = {
    "README.md": "README.zh-CN.md",
    "docs/training.md": "docs/training.zh-CN.md",
    "docs/figures.md": "docs/figures.zh-CN.md",
}
MIGRATING = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/migrating").glob("*.md"))
PAGES = [*PAIRS, *PAIRS.values(), *MIGRATING, "CONTRIBUTING.md", "docs/architecture.md", "docs/proof.md"]
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
REFERS = re.compile(r"[Aa]s (in |the )?`|[Aa]rguments as|, as `|[Aa]s the base")  # to where an argument is described


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def snippets(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(name), re.DOTALL)


def run(code: str, **environment: str) -> str:
    environment = os.environ | environment
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Snippets -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_snippets_of_a_page_run_one_after_the_other(tmp_path: Path) -> None:
    """Each page by itself, in one process, for importing takes longer than most of them."""
    pages = {name: "\n".join(snippets(name)) for name in ("README.md", "docs/training.md", *MIGRATING)}
    assert all(code for name, code in pages.items() if name != "docs/migrating/README.md")
    run_all = f"for name, code in {pages!r}.items():\n    exec(compile(code, name, 'exec'), {{}})"
    assert "layer_norm: native" in run(run_all, FASTLM_CACHE=str(tmp_path))
    assert (tmp_path / "tuned.json").exists()


def commands() -> list[str]:
    """The lines of the pages that call `fastlm` alone, each once."""
    blocks = "\n".join("\n".join(snippets(name, "sh")) for name in PAIRS).replace(".venv/bin/", "")
    return sorted({re.sub(r"( &)?\s*(#.*)?$", "", line) for line in blocks.splitlines() if line.startswith("fastlm ")})


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_pages_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(BaseException):
        """So far and no further."""

    def parse(parser: Parser, argv: list[str]) -> None:
        original(parser, argv)
        raise Parsed

    original = Parser.parse
    monkeypatch.setattr(Parser, "parse", parse)
    with pytest.raises(Parsed):
        cli.main(shlex.split(line)[1:])


# The same in two languages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_two_languages_have_the_same_snippets_but_for_comments(english: str, chinese: str) -> None:
    for language in ("python", "sh"):
        ours, theirs = (
            [
                ast.dump(ast.parse(code)) if language == "python" else re.sub(r"\s+#.*", "", code)
                for code in snippets(name, language)
            ]
            for name in (english, chinese)
        )
        assert ours == theirs


def outline(name: str) -> list[str]:
    """The shape of a page: headings by level, items, rows with the cells that are numbers, images, links, comments."""
    shape = []
    for line in CODE.sub("```", read(name)).splitlines():
        shape += re.findall(r"^(?:#+ |- |\d\. |```|<!--)", line)
        if line.startswith("|"):
            shape.append("|".join(cell if re.fullmatch(r" [\d.,%() -]+ ", cell) else "" for cell in line.split("|")))
        shape += [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", line)]
    same = {
        page: english
        for english, chinese in PAIRS.items()
        for page in (english, chinese, *(Path(p).name for p in (english, chinese)))
    }
    return [same.get(part.removeprefix("../"), part) for part in shape]


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_two_languages_have_the_same_headings_lists_tables_images_and_links(english: str, chinese: str) -> None:
    assert outline(english) == outline(chinese)
    assert len(outline(english)) > 20


# Links --------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", CODE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_links_to_exists(name: str) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", CODE.sub("", read(name))):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(link)
    assert not missing


# What is made of the code -------------------------------------------------------------------------------------------


def builder() -> types.ModuleType:
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # what it takes from the environment is other tests' too
        patch.delenv("TRITON_INTERPRET", raising=False)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The table and the folder of the reference, made where no test has registered a backend; a warning is an error."""
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("docs")
    code = f"""
import sys, warnings
from pathlib import Path
sys.path.insert(0, "docs")
import build
warnings.filterwarnings("error", module="pdoc")
build.build(Path({str(folder)!r}))
print(build.table())
"""
    return run(code), folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_table_of_ops_and_backends_is_what_the_registry_says(name: str, built: tuple[str, Path]) -> None:
    begin, end = builder().MARKS
    table = read(name).split(begin)[1].split(end)[0]
    assert table == built[0].strip(), "run `make docs`"


@pytest.mark.slow
def test_the_reference_has_every_public_name(built: tuple[str, Path]) -> None:
    index = (built[1] / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]+)"', index) == [f"{module.replace('.', '/')}.html" for module in public()]
    missing = [
        f"{module}.{name}"
        for module, names in public().items()
        for name in names
        if f'id="{name}"' not in (built[1] / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
    ]
    assert not missing


def test_static_figures_of_the_gpu_kernels_are_those_of_the_committed_report() -> None:
    table = read("benchmarks/results/attention.md")
    report = {
        (head, way): (registers, flop)
        for head, way, registers, flop in re.findall(
            r"\| sm_80 \| (\d+) \| CUDA (fwd|bwd) \| (\d+) \| 0\+0 \| \d+ \| (\d+) \|", table
        )
    }
    peers = dict(re.findall(r"\| sm_80 \| (\d+ \| \w+) \| \d+ \| \d+ \| FlashAttention-2 (\d+) \|", table))
    rows = re.findall(
        r"\| attention (\w+), causal, head (\d+) \| (\d+) \| [\d,]+ \| 0 \| ([\d,]+) \| ([\d,]+) \|", read("README.md")
    )
    assert len(rows) == 4
    for way, head, registers, flop, peer in rows:
        assert (registers, flop.replace(",", "")) == report[head, {"forward": "fwd", "backward": "bwd"}[way]]
        assert peer.replace(",", "") == peers[f"{head} | {way}"]


# Docstrings ---------------------------------------------------------------------------------------------------------


def public() -> dict[str, list[str]]:
    """Public names by module, but for modules."""
    modules = {name: importlib.import_module(name) for name in builder().MODULES}
    return {
        name: [each for each in getattr(module, "__all__", ()) if not inspect.ismodule(getattr(module, each))]
        for name, module in modules.items()
    }


def undocumented(name: str, thing: object) -> list[str]:
    """What of a function, class or method has no docstring, and which arguments none tells about."""
    own = vars(thing).get("__doc__") if isinstance(thing, type) else inspect.getdoc(thing)
    if not own or own.startswith(f"{name.split('.')[-1]}("):  # what a dataclass writes for itself
        return [f"{name} has no docstring"]
    try:
        signature = inspect.signature(thing)
    except ValueError:  # an exception's
        return []
    given = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    given = [each for each in given if each not in ("self", "cls")]
    told = r"^ *(?:\w+, *\n? *)*{0}(?:, *\n? *\w+)*:|`[^`]*\b{0}\b[^`]*`"  # listed as an argument, or marked as code
    lacking = [each for each in given if not re.search(told.format(each), own, re.MULTILINE)]
    return [f"{name} says nothing of {', '.join(lacking)}"] if lacking and not REFERS.search(own) else []


def test_public_names_have_docstrings_that_tell_of_every_argument() -> None:
    faults = []
    for module, names in public().items():
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            if not callable(thing):
                continue
            faults += undocumented(f"{module}.{name}", thing)
            for key, member in vars(thing).items() if isinstance(thing, type) else ():
                field = key.startswith("_") or key in vars(thing).get("__annotations__", ())
                if inspect.isroutine(member) and not field and not inspect.getdoc(getattr(thing, key)):
                    faults.append(f"{module}.{name}.{key} has no docstring")
    assert not faults, "\n".join(faults)
