"""Requests that come together go through the model together: a queue, and a thread that takes from it.

A classifier takes whatever waits as one batch. A GPT is batched continuously: between two steps requests join those
that run, and leave when they are done, each with its own options and its own generator of draws.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.config import Config
from fastlm.data import collate
from fastlm.generation import Sampling
from fastlm.models import GPT, BERTForSequenceClassification
from fastlm.serve.slots import Slots
from fastlm.text import Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Closed", "Generation", "Job", "Limits", "Predictor", "QueueFull", "TextGenerator", "Worker"]


@dataclass(frozen=True)
class Limits(Config):
    """What a server takes upon itself.

    Args:
        max_batch: requests that the model works on at a time
        max_batch_tokens: of texts and prompts that go through the model together; a longer one goes alone
        max_queue: requests that wait for it; further ones are turned away
        timeout: seconds for a request
        max_body: bytes of a request
    """

    max_batch: int = 32
    max_batch_tokens: int = 4096
    max_queue: int = 128
    timeout: float = 60.0
    max_body: int = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch", "max_batch_tokens", "max_queue", "max_body"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        self._need(0 < self.timeout < math.inf, "timeout", "above 0 and finite")


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The worker takes and does nothing more."""


class Job:
    """A request on its way: made and awaited in an event loop, worked on in a worker's thread.

    `events` gets what the worker has to say: a dict for each part of a stream, a last one with all that is to be
    answered, or an exception in its place.
    """

    def __init__(self, ids: Sequence[int], deadline: float) -> None:
        self.ids, self.deadline, self.dropped = ids, deadline, False
        self.events: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, event: dict[str, Any] | Exception) -> None:
        if not self.dropped:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def is_over(self) -> bool:
        """Nobody waits for it any more."""
        return self.dropped or time.monotonic() > self.deadline


