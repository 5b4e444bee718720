"""Training: it learns, writes what it did, and wherever it is stopped goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastlm import data
from fastlm.models import GPT, GPTConfig
from fastlm.models.pretrained import read_tensors
from fastlm.train import NonFiniteError, TrainConfig, Trainer, checkpoint

MODEL = GPTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=2, num_heads=2, dropout=0.1)
CONFIG = TrainConfig(
    steps=12, batch_size=2, seq_len=16, warmup_steps=3, log_every=4, eval_every=6, save_every=5, device="cpu"
)


def tokens(n: int = 700, seed: int = 0) -> np.ndarray:
    """Each token is a function of the one before, but for a tenth of them."""
    random = np.random.default_rng(seed)
    out = np.zeros(n, dtype=np.uint16)
    for i in range(1, n):
        out[i] = random.integers(31) if random.random() < 0.1 else (3 * out[i - 1] + 7) % 31
    return out


def trainer(folder=None, config: TrainConfig = CONFIG, model: GPTConfig = MODEL, **options) -> Trainer:
    torch.manual_seed(1)
    options = {"quiet": True, "eval_bytes": 500, **options}
    return Trainer(GPT(model), config, tokens(), tokens(200, seed=1), folder=folder, **options)


def stop_after(trainer: Trainer, step: int, number: int = signal.SIGINT) -> None:
    """Have this very process receive a signal while it is in that step."""
    train_step = trainer._train_step

    def stepped(lr_factor):
        train_step(lr_factor)
        if trainer.step == step:
            signal.raise_signal(number)

    trainer._train_step = stepped


def losses(folder) -> list[dict]:
    """The lines of metrics.jsonl without what is timed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


# --- learning


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_learns_what_there_is_to_learn(optimizer, dtype):
    config = dataclasses.replace(CONFIG, steps=100, optimizer=optimizer, dtype=dtype, lr=2e-2, batch_size=4)
    run = trainer(config=config, model=dataclasses.replace(MODEL, dropout=0.0))
    before = run.evaluate().loss
    after = run.train().loss
    assert before == pytest.approx(math.log(31), rel=0.02)
    assert after < 1.2  # the entropy of the source is 0.66


def test_an_evaluation_scores_every_token_once():
    run = trainer()
    found = run.evaluate()
    run.model.eval()
    total = 0.0
    with CONFIG.autocast(), torch.no_grad():
        for x, y in data.eval_batches(run.eval_data, batch_size=1, seq_len=16):
            logits = run.model(x).logits.double()
            total += nn.functional.cross_entropy(logits[0], y[0], reduction="sum").item()
    assert found.loss == pytest.approx(total / 199, rel=2e-3)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss * 199 / math.log(2) / 500)


def test_evaluating_changes_nothing_that_training_depends_on(tmp_path):
    often, never = trainer(tmp_path / "often", dataclasses.replace(CONFIG, eval_every=1)), trainer(tmp_path / "never")
    never.eval_data = None
    often.train(), never.train()
    assert [line for line in losses(tmp_path / "often") if "loss" in line] == losses(tmp_path / "never")


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    run = trainer()
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    matrices = {n for n in names.values() if n.startswith("blocks.") and n.endswith("weight") and "norm" not in n}

    def decays(optimizer):
        groups = optimizer.param_groups
        return {(frozenset(names[p] for p in group["params"]), group["weight_decay"]) for group in groups}

    others = frozenset(names.values()) - matrices
    assert decays(run.optimizers["muon"]) == {(frozenset(matrices), CONFIG.weight_decay)}
    assert decays(run.optimizers["adamw"]) == {(others, 0.0)}
    run = trainer(config=dataclasses.replace(CONFIG, optimizer="adamw"))
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    assert list(run.optimizers) == ["adamw"]
    assert decays(run.optimizers["adamw"]) == {(frozenset(matrices), CONFIG.weight_decay), (others, 0.0)}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_nothing(schedule):
    config = TrainConfig(steps=100, warmup_steps=9, schedule=schedule)
    factors = [config.lr_factor(step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(one > two for one, two in itertools.pairwise(factors[9:]))
    assert factors[100] == pytest.approx(0)
    middle = {"linear": (100 - 55) / 91, "cosine": 0.5 * (1 + math.cos(math.pi * 46 / 91))}[schedule]
    assert factors[55] == pytest.approx(middle)


def test_every_optimizer_follows_the_schedule_and_the_gradient_is_clipped():
    run = trainer(config=dataclasses.replace(CONFIG, grad_clip=1e-3))
    seen = []
    muon, adamw = run.optimizers.values()
    step = muon.step
    muon.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in run.parameters]).norm().item()) or step()
    run.train()
    assert max(seen) == pytest.approx(1e-3, rel=0.01)
    assert run.records[0]["grad_norm"] > 0.01  # before it was clipped
    last = CONFIG.lr_factor(11)
    assert muon.param_groups[0]["lr"] == pytest.approx(CONFIG.muon_lr * last)
    assert adamw.param_groups[0]["lr"] == pytest.approx(CONFIG.lr * last)
    assert run.records[-2]["lr"] == pytest.approx(CONFIG.lr * last)


