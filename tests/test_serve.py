"""The server: over HTTP the same answers as from the model, many requests at a time, whatever a client does."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import pytest
import torch
import uvicorn

import fastlm
from fastlm import cli
from fastlm.cli.generate import texts
from fastlm.cli.serve import listening
from fastlm.data import encode_texts
from fastlm.data.tokenizer import train_tokenizer
from fastlm.folder import open_model
from fastlm.models import GPT, BERTConfig, BERTForMaskedLM, BERTForSequenceClassification, GPTConfig
from fastlm.ops.measured import fastest
from fastlm.serve import Limits, create_app
from fastlm.serve.slots import Slots
from fastlm.text import prompt_ids

LINES = ["the kernel reads a row of weights", "löss of the mean gradient", "行列 good bad film", "a tensor is shared"]
LONGEST = 96  # tokens of the GPT


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders gpt and bert."""
    home = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    tokenizer = train_tokenizer("bpe", 300, lambda: LINES * 9)
    shape = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    save(GPT(GPTConfig(max_seq_len=LONGEST, **shape)), tokenizer, home / "gpt")
    tokenizer = train_tokenizer("wordpiece", 120, lambda: LINES * 9)
    model = classifier(tokenizer, num_labels=3)
    save(model, tokenizer, home / "bert")
    with torch.no_grad():  # no class for all texts
        model.classifier.bias -= model(torch.tensor(encode_texts(tokenizer, LINES, 5))).logits.mean(0)
    model.save_pretrained(home / "bert")
    return home


def save(model, tokenizer, folder):
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def classifier(tokenizer, **options):
    size = tokenizer.get_vocab_size()
    config = BERTConfig(vocab_size=size, max_seq_len=24, hidden_size=32, num_layers=2, num_heads=2, **options)
    model = BERTForSequenceClassification(config).eval()
    model.other_config = {"id2label": {"0": "bad", "1": "so so", "2": "gut"}}
    return model


@pytest.fixture(scope="module")
def gpt(home):
    return open_model(home / "gpt")


@pytest.fixture(scope="module")
def bert(home):
    return open_model(home / "bert")


