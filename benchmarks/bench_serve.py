"""`fastlm serve` under load: the same requests from one client, one after the other, and from several at a time.

A server in a process of its own; its clients, threads of this one, share the processor with it, as does, in its turn,
the model itself without a server. Predictions: a BERT of MiniLM's shape, texts of real lengths. Texts: the GPT of
configs/gpt-tiny.toml, 128 new tokens each. "per s" counts predictions, or tokens.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlm.bench.harness import Comparison, compare, write_results
from fastlm.config import read_toml
from fastlm.data import encode_texts
from fastlm.data.tokenizer import train_tokenizer
from fastlm.models import GPT, BERTConfig, BERTForSequenceClassification, GPTConfig
from fastlm.text import prompt_ids

ALONE, CLIENTS = "no server", {"1 client": 1, "8 clients": 8, "32 clients": 32}
REQUESTS, NEW = 32, 128
HERE = Path(__file__).parent


class Clients:
    """Send requests, so many at a time; `latencies` keeps the seconds of each."""

    def __init__(self, port: int, route: str, requests: list[dict[str, Any]]) -> None:
        self.port, self.route, self.requests = port, route, requests
        self.connections = threading.local()
        self.latencies: dict[int, list[float]] = {}

    def send(self, clients: int) -> None:
        with ThreadPoolExecutor(clients) as pool:
            self.latencies.setdefault(clients, []).extend(pool.map(self._one, self.requests))

    def _one(self, request: dict[str, Any]) -> float:
        start = time.perf_counter()
        if not hasattr(self.connections, "connection"):
            self.connections.connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection = self.connections.connection
        connection.request("POST", self.route, json.dumps(request))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
        return time.perf_counter() - start

    def quantile(self, clients: int, q: int) -> float:
        return 1e3 * statistics.quantiles(self.latencies[clients], n=100)[q - 1]


@contextmanager
def served(model: Any, tokenizer: Any) -> Iterator[int]:
    """The port of a server."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save(f"{folder}/tokenizer.json")
        command = [sys.executable, "-m", "fastlm", "serve", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                yield int(server.stdout.readline().rsplit(":", 1)[1])
            finally:
                server.terminate()


def predictions(words: list[str]) -> tuple[Any, Any, str, list[dict[str, Any]], Callable[[], None]]:
    tokenizer = train_tokenizer("wordpiece", 4096, lambda: [" ".join(words)])
    model = BERTForSequenceClassification(
        BERTConfig(vocab_size=30522, max_seq_len=512, hidden_size=384, num_layers=6, num_heads=12)
    ).eval()
    lengths = torch.empty(REQUESTS).log_normal_(mean=3.9, std=0.5).round().clamp(8, 250).long().tolist()
    requests = [{"text": " ".join(random.choices(words, k=round(length / 1.3)))} for length in lengths]

    @torch.inference_mode()
    def alone() -> None:
        for request in requests:
            model(torch.tensor(encode_texts(tokenizer, [request["text"]], 512)))

    return model, tokenizer, "/predict", requests, alone


def texts(words: list[str]) -> tuple[Any, Any, str, list[dict[str, Any]], Callable[[], None]]:
    tokenizer = train_tokenizer("bpe", 4096, lambda: [" ".join(words)])
    shape = read_toml(HERE.parent / "configs" / "gpt-tiny.toml")["model"]
    del shape["type"]
    model = GPT(GPTConfig(vocab_size=4096, **shape)).eval()
    requests: list[dict[str, Any]] = [
        {"prompt": " ".join(random.choices(words, k=12)), "seed": n, "max_new_tokens": NEW, "ignore_eos": True}
        for n in range(REQUESTS)
    ]

    def alone() -> None:
        for request in requests:
            ids = torch.tensor([prompt_ids(model, tokenizer, request["prompt"])])
            model.generate(ids, NEW, do_sample=True, temperature=0.8, seed=request["seed"])

    return model, tokenizer, "/generate", requests, alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each case")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    words = re.findall(r"[a-z]+", (HERE.parent / "README.md").read_text(encoding="utf-8"))
    results: list[Comparison] = []
    clients: dict[str, Clients] = {}
    for name, case in {f"{REQUESTS} predictions": predictions, f"{REQUESTS} texts of {NEW} tokens": texts}.items():
        model, tokenizer, route, requests, alone = case(words)
        with served(model, tokenizer) as port:
            clients[name] = Clients(port, route, requests)
            sides = {side: functools.partial(clients[name].send, count) for side, count in CLIENTS.items()}
            results.append(compare(name, {ALONE: alone, **sides}, seconds=arguments.seconds, least=3))

    def rate(side: str) -> Callable[[Comparison], str]:
        return lambda c: f"{REQUESTS * (NEW if 'tokens' in c.case else 1) / c.median(side):,.0f}"

    def latency(count: int) -> Callable[[Comparison], str]:
        return lambda c: " / ".join(f"{clients[c.case].quantile(count, q):.0f}" for q in (50, 95))

    columns = [
        *((f"{side}, per s", rate(side)) for side in (ALONE, *CLIENTS)),
        *((f"{side}, latency p50 / p95, ms", latency(count)) for side, count in CLIENTS.items()),
    ]
    title = "fastlm serve: the same requests one after the other and at the same time"
    write_results(
        "serve", title, results, columns, lambda c: c.ratio("32 clients", "1 client"), "32 clients / 1, speed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