# --- what a run leaves


def test_a_run_leaves_its_configuration_metrics_curves_and_one_checkpoint(tmp_path):
    folder = tmp_path / "runs" / "one"
    run = trainer(folder, baselines={"n-gram": 2.0}, source={"data": "here"})
    evaluation = run.train()
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-12", "config.json", "loss.png", "metrics.jsonl"]
    config = json.loads((folder / "config.json").read_text())
    assert TrainConfig.from_dict(config["train"]) == CONFIG
    assert GPTConfig.from_dict(config["model"]) == MODEL
    assert config["source"] == {"data": "here"}
    lines = losses(folder)
    assert [(line["step"], "loss" in line) for line in lines] == [
        (4, True),
        (6, False),
        (8, True),
        (12, True),
        (12, False),
    ]
    assert lines[-1]["val_loss"] == evaluation.loss == pytest.approx(evaluation.bits_per_byte * math.log(2) * 500 / 199)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = GPT.from_pretrained(folder / "checkpoint-12")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), run.model.parameters(), strict=True))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainer().train().bits_per_byte > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path).train()
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds a run already"):
        trainer(tmp_path).train()
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_progress_goes_to_plain_lines_where_there_is_no_terminal(capsys):
    trainer(quiet=False).train()
    out = capsys.readouterr().out
    assert "step 12/12   loss " in out
    assert "tokens/s" in out
    assert "step 6: validation loss " in out
    assert "\x1b" not in out


# --- stopping and going on


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (7, signal.SIGTERM), (11, signal.SIGINT)])
def test_an_interrupted_run_goes_on_with_the_same_losses_to_the_last_bit(tmp_path, step, number):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_after(first, step, number)
    first.train()
    assert first.interrupted
    assert first.step == step
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    torch.manual_seed(99)
    second = trainer(tmp_path / "parts")
    second.resume()
    assert second.step == step
    evaluation = second.train()
    assert not second.interrupted
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert evaluation == whole.evaluation
    for name in ("model.safetensors", "training.safetensors"):
        one, two = (read_tensors(tmp_path / run / "checkpoint-12" / name) for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_metrics_after_the_last_checkpoint_are_dropped_when_a_killed_run_goes_on(tmp_path):
    trainer(tmp_path / "whole").train()
    killed = trainer(tmp_path / "killed")
    stop_after(killed, 5)
    killed.train()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9.9}\n{"step": 8, "lo')
    again = trainer(tmp_path / "killed")
    again.resume()
    again.train()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path):
    run = trainer(tmp_path)
    stop_after(run, 2)
    save = run._save
    run._save = lambda: signal.raise_signal(signal.SIGINT) or save()
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert checkpoint.latest(tmp_path) is None


def test_a_finished_run_resumes_to_its_result(tmp_path):
    evaluation = trainer(tmp_path).train()
    again = trainer(tmp_path)
    again.resume()
    assert again.train() == evaluation


def test_resuming_another_configuration_is_refused_with_the_differences(tmp_path):
    trainer(tmp_path).train()
    other = trainer(tmp_path, dataclasses.replace(CONFIG, steps=20, lr=0.5), source={"data": "elsewhere"})
    with pytest.raises(ValueError) as caught:
        other.resume()
    message = str(caught.value)
    assert message.endswith(
        "is of another run: train steps was 12 and is 20; train lr was 0.012 and is 0.5; "
        "source data was None and is 'elsewhere'"
    )


