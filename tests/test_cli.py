"""The `fastlm` command: what it prints and leaves, and one clear line for everything that a user can get wrong."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from fastlm import cli
from fastlm.models import GPT
from fastlm.train import checkpoint

TINY = ["--vocab-size=300", "--hidden-size=16", "--num-layers=1", "--num-heads=2", "--seq-len=64", "--batch-size=2"]
WORDS = ["mean", "variance", "gradient", "weight", "tensor", "kernel", "stride", "shared", "löss", "行列"]


def write_corpus(folder):
    choose = random.Random(0)
    folder.mkdir()
    for i in range(30):
        lines = (" ".join(choose.choices(WORDS, k=6)) + f" {i}.{j}\n" for j in range(40))
        (folder / f"file{i:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a cache that all tests share, and a finished run."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    before = os.environ.get("FASTLM_CACHE"), os.getcwd()
    os.environ["FASTLM_CACHE"] = str(home / "cache")
    os.chdir(home)
    assert cli.main(["train", "--data", "corpus", "--steps", "8", "--name", "done", *TINY]) == 0
    yield home
    os.chdir(before[1])
    del os.environ["FASTLM_CACHE"]
    if before[0] is not None:
        os.environ["FASTLM_CACHE"] = before[0]


def fails(capsys, *arguments: str, code: int = 2) -> str:
    """The line on stderr, there being nothing but that."""
    capsys.readouterr()
    assert cli.main([*arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("fastlm: ")
    assert err.count("\n") == 1
    return err.removeprefix("fastlm: ").rstrip("\n")


# --- train


def test_a_run_prints_the_comparison_a_sample_and_the_next_command(home, capsys):
    assert cli.main(["train", "--data", "corpus", "--steps", "5", "--name", "fresh", "--seed", "3", *TINY]) == 0
    out = capsys.readouterr().out
    assert re.search(r"corpus: 0.\d\d MB in \d+ files to train on", out)
    assert re.search(r"validation loss \d\.\d{3} nats per token, perplexity \d+\.\d\n", out)
    rows = re.findall(
        r"^  (this model|n-gram of six bytes|xz alone|xz, given the training text) +(\d\.\d{3})$", out, re.M
    )
    figures = [float(figure) for _, figure in rows]
    assert len(figures) == 4
    record = json.loads((home / "runs/fresh/metrics.jsonl").read_text().splitlines()[-1])
    assert figures[0] == pytest.approx(record["val_bits_per_byte"], abs=5e-4)
    assert "A sample" in out
    command = out.splitlines()[-1].split()
    assert command[:3] == ["fastlm", "generate", "runs/fresh"]
    names = ["checkpoint-5", "config.json", "loss.png", "metrics.jsonl", "tokenizer.json"]
    assert sorted(path.name for path in (home / "runs/fresh").iterdir()) == names
    config = json.loads((home / "runs/fresh/config.json").read_text())
    assert config["source"] == {"data": "corpus", "vocab_size": 300}
    assert (config["train"]["seed"], config["train"]["steps"], config["model"]["max_seq_len"]) == (3, 5, 64)


def test_a_run_without_a_name_is_called_after_its_data_and_numbered(home):
    names = [cli._new_run(home / "runs", None, data).name for data in (None, "corpus", "x/y/book.txt")]
    assert names == ["stdlib", "corpus", "book"]
    (home / "runs/corpus").mkdir()
    (home / "runs/corpus-2").mkdir()
    assert cli._new_run(home / "runs", None, "corpus").name == "corpus-3"


def test_every_field_is_an_option(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in (
        "--num-layers N",
        "--position {learned,alibi,sinusoidal}",
        "--no-tie-embeddings",
        "--muon-lr X",
        "--resume",
    ):
        assert option in out
    assert "updates of the weights [" in out


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_ctrl_c_saves_a_whole_checkpoint_and_says_how_to_go_on(home, capsys):
    command = [sys.executable, "-m", "fastlm.cli", "train", "--data", "corpus", "--name", "stopped", "--steps", "9000"]
    process = subprocess.Popen([*command, *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = home / "runs/stopped/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    step = int(re.search(r"stopped and saved at step ([\d,]+); to go on:\n", out)[1].replace(",", ""))
    assert out.endswith("  fastlm train --resume --name stopped\n")
    folder = checkpoint.latest(home / "runs/stopped")
    assert folder.name == f"checkpoint-{step}"
    GPT.from_pretrained(folder)
    assert (home / "runs/stopped/loss.png").exists()
    assert cli.main(["generate", "runs/stopped", "--prompt", "mean", "--max-new-tokens", "3"]) == 0
    line = fails(capsys, "train", "--resume", "--name", "stopped", "--steps", "9001", "--lr", "0.5")
    assert line.endswith("train steps was 9000 and is 9001; train lr was 0.012 and is 0.5")


def test_resuming_takes_every_setting_from_the_run(home, capsys):
    assert cli.main(["train", "--resume", "--name", "done"]) == 0
    out = capsys.readouterr().out
    assert "from step 8 to 8" in out
    assert "this model" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data nowhere", "data: no such file or folder: nowhere"),
        ("train --data empty", r"data: no text in empty .*"),
        ("train --data small", r"data: .*small.*"),
        ("train --step 5", r"unknown option --step; did you mean --steps\?"),
        ("train --num_layers=5", r"unknown option --num_layers; did you mean --num-layers\?"),
        ("train steps", r"unknown argument steps; did you mean --steps\?"),
        ("train --steps many", "--steps: invalid int value: 'many'"),
        ("train --steps 0", "TrainConfig: steps must be at least 1, got 0"),
        ("train --num-heads 5", "GPTConfig: hidden_size must be a multiple of num_heads, 5, got 192"),
        ("train --position rotary", r"--position: invalid choice: 'rotary' \(choose from .*\)"),
        ("train --vocab-size 10", "data: vocab_size must be from 257 .*, got 10"),
        (
            "train --data corpus --vocab-size 300 --seq-len 64 --max-seq-len 32",
            r".*seq_len must be at most the model's max_seq_len, 32, got 64",
        ),
        ("train --data corpus --vocab-size 300 --seq-len 99999", "data: the text is too small: .*"),
        ("train --name done", "runs/done exists: --resume --name done goes on with it, another --name starts anew"),
        ("train --name a/b", "--name must be the name of a folder, got 'a/b'"),
        ("train --resume --name nope", "no such run: runs/nope"),
        ("train --resume --out nowhere", "there is no run to resume in nowhere"),
        ("generate nope", "no such run or model: nope"),
        ("generate corpus", "data: no tokenizer at corpus/tokenizer.json"),
        ("generate runs/done --max-new-tokens 64", ".*must fit max_seq_len = 64, got 1 and 64"),
        ("generate runs/done --top-p 2", ".*top_p must be above 0 and at most 1, got 2.0"),
        ("generate", "the following arguments are required: RUN_OR_DIR"),
        ("trian", r"unknown command 'trian'; did you mean train\?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(home, capsys, arguments, message):
    (home / "empty").mkdir(exist_ok=True)
    (home / "small").mkdir(exist_ok=True)
    (home / "small/a.txt").write_text("a")
    before = sorted(home.rglob("*"))
    assert re.fullmatch(message, fails(capsys, *arguments.split()))
    assert sorted(home.rglob("*")) == before


def test_a_missing_library_is_one_line(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = fails(capsys, "generate", "runs/done")
    assert line == "data: the tokenizers library is missing: pip install fastlm[train]"


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(home, capsys):
    options = ["--data", "corpus", "--steps", "20", "--lr", "1e30", "--warmup-steps", "0", "--name", "diverged"]
    assert "the loss is nan" in fails(capsys, "train", *options, *TINY, code=1)
    assert "runs/diverged has no checkpoint yet" in fails(capsys, "generate", "runs/diverged")


def test_a_damaged_run_is_one_line(home, capsys):
    (home / "runs/damaged").mkdir()
    (home / "runs/damaged/config.json").write_text("{}")
    (home / "runs/damaged/metrics.jsonl").touch()
    assert "is not the configuration of a run" in fails(capsys, "train", "--resume", "--name", "damaged")


# --- generate and info


def test_generate_prints_the_prompt_and_what_follows(home, capsys):
    capsys.readouterr()
    arguments = ["generate", "runs/done", "--prompt", "gradient 行", "--max-new-tokens", "12", "--seed", "1"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("gradient 行")
    assert len(out) > len("gradient 行\n")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == out
    assert cli.main([*arguments[:-1], "2"]) == 0
    assert capsys.readouterr().out != out


def test_generate_without_a_seed_draws_anew_in_every_process(home):
    command = [sys.executable, "-m", "fastlm.cli", "generate", "runs/done"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    one, two = (process.communicate(timeout=120)[0] for process in processes)
    assert len(one) > 20
    assert one != two


def test_generate_greedily_needs_no_seed_and_fills_the_context_at_most(home, capsys):
    capsys.readouterr()
    for _ in range(2):
        assert cli.main(["generate", "runs/done", "--greedy"]) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_generate_loads_a_folder_with_a_model_too(home, capsys, tmp_path):
    GPT.from_pretrained(home / "runs/done/checkpoint-8").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((home / "runs/done/tokenizer.json").read_bytes())
    capsys.readouterr()
    for folder in (tmp_path, home / "runs/done", home / "runs/done/checkpoint-8"):
        assert cli.main(["generate", str(folder), "--greedy", "--max-new-tokens", "5"]) == 0
    outs = capsys.readouterr().out
    assert outs == outs[: len(outs) // 3] * 3


def test_text_is_printed_in_whole_characters_only(home, capsys):
    class Spelling:
        """A model that spells the bytes of one word."""

        config = type("Config", (), {"max_seq_len": 64})

        def stream(self, input_ids, max_new_tokens):
            yield from tokenizer.encode("é行").ids[:max_new_tokens]

    tokenizer = cli.data.load_tokenizer(home / "runs/done/tokenizer.json")
    writes = []
    capsys.readouterr()
    stdout = sys.stdout
    try:
        sys.stdout = type(
            "Recorder", (), {"write": lambda self, text: writes.append(text), "flush": lambda self: None}
        )()
        cli._print_text(Spelling(), tokenizer, "", None)
    finally:
        sys.stdout = stdout
    assert "".join(writes) == "é行\n"
    assert all("\N{REPLACEMENT CHARACTER}" not in text for text in writes)


def test_output_that_nobody_reads_on_is_no_error(home):
    command = f"{sys.executable} -m fastlm.cli info | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_info_and_help_print_and_succeed(capsys):
    assert cli.main(["info"]) == 0
    assert "layer_norm" in capsys.readouterr().out
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        assert re.search(r"train .*\n  generate .*\n  info ", capsys.readouterr().out)
