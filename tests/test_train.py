"""Training: it learns, writes what it did, and wherever it is stopped goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm import data
from fastlm.config import read_toml
from fastlm.models import (
    GPT,
    BERTConfig,
    BERTForMaskedLM,
    BERTForSequenceClassification,
    GPTConfig,
)
from fastlm.models.pretrained import read_tensors, write_tensors
from fastlm.train import Evaluation, NonFiniteError, TrainConfig, Trainer, checkpoint
from fastlm.train.estimate import Estimate, saved_bytes
from fastlm.train.memory import kept_memory
from fastlm.train.optimizers import build_optimizers, step_unless

MODEL = GPTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=2, num_heads=2, dropout=0.1)
CONFIG = TrainConfig(
    steps=12, batch_size=2, seq_len=16, warmup_steps=3, log_every=4, eval_every=6, save_every=5, device="cpu"
)


SHARD = "training/shard-00001-model-00001-of-00001.safetensors"
LEFT = ["best", "checkpoint-12", "config.toml", "loss.png", "metrics.jsonl"]


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
    train_step = trainer.train_step

    def stepped(lr_factor):
        train_step(lr_factor)
        if trainer.step == step:
            signal.raise_signal(number)

    trainer.train_step = stepped


def losses(folder) -> list[dict]:
    """The lines of metrics.jsonl without what is timed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory")} for line in lines
    ]


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
        for batch in data.CausalLM(tokens(200, seed=1), 16).eval_batches(1):
            logits = run.model(batch["input_ids"]).logits.double()
            total += nn.functional.cross_entropy(logits[0], batch["shift_labels"][0], reduction="sum").item()
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


@pytest.mark.parametrize(
    "name", ["Adam", "adamax", "sgd", "rmsprop", "radam", "nadam", "adagrad", "adafactor", "rprop"]
)
def test_any_optimizer_of_torch_by_its_name_learns_and_goes_on_after_an_interruption(tmp_path, name):
    config = dataclasses.replace(CONFIG, optimizer=name, lr=1e-2)
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    assert type(whole.optimizers[name.lower()]).__name__.lower() == name.lower()
    assert whole.metrics.records[-2]["loss"] < whole.metrics.records[0]["loss"]
    first = trainer(tmp_path / "parts", config)
    stop_after(first, 7)
    first.train()
    second = trainer(tmp_path / "parts", config)
    second.resume()
    second.train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_options_of_the_optimizer_reach_it_and_wrong_ones_are_named():
    sgd = dataclasses.replace(CONFIG, optimizer="sgd", optimizer_options={"momentum": 0.5, "nesterov": True})
    assert trainer(config=sgd).optimizers["sgd"].param_groups[0]["momentum"] == 0.5
    muon = dataclasses.replace(CONFIG, optimizer_options={"ns_steps": 2})
    assert trainer(config=muon).optimizers["muon"].param_groups[0]["ns_steps"] == 2
    wrong = dataclasses.replace(CONFIG, optimizer_options={"beta": 1})
    with pytest.raises(ValueError, match=r"optimizer_options of muon must be of .*, got beta"):
        build_optimizers(GPT(MODEL), wrong)