def test_resuming_with_another_model_or_another_text_is_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match="model ffn_size was None and is 8"):
        trainer(tmp_path, model=dataclasses.replace(MODEL, ffn_size=8)).resume()
    changed = tokens()
    changed[300] += 1
    with pytest.raises(ValueError, match=r"tokens train was '700 tokens, .*' and is '700 tokens, "):
        Trainer(GPT(MODEL), CONFIG, changed, tokens(200, seed=1), folder=tmp_path).resume()


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        trainer(tmp_path).resume()


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, name):
    trainer(tmp_path).train()
    path = tmp_path / "checkpoint-12" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} is damaged") as caught:
        trainer(tmp_path).resume()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, when):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, log_every=10))
    loss = run.model.loss

    def broken(x, y):
        value = loss(x, y)
        if run.step != 9:
            return value
        return value * math.nan if when == "loss" else value + (run.model.head_weight.sum() * 0).sqrt()

    run.model.loss = broken
    with pytest.raises(NonFiniteError, match=r"between steps 0 and 10: .*the last checkpoint is .*checkpoint-5"):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-5"]
    weights = read_tensors(tmp_path / "checkpoint-5" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


# --- kills


KILLS = {
    "while the model is written": ("fastlm.models.pretrained", "write_tensors"),
    "while the optimizers are written": ("fastlm.train.checkpoint", "write_tensors"),
    "before the folder gets its name": ("os", "rename"),
    "while the old one is removed": ("shutil", "rmtree"),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_kill_in_the_middle_of_saving_leaves_the_last_checkpoint_whole(tmp_path, when, monkeypatch):
    run = trainer(tmp_path)
    stop_after(run, 3)
    run.train()
    run.step = 4
    module, name = KILLS[when]

    def killed(*args, **options):
        if name == "write_tensors":
            args[1].write_bytes(b"half of it")
        if name == "rmtree":
            if "partial" in str(args[0]):
                return
            os.remove(args[0] / "training.json")
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(sys.modules[module], name, killed)
        try:
            run._save()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    last = 4 if name == "rmtree" else 3
    assert checkpoint.latest(tmp_path).name == f"checkpoint-{last}"
    again = trainer(tmp_path)
    again.resume()
    assert again.step == last
    again.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-12", "config.json", "loss.png", "metrics.jsonl"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    stop_after(run, 3)
    run.train()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    before = sorted(p.name for p in tmp_path.iterdir())
    run.step = 4
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        run._save()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_checkpoint_of_the_highest_step_is_the_latest(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", ".partial-checkpoint-200"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-100"


# --- what it refuses


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", 2.5, "batch_size must be an integer, got 2.5"),
        ("optimizer", "sgd", "optimizer must be one of 'muon', 'adamw', got 'sgd'"),
        ("lr", -1.0, "lr must be at least 0 and finite, got -1.0"),
        ("lr", math.nan, "lr must be at least 0 and finite, got nan"),
        ("dtype", "fp16", "dtype must be one of 'auto', 'bf16', 'fp32', got 'fp16'"),
        ("device", "gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("device", "cuda:99", "device must be one that is here"),
        ("save_every", -1, "save_every must be at least 0, got -1"),
    ],
)
def test_a_configuration_out_of_range_is_refused(field, value, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_an_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"TrainConfig: unknown field 'warm_up_steps'; did you mean warmup_steps\?"):
        TrainConfig.from_dict({"warm_up_steps": 3})


def test_an_integer_will_do_for_a_number():
    assert TrainConfig(lr=1) == TrainConfig(lr=1.0)
    assert type(TrainConfig(lr=1).lr) is float


def test_sequences_longer_than_the_models_are_refused():
    with pytest.raises(ValueError, match="seq_len must be at most the model's max_seq_len, 16, got 17"):
        trainer(config=dataclasses.replace(CONFIG, seq_len=17))


def test_a_text_shorter_than_a_sequence_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="the text is too small: 16 tokens, seq_len 16 needs at least 17"):
        Trainer(GPT(MODEL), CONFIG, tokens(), tokens(16), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['rich'] = None; import fastlm.train"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.endswith("ImportError: fastlm.train needs the rich library: pip install fastlm[train]\n")