class Worker(threading.Thread):
    """The thread that runs the model. What fails there fails for the jobs that it was done for, and no others."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(name="fastlm.serve", daemon=True)
        self.limits = limits
        self.running: list[Any] = []
        self.waiting: deque[Any] = deque()
        self.answered = self.passes = 0  # requests, and how often the model ran for them
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, job: Job) -> None:
        """Raises QueueFull or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self.waiting) >= self.limits.max_queue:
                raise QueueFull
            self.waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.dropped = True
        with self._changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self) -> None:
        """Everything that waits or runs ends, as soon as the model has come back."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        while not self._closed:
            try:
                self.work()
            except Exception as error:
                self.fail(self.abandon(), error)
        with self._changed:
            left = [*self.running, *self.waiting]
        for job in left:
            job.tell(Closed())

    def work(self) -> None:
        """Take what is to be done next, and do it. What it raises is for all that run."""
        raise NotImplementedError

    def abandon(self) -> list[Any]:
        """What runs, which does so no more."""
        jobs, self.running = self.running, []
        return jobs

    def take(self, most: int, wait: bool) -> list[Any]:
        """The jobs that have waited longest, as many as go through the model together."""
        jobs: list[Any] = []
        with self._changed:
            while wait and not self.waiting and not self._closed:
                self._changed.wait()
            room = self.limits.max_batch_tokens
            while self.waiting and len(jobs) < most and (not jobs or len(self.waiting[0].ids) <= room):
                room -= len(self.waiting[0].ids)
                jobs.append(self.waiting.popleft())
        return jobs

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        logging.getLogger(__name__).error("%d requests failed", len(jobs), exc_info=error)
        for job in jobs:
            job.tell(error)


# Classes ------------------------------------------------------------------------------------------------------------


class Predictor(Worker):
    """Answers jobs, whose ids are [CLS] text [SEP], with what a classifier says of them."""

    def __init__(self, model: BERTForSequenceClassification, limits: Limits) -> None:
        super().__init__(limits)
        config, names = model.config, model.other_config.get("id2label") or {}
        self.model, self.device = model, model.classifier.weight.device
        numbers = [str(n) for n in range(config.num_labels)]
        named = sorted(names) == sorted(numbers) and len(set(names.values())) == len(names)
        self.labels = [names[n] if named else f"LABEL_{n}" for n in numbers]
        usual = "regression" if config.num_labels == 1 else "single_label_classification"
        self.problem_type = config.problem_type or usual

    def work(self) -> None:
        jobs = self.running = self.take(self.limits.max_batch, wait=True)
        answers = self.predict([job.ids for job in jobs]) if jobs else []
        self.running = []
        self.answered += len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.tell(answer)

    @torch.inference_mode()
    def predict(self, batch: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        padded: Any = collate([{"input_ids": ids} for ids in batch])
        ids, mask = padded["input_ids"].to(self.device), padded["attention_mask"].to(self.device)
        self.passes += 1
        logits = self.model(ids, mask).logits.float()
        if not logits.isfinite().all():
            raise ArithmeticError("its numbers are not finite")
        if self.problem_type == "regression":
            return [{"value": row[0] if len(row) == 1 else row} for row in logits.tolist()]
        single = self.problem_type == "single_label_classification"
        return [self._named(row, single) for row in (logits.softmax(-1) if single else logits.sigmoid()).tolist()]

    def _named(self, row: list[float], single: bool) -> dict[str, Any]:
        probabilities = dict(zip(self.labels, row, strict=True))
        likeliest = max(probabilities, key=probabilities.__getitem__)
        label = likeliest if single else [name for name, p in probabilities.items() if p > 0.5]
        return {"label": label, "probabilities": probabilities}


# Texts --------------------------------------------------------------------------------------------------------------


class Generation(Job):
    """A prompt, how to go on from it, and what has become of it.

    Args:
        stop: texts any of which ends the new one, and is left out.
        eos_token_id: the token that ends it.
        seed: of the draws, which are those of `generate`.
        stream: whether every piece of the text is an event.
    """

    def __init__(
        self,
        ids: Sequence[int],
        deadline: float,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        *,
        seed: int,
        stop: Sequence[str] = (),
        eos_token_id: int | None = None,
        stream: bool = False,
    ) -> None:
        super().__init__(ids, deadline)
        self.sampling, self.seed, self.eos_token_id, self.stream = sampling, seed, eos_token_id, stream
        self.text = Text(tokenizer, stop, max_new_tokens)
        self.generator: torch.Generator | None = None

    def go_on(self, logits: Tensor) -> dict[str, Any] | None:
        """Take the next token, of logits (V); the last event if it is the last one."""
        if self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(self.seed)
        there = torch.tensor([*self.ids, *self.text.tokens] if self.sampling.repetition_penalty != 1.0 else [])
        token = int(self.sampling.choose(logits[None], there[None].to(logits.device), self.generator))
        text = self.text
        if token == self.eos_token_id:
            piece, finish = text.rest(), "end"
        else:
            piece = text.add(token)
            finish = "stop" if text.stopped else "length" if len(text.tokens) == text.last else ""
        if finish:
            return {"text": piece if self.stream else text.shown, "finish": finish, **self.counts}
        if piece and self.stream:
            self.tell({"text": piece})
        return None

    @property
    def counts(self) -> dict[str, int]:
        return {"prompt_tokens": len(self.ids), "new_tokens": len(self.text.tokens), "seed": self.seed}


class TextGenerator(Worker):
    """Goes on with the prompts of `Generation` jobs, a token of each running one at a time."""

    def __init__(self, model: GPT, limits: Limits, int8: bool = False) -> None:
        super().__init__(limits)
        self.slots = Slots(model, limits.max_batch, int8)
        self.running: list[Generation] = []  # in the order of their slots

    def work(self) -> None:
        for slot in reversed([slot for slot, job in enumerate(self.running) if job.is_over]):
            self._leave(slot)
        joining = self.take(self.limits.max_batch - len(self.running), wait=not self.running)
        if joining:
            self.passes += 1
            try:
                logits = self.slots.join([job.ids for job in joining])
            except Exception as error:
                self.fail(joining, error)
            else:
                self.running += joining
                self._choose(logits, len(self.running) - len(joining))
        if self.running:
            self.passes += 1
            self._choose(self.slots.step([job.text.tokens[-1] for job in self.running]), 0)

    def abandon(self) -> list[Any]:
        self.slots.running = 0
        return super().abandon()

    def _choose(self, logits: Tensor, first: int) -> None:
        """The next tokens of the jobs in the slots from `first` on; those that are done leave."""
        last: dict[int, dict[str, Any] | Exception] = {}  # what those that are done are told
        for slot, (job, row) in enumerate(zip(self.running[first:], logits, strict=True), first):
            try:
                if event := job.go_on(row):
                    last[slot] = event
            except Exception as error:
                last[slot] = error
        for slot in reversed(last):
            job, said = self._leave(slot), last[slot]
            if isinstance(said, Exception):
                self.fail([job], said)
            else:
                self.answered += 1
                job.tell(said)

    def _leave(self, slot: int) -> Generation:
        """The last job takes the slot."""
        self.slots.leave(slot)
        job, self.running[slot] = self.running[slot], self.running[-1]
        self.running.pop()
        return job