@contextmanager
def process(*arguments, start=("-m", "fastlm"), host="127.0.0.1"):
    """`fastlm serve` with a free port in a process of its own, and a client of it."""
    command = [sys.executable, *start, "serve", *map(str, arguments), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            server.line = server.stdout.readline()
            url = re.search(r"http://\S+", server.line)
            assert url, server.stderr.read()
            with httpx2.Client(base_url=url[0], timeout=60, trust_env=False) as client:
                yield server, client
        finally:
            server.kill()


@contextmanager
def running(model, tokenizer, prepare=lambda worker: None, quantize=None, **limits):
    """A server in this process, and a client of it; `prepare` gets the worker."""
    app = create_app(model, tokenizer, Limits(**limits), quantize=quantize)
    prepare(app.state.worker)
    with listening("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
                client.get("/health")
                client.worker = app.state.worker
                yield client
        finally:
            server.should_exit = True
            thread.join()
    assert not app.state.worker.is_alive()


@pytest.fixture(scope="module")
def gpt_client(gpt):
    with running(*gpt) as client:
        yield client


@pytest.fixture(scope="module")
def bert_client(bert):
    with running(*bert) as client:
        yield client


def each_time(do):
    """`prepare` for `running`: what to do before the worker's model runs, given what goes into it."""

    def prepare(worker):
        owner, name = (worker.slots, "step") if hasattr(worker, "slots") else (worker, "predict")
        run = getattr(owner, name)

        def after(batch):
            do(batch)
            return run(batch)

        setattr(owner, name, after)

    return prepare


def slower(seconds):
    return each_time(lambda batch: time.sleep(seconds))


def alone(gpt, prompt, max_new_tokens=None, *, ignore_eos=False, stream=False, **options):
    """What `fastlm generate` says."""
    model, tokenizer = gpt
    eos = None if ignore_eos else tokenizer.token_to_id("<|endoftext|>")
    ids = prompt_ids(model, tokenizer, prompt)
    options = {"do_sample": True, "temperature": 0.8} | options
    (answer,) = texts(model, tokenizer, ids, max_new_tokens, eos, **options)
    return answer | {"prompt_tokens": len(ids), "seed": options["seed"]}


def generated(client, **request):
    """The answer, from a stream too: its pieces as `pieces`."""
    if not request.get("stream"):
        response = client.post("/generate", json=request)
        assert response.status_code == 200, response.text
        return response.json()
    with client.stream("POST", "/generate", json=request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    return events[-1] | {"text": "".join(event["text"] for event in events), "pieces": events}


def events_of(response):
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))


REQUESTS = [
    {"prompt": "the kernel", "seed": 1},
    {"prompt": "", "seed": 4, "temperature": 1e3},
    {"prompt": "löss", "seed": 3, "top_k": 5, "stream": True},
    {"prompt": "行列 good", "seed": 4, "top_p": 0.6, "max_new_tokens": 40},
    {"prompt": "a tensor is", "seed": 5, "repetition_penalty": 1.5, "stream": True},
    {"prompt": "the", "seed": 6, "do_sample": False, "max_new_tokens": 1},
    {"prompt": "mean gradient of the löss of", "seed": 7, "do_sample": False, "repetition_penalty": 1.3},
    {"prompt": "bad film", "seed": 2**63 - 1, "temperature": 2, "stop": ["a", "e"], "stream": True},
    {"prompt": "bad film", "seed": 9, "temperature": 2, "stop": ["o", "zzz"], "stream": False},
    {"prompt": "x" * 60, "seed": 10, "temperature": 0.5, "ignore_eos": True},
    {"prompt": "\0 \n", "seed": 4, "temperature": 1e3, "ignore_eos": True, "stream": True},
    {"prompt": "row of", "seed": 12, "top_k": 3, "top_p": 0.9, "repetition_penalty": 0.8, "stream": True},
] * 2


# --- the process


def test_many_clients_get_the_texts_that_generate_gives_alone(home, gpt):
    with process(home / "gpt") as (server, client):
        assert server.line == f"serving GPT of {home / 'gpt'} on {str(client.base_url).rstrip('/')}\n"
        assert client.base_url.host == "127.0.0.1"

        def ask(n):
            time.sleep(0.01 * (n % 7))
            return generated(client, **REQUESTS[n])

        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            answers = list(pool.map(ask, range(len(REQUESTS))))
        health = client.get("/health").json()
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr.read() == ""
    for request, answer in zip(REQUESTS, answers, strict=True):
        expected = alone(gpt, **request)
        assert {name: answer[name] for name in expected} == expected
    assert {answer["finish"] for answer in answers} == {"length", "stop", "end"}
    assert (health["status"], health["model"], health["serves"]) == ("ok", "GPT", "/generate")
    assert (health["waiting"], health["running"], health["answered"]) == (0, 0, len(REQUESTS))
    assert health["passes"] < sum(answer["new_tokens"] for answer in answers)
    assert health["limits"] == Limits().to_dict() | {"max_seq_len": LONGEST}


def test_many_clients_get_the_classes_that_the_model_gives_alone(home, bert):
    model, tokenizer = bert
    asked = [f"{LINES[n % 4][: 3 + n // 2]} {n}" for n in range(40)]
    with process(home / "bert") as (server, client):
        assert server.line.startswith("serving BERTForSequenceClassification of ")
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda text: client.post("/predict", json={"text": text}), asked))
        assert client.get("/health").json()["answered"] == len(asked)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert server.stderr.read() == ""
    for text, answer in zip(asked, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor(encode_texts(tokenizer, [text], 24))).logits.softmax(-1)[0]
        given = answer.json()
        assert given["label"] == ["bad", "so so", "gut"][expected.argmax()]
        assert list(given["probabilities"]) == ["bad", "so so", "gut"]
        assert list(given["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert given["truncated"] is False
    assert len({answer.json()["label"] for answer in answers}) > 1


SLOW = """
import sys, time
from fastlm import cli
from fastlm.serve.slots import Slots
sys.modules["fastlm.cli.serve"].GRACE = 2
step = Slots.step
Slots.step = lambda *args: time.sleep(0.1) or step(*args)
sys.exit(cli.main())
"""


def test_a_signal_lets_what_runs_finish_but_not_for_long(home):
    began = threading.Semaphore(0)

    def ask(client, tokens):
        request = {"prompt": "the", "seed": 1, "ignore_eos": True, "max_new_tokens": tokens, "stream": True}
        with client.stream("POST", "/generate", json=request) as response:
            events = events_of(response)
            next(events)
            began.release()
            return [*events][-1]

    with process(home / "gpt", start=("-c", SLOW)) as (server, client), ThreadPoolExecutor(2) as pool:
        short, long = (pool.submit(ask, client, tokens) for tokens in (8, 80))
        assert began.acquire(timeout=20)
        assert began.acquire(timeout=20)
        server.terminate()
        assert (short.result()["finish"], short.result()["new_tokens"]) == ("length", 8)
        assert (long.result()["finish"], long.result()["detail"]) == ("error", "the server is stopping")
        assert 8 < long.result()["new_tokens"] < 50
        assert server.wait(20) == 0
        assert server.stderr.read() == ""


def fails(capsys, *arguments, code=2):
    """The line on stderr."""
    assert cli.main(["serve", *map(str, arguments)]) == code
    err = capsys.readouterr().err
    assert err.startswith("fastlm: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_served_is_one_line(home, capsys, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in fails(
            capsys, home / "gpt", "--port", port
        )
    assert "--port must be from 0 to 65535, got 70000" in fails(capsys, home / "gpt", "--port", 70000)
    assert "Limits: timeout must be above 0 and finite, got 0.0" in fails(capsys, home / "gpt", "--timeout", 0)
    assert "Limits: max_batch must be at least 1, got 0" in fails(capsys, home / "gpt", "--max-batch", 0)
    assert "no such run or model" in fails(capsys, tmp_path / "none", "--port", 0)
    assert "quantize is for a GPT" in fails(capsys, home / "bert", "--port", 0, "--quantize", "int8")
    tokenizer = train_tokenizer("wordpiece", 120, lambda: LINES)
    config = BERTConfig(tokenizer.get_vocab_size(), 24, 32, 1, 2)
    save(BERTForMaskedLM(config), tokenizer, tmp_path / "mlm")
    err = fails(capsys, tmp_path / "mlm", "--port", 0)
    assert "the model must be a GPT or a BERTForSequenceClassification, got BERTForMaskedLM" in err
    larger = train_tokenizer("bpe", 400, lambda: ["much more text than before, " + " ".join(map(str, range(999)))])
    save(open_model(home / "gpt")[0], larger, tmp_path / "larger")
    assert "the tokenizer has 400 tokens, the model only 300" in fails(capsys, tmp_path / "larger", "--port", 0)
    for name in [name for name in sys.modules if name.startswith("fastlm.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "the fastapi library is missing: pip install fastlm[serve]" in fails(capsys, home / "gpt")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "the uvicorn library is missing: pip install fastlm[serve]" in fails(capsys, home / "gpt")


def test_answers_do_not_wait_for_one_another_in_the_network(bert):
    """asyncio turns Nagle's algorithm off only where a socket says that it is TCP's."""
    with listening("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP
        assert bound.getsockname()[0] == "127.0.0.1"


# --- batches


class Gate:
    """Holds a worker's batches until it is open."""

    def __init__(self):
        self.batches, self.began, self.open = [], threading.Event(), threading.Event()

    def __call__(self, batch):
        self.batches.append(batch)
        self.began.set()
        assert self.open.wait(20)


def test_what_waits_for_a_classifier_is_one_batch(bert):
    gate = Gate()
    with running(*bert, each_time(gate), max_batch=16) as client, ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(client.post, "/predict", json={"text": "good"})]
        assert gate.began.wait(20)
        asked += [pool.submit(client.post, "/predict", json={"text": f"good {n}"}) for n in range(19)]
        until(lambda: client.get("/health").json()["waiting"] == 19)
        assert client.get("/health").json()["running"] == 1
        gate.open.set()
        assert all(each.result().status_code == 200 for each in asked)
        health = client.get("/health").json()
        assert (health["answered"], health["passes"], health["waiting"], health["running"]) == (20, 3, 0, 0)
    assert [len(batch) for batch in gate.batches] == [1, 16, 3]


def test_a_batch_holds_so_many_tokens_and_a_longer_text_goes_alone(bert):
    gate = Gate()
    with running(*bert, each_time(gate), max_batch_tokens=12) as client, ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(client.post, "/predict", json={"text": "good"})]
        assert gate.began.wait(20)
        for words in (1, 2, 3, 4, 5, 6, 15):
            waiting = len(client.worker.waiting)
            asked.append(pool.submit(client.post, "/predict", json={"text": "good " * words}))
            until(lambda: len(client.worker.waiting) > waiting)  # noqa: B023
        gate.open.set()
        assert all(each.result().status_code == 200 for each in asked)
    assert [[len(ids) for ids in batch] for batch in gate.batches] == [[3], [3, 4, 5], [6], [7], [8], [17]]


def until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_texts_join_and_leave_a_running_batch(gpt):
    sizes: list[int] = []
    with running(*gpt, each_time(lambda tokens: sizes.append(len(tokens)) or time.sleep(0.01)), max_batch=14) as client:

        def ask(n):
            time.sleep(0.05 * (n % 6))
            return generated(client, **REQUESTS[n])

        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            answers = list(pool.map(ask, range(len(REQUESTS))))
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert answer["text"] == alone(gpt, **request)["text"]
    assert max(sizes) == 14  # and so in two parts: a recorded step takes twelve
    assert len(set(sizes)) > 5
    assert any(later > earlier for earlier, later in itertools.pairwise(sizes))


def test_a_stream_comes_piece_by_piece_in_whole_characters(gpt):
    with running(*gpt, slower(0.02)) as client:
        request = {"prompt": "行", "seed": 5, "max_new_tokens": 30, "ignore_eos": True, "stream": True}
        times = []
        with client.stream("POST", "/generate", json=request) as response:
            assert response.headers["cache-control"] == "no-cache"
            events = [(times.append(time.monotonic()), event)[1] for event in events_of(response)]
    assert times[-1] - times[0] > 0.3
    assert len(events) > 10
    assert all(set(event) == {"text"} for event in events[:-1])
    assert set(events[-1]) == {"text", "finish", "prompt_tokens", "new_tokens", "seed"}
    assert "".join(event["text"] for event in events) == alone(gpt, **request)["text"]


def test_with_int8_the_texts_are_those_of_generate_with_int8(gpt):
    with running(*gpt, quantize="int8") as client:
        for request in REQUESTS[:5]:
            assert generated(client, **request)["text"] == alone(gpt, **request, quantize="int8")["text"]


def test_without_a_seed_texts_differ_and_the_answer_says_how_to_get_them_again(gpt, gpt_client):
    first, second = (generated(gpt_client, prompt="the") for _ in range(2))
    assert first["text"] != second["text"]
    assert generated(gpt_client, prompt="the", seed=first["seed"]) == first
    assert generated(gpt_client, prompt="the", seed=None, max_new_tokens=None)["new_tokens"] > 0
    assert first["text"] == alone(gpt, "the", seed=first["seed"])["text"]


@pytest.mark.parametrize("position", ["learned", "alibi", "sinusoidal"])
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_in_slots_the_logits_are_those_of_the_whole_text(position, backend):
    """More sequences than a recorded step takes, joining and leaving in any order."""
    torch.manual_seed(0)
    config = GPTConfig(50, 40, 24, num_layers=2, num_heads=3, position=position)
    model, texts = GPT(config).eval(), []
    choose = random.Random(1)
    with fastlm.use_backend(backend), torch.no_grad():
        slots = Slots(model, 20)
        assert slots.records or backend == "native" or not fastest("linear of a whole step", model.head_weight)

        def check(logits, texts):
            expected = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

        for _ in range(40):
            for slot in reversed([n for n, text in enumerate(texts) if len(text) == 40 or choose.random() < 0.05]):
                slots.leave(slot)
                texts[slot] = texts[-1]
                texts.pop()
            if len(texts) < 17:
                joining = [choose.choices(range(50), k=choose.randint(1, 20)) for _ in range(choose.randint(1, 3))]
                check(slots.join(joining), joining)
                texts += joining
            for text in texts:
                text.append(choose.randrange(50))
            check(slots.step([text[-1] for text in texts]), texts)


# --- classes


def test_classes_are_named_and_weighed_as_the_configuration_says(bert):
    _, tokenizer = bert
    said = {}
    for kind, num_labels in [
        ("multi_label_classification", 3),
        ("single_label_classification", 2),
        (None, 1),
        ("regression", 2),
    ]:
        torch.manual_seed(2)
        model = classifier(tokenizer, num_labels=num_labels, problem_type=kind)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([1.0, -1.0, 1.0])[:num_labels])
            logits = model(torch.tensor(encode_texts(tokenizer, ["good"], 24))).logits[0]
        with running(model, tokenizer) as client:
            said[kind] = client.post("/predict", json={"text": "good"}).json(), logits
    answer, logits = said["multi_label_classification"]
    assert answer["label"] == ["bad", "gut"]
    assert list(answer["probabilities"].values()) == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    answer, logits = said["single_label_classification"]  # for which there are too many names
    assert answer["label"] == "LABEL_0"
    first, second = logits.softmax(-1).tolist()
    assert answer["probabilities"] == pytest.approx({"LABEL_0": first, "LABEL_1": second}, abs=1e-5)
    answer, logits = said[None]
    assert answer == {"value": pytest.approx(logits.item(), abs=1e-5), "truncated": False}
    answer, logits = said["regression"]
    assert answer["value"] == pytest.approx(logits.tolist(), abs=1e-5)


def test_a_text_that_is_too_long_is_refused_or_cut(bert, bert_client):
    model, tokenizer = bert
    exact, longer = "good " * 22, "good " * 21 + "film film"
    assert bert_client.post("/predict", json={"text": exact}).json()["truncated"] is False
    response = bert_client.post("/predict", json={"text": longer})
    assert response.status_code == 413
    need = "the text must have at most 24 tokens, [CLS] and [SEP] included, got 25"
    assert response.json() == {"detail": f'{need}; "truncate": true cuts it'}
    cut = bert_client.post("/predict", json={"text": longer, "truncate": True}).json()
    assert cut["truncated"] is True
    with torch.no_grad():
        expected = model(torch.tensor(encode_texts(tokenizer, [longer], 24))).logits.softmax(-1)[0]
    assert list(cut["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    short = bert_client.post("/predict", json={"text": "good", "truncate": True}).json()
    assert short["truncated"] is False


# --- what clients do wrong

TEXT = {"text": "good"}
BAD_PREDICTIONS = [
    (b"", 400, "the body must be JSON: Expecting value"),
    (b"text=good", 400, "the body must be JSON"),
    (b'{"text": "good"', 400, "the body must be JSON"),
    (b"\xff\xfe\xfa", 400, "the body must be JSON"),
    (b"[" * 100_000, 400, "the body must be JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", 400, "the body must be JSON"),
    (b"[]", 422, "the body must be a JSON object, got []"),
    (b"null", 422, "the body must be a JSON object, got None"),
    (b'"good"', 422, "the body must be a JSON object, got 'good'"),
    (b"NaN", 422, "the body must be a JSON object, got nan"),
    ({}, 422, "text must be a Unicode string that is more than blanks, got nothing"),
    ({"txet": "good"}, 422, "unknown field 'txet'; did you mean text?"),
    ({"text": "good", "\ud800": 1}, 422, r"unknown field '\ud800'"),
    ({"text": "good", "x" * 300_000: 1}, 422, "unknown field 'xxx"),
    ({f"field{n}": n for n in range(50_000)}, 422, "unknown field 'field0'"),
    ({"text": ""}, 422, "text must be a Unicode string that is more than blanks, got ''"),
    ({"text": " \n\u3000"}, 422, "text must be a Unicode string that is more than blanks, got ' \\n"),
    ({"text": None}, 422, "text must be a Unicode string that is more than blanks, got None"),
    ({"text": 3}, 422, "text must be a Unicode string that is more than blanks, got 3"),
    ({"text": ["good"]}, 422, "text must be a Unicode string that is more than blanks, got ['good']"),
    ({"text": "a\ud800"}, 422, r"text must be a Unicode string that is more than blanks, got 'a\ud800'"),
    (b'{"text": NaN}', 422, "text must be a Unicode string that is more than blanks, got nan"),
    ({**TEXT, "truncate": 1}, 422, "truncate must be true or false, got 1"),
    ({**TEXT, "truncate": "yes"}, 422, "truncate must be true or false, got 'yes'"),
    ({**TEXT, "truncate": None}, 422, "truncate must be true or false, got None"),
]
PROMPT = {"prompt": "the"}
FIT = "prompt and new tokens must fit max_seq_len = 96, got "
BAD_GENERATIONS = [
    ({"text": "the"}, 422, "unknown field 'text'"),
    ({"max_new_tokens": 3}, 422, "prompt must be a Unicode string, got nothing"),
    ({**PROMPT, "max_new_token": 3}, 422, "unknown field 'max_new_token'; did you mean max_new_tokens?"),
    ({"prompt": True}, 422, "prompt must be a Unicode string, got True"),
    ({"prompt": "\udfff"}, 422, r"prompt must be a Unicode string, got '\udfff'"),
    ({"prompt": "x y " * 100}, 422, "tokens, the model's context only 96, new ones included"),
    ({**PROMPT, "max_new_tokens": 96}, 422, FIT + "2 and 96"),
    ({**PROMPT, "max_new_tokens": 10**4000}, 422, "max_new_tokens must be an integer of at least 1, got 1000"),
    *(
        ({**PROMPT, name: value}, 422, f"{name} must be {need}, got {value!r}")
        for name, values, need in [
            ("max_new_tokens", (0, -1, True, 3.0, "3"), "an integer of at least 1"),
            ("temperature", (0, -1.0, 1e-9, 1e9, True, "1", None), "a number from 0.001 to 1000"),
            ("top_k", (-1, False, 1.5, None), "an integer of at least 1, or 0 for all tokens"),
            ("top_p", (0, 2, True, "1"), "a number above 0 and at most 1"),
            ("repetition_penalty", (0, -1, 1e300, False), "a number from 0.01 to 100"),
            ("seed", (-1, 2**63, True, 1.0), "an integer from 0 to 2^63 - 1"),
            ("do_sample", (0, "no", None), "true or false"),
            ("ignore_eos", (0,), "true or false"),
            ("stream", (1,), "true or false"),
            ("stop", ("a", {}, None), "at most 8 strings of 1 to 100 characters"),
        ]
        for value in values
    ),
    ({**PROMPT, "stop": [""]}, 422, "stop must be at most 8 strings of 1 to 100 characters, got ''"),
    ({**PROMPT, "stop": ["a", 1]}, 422, "stop must be at most 8 strings of 1 to 100 characters, got 1"),
    ({**PROMPT, "stop": ["a"] * 9}, 422, "stop must be at most 8 strings of 1 to 100 characters, got ['a', "),
    ({**PROMPT, "stop": ["\ud800"]}, 422, "stop must be at most 8 strings of 1 to 100 characters, got '\\ud800'"),
    ({**PROMPT, "stop": ["a" * 101]}, 422, "stop must be at most 8 strings of 1 to 100 characters, got 'aaa"),
    *(
        (b'{"prompt": "the", "%s": %s}' % (name, value), 422, f"{name.decode()} must be ")
        for name in (b"temperature", b"top_p", b"repetition_penalty", b"top_k", b"seed", b"max_new_tokens")
        for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999")
    ),
]


def refused(client, route, body, status, detail):
    response = client.post(route, content=body if isinstance(body, bytes) else json.dumps(body))
    assert response.status_code == status, response.text[:300]
    assert set(response.json()) == {"detail"}
    said = response.json()["detail"]
    assert said.startswith(detail) or detail in said, said
    assert "\n" not in said
    assert len(said) < 250


@pytest.mark.parametrize(("body", "status", "detail"), BAD_PREDICTIONS, ids=lambda value: repr(value)[:60])
def test_a_bad_prediction_is_told_what_is_wrong(bert_client, body, status, detail):
    refused(bert_client, "/predict", body, status, detail)
    assert bert_client.post("/predict", json=TEXT).status_code == 200


@pytest.mark.parametrize(("body", "status", "detail"), BAD_GENERATIONS, ids=lambda value: repr(value)[:60])
def test_a_bad_generation_is_told_what_is_wrong(gpt_client, body, status, detail):
    refused(gpt_client, "/generate", body, status, detail)


def test_what_is_unusual_but_right_is_answered(gpt_client, bert_client):
    for text in ("\0", "a\0b", "行列" * 3, "\u202e", "👩‍👩‍👧", "x" * 500):
        assert bert_client.post("/predict", json={"text": text}).status_code == 200
        assert generated(gpt_client, prompt=text[:9], max_new_tokens=2)["new_tokens"] <= 2
    for options in ({"top_k": 2**31}, {"temperature": 1}, {"temperature": 1e-3}, {"repetition_penalty": 100}):
        assert generated(gpt_client, prompt="the", max_new_tokens=9, **options)["new_tokens"] <= 9
    assert generated(gpt_client, prompt="the", top_p=5e-324, seed=1, max_new_tokens=9) == generated(
        gpt_client, prompt="the", do_sample=False, seed=1, max_new_tokens=9
    )
    assert bert_client.post("/predict", content='{"text": "good"}'.encode("utf-16")).status_code == 200


def test_routes_of_another_model_say_what_is_served(gpt_client, bert_client):
    refused(gpt_client, "/predict", TEXT, 404, "this server serves a GPT: POST /generate")
    detail = "this server serves a BERTForSequenceClassification: POST /predict"
    refused(bert_client, "/generate", PROMPT, 404, detail)
    assert bert_client.get("/predict").status_code == 405
    assert bert_client.post("/classify").status_code == 404
    schema = gpt_client.get("/openapi.json").json()["paths"]["/generate"]["post"]["requestBody"]
    assert "top_p" in schema["content"]["application/json"]["schema"]["properties"]


def test_a_body_is_read_no_further_than_the_limit(bert):
    with running(*bert, max_body=1000) as client:
        body = json.dumps({"text": "good", "truncate": True}).encode()
        refused(client, "/predict", body + b" " * 2000, 413, "the body must have at most 1000 bytes, got more")
        assert client.post("/predict", content=body + b" " * (1000 - len(body))).status_code == 200
        sent = []

        def endless():
            while len(sent) < 3_000:
                sent.append(1)
                yield b" " * 100

        response = client.post("/predict", content=endless())  # chunked, its length not said
        assert response.status_code == 413
        assert client.post("/predict", content=iter([body[:9], body[9:]])).status_code == 200


def raw(client, data=b""):
    """A connection as it is."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    connection.sendall(data)
    return connection


def request_of(route, values):
    body = json.dumps(values).encode()
    return f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_body_that_does_not_come_is_not_waited_for(bert):
    with running(*bert, timeout=0.5) as client:
        with raw(client, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{") as connection:
            answer = b"".join(iter(functools.partial(connection.recv, 1), b"}"))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body must arrive within 0.5 seconds" in answer
        with raw(client, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"):
            pass  # and gone
        with raw(client, b"\0\1 rubbish\r\n\r\n") as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert client.post("/predict", json=TEXT).status_code == 200


# --- limits


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_when_the_queue_is_full_further_requests_are_turned_away(request, kind):
    gate, served = Gate(), request.getfixturevalue(kind)
    route, body = ("/generate", PROMPT | {"max_new_tokens": 3}) if kind == "gpt" else ("/predict", TEXT)
    with running(*served, each_time(gate), max_batch=1, max_queue=2) as client, ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(client.post, route, json=body)]
        assert gate.began.wait(20)
        asked += [pool.submit(client.post, route, json=body) for _ in range(2)]
        until(lambda: client.get("/health").json()["waiting"] == 2)
        for stream in ({}, {"stream": True})[: 1 + (kind == "gpt")]:
            response = client.post(route, json=body | stream)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json() == {"detail": "2 requests wait already, no more may"}
        gate.open.set()
        assert all(each.result().status_code == 200 for each in asked)
        assert client.post(route, json=body).status_code == 200


def test_a_request_that_takes_too_long_ends_and_leaves_its_place(gpt):
    long = {"prompt": "the", "ignore_eos": True, "seed": 1}
    with running(*gpt, slower(0.05), timeout=1, max_batch=2) as client, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.post, "/generate", json=long) for _ in range(3)]  # one does not even begin
        for each in asked:
            assert each.result().status_code == 504
            assert each.result().json() == {"detail": "not done in 1 seconds"}
        until(lambda: client.get("/health").json()["running"] == 0)
        streamed = generated(client, **long, stream=True)
        assert (streamed["finish"], streamed["seed"]) == ("timeout", 1)
        assert 5 < streamed["new_tokens"] < 25
        assert alone(gpt, **long)["text"].startswith(streamed["text"])
        assert len(streamed["text"]) > 3
        until(lambda: client.get("/health").json()["running"] == 0)
        assert generated(client, prompt="the", max_new_tokens=2)["new_tokens"] <= 2


def test_a_prediction_that_takes_too_long_ends(bert):
    gate = Gate()
    with running(*bert, each_time(gate), timeout=0.3) as client:
        for _ in range(2):  # the second one waits for the first
            refused(client, "/predict", TEXT, 504, "not done in 0.3 seconds")
        assert client.get("/health").json()["waiting"] == 0
        gate.open.set()
        until(lambda: client.post("/predict", json=TEXT).status_code == 200)
    assert len(gate.batches) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_disconnects_leaves_the_batch_and_the_queue(gpt, stream):
    long = {"prompt": "the", "ignore_eos": True, "stream": stream}
    with running(*gpt, slower(0.05), max_batch=1) as client:
        running_one = raw(client, request_of("/generate", long))
        until(lambda: client.get("/health").json()["running"] == 1)
        waiting_one = raw(client, request_of("/generate", long))
        until(lambda: client.get("/health").json()["waiting"] == 1)
        waiting_one.close()
        until(lambda: client.get("/health").json()["waiting"] == 0)
        assert client.get("/health").json()["running"] == 1
        running_one.close()
        began = time.monotonic()
        assert generated(client, prompt="the", max_new_tokens=1)["new_tokens"] == 1
        assert time.monotonic() - began < 1.5  # all of the other text takes four seconds
        assert client.get("/health").json()["answered"] == 1


def test_who_does_not_read_a_stream_holds_no_place(gpt):
    """Longer than the buffers of a connection: what the server sends waits for ever."""
    request = request_of("/generate", PROMPT | {"ignore_eos": True, "stream": True})
    with running(*gpt, slower(0.1), timeout=1, max_batch=1) as client, raw(client, request):
        until(lambda: client.get("/health").json()["running"] == 1)
        client.worker.drop = lambda job: None  # as where the server never gets to it
        until(lambda: client.get("/health").json()["running"] == 0, seconds=5)  # all of it takes nine


# --- failures of the model


def test_a_batch_that_fails_is_answered_and_the_server_goes_on(gpt, bert):
    def fault(batch):
        if faults:
            raise RuntimeError(faults.pop())

    faults = ["no memory\nat all"]
    with running(*bert, each_time(fault)) as client:
        refused(client, "/predict", TEXT, 500, "the model failed: no memory")
        assert client.post("/predict", json=TEXT).status_code == 200
    faults = ["", "of late"]
    with running(*gpt, each_time(fault)) as client:
        refused(client, "/generate", PROMPT, 500, "the model failed: of late")
        streamed = generated(client, prompt="the", stream=True, seed=1)  # whose first token is a character
        assert (streamed["finish"], streamed["detail"]) == ("error", "the model failed: RuntimeError")
        assert client.get("/health").json()["running"] == 0
        assert generated(client, prompt="the", seed=1)["text"] == alone(gpt, "the", seed=1)["text"]


def test_prompts_that_fail_do_not_touch_those_that_run(gpt):
    with running(*gpt, slower(0.02)) as client, ThreadPoolExecutor(2) as pool:
        other = pool.submit(generated, client, prompt="the", seed=1, ignore_eos=True)
        until(lambda: client.get("/health").json()["running"] == 1)
        run, client.worker.slots.model.run = client.worker.slots.model.run, None
        try:
            refused(client, "/generate", PROMPT, 500, "the model failed: 'NoneType' object is not callable")
        finally:
            client.worker.slots.model.run = run
        assert generated(client, prompt="good", seed=2)["text"] == alone(gpt, "good", seed=2)["text"]
        assert other.result()["text"] == alone(gpt, "the", seed=1, ignore_eos=True)["text"]


def test_logits_that_are_not_numbers_fail_their_own_request(gpt, bert):
    def prepare(worker):
        join = worker.slots.join

        def spoilt(prompts):
            logits = join(prompts).clone()
            for row, ids in zip(logits, prompts, strict=True):
                if len(ids) == 3:
                    row.fill_(torch.nan)
            return logits

        worker.slots.join = spoilt

    with running(*gpt, prepare) as client, ThreadPoolExecutor(6) as pool:
        model, tokenizer = gpt
        three = next(word for word in ("ab", "zx", "qq") if len(prompt_ids(model, tokenizer, word)) == 3)
        prompts = [three, "the", three, "a", "the kernel", three]
        assert [len(prompt_ids(model, tokenizer, prompt)) == 3 for prompt in prompts] == [1, 0, 1, 0, 0, 1]
        answers = list(pool.map(lambda prompt: client.post("/generate", json={"prompt": prompt}), prompts))
        assert client.get("/health").json()["answered"] == 3
    assert [answer.status_code == 500 for answer in answers] == [prompt == three for prompt in prompts]
    model, tokenizer = bert
    with running(classifier(tokenizer), tokenizer) as client:
        client.worker.model.classifier.bias.data.fill_(torch.nan)
        refused(client, "/predict", TEXT, 500, "the model failed: its numbers are not finite")