def same(one: Trainer, two: Trainer, **tolerance) -> None:
    """After one step of each."""
    for run in (one, two):
        run.train_step()
    for p, q in zip(one.parameters, two.parameters, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


SGD = dataclasses.replace(
    CONFIG, optimizer="sgd", lr=1.0, warmup_steps=0, weight_decay=0.0, grad_clip=0.0, batch_size=7, dtype="fp32"
)
PLAIN = dataclasses.replace(MODEL, dropout=0.0)


@pytest.mark.parametrize("micro", [1, 2, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro):
    whole = trainer(config=SGD, model=PLAIN)
    same(whole, trainer(config=dataclasses.replace(SGD, micro_batch_size=micro), model=PLAIN), rtol=1e-4, atol=1e-6)
    assert whole._sums[0].item() > 3  # the loss is not divided


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_count_by_their_labels(micro):
    random = np.random.default_rng(0)
    examples = []
    for n in (3, 14, 1, 9, 16, 2, 5):
        ids = random.integers(31, size=n)
        examples.append({"input_ids": ids, "labels": np.where(random.random(n) < 0.5, ids, -100)})
    shape = BERTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=1, num_heads=2)
    sides = []
    for size in (None, micro):
        torch.manual_seed(0)
        config = dataclasses.replace(SGD, micro_batch_size=size)
        sides.append(Trainer(BERTForMaskedLM(shape), config, data.Labelled(examples), quiet=True))
    same(*sides, rtol=1e-4, atol=1e-6)


def test_a_step_without_any_label_changes_nothing_and_is_counted():
    unlabelled = data.Labelled([{"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}])
    shape = BERTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=1, num_heads=2)
    run = Trainer(BERTForMaskedLM(shape), dataclasses.replace(SGD, steps=2, log_every=2), unlabelled, quiet=True)
    before = [p.detach().clone() for p in run.parameters]
    run.train()
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, before, strict=True))
    assert run.metrics.records[-1]["skipped"] == 2


def test_activation_checkpointing_changes_no_gradient_and_keeps_less():
    config = dataclasses.replace(SGD, checkpointing=True)
    kept = []
    for model in (MODEL, dataclasses.replace(MODEL, dropout=0.0)):
        plain, checked = trainer(config=SGD, model=model), trainer(config=config, model=model)
        inputs = plain.train_data.batch(0, 7, 0)
        kept.append([saved_bytes(run.model, inputs, run.config.autocast()) for run in (plain, checked)])
        torch.manual_seed(5), plain.train_step()
        torch.manual_seed(5), checked.train_step()
        for p, q in zip(plain.parameters, checked.parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert all(less < 0.5 * more for more, less in kept)


def test_a_compiled_model_learns_the_same():
    compiled = dataclasses.replace(SGD, compile=True)
    same(trainer(config=SGD, model=PLAIN), trainer(config=compiled, model=PLAIN), rtol=1e-4, atol=1e-5)


def test_fp16_scales_the_loss_and_goes_on_after_an_interruption(tmp_path):
    config = dataclasses.replace(CONFIG, dtype="fp16", optimizer="adamw")
    whole = trainer(tmp_path / "whole", config)
    whole.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)  # overflows at first
    weights = [p.detach().clone() for p in whole.parameters]
    whole.train_step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters, weights, strict=True))
    assert whole.scaler.get_scale() == 2.0**39
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    assert whole.metrics.records[-2]["loss"] < whole.metrics.records[0]["loss"]
    exact = trainer(config=dataclasses.replace(config, dtype="fp32"))
    exact.train()
    assert whole.metrics.records[0]["grad_norm"] == pytest.approx(exact.metrics.records[0]["grad_norm"], rel=0.02)
    first = trainer(tmp_path / "parts", config)
    stop_after(first, 7)
    first.train()
    second = trainer(tmp_path / "parts", config)
    second.resume()
    second.train()
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_of_a_classifier_the_evaluation_has_accuracy_precision_recall_and_f1():
    random = np.random.default_rng(0)
    examples = [{"input_ids": random.integers(31, size=5), "labels": int(i % 3 == 0)} for i in range(50)]
    model = BERTForSequenceClassification(
        BERTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=1, num_heads=2, num_labels=3)
    )
    learnt = data.Labelled(examples, num_classes=3)
    config = dataclasses.replace(CONFIG, steps=60, lr=1e-2, optimizer="adamw", batch_size=8, eval_every=60)
    run = Trainer(model, config, learnt, learnt, quiet=True)
    found = run.train()
    predicted = torch.cat([model(**inputs).logits.argmax(-1) for inputs in learnt.eval_batches(7)]).tolist()
    labels = [example["labels"] for example in examples]
    assert found.confusion == [
        [sum(1 for p, q in zip(labels, predicted, strict=True) if (p, q) == (a, b)) for b in range(3)] for a in range(3)
    ]
    assert found.accuracy == pytest.approx(sum(p == q for p, q in zip(labels, predicted, strict=True)) / 50)
    assert found.accuracy > 0.7
    assert found.perplexity is None
    scores = []
    for c in sorted({*labels, *predicted}):
        right = sum(p == q == c for p, q in zip(labels, predicted, strict=True))
        scores.append(
            (
                right / max(1, predicted.count(c)),
                right / max(1, labels.count(c)),
                2 * right / (predicted.count(c) + labels.count(c)),
            )
        )
    means = [sum(each) / len(scores) for each in zip(*scores, strict=True)]
    assert [found.precision, found.recall, found.f1] == pytest.approx(means)
    assert "accuracy" in str(found)
    assert run.metrics.records[-1]["val_f1"] == found.f1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_nothing(schedule):
    config = TrainConfig(steps=100, warmup_steps=9, schedule=schedule)
    factors = [config.lr_factor(step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(one > two for one, two in itertools.pairwise(factors[9:]))
    assert factors[100] == pytest.approx(0)
    middle = {"linear": (100 - 55) / 91, "cosine": 0.5 * (1 + math.cos(math.pi * 46 / 91))}[schedule]
    assert factors[55] == pytest.approx(middle)


def test_wsd_stays_up_and_falls_at_the_end_and_constant_stays():
    config = TrainConfig(steps=100, warmup_steps=9, schedule="wsd", decay_steps=10, min_lr=0.2)
    factors = [config.lr_factor(step) for step in range(101)]
    assert factors[9:91] == [1.0] * 82
    assert factors[90:] == pytest.approx([1 - 0.08 * i for i in range(11)])
    assert (
        TrainConfig(steps=100, schedule="wsd").lr_factor(79)
        == 1.0
        > TrainConfig(steps=100, schedule="wsd").lr_factor(81)
    )
    assert TrainConfig(steps=100, warmup_steps=9, schedule="constant").lr_factor(99) == 1.0


def test_every_optimizer_follows_the_schedule_and_the_gradient_is_clipped(monkeypatch):
    run = trainer(config=dataclasses.replace(CONFIG, grad_clip=1e-3))
    seen = []
    muon, adamw = run.optimizers.values()

    def stepped(skip, optimizer, divisor):
        if optimizer is muon:
            seen.append((torch.cat([p.grad.flatten() for p in run.parameters]) / divisor).norm().item())
        step_unless(skip, optimizer, divisor)

    monkeypatch.setattr("fastlm.train.trainer.step_unless", stepped)
    run.train()
    assert seen == pytest.approx([1e-3] * 12, rel=0.01)
    assert run.metrics.records[0]["grad_norm"] > 0.01  # before it was clipped
    last = CONFIG.lr_factor(11)
    assert muon.param_groups[0]["lr"] == pytest.approx(CONFIG.muon_lr * last)
    assert adamw.param_groups[0]["lr"] == pytest.approx(CONFIG.lr * last)
    assert run.metrics.records[-2]["lr"] == pytest.approx(CONFIG.lr * last)


# --- what a run leaves


def test_a_run_leaves_its_configuration_metrics_curves_and_one_checkpoint(tmp_path):
    folder = tmp_path / "runs" / "one"
    run = trainer(folder, baselines={"n-gram": 2.0}, source={"path": "here", "column": None})
    evaluation = run.train()
    assert sorted(p.name for p in folder.iterdir()) == LEFT
    config = read_toml(folder / "config.toml")
    assert TrainConfig.from_dict(config["train"]) == CONFIG
    assert config["model"].pop("type") == "GPT"
    assert GPTConfig.from_dict(config["model"]) == MODEL
    assert config["data"] == {"path": "here"}
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


def test_the_last_checkpoints_and_the_best_stay(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, eval_every=2, save_every=2, keep=2))
    fixed = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    run.evaluate = lambda: Evaluation(next(fixed))
    run.train()
    assert sorted(path.name for path in checkpoint._checkpoints(tmp_path)) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-4",
    ]
    assert (tmp_path / "best").resolve().name == "checkpoint-4"
    GPT.from_pretrained(tmp_path / "best")


