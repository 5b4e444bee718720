"""Several processes train what one does: the same losses, weights and evaluations, however they share the work."""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastlm import cli, data
from fastlm.models import (
    GPT,
    BERTConfig,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    GPTConfig,
)
from fastlm.train import NonFiniteError, TrainConfig, Trainer, checkpoint
from fastlm.train.config import OPTIMIZERS
from fastlm.train.parallel import Processes, local, whole

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

SECONDS = 120  # after which processes that wait for each other are killed
GPT_SHAPE = GPTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=2, num_heads=2)
BERT_SHAPE = BERTConfig(vocab_size=31, max_seq_len=16, hidden_size=16, num_layers=2, num_heads=2)
SPECIAL = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3}
CONFIG = TrainConfig(
    steps=10, batch_size=8, micro_batch_size=2, seq_len=16, warmup_steps=3, log_every=1, eval_every=5, save_every=5,
    device="cpu", dtype="fp32", optimizer="adamw",
)  # fmt: skip
KINDS = ("ddp", "fsdp")


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 31, size=n).astype(np.uint16)


def sparse() -> list[dict]:
    """Examples with labels in every eighth alone: whole micro-batches, and whole processes' shares, have none."""
    random = np.random.default_rng(0)
    rows = [random.integers(4, 31, size=3 + i % 14) for i in range(64)]
    return [{"input_ids": ids, "labels": np.where(i % 8 == 0, ids, -100)} for i, ids in enumerate(rows)]


def trainer(objective: str = "gpt", folder=None, dropout: float = 0.0, **options) -> Trainer:
    """The same in every process."""
    config = dataclasses.replace(CONFIG, **options)
    torch.manual_seed(1)
    bert, gpt = (dataclasses.replace(shape, dropout=dropout) for shape in (BERT_SHAPE, GPT_SHAPE))
    learn, test = tokens(700), tokens(200, 1)
    if objective == "gpt":
        return Trainer(GPT(gpt), config, learn, test, folder=folder, eval_bytes=300, quiet=True)
    masked = {"special": SPECIAL, "vocab_size": 31, "next_sentence": objective == "pretraining"}
    if objective in ("masked", "pretraining"):
        parts = [data.MaskedLM(part, 16, **masked) for part in (learn, test)]
        model = (BERTForPreTraining if objective == "pretraining" else BERTForMaskedLM)(bert)
    elif objective == "sparse":
        parts, model = [data.Labelled(sparse()), data.Labelled(sparse()[:21])], BERTForMaskedLM(bert)
    else:
        rows = [{"input_ids": tokens(2 + i % 9, i).astype(int), "labels": i % 3} for i in range(50)]
        parts = [data.Labelled(rows, num_classes=3), data.Labelled(rows[:21], num_classes=3)]
        model = BERTForSequenceClassification(dataclasses.replace(bert, num_labels=3))
    return Trainer(model, config, *parts, folder=folder, quiet=True)


