"""The example of an encoder and a decoder: with torch.nn and with fastlm.nn it is one program with one loss."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "translation.py"
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ZAHLEN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]


@pytest.fixture
def pairs(tmp_path):
    """Numbers of one to six digits, in words of both languages: no two pairs of a length, so that there is padding."""
    digits = [[int(digit) for digit in str(n * 7919 % 10 ** (1 + n % 6))] for n in range(160)]
    lines = ["\t".join(" ".join(words[d] for d in number) for words in (NUMBERS, ZAHLEN)) + "\n" for number in digits]
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(*arguments):
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def curve(said):
    """(loss, validation loss) of every step."""
    return [tuple(map(float, found)) for found in re.findall(r"loss (\d+\.\d+), validation loss (\d+\.\d+)", said)]


def test_the_example_has_the_same_losses_with_torch_nn_and_fastlm_nn(pairs):
    said = {way: run(pairs, "--steps", 24, "--every", 1, "--dropout", 0, *way) for way in ((), ("--plain",))}
    ours, plain = (curve(said[way]) for way in ((), ("--plain",)))
    assert len(ours) == len(plain) == 24
    for one, two in zip(ours, plain, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert ours[-1][0] < 0.75 * ours[0][0]  # it learns
    assert "fastlm.nn.Transformer" in said[()]
    assert "torch.nn.modules.transformer.Transformer" in said["--plain",]
    for text in said.values():
        assert len(re.findall(r"\n  model    ", text)) == 8  # translations at the end
        assert re.search(r"\d\.\d{3} s per step", text)


def test_nothing_but_the_import_differs():
    """`nn` is bound in the two branches of one `if`, and no other line knows which it is."""
    source = EXAMPLE.read_text(encoding="utf-8")
    tree = ast.parse(source)
    (choice,) = [node for node in tree.body if isinstance(node, ast.If) and "--plain" in ast.unparse(node.test)]
    assert ast.unparse(choice) == (
        "if '--plain' in sys.argv:\n    from torch import nn\nelse:\n    from fastlm import nn"
    )
    tree.body.remove(choice)
    rest = ast.unparse(ast.Module(tree.body[1:], []))  # without the docstring
    assert [line.strip() for line in rest.splitlines() if "plain" in line or "fastlm" in line] == [
        "parser.add_argument('--plain', action='store_true', help='torch.nn instead of fastlm.nn')"
    ]
    assert "torch.nn" not in rest.replace("help='torch.nn instead", "")