def test_an_evaluation_that_is_no_number_is_not_the_best(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, eval_every=3, save_every=0))
    fixed = iter([math.nan, 2.0, math.nan, 2.6])
    run.evaluate = lambda: Evaluation(next(fixed))
    run.train()
    assert (tmp_path / "best").resolve().name == "checkpoint-6"


def test_a_better_evaluation_is_saved_between_checkpoints(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, eval_every=3, save_every=0))
    fixed = iter([3.0, 2.0, 2.5, 2.6])
    run.evaluate = lambda: Evaluation(next(fixed))
    run.train()
    assert sorted(path.name for path in checkpoint._checkpoints(tmp_path)) == ["checkpoint-12", "checkpoint-6"]
    assert (tmp_path / "best").resolve().name == "checkpoint-6"


def test_a_run_stops_when_its_patience_is_over_and_resumes_to_its_result(tmp_path):
    config = dataclasses.replace(CONFIG, eval_every=2, save_every=0, patience=2)
    run = trainer(tmp_path, config)
    fixed = iter([3.0, 2.0, 2.5, 2.6, 1.0, 1.0])
    run.evaluate = lambda: Evaluation(next(fixed))
    assert run.train().loss == 2.6
    assert run.step == 8
    assert not run.interrupted
    again = trainer(tmp_path, config)
    again.resume()
    assert again.train().loss == 2.6
    assert again.step == 8


