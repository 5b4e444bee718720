"""The README's way from text to an answer over HTTP, run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADINGS = {"README.md": "## From text to an answer", "README.zh-CN.md": "## 从文本到回答"}


def story(name: str) -> list[str]:
    section = (ROOT / name).read_text(encoding="utf-8").split(HEADINGS[name])[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1].splitlines()


def test_the_two_readmes_tell_the_same_story() -> None:
    english, chinese = ([re.sub(r"\s+#.*", "", line) for line in story(name)] for name in HEADINGS)
    assert english == chinese


@pytest.mark.slow
def test_the_story_runs(tmp_path: Path) -> None:
    """Every line, with fewer steps, an eighth of the reviews, and on a port that is free."""
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
    lines = []
    for line in story("README.md"):
        line = re.sub(r"(fastlm (?:train|finetune) \S+)", r"\1 --steps 6", line)
        lines.append(re.sub(r"(fastlm serve \S+)", rf"\1 --port {port}", line).replace(":8000", f":{port}"))
    eighth = "for f in data/chinese/*; do awk 'NR % 8 == 1' $f > part; mv part $f; done"
    lines.insert(1, eighth)
    assert sum("--steps 6" in line for line in lines) == 2
    assert sum(port in line for line in lines) == 2
    environment = os.environ | {"FASTLM_CACHE": str(tmp_path / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = ["bash", "-e", "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout
    assert "test: 1,736 texts: 903 neg, 833 pos" in said  # of all
    kept = re.search(r"data/chinese/reviews.csv, test: (\d+) texts", said)
    assert kept
    answer = json.loads(said.splitlines()[-1])
    assert answer["label"] in ("neg", "pos")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    figures = re.findall(rf"accuracy (\d+\.\d)%.* on {kept[1]} texts", said)
    assert len(figures) == 2  # of finetune and of evaluate
    assert len(set(figures)) == 1
    assert (tmp_path / "runs/reviews/report.md").exists()