def curve(run: Trainer) -> dict[str, list]:
    """What a run recorded, without what is timed."""
    names = ("loss", "grad_norm", "skipped", "val_loss", "val_f1")
    return {name: [record.get(name) for record in run.metrics.records if name in record] for name in names}


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(p).detach().clone() for name, p in run.model.named_parameters()}


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], **tolerance) -> None:
    """But for the biases of keys: their gradients are nothing but rounding, which Adam and others make large."""
    for name, weight in one.items():
        rows = [0, 2] if name.endswith("qkv.bias") else [0]
        parts = (each.view(3 if len(rows) == 2 else 1, -1)[rows] for each in (weight, two[name]))
        torch.testing.assert_close(*parts, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def stop_in(run: Trainer, step: int, rank: int = 1) -> None:
    """One of the processes alone receives a signal in that step."""
    train_step = run.train_step

    def stepped(lr_factor):
        train_step(lr_factor)
        if run.step == step and run.processes.rank == rank:
            signal.raise_signal(signal.SIGTERM)

    run.train_step = stepped


def broken_in(run: Trainer, steps, rank: int = 1) -> None:
    """In one of the processes alone the loss is not a number in these steps."""
    forward = run._forward

    def broken(**inputs):
        output = forward(**inputs)
        if run.step not in steps or run.processes.rank != rank or not torch.is_grad_enabled():
            return output
        return output._replace(loss=output.loss * math.nan)

    run._forward = broken


# --- what runs in processes: functions of a folder, whose results the tests read there

RUNS = {
    **{f"{what}-adamw": (what, {}) for what in ("gpt", "masked", "pretraining", "sparse", "classes")},
    "gpt-muon": ("gpt", {"optimizer": "muon"}),
    "gpt-sgd": ("gpt", {"optimizer": "sgd", "lr": 0.5}),
    "gpt-checkpointing": ("gpt", {"checkpointing": True}),
    "gpt-fp16": ("gpt", {"dtype": "fp16"}),
    "gpt-whole": ("gpt", {"micro_batch_size": None}),
}


def curves(folder: Path) -> None:
    for name, (objective, options) in RUNS.items():
        for kind in KINDS if dist.is_initialized() else KINDS[:1]:
            run = trainer(objective, parallel=kind, **options)
            evaluation = run.train()
            found = {"curve": curve(run), "weights": weights(run), "evaluation": evaluation.to_dict()}
            torch.save(found, folder / f"{name}-{kind}-{run.processes.count}-{run.processes.rank}.pt")


def stopped(folder: Path) -> None:
    """Runs with dropout that one process's signal stops, and runs that nothing does."""
    for kind in KINDS:
        options = {"parallel": kind, "dropout": 0.2}
        full = trainer(folder=folder / f"{kind}-full", **options)
        full.train()
        first = trainer(folder=folder / f"{kind}-parts", **options)
        stop_in(first, 4)
        first.train()
        assert first.interrupted
        assert first.step == 4
        second = trainer(folder=folder / f"{kind}-parts", **options)
        torch.manual_seed(first.processes.rank)
        second.resume()
        assert second.step == 4
        second.train()
        for one, two in zip(weights(full).values(), weights(second).values(), strict=True):
            assert torch.equal(one, two)
        if first.processes.first:
            assert curve(second) == curve(full)


def parts_of_matrix(folder: Path) -> None:
    """The beginning of runs that others end."""
    for kind in KINDS if dist.is_initialized() else ("one",):
        for optimizer in ("adamw", "muon"):
            run = trainer(folder=folder / f"{kind}-{optimizer}", **matrix_options(kind, optimizer))
            stop_in(run, 5, rank=0)
            run.train()


def matrix_options(kind: str, optimizer: str) -> dict:
    return {"optimizer": optimizer, "parallel": kind.replace("one", "ddp")}


def rest_of_matrix(folder: Path) -> None:
    """Every beginning in `folder`, ended in every way that there is here."""
    for kind in KINDS if dist.is_initialized() else ("one",):
        for begun in sorted(path.name for path in folder.iterdir() if path.is_dir()):
            optimizer = begun.partition("-")[2]
            run = trainer(folder=folder / begun, **matrix_options(kind, optimizer))
            run._save = lambda: None  # the next one is to begin there too
            run.resume()
            assert run.step == 5
            run.metrics._path = None
            run.train()
            found = (curve(run), weights(run))
            if run.processes.first:
                torch.save(found, folder / f"{begun}-{kind}.pt")


def decisions(folder: Path) -> None:
    """What all processes must decide alike."""
    rank = dist.get_rank()
    for kind in KINDS:
        for optimizer in ("adamw", "muon", "sgd"):
            run, seen = trainer(parallel=kind, optimizer=optimizer, log_every=5), {}
            broken_in(run, (3, 4))
            step = run.train_step

            def stepped(factor, run=run, seen=seen, step=step):
                step(factor)
                seen[run.step] = weights(run)

            run.train_step = stepped
            run.train()
            for one, two in ((3, 4), (4, 5)):
                assert all(torch.equal(seen[one][name], seen[two][name]) for name in seen[one])
            assert not all(torch.equal(seen[5][name], seen[6][name]) for name in seen[5])
            assert curve(run)["skipped"] == [2]
        many = trainer(parallel=kind, max_skipped=2, folder=folder / f"many-{kind}", save_every=1, eval_every=0)
        broken_in(many, range(4, 10))
        with pytest.raises(NonFiniteError, match=r"last 2 steps, up to step 6;.*the last checkpoint is .*checkpoint-5"):
            many.train()
        unlabelled = data.Labelled([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8)
        config = dataclasses.replace(CONFIG, parallel=kind, steps=2, log_every=2, eval_every=0)
        none = Trainer(BERTForMaskedLM(BERT_SHAPE), config, unlabelled, quiet=True)
        before = weights(none)
        none.train()
        assert curve(none)["skipped"] == [2]
        assert all(torch.equal(one, two) for one, two in zip(before.values(), weights(none).values(), strict=True))
        early = trainer(parallel=kind, patience=1, eval_every=1, lr=0.0, folder=folder / f"early-{kind}")
        early.train()
        assert early.step == 2
        # Fewer batches than processes, and a model that differs between them until the first one's is everyone's.
        torch.manual_seed(rank)
        config = dataclasses.replace(CONFIG, parallel=kind)
        few = Trainer(GPT(GPT_SHAPE), config, tokens(700), tokens(20), quiet=True)
        torch.manual_seed(0)
        alike = GPT(GPT_SHAPE)
        for name, weight in weights(few).items():
            assert torch.equal(weight, alike.get_parameter(name))
        assert math.isfinite(few.evaluate().loss)


def masks(folder: Path) -> None:
    """With the same batch in both, dropout alone makes the losses of the two differ."""
    run = trainer(dropout=0.5, batch_size=2, micro_batch_size=1)
    run.train_data.batch = lambda start, stop, seed: data.CausalLM(tokens(700), 16).batch(0, 1, 0)
    found, forward = [], run._forward

    def forwarded(**inputs):
        output = forward(**inputs)
        found.append(output.loss.item())
        return output

    run._forward = forwarded
    run.train_step(0.0), run.train_step(0.0)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def optimizers(folder: Path) -> None:
    """Every optimizer of torch with weights that are shared out: as with whole ones, or refused."""
    for name in OPTIMIZERS:
        options = {"optimizer": name, "steps": 3, "eval_every": 0, "lr": 1e-2}
        if name in ("adafactor", "rprop"):
            with pytest.raises(ValueError, match=f"parallel must be ddp with optimizer {name}"):
                trainer(parallel="fsdp", **options)
            continue
        one, two = trainer(parallel="fsdp", **options), trainer(parallel="ddp", **options)
        broken_in(one, (1,)), broken_in(two, (1,))
        one.train(), two.train()
        tolerance = {"rtol": 0.05, "atol": 2e-3} if name == "muon" else {"rtol": 1e-3, "atol": 2e-5}
        close(weights(one), weights(two), **tolerance)
        assert all(local(p) is not p and local(p).numel() < p.numel() for p in one.parameters)


def mistakes(folder: Path) -> None:
    """One clear error in every process, and no process that waits for another."""
    with pytest.raises(ValueError, match="batch_size must be a multiple of the number of processes, 2, got 3"):
        trainer(batch_size=3)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        trainer(folder=folder / "nothing").resume()
    run = trainer(folder=folder / "run", steps=5, parallel="fsdp")
    run.train()
    with pytest.raises(FileExistsError, match="holds a run already"):
        trainer(folder=folder / "run").train()
    with pytest.raises(ValueError, match="is of another run: train steps was 5 and is 10"):
        trainer(folder=folder / "run").resume()
    last = folder / "run" / "checkpoint-5"
    shards = json.loads((last / "training.json").read_text())["shards"]
    assert len(shards) == 2
    for name in ("model.safetensors", "training.json", shards[1]):
        content = (last / name).read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            (last / name).write_bytes(content[:-9])
        dist.barrier()
        with pytest.raises(ValueError, match=f"{name.split('/')[0]} is damaged"):
            trainer(folder=folder / "run", steps=5).resume()
        dist.barrier()
        if dist.get_rank() == 0:
            (last / name).unlink()
        dist.barrier()
        with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}"):
            trainer(folder=folder / "run", steps=5).resume()
        dist.barrier()
        if dist.get_rank() == 0:
            (last / name).write_bytes(content)
    run.step = 6
    for what, rank in (("safetensors.torch.save", 1), ("fastlm.models.pretrained.write_tensors", 0)):
        with pytest.MonkeyPatch.context() as patch:

            def full(*args, **options):
                raise OSError("no space left")

            if dist.get_rank() == rank:
                patch.setattr(what, full)
            with pytest.raises(OSError, match="no space left"):
                run._save()
        dist.barrier()
        assert checkpoint.latest(folder / "run") == last
        assert not list((folder / "run").glob(".partial*"))
    run._save()
    dist.barrier()
    assert checkpoint.latest(folder / "run").name == "checkpoint-6"


def shared(folder: Path) -> None:
    """The arithmetic of sharing."""
    rank, one = dist.get_rank(), Processes()
    assert [one.sum(rank, 5), one.any(rank == 1), one.any(False)] == [[1, 10], True, False]
    shares = [("a", True), ("c", True), ("e", True)], [("b", True), ("d", True), ("e", False)]
    assert list(one.share("abcde")) == shares[rank]
    assert one.once(lambda: rank) == 0
    with pytest.raises(FileNotFoundError, match="no x"):
        one.once(lambda: (_ for _ in ()).throw(FileNotFoundError("no x")))
    order = one.before_others(lambda: (folder / "made").exists() or (folder / "made").touch())
    assert order is (True if rank else None)
    mine = torch.cat([inputs["input_ids"] for inputs in trainer()._micro_batches()])
    everyone = data.CausalLM(tokens(700), 16).batch(0, 8, 0)["input_ids"]
    assert torch.equal(mine, everyone[4 * rank : 4 * rank + 4])


def compiled(folder: Path) -> None:
    for kind in KINDS:
        runs = [trainer(parallel=kind, compile=compile, steps=3, micro_batch_size=4) for compile in (False, True)]
        for run in runs:
            run.eval_data = None
            run.train()
        one, two = map(curve, runs)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


# --- starting them


def work(folder: Path, seconds: int, rank: int, names: list[str]) -> None:
    faulthandler.dump_traceback_later(seconds - 5)  # says where they wait for each other
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        globals()[name](folder / name)
        dist.barrier()
    dist.destroy_process_group()


def in_two_processes(folder: Path, *names: str, seconds: int = SECONDS) -> None:
    """Call functions of this file, each with a folder of its name."""
    command = [sys.executable, __file__, str(folder), str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen([*command, rank, *names], stderr=subprocess.PIPE, text=True, env=environment) for rank in "01"
    ]
    end = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in started):
            failed = [process for process in started if process.poll()]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
        errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n\n".join(errors)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each of several processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_learn_what_one_does(tmp_path):
    (tmp_path / "curves").mkdir()
    curves(tmp_path / "curves")
    in_two_processes(tmp_path, "shared", "curves")
    for name, kind in itertools.product(RUNS, KINDS):
        alone, first, second = (
            torch.load(tmp_path / "curves" / f"{name}-{of}.pt") for of in ("ddp-1-0", f"{kind}-2-0", f"{kind}-2-1")
        )
        rounding = name.endswith(("muon", "fp16"))  # in 16 bits
        for figure, values in alone["curve"].items():
            same = pytest.approx(values, rel=3e-3 if rounding else 2e-5)
            assert first["curve"][figure] == same, f"{name} {kind} {figure}"
        assert first["curve"] == second["curve"], f"{name} {kind}"
        assert first["evaluation"] == second["evaluation"], f"{name} {kind}"
        assert len(alone["curve"]["loss"]) + len(alone["curve"]["skipped"]) == 10  # of sparse ones some have no labels
        tolerance = {"rtol": 0.05, "atol": 2e-3} if rounding else {"rtol": 1e-3, "atol": 2e-5}
        close(first["weights"], second["weights"], rtol=0, atol=0)
        close(first["weights"], alone["weights"], **tolerance)