def test_tensorboard_gets_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trainer(tmp_path, dataclasses.replace(CONFIG, tensorboard=True))
    run.train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [record for record in run.metrics.records if "loss" in record]
    assert [event.step for event in events.Scalars("loss")] == [record["step"] for record in logged]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([record["loss"] for record in logged])
    assert "val_loss" in events.Tags()["scalars"]


def test_the_estimate_is_what_a_step_keeps_and_does():
    run = trainer(config=dataclasses.replace(CONFIG, dtype="fp32"))
    inputs = run.train_data.batch(0, 2, 0)
    before = torch.get_rng_state()
    found = Estimate.of(run.model, inputs, run.optimizers, run.config.autocast(), tokens=320, seq_len=16)
    assert torch.equal(torch.get_rng_state(), before)
    run.train_step()
    state = [
        t for each in run.optimizers.values() for fields in each.state.values() for t in fields.values() if t.dim()
    ]
    assert found.optimizer == sum(t.nbytes for t in state)
    assert found.weights == found.gradients == sum(p.nbytes for p in run.parameters)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.model.train()(**inputs).loss
    own = {p.untyped_storage()._cdata for p in run.parameters}
    assert found.activations == pytest.approx(
        sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in own), rel=0.02
    )
    del loss
    with FlopCounterMode(display=False) as counter, fastlm.use_backend("native"):
        run.model(**inputs).loss.backward()
    causal = 6 * MODEL.num_layers * MODEL.hidden_size * 16  # a counter takes every token to see every other
    assert found.flops_per_token == pytest.approx(counter.get_total_flops() / 32 - causal, rel=0.1)


def test_memory_that_is_freed_stays_while_a_model_trains():
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(1 << 24)  # more than glibc keeps by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_memory(torch.device("cpu")):
        faults()
        kept = faults()
    assert faults() > 1000 + 20 * kept  # as it was before


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
    for name in ("model.safetensors", SHARD):
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
    other = trainer(tmp_path, dataclasses.replace(CONFIG, steps=20, lr=0.5), source={"path": "elsewhere"})
    with pytest.raises(ValueError) as caught:
        other.resume()
    message = str(caught.value)
    assert message.endswith(
        "is of another run: data path was None and is 'elsewhere'; train steps was 12 and is 20; "
        "train lr was 0.012 and is 0.5"
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


@pytest.mark.parametrize("name", ["model.safetensors", SHARD, "training.json"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, name):
    trainer(tmp_path).train()
    path = tmp_path / "checkpoint-12" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"checkpoint-12/{name.split('/')[0]} is damaged") as caught:
        trainer(tmp_path).resume()
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}$"):
        trainer(tmp_path).resume()


def test_state_of_another_shape_is_refused(tmp_path):
    trainer(tmp_path).train()
    path = tmp_path / "checkpoint-12" / SHARD
    tensors = read_tensors(path)
    tensors["adamw.final_norm.bias.exp_avg"] = torch.zeros(3)
    write_tensors(tensors, path)
    with pytest.raises(ValueError, match=r"final_norm.bias.exp_avg has shape \(3,\) instead of \(16,\)"):
        trainer(tmp_path).resume()


