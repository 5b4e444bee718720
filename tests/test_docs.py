"""What the documentation shows is run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_snippets_of_the_readme_run_one_after_the_other() -> None:
    code = "\n".join(snippets("README.md"))
    assert code.count("import fastlm") >= 2
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "layer_norm: native" in result.stdout


def test_the_two_readmes_have_the_same_snippets_but_for_comments() -> None:
    english, chinese = (
        [ast.dump(ast.parse(code)) for code in snippets(name)] for name in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_document_links_to_exist(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
