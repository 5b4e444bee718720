"""The `fastlm` command: what it prints and leaves, and one clear line for everything that a user can get wrong."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import cli, data, models
from fastlm.cli.finetune import StartConfig
from fastlm.cli.generate import print_text
from fastlm.cli.runs import new_run, tables_of
from fastlm.cli.train import settings_of
from fastlm.config import read_toml
from fastlm.models import GPT
from fastlm.models.pretrained import read_tensors
from fastlm.train import TrainConfig, checkpoint

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
    assert re.search(r"corpus: 0.\d\d MB in \d+ documents to train on", out)
    assert re.search(r"validation loss \d\.\d{3} nats per token, perplexity \d+\.\d\n", out)
    rows = re.findall(
        r"^  (this model|n-gram of six bytes|xz alone|xz, given the training text) +(\d\.\d{3})$", out, re.M
    )
    figures = [float(figure) for _, figure in rows]
    assert len(figures) == 4
    record = json.loads((home / "runs/fresh/metrics.jsonl").read_text().splitlines()[-1])
    assert figures[0] == pytest.approx(record["val_bits_per_byte"], abs=5e-4)
    assert "A sample" in out
    assert re.search(r"A step of \d\.\d{3} s is \d+\.\d\d times as fast as the same model's in plain PyTorch", out)
    command = out.splitlines()[-1].split()
    assert command[:3] == ["fastlm", "generate", "runs/fresh"]
    names = ["best", "checkpoint-5", "config.toml", "loss.png", "metrics.jsonl", "tokenizer.json"]
    assert sorted(path.name for path in (home / "runs/fresh").iterdir()) == names
    config = read_toml(home / "runs/fresh/config.toml")
    assert (config["data"]["path"], config["data"]["vocab_size"]) == ("corpus", 300)
    assert (config["train"]["seed"], config["train"]["steps"], config["model"]["max_seq_len"]) == (3, 5, 64)


def test_an_estimate_comes_first_and_is_corrected_by_the_first_steps(home, capsys):
    options = ["--data", "corpus", "--steps", "12", "--name", "priced", "--price-per-hour", "3600", "--profile"]
    assert cli.main(["train", *options, *TINY]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^0\.01 M parameters; memory \d+ MiB: weights 0 MiB, gradients 0 MiB, optimizer 0 MiB, act", out, re.M
    )
    assert re.search(
        r"FLOP in all: about \d+:\d\d and [\d.,]+ in money at 40% of [\d.]+ [GT]FLOP/s \(a matrix prod", out
    )
    assert re.search(r"^measured: \d:\d\d and \d+\.\d\d in money for all 12 steps$", out, re.M)
    assert re.search(r"tokens/s   MFU \d+%   \d\.\d GiB   0:00 left", out)
    trace = json.loads((home / "runs/priced/trace.json").read_text())
    assert any("linear_cross_entropy" in event.get("name", "") for event in trace["traceEvents"])


def test_the_configuration_that_a_run_leaves_reruns_it(home):
    assert cli.main(["train", "runs/done/config.toml", "--name", "again"]) == 0
    assert read_toml(home / "runs/again/config.toml") == read_toml(home / "runs/done/config.toml")
    one, two = (read_tensors(home / f"runs/{name}/best/model.safetensors") for name in ("done", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_options_come_before_the_file_and_the_file_before_the_defaults(home):
    (home / "own.toml").write_text(
        '[model]\nnum_layers = 2\n[data]\npath = "corpus"\nvocab_size = 300\n'
        "[train]\nsteps = 3\nlr = 0.5\noptimizer_options = {ns_steps = 3}\n"
    )
    settings = settings_of("own.toml", {"train.lr": 0.25, "model.num_heads": 2})
    assert settings["model"]["num_layers"] == 2
    assert settings["model"]["num_heads"] == 2
    assert settings["model"]["hidden_size"] == 192
    assert settings["train"] == {"steps": 3, "lr": 0.25, "optimizer_options": {"ns_steps": 3}}
    command = "train own.toml --model.layers 1 --model.hidden_size=16 --num-heads 2 --train.seq-len 64 --name tabled"
    assert cli.main([*command.split(), "--train.batch-size", "2", "--optimizer-options", '{"ns_steps": 2}']) == 0
    config = read_toml(home / "runs/tabled/config.toml")
    assert (config["model"]["num_layers"], config["model"]["max_seq_len"], config["train"]["lr"]) == (1, 64, 0.5)
    assert config["train"]["optimizer_options"] == {"ns_steps": 2}


@pytest.mark.parametrize("kind", ["BERTForMaskedLM", "BERTForPreTraining"])
def test_a_bert_is_pretrained_too(home, capsys, kind):
    options = ["--model.type", kind, "--data", "corpus", "--steps", "6", "--name", kind]
    assert cli.main(["train", *options, *TINY]) == 0
    assert "validation loss" in capsys.readouterr().out
    model = getattr(models, kind).from_pretrained(home / "runs" / kind / "best")
    assert model.config.num_layers == 1
    assert read_toml(home / f"runs/{kind}/config.toml")["data"]["tokenizer"] == "wordpiece"


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
FINETUNING = [path for path in CONFIGS if path.stem.endswith("-finetune")]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in FINETUNING], ids=lambda path: path.stem)
def test_every_configuration_that_comes_along_is_one(path):
    settings = settings_of(path, {})
    kind = settings["model"].pop("type")
    getattr(models, kind).config_type.from_dict({"vocab_size": 300, **settings["model"]})
    TrainConfig.from_dict(settings["train"])
    data.DataConfig.from_dict(settings["data"])


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_every_configuration_of_fine_tuning_is_one(path):
    settings = tables_of(path, {})
    StartConfig.from_dict(settings["model"])
    data.LabelledConfig.from_dict(settings["data"])
    assert settings["train"].pop("epochs") > 0
    TrainConfig.from_dict(settings["train"])


def test_gpt_tiny_is_what_no_options_train():
    def resolved(settings):
        return TrainConfig.from_dict(settings["train"]), data.DataConfig.from_dict(settings["data"]), settings["model"]

    tiny = Path(__file__).parents[1] / "configs/gpt-tiny.toml"
    assert resolved(settings_of(tiny, {})) == resolved(settings_of(None, {}))


def test_a_run_without_a_name_is_called_after_its_data_and_numbered(home):
    names = [new_run(home / "runs", None, data).name for data in (None, "corpus", "x/y/book.txt")]
    assert names == ["stdlib", "corpus", "book"]
    (home / "runs/corpus").mkdir()
    (home / "runs/corpus-2").mkdir()
    assert new_run(home / "runs", None, "corpus").name == "corpus-3"


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
    command = [sys.executable, "-m", "fastlm", "train", "--data", "corpus", "--name", "stopped", "--steps", "9000"]
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
        ("train --num_layerz=5", r"unknown option --num-layerz; did you mean --num-layers\?"),
        ("train --model.depth 5", r"unknown option --model.depth.*"),
        ("train nowhere.toml", "no such file: nowhere.toml"),
        ("train asked/broken.toml", "asked/broken.toml is not TOML: .*"),
        ("train asked/table.toml", r"asked/table.toml: unknown table 'models'; did you mean model\?"),
        ("train asked/field.toml", r"TrainConfig: unknown field 'step'; did you mean steps\?"),
        ("train asked/type.toml", "model.type must be one of GPT, BERTForMaskedLM, BERTForPreTraining, got 'T5'"),
        ("train asked/number.toml", "TrainConfig: steps must be an integer, got '3'"),
        ("train asked/field.toml --resume --name done", "--resume takes the configuration of the run, and no other"),
        ("train --optimizer adamwx --data corpus", r".*optimizer must be .*; did you mean adamw\?, got 'adamwx'"),
        ("train steps", "no such file: steps"),
        ("train --steps many", "--train.steps/--steps: invalid int value: 'many'"),
        ("train --steps 0", "TrainConfig: steps must be at least 1, got 0"),
        ("train --num-heads 5", "GPTConfig: hidden_size must be a multiple of num_heads, 5, got 192"),
        ("train --position rotary", r"--model.position/--position: invalid choice: 'rotary' \(choose from .*\)"),
        ("train --vocab-size 10", "data: vocab_size must be from 257 .*, got 10"),
        (
            "train --data corpus --vocab-size 300 --seq-len 64 --max-seq-len 32",
            r".*seq_len must be at most the model's max_seq_len, 32, got 64",
        ),
        ("train --data corpus --vocab-size 300 --seq-len 99999", "CausalLM: the text is too small: .*"),
        ("train --name done", "runs/done exists: --resume --name done goes on with it, another --name starts anew"),
        ("train --name a/b", "--name must be the name of a folder, got 'a/b'"),
        ("train --resume --name nope", "no such run: runs/nope"),
        ("train --resume --out nowhere", "there is no run to resume in nowhere"),
        ("generate nope", "no such run or model: nope"),
        ("generate corpus", "data: no tokenizer at corpus: a folder needs .*"),
        ("generate runs/done --max-new-tokens 64", "prompt and new tokens must fit max_seq_len = 64, got 1 and 64"),
        ("generate runs/done --max-new-tokens 0", "generate: max_new_tokens must be at least 1, got 0"),
        ("generate runs/done --prompt " + "x." * 70, "the prompt has 141 tokens, the model's context only 64, .*"),
        ("generate runs/done --prompt a --prompts b", "--prompt and --prompts exclude each other"),
        ("generate runs/done --prompts nope.txt", ".*No such file or directory: 'nope.txt'"),
        ("generate runs/done --prompts asked/empty.txt", "asked/empty.txt has no prompts"),
        ("generate runs/done --prompts asked/bad.jsonl", 'asked/bad.jsonl: line 2 must be {"prompt": a text}'),
        ("generate runs/done --stop=", "--stop must not be empty"),
        ("generate runs/done --quantize int4", "--quantize: invalid choice: 'int4' .*"),
        ("generate runs/done --num-beams 2 --num-return-sequences 3", ".*num_return_sequences must be at most .*"),
        ("generate runs/done --top-p 2", ".*top_p must be above 0 and at most 1, got 2.0"),
        ("generate", "the following arguments are required: RUN_OR_DIR"),
        ("trian", r"unknown command 'trian'; did you mean train\?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(home, capsys, arguments, message):
    (home / "empty").mkdir(exist_ok=True)
    (home / "small").mkdir(exist_ok=True)
    (home / "small/a.txt").write_text("a")
    (home / "asked").mkdir(exist_ok=True)
    (home / "asked/empty.txt").touch()
    (home / "asked/bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    tomls = {"broken": "[model", "table": "[models]", "field": "[train]\nstep = 3", "number": '[train]\nsteps = "3"'}
    for name, text in {**tomls, "type": '[model]\ntype = "T5"'}.items():
        (home / f"asked/{name}.toml").write_text(text)

    def files():
        return sorted(path for path in home.rglob("*") if not path.name.startswith(".lock-"))

    before = files()
    assert re.fullmatch(message, fails(capsys, *arguments.split()))
    assert files() == before


def test_a_missing_library_is_one_line(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = fails(capsys, "generate", "runs/done")
    assert line == "data: the tokenizers library is missing: pip install fastlm[train]"


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(home, capsys):
    options = ["--data", "corpus", "--steps", "20", "--lr", "1e30", "--warmup-steps", "0", "--name", "diverged"]
    line = fails(capsys, "train", *options, *TINY, code=1)
    assert re.match(r"the loss or the gradient was not finite in the last \d+ steps, up to step \d+; the weights", line)


def test_a_damaged_run_is_one_line(home, capsys):
    (home / "runs/damaged").mkdir()
    (home / "runs/damaged/config.toml").write_text("[model")
    (home / "runs/damaged/metrics.jsonl").touch()
    assert "runs/damaged/config.toml is not TOML" in fails(capsys, "train", "--resume", "--name", "damaged")


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
    command = [sys.executable, "-m", "fastlm", "generate", "runs/done"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    one, two = (process.communicate(timeout=120)[0] for process in processes)
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


def generated(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["generate", "runs/done", *arguments]) == 0
    return capsys.readouterr().out


def test_prompts_of_a_file_go_on_one_after_the_other(home, capsys, monkeypatch):
    (home / "prompts.txt").write_text("alpha\nbeta 行\n")
    (home / "prompts.jsonl").write_text('{"prompt": "alpha"}\n{"prompt": "beta 行"}\n')
    options = ["--greedy", "--ignore-eos", "--max-new-tokens", "6"]
    alone = [generated(capsys, "--prompt", prompt, *options) for prompt in ("alpha", "beta 行")]
    assert generated(capsys, "--prompts", "prompts.txt", *options) == "\n".join(alone)
    assert generated(capsys, "--prompts", "prompts.jsonl", *options) == "\n".join(alone)
    monkeypatch.setattr("sys.stdin", io.StringIO("alpha\nbeta 行"))
    assert generated(capsys, "--prompts", "-", *options) == "\n".join(alone)
    lines = [
        json.loads(line) for line in generated(capsys, "--prompts", "prompts.txt", "--json", *options).splitlines()
    ]
    assert [line["prompt"] + line["text"] + "\n" for line in lines] == alone
    assert [line["finish"] for line in lines] == ["length", "length"]


def test_a_stop_text_ends_the_text_before_it(home, capsys):
    options = ["--prompt", "def", "--greedy", "--ignore-eos", "--max-new-tokens", "12"]
    text = generated(capsys, *options)[:-1]
    assert len(text) > 8
    stop = text[6:8]
    expected = text[: text.index(stop, 3)]
    assert generated(capsys, *options, "--stop", stop) == expected + "\n"
    assert generated(capsys, *options, "--stop", "\0", "--stop", stop) == expected + "\n"
    assert generated(capsys, *options, "--stop", stop + "\0") == text + "\n"  # which only begins
    line = json.loads(generated(capsys, *options, "--stop", stop, "--json"))
    assert line == {"prompt": "def", "text": expected[3:], "finish": "stop"}


def test_the_end_of_the_document_ends_the_text(home, capsys, monkeypatch):
    tokenizer = data.load_tokenizer(home / "runs/done/tokenizer.json")
    eos = tokenizer.token_to_id(data.EOS_TOKEN)
    spelled = [*tokenizer.encode("one").ids, eos, *tokenizer.encode("two").ids]

    def logits(self, hidden):
        self.turn = getattr(self, "turn", -1) + 1
        return torch.nn.functional.one_hot(torch.tensor([spelled[self.turn % len(spelled)]]), 300).float()

    monkeypatch.setattr(GPT, "logits", logits)
    options = ["--greedy", "--max-new-tokens", str(len(spelled))]
    with fastlm.use_backend("native"):  # where the logits are what that method gives
        assert generated(capsys, *options) == "one\n"
        assert generated(capsys, *options, "--ignore-eos") == f"one{data.EOS_TOKEN}two\n"
        assert json.loads(generated(capsys, *options, "--json")) == {"prompt": "", "text": "one", "finish": "end"}


def test_beams_and_several_texts_and_int8(home, capsys):
    options = ["--prompt", "x", "--max-new-tokens", "5", "--num-return-sequences", "3", "--json"]
    beams = generated(capsys, *options, "--num-beams", "3", "--length-penalty", "0.5").splitlines()
    drawn = generated(capsys, *options, "--repetition-penalty", "1.2", "--seed", "1").splitlines()
    assert len(beams) == len(drawn) == 3
    assert len(set(beams)) == len(set(drawn)) == 3
    assert generated(capsys, "--prompt", "x", "--max-new-tokens", "5", "--num-beams", "3").startswith("x")
    assert generated(capsys, "--prompt", "x", "--greedy", "--quantize", "int8").startswith("x")


def test_text_is_printed_in_whole_characters_only(home, capsys):
    class Spelling:
        """A model that spells the bytes of one word."""

        config = type("Config", (), {"max_seq_len": 64})

        def stream(self, input_ids, max_new_tokens, **_):
            yield from tokenizer.encode("é行").ids[:max_new_tokens]

    tokenizer = data.load_tokenizer(home / "runs/done/tokenizer.json")
    writes = []
    capsys.readouterr()
    stdout = sys.stdout
    try:
        sys.stdout = type(
            "Recorder", (), {"write": lambda self, text: writes.append(text), "flush": lambda self: None}
        )()
        print_text(Spelling(), tokenizer, "", [0])
    finally:
        sys.stdout = stdout
    assert "".join(writes) == "é行\n"
    assert all("\N{REPLACEMENT CHARACTER}" not in text for text in writes)


def test_output_that_nobody_reads_on_is_no_error(home):
    command = f"{sys.executable} -m fastlm info | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_info_and_help_print_and_succeed(capsys):
    assert cli.main(["info"]) == 0
    assert "layer_norm" in capsys.readouterr().out
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        commands = re.findall(r"^  (\w+) +\w", capsys.readouterr().out, re.MULTILINE)
        assert commands == list(cli.COMMANDS)