def test_a_checkpoint_of_the_time_before_there_were_several_processes_is_gone_on_with(tmp_path):
    """The state in one file beside the model, with that of the random generators, and fewer fields."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    stop_after(first, 7)
    first.train()
    folder = tmp_path / "parts/checkpoint-7"
    write_tensors(read_tensors(folder / SHARD) | {"random.cpu": torch.get_rng_state()}, folder / "training.safetensors")
    shutil.rmtree(folder / "training")
    saved = json.loads((folder / "training.json").read_text())
    del saved["shards"], saved["description"]["train"]["parallel"]
    (folder / "training.json").write_text(json.dumps(saved))
    second = trainer(tmp_path / "parts")
    second.resume()
    second.train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def broken_at(run: Trainer, steps, when: str = "loss") -> None:
    """The loss, or the gradient alone, is not a number in these steps."""
    forward = run._forward

    def broken(**inputs):
        output = forward(**inputs)
        if run.step not in steps or not torch.is_grad_enabled():
            return output
        bad = output.loss * math.nan if when == "loss" else output.loss + (run.model.head_weight.sum() * 0).sqrt()
        return output._replace(loss=bad)

    run._forward = broken


def weights_and_state(run: Trainer) -> list[torch.Tensor]:
    state = [t for each in run.optimizers.values() for fields in each.state.values() for t in fields.values()]
    return [tensor.detach().clone() for tensor in (*run.model.parameters(), *state)]


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd", "rmsprop", "nadam"])
@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_nothing_and_is_counted(when, optimizer):
    run = trainer(config=dataclasses.replace(CONFIG, optimizer=optimizer))
    broken_at(run, (6,), when)
    train_step, seen = run.train_step, {}

    def stepped(lr_factor):
        train_step(lr_factor)
        seen[run.step] = weights_and_state(run)

    run.train_step = stepped
    run.train()
    assert all(torch.equal(one, two) for one, two in zip(seen[6], seen[7], strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(seen[7], seen[8], strict=True))
    lines = [line for line in run.metrics.records if "lr" in line]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)


def test_a_first_step_that_is_not_finite_leaves_the_weights_and_a_state_that_serves():
    run = trainer(config=dataclasses.replace(CONFIG, optimizer="rmsprop"))
    before = [p.detach().clone() for p in run.parameters]
    broken_at(run, (0,))
    run.train_step(1.0)
    assert all(torch.equal(one, two) for one, two in zip(run.parameters, before, strict=True))
    run.train_step(1.0)
    assert all(tensor.isfinite().all() for tensor in weights_and_state(run))


def test_many_such_steps_in_a_row_stop_and_keep_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(CONFIG, log_every=2, max_skipped=3))
    broken_at(run, (2, 3, 5, 6, 7))
    with pytest.raises(NonFiniteError, match=r"last 3 steps, up to step 8;.*the last checkpoint is .*checkpoint-6"):
        run.train()
    weights = read_tensors(tmp_path / "checkpoint-6" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_steps_that_were_skipped_are_told(capsys):
    run = trainer(quiet=False)
    broken_at(run, (1, 2))
    run.train()
    assert "step 4: 2 of the last 4 steps skipped, loss or gradient not finite" in capsys.readouterr().out


# --- kills


KILLS = {
    "while the model is written": ("fastlm.models.pretrained", "write_tensors"),
    "while the optimizers are written": ("torch.distributed.checkpoint", "save"),
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
        if name == "save":
            options["storage_writer"].path.mkdir()
            (options["storage_writer"].path / "shard.safetensors").write_bytes(b"half of it")
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
    assert sorted(p.name for p in tmp_path.iterdir()) == LEFT


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    stop_after(run, 3)
    run.train()

    def full(*args, **options):
        raise OSError("no space left")

    before = sorted(p.name for p in tmp_path.iterdir())
    run.step = 4
    monkeypatch.setattr("safetensors.torch.save", full)  # as torch.distributed.checkpoint calls it
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
        ("lr", -1.0, "lr must be at least 0 and finite, got -1.0"),
        ("lr", math.nan, "lr must be at least 0 and finite, got nan"),
        ("dtype", "fp8", "dtype must be one of 'auto', 'bf16', 'fp16', 'fp32', got 'fp8'"),
        ("optimizer", "sdg", r"optimizer must be one of .*sgd.*; did you mean sgd\?, got 'sdg'"),
        ("optimizer", "lbfgs", "optimizer must be one of .*, got 'lbfgs'"),
        ("micro_batch_size", 0, "micro_batch_size must be at least 1, or None, got 0"),
        ("schedule", "up", "schedule must be one of 'linear', 'cosine', 'constant', 'wsd', got 'up'"),
        ("min_lr", 2.0, "min_lr must be from 0 to 1, got 2.0"),
        ("optimizer_options", 3, "optimizer_options must be a table of names and values, got 3"),
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
    with pytest.raises(ValueError, match="CausalLM: the text is too small: 16 tokens, seq_len 16 needs at least 17"):
        Trainer(GPT(MODEL), CONFIG, tokens(), tokens(16), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['rich'] = None; import fastlm.train"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.endswith("ImportError: fastlm.train needs the rich library: pip install fastlm[train]\n")