def test_a_run_goes_on_with_other_processes_than_it_began_with(tmp_path):
    folder = tmp_path / "rest_of_matrix"
    folder.mkdir()
    (tmp_path / "parts_of_matrix").symlink_to(folder.name)
    parts_of_matrix(folder)
    in_two_processes(tmp_path, "parts_of_matrix", "rest_of_matrix")
    rest_of_matrix(folder)
    for optimizer, begun, ended in itertools.product(("adamw", "muon"), ("one", *KINDS), ("one", *KINDS)):
        expected, _ = torch.load(folder / f"one-{optimizer}-one.pt")
        found, _ = torch.load(folder / f"{begun}-{optimizer}-{ended}.pt")
        assert len(found["loss"]) == 10
        for figure, values in expected.items():
            same = pytest.approx(values, rel=3e-3 if optimizer == "muon" else 2e-5)
            assert found[figure] == same, f"{optimizer} {begun} {ended} {figure}"


def test_a_signal_to_one_process_saves_in_all_and_the_run_goes_on_to_the_last_bit(tmp_path):
    in_two_processes(tmp_path, "stopped", "masks")
    names = sorted(path.name for path in (tmp_path / "stopped/fsdp-parts/checkpoint-10/training").iterdir())
    assert len(names) == 2
    GPT.from_pretrained(tmp_path / "stopped/fsdp-parts/checkpoint-10")
    one, two = (torch.load(tmp_path / "masks" / f"{rank}.pt") for rank in "01")
    assert len({*one, *two}) == 4  # of two processes in two steps, which nothing but dropout tells apart


