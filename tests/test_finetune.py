"""`fastlm finetune` and `fastlm evaluate`: a classifier that learns, its report, and what can go wrong."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time

import matplotlib.image
import pytest
import torch

from fastlm import cli
from fastlm.config import read_toml
from fastlm.data import load_tokenizer, read_labelled
from fastlm.data.tokenizer import train_tokenizer
from fastlm.folder import model_folder, open_model
from fastlm.models import BERT, BERTConfig, BERTForMaskedLM, BERTForSequenceClassification
from fastlm.train import classify

WORDS = ["mean", "variance", "gradient", "weight", "tensor", "kernel", "stride", "shared", "löss", "行列"]
GOOD, BAD = ["fine", "great", "lovely"], ["poor", "awful", "broken"]


def sentences(n):
    """A text is "good" or "bad" by a word in it."""
    choose = random.Random(0)
    for i in range(n):
        words = [*choose.choices(WORDS, k=choose.randrange(2, 9)), choose.choice(GOOD if i % 3 else BAD)]
        choose.shuffle(words)
        yield " ".join(words) + f" {i}", "good" if i % 3 else "bad"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """reviews.csv, `base`, a folder with a BERT, and runs/reviews, fine-tuned from it."""
    home, patch = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    patch.chdir(home)
    patch.setenv("FASTLM_CACHE", str(home / "cache"))
    rows = list(sentences(400))
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("body", "stars"), *rows, *rows[:7], ("", "good")])
    tokenizer = train_tokenizer("wordpiece", 400, lambda: [text for text, _ in rows])
    torch.manual_seed(0)
    shape = BERTConfig(tokenizer.get_vocab_size(), 32, 32, 2, 2)
    BERTForMaskedLM(shape).save_pretrained(home / "base")
    tokenizer.save(str(home / "base/tokenizer.json"))
    assert finetune("--name", "reviews", "--epochs", "6", "--lr", "3e-3") == 0
    yield home
    patch.undo()


DATA = ("--data", "reviews.csv", "--text-column", "body", "--label-column", "stars")


def finetune(*options):
    return cli.main(["finetune", "--model", "base", *DATA, *options])


def ran(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_classifier_learns_and_its_run_is_complete(home):
    run = home / "runs/reviews"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "loss.png", "tokenizer.json", "report.md", "confusion.png", "best"}
    tables = read_toml(run / "config.toml")
    assert tables["model"]["type"] == "BERTForSequenceClassification"
    assert tables["model"]["path"] == "base"
    assert tables["data"]["label_column"] == "stars"
    assert tables["train"]["steps"] == 60  # 6 epochs of 320 texts, 32 at a time
    assert tables["train"]["warmup_steps"] == 6
    assert tables["train"]["eval_every"] == 5
    assert tables["train"]["seq_len"] == 32  # the model's most
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["val_accuracy"] for record in metrics if "val_accuracy" in record}
    assert max(scores.values()) > 0.97
    best = int((run / "best").resolve().name.removeprefix("checkpoint-"))
    assert scores[best] == max(scores.values())
    assert best == min(step for step, score in scores.items() if score == scores[best])  # the first of the best
    model, tokenizer = open_model(run)
    assert model.other_config["id2label"] == {"0": "bad", "1": "good"}
    ids = torch.tensor([tokenizer.encode(f"[CLS] {word} kernel [SEP]").ids for word in ("broken", "lovely")])
    assert model_folder(run) == run / "best"
    assert ids.shape[0] == 2


def test_the_report_says_what_the_model_does(home):
    run = home / "runs/reviews"
    text = (run / "report.md").read_text()
    config = {"path": str(home / "reviews.csv"), "text_column": "body", "label_column": "stars"}
    from fastlm.data import LabelledConfig, encode_texts, split_labelled

    test = split_labelled(LabelledConfig(**config))["test"]
    model = BERTForSequenceClassification.from_pretrained(run / "best")
    tokenizer = load_tokenizer(run)
    said = []
    for ids in encode_texts(tokenizer, test.texts, 32):
        said.append(model(torch.tensor([ids])).logits.argmax().item())
    right = sum(a == b for a, b in zip(said, test.labels, strict=True))
    assert f"| accuracy | {right / 40:.2%} of 40 texts (95%: " in text
    assert "| always good | 67.50% |" in text
    for n, name in enumerate(test.classes):
        support, hits = test.labels.count(n), sum(a == b == n for a, b in zip(said, test.labels, strict=True))
        assert f"| {name} | {support} | {hits / max(1, said.count(n)):.2%} | {hits / support:.2%} |" in text
    assert "reviews.csv: 320 train, 40 val, 40 test" in text
    assert matplotlib.image.imread(run / "confusion.png").shape[2] == 4


def test_evaluate_repeats_the_figures_of_the_report(home, capsys):
    report = (home / "runs/reviews/report.md").read_text()
    figures = json.loads(ran(capsys, "evaluate", "runs/reviews", "--json"))
    assert f"| accuracy | {figures['accuracy']:.2%} of {figures['texts']} texts" in report
    assert f"| loss | {figures['loss']:.4f} nats |" in report
    assert sum(map(sum, figures["confusion"])) == 40
    text = ran(capsys, "evaluate", "runs/reviews", "--part", "val")
    assert "reviews.csv, val: 40 texts: 13 bad, 27 good" in text
    assert "with 95% confidence; always 'good' would have 67.5%" in text


def test_evaluate_takes_other_texts_and_writes_a_report(home, capsys):
    whole = json.loads(ran(capsys, "evaluate", "runs/reviews/best", *DATA, "--json", "--dtype", "fp32"))
    assert whole["texts"] == 400
    model, tokenizer = open_model(home / "runs/reviews")
    texts = read_labelled(home / "reviews.csv", "body", "stars")
    from fastlm.cli.finetune import encoded
    from fastlm.train import TrainConfig

    log_p = classify.log_probabilities(model, encoded(texts, tokenizer, 32), TrainConfig(dtype="fp32"))
    torch.testing.assert_close(whole["loss"], classify.evaluate_classifier(log_p, torch.tensor(texts.labels)).loss)
    out = ran(capsys, "evaluate", "runs/reviews", *DATA, "--out", "seen/other")
    assert "Report in seen/other/report.md." in out
    assert (home / "seen/other/confusion.png").exists()
    with open("unknown.csv", "w") as file:
        file.write("body,stars\nfine,good\nnone,ugly\n")
    assert cli.main(["evaluate", "runs/reviews", "--data", "unknown.csv"]) == 2
    assert "unknown.csv:3: the label must be of 'bad', 'good', got 'ugly'" in capsys.readouterr().err


def test_a_killed_run_goes_on(home, capsys):
    options = ["--epochs", "400", "--name", "killed", "--save-every", "5", "--eval-every", "40"]
    command = [sys.executable, "-m", "fastlm", "finetune", "--model", "base", *DATA, *options]
    run = home / "runs/killed"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(run.glob("checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert "fastlm finetune --resume --name killed" in out
    step = int(re.search(r"stopped and saved at step ([\d,]+)", out)[1].replace(",", ""))
    (home / "base").rename(home / "gone")  # what it started from is not needed any more
    try:
        out = ran(capsys, "finetune", "--resume", "--name", "killed", "--steps", "4000", "--patience", "1")
    except AssertionError:
        out = capsys.readouterr().err
    finally:
        (home / "gone").rename(home / "base")
    assert "patience was 0 and is 1" in out  # another configuration than that of the run
    (home / "base").rename(home / "gone")
    try:
        with subprocess.Popen(
            [*command[:4], "--resume", "--name", "killed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            lines = []
            while not lines or not lines[-1].startswith("measured"):  # signals are heeded from the first step on
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert any(f"from step {step:,} to 4,000" in line for line in lines)
    finally:
        (home / "gone").rename(home / "base")
    assert process.returncode == 130


def test_from_scratch_and_a_classifier_as_the_start(home, capsys):
    assert "no weights, a new classifier" in ran(
        capsys, "finetune", "--model", "base", "--from-scratch", *DATA, "--steps", "1", "--name", "scratch"
    )
    assert "all weights" in ran(
        capsys, "finetune", "--model", "runs/reviews", *DATA, "--steps", "1", "--name", "on", "--lr", "0"
    )
    torch.testing.assert_close(
        open_model("runs/on")[0].classifier.weight, open_model("runs/reviews")[0].classifier.weight
    )
    with open("three.csv", "w") as file:
        file.write("text,label\n" + "".join(f"text {i},{'abc'[i % 3]}\n" for i in range(30)))
    text = ran(capsys, "finetune", "--model", "runs/reviews", "--data", "three.csv", "--steps", "1", "--dropout", "0.2")
    assert "the weights of BERT, a new classifier" in text
    model, _ = open_model("runs/three")
    assert model.config.num_labels == 3
    assert model.config.dropout == 0.2
    with pytest.warns(UserWarning, match="left out: classifier"):
        body = BERT.from_pretrained(model_folder("runs/reviews")).state_dict()
    assert (body["token_embedding.weight"] - model.bert.token_embedding.weight).abs().max() < 3e-3  # one step
    assert model.other_config["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_nothing_kept_to_validate_or_to_test_on(home, capsys):
    options = [*DATA, "--steps", "2", "--name", "all", "--val-fraction", "0", "--test-fraction", "0"]
    assert "400 texts" in ran(capsys, "finetune", "--model", "base", *options)
    assert not (home / "runs/all/report.md").exists()
    assert model_folder("runs/all").name == "checkpoint-2"
    assert cli.main(["evaluate", "runs/all"]) == 2
    assert "the run kept no texts for test: --part val, or --data" in capsys.readouterr().err


def test_a_configuration_runs_again(home, capsys):
    ran(capsys, "finetune", "runs/reviews/config.toml", "--name", "again")
    first, again = (read_toml(home / "runs" / name / "config.toml") for name in ("reviews", "again"))
    assert first == again
    losses = [
        [json.loads(line).get("loss") for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("reviews", "again")
    ]
    assert losses[0] == losses[1]


def test_two_processes_fine_tune_as_one_does(home):
    options = ["finetune", "--model", "base", *DATA, "--steps", "6", "--eval-every", "3", "--dtype", "fp32"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fastlm", *options, "--name", "two", "--parallel", "fsdp"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("Report in runs/two/report.md") == 1
    assert cli.main([*options, "--name", "one"]) == 0
    one, two = (
        [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for figure in {"loss", "val_loss", "val_accuracy"} & a.keys():
            assert a[figure] == pytest.approx(b[figure], rel=1e-4)


def test_transformers_loads_what_was_fine_tuned(home):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForSequenceClassification.from_pretrained(model_folder("runs/reviews"))
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    ids = torch.tensor([[2, 30, 41, 52, 3]])
    ours, _ = open_model("runs/reviews")
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)


def test_language_models_are_evaluated_too(home, capsys):
    with open("text.jsonl", "w") as file:
        for text, _ in sentences(3000):
            file.write(json.dumps({"text": text}) + "\n")
    small = ["--hidden-size=16", "--num-layers=1", "--num-heads=2", "--seq-len=32", "--batch-size=4", "--steps=3"]
    for kind, name in (("GPT", "gpt"), ("BERTForMaskedLM", "mlm"), ("BERTForPreTraining", "nsp")):
        ran(capsys, "train", "--data", "text.jsonl", "--model.type", kind, "--vocab-size=300", "--name", name, *small)
        last = json.loads((home / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
        own = json.loads(ran(capsys, "evaluate", f"runs/{name}", "--json", "--batch-size", "4").splitlines()[-1])
        assert own["loss"] == pytest.approx(last["val_loss"], rel=1e-3)
        assert "perplexity" in ran(capsys, "evaluate", f"runs/{name}", "--data", "text.jsonl")
    assert "bits_per_byte" in own or name != "gpt"
    assert cli.main(["evaluate", "runs/gpt", "--part", "test"]) == 2
    assert cli.main(["evaluate", "runs/gpt", "--out", "x"]) == 2
    errors = capsys.readouterr().err
    assert "a language model's run keeps texts to validate on, and no others" in errors
    assert "--out is for a classifier, and this is a GPT" in errors


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("finetune --data reviews.csv", "--model must be given"),
        ("finetune --model base", "--data must be given"),
        ("finetune --model nope --data reviews.csv", "no such run or model: nope"),
        ("finetune --model base --data nope.csv", "data: no such file or folder: nope.csv"),
        ("finetune --model base --data reviews.csv", r".*no column 'text' \(text_column\), it has body, stars"),
        ("finetune --model base {} --epochs 0", "epochs must be above 0 and finite, got 0.0"),
        ("finetune --model base {} --seq-len 64", ".*seq_len must be at most the model's max_seq_len, 32, got 64"),
        ("finetune --model base {} --name reviews", "runs/reviews exists: --resume --name reviews goes on with it.*"),
        ("finetune --model base {} --best-by auc", "--train.best-by/--best-by: invalid choice: 'auc' .*"),
        ("finetune --model base {} --val-fraction 0 --best-by f1", "Trainer: best_by = 'f1' needs eval_data .*"),
        (
            "finetune --model base {} --test-fraction 0.7",
            ".*test_fraction must be from 0 to 0.5, got 0.7",
        ),
        ("evaluate base", "--data must be given: base is no run that kept texts to measure it on"),
        ("evaluate nope", "no such run or model: nope"),
        (
            "evaluate runs/reviews --data reviews.csv --part val",
            "--part is of the run's own texts, .*",
        ),
    ],
)
def test_a_mistake_is_one_line(home, capsys, arguments, error):
    before = sorted((home / "runs").iterdir())
    capsys.readouterr()
    assert cli.main(arguments.format(" ".join(DATA)).split()) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.fullmatch(f"fastlm: {error}\n", line), line
    assert sorted((home / "runs").iterdir()) == before


def test_the_report_of_known_predictions(tmp_path):
    said, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 1])
    sure = torch.tensor([0.9, 0.6, 0.8, 0.9, 0.9, 0.9])
    log_p = torch.stack([torch.where(said == n, sure, 1 - sure) for n in range(2)], 1).log()
    texts = ["a", "a | b", "<c>", "d", "e", "f"]
    text = classify.write_report(tmp_path, "Known", {"model": "none"}, texts, labels, log_p, ["no", "yes"]).read_text()
    assert "| no | 1 | 33.33% | 100.00% | 50.00% |" in text  # precision, recall, F1
    assert "| yes | 5 | 100.00% | 60.00% | 75.00% |" in text
    assert text.split("| with |\n|---|---|---|---|\n")[1] == (
        "| &lt;c> | yes | no | 80.0% |\n| a \\| b | yes | no | 60.0% |\n"
    )


def test_intervals_of_shares():
    low, high = classify.wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert classify.wilson_interval(1.0, 10)[1] == pytest.approx(1.0)
    assert classify.wilson_interval(0.0, 10)[0] == pytest.approx(0.0)