def test_processes_decide_alike_and_a_mistake_is_one_clear_error_in_all(tmp_path):
    in_two_processes(tmp_path, "decisions", "mistakes")


def test_optimizers_update_weights_that_are_shared_out_as_whole_ones_or_are_refused(tmp_path):
    in_two_processes(tmp_path, "optimizers")


# --- the command


CORPUS = ["mean", "variance", "gradient", "weight", "tensor", "kernel", "stride", "shared"]
TINY = ["--vocab-size=300", "--hidden-size=16", "--num-layers=1", "--num-heads=2", "--seq-len=32", "--batch-size=4"]


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastlm"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTLM_CACHE": str(folder / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *arguments], text=True, cwd=folder, env=environment, **pipes)


def test_the_command_under_torchrun_writes_one_run_that_one_process_goes_on_with(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    text = "\n".join(" ".join(random.choice(CORPUS, 6)) for _ in range(2000))
    (tmp_path / "corpus.txt").write_text(text)
    data_of = ["--data", "corpus.txt", *TINY]
    process = torchrun(tmp_path, "train", "--steps=100000", "--parallel=fsdp", "--dropout=0.1", *data_of)
    metrics, end = tmp_path / "runs/corpus/metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.search(r"stopped and saved at step ([\d,]+); to go on:\n", out)[1].replace(",", ""))
    assert out.endswith("  torchrun --nproc-per-node 2 -m fastlm train --resume --name corpus\n")
    for once in ("stopped and saved", "runs/corpus: from step 0 to", "parameters; memory", "; vocabulary of 300"):
        assert out.count(once) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["corpus"]
    folder = checkpoint.latest(tmp_path / "runs/corpus")
    assert folder.name == f"checkpoint-{step}"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    assert cli.main(["generate", "runs/corpus", "--prompt", "mean", "--max-new-tokens", "3"]) == 0
    train = Trainer.train

    def three_steps(self):
        stop_in(self, self.step + 3, rank=0)
        return train(self)

    monkeypatch.setattr(Trainer, "train", three_steps)
    capsys.readouterr()
    assert cli.main(["train", "--resume"]) == 130
    assert f"stopped and saved at step {step + 3:,}" in capsys.readouterr().out

    process = torchrun(tmp_path, "train", "--name=small", "--steps=3", "--batch-size=3", *data_of[:-1])
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "fastlm: Trainer: batch_size must be a multiple of the number of processes, 2, got 3" in err
    assert not (tmp_path / "runs/small").exists()


def test_processes_that_are_no_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="torchrun started 2 processes, which are no group yet"):
        trainer()


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dataclasses.replace(CONFIG, device="cuda").torch_device() == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device must be one that is here, and torch sees 2 GPUs"):
        dataclasses.replace(CONFIG, device="cuda")


@pytest.mark.proof
def test_a_compiled_model_learns_the_same(tmp_path):
    in_two_processes(tmp_path, "compiled", seconds=600)  # the C++ compiler alone takes 90 where nothing else runs


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
