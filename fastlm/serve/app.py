"""The routes of a server, and what they make of whatever a client sends."""

from __future__ import annotations

import asyncio
import json
import random
import reprlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

try:
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import StreamingResponse
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect
    from starlette.types import Receive, Scope, Send
except ImportError:
    raise ImportError("the fastapi library is missing: pip install fastlm[serve]") from None

from fastlm.config import nearest
from fastlm.data import EOS_TOKEN, encode_texts
from fastlm.generation import Sampling
from fastlm.models import GPT, BERTForSequenceClassification
from fastlm.serve.batching import Closed, Generation, Job, Limits, Predictor, QueueFull, TextGenerator, Worker
from fastlm.text import TEMPERATURE, prompt_ids, room

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastlm.models.pretrained import Pretrained

__all__ = ["create_app"]

_A = TypeVar("_A", bound="Asked")


# What clients ask ---------------------------------------------------------------------------------------------------


def _encodable(text: str) -> str:
    text.encode()  # half of a surrogate pair raises a ValueError
    return text


Unicode = Annotated[str, AfterValidator(_encodable)]


class Asked(BaseModel):
    """The fields of a request. A field's description is what an error says it must be."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class PredictRequest(Asked):
    text: Annotated[Unicode, Field(pattern=r"\S", description="a Unicode string that is more than blanks")]
    truncate: Annotated[bool, Field(description="true or false")] = False


StopText = Annotated[Unicode, Field(min_length=1, max_length=100)]


class GenerateRequest(Asked):
    prompt: Annotated[Unicode, Field(description="a Unicode string")]
    max_new_tokens: Annotated[int | None, Field(ge=1, le=2**31, description="an integer of at least 1")] = None
    do_sample: Annotated[bool, Field(description="true or false")] = True
    temperature: Annotated[float, Field(ge=1e-3, le=1e3, description="a number from 0.001 to 1000")] = TEMPERATURE
    top_k: Annotated[int, Field(ge=0, le=2**31, description="an integer of at least 1, or 0 for all tokens")] = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="a number above 0 and at most 1")] = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, description="a number from 0.01 to 100")] = 1.0
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="an integer from 0 to 2^63 - 1")] = None
    stop: Annotated[list[StopText], Field(max_length=8, description="at most 8 strings of 1 to 100 characters")] = []
    ignore_eos: Annotated[bool, Field(description="true or false")] = False
    stream: Annotated[bool, Field(description="true or false")] = False


async def read(request: Request, kind: type[_A], limits: Limits) -> _A:
    """What a request's body asks; HTTPException says what is wrong with it."""
    try:
        body = await asyncio.wait_for(_body(request, limits.max_body), limits.timeout)
        values = json.loads(body)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body must arrive within {limits.timeout:g} seconds") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body must be JSON: {_short(error)}") from None
    if not isinstance(values, dict):
        raise HTTPException(422, f"the body must be a JSON object, got {reprlib.repr(values)}")
    for name in values:
        if name not in kind.model_fields:
            raise HTTPException(422, f"unknown field {reprlib.repr(name)}{nearest(name[:50], kind.model_fields)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        name = str(fault["loc"][0])
        got = "nothing" if fault["type"] == "missing" else reprlib.repr(fault["input"])
        raise HTTPException(422, f"{name} must be {kind.model_fields[name].description}, got {got}") from None


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"the body must have at most {most} bytes, got more")
    return bytes(body)


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


# What they get ------------------------------------------------------------------------------------------------------


def create_app(
    model: Pretrained, tokenizer: Tokenizer, limits: Limits | None = None, *, quantize: Literal["int8"] | None = None
) -> FastAPI:
    """An ASGI app for a model in evaluation mode: POST /predict for a BERTForSequenceClassification, POST /generate
    for a GPT, GET /health for both.

    `quantize` is for a GPT, as in `generate`.

    Raises ValueError for another model, and for a tokenizer that does not fit it.
    """
    limits, kind = limits or Limits(), type(model).__name__
    if not isinstance(model, (GPT, BERTForSequenceClassification)):
        raise ValueError(f"serve: the model must be a GPT or a BERTForSequenceClassification, got {kind}")
    size, longest = tokenizer.get_vocab_size(), model.config.max_seq_len
    if size > model.config.vocab_size:
        raise ValueError(f"serve: the tokenizer has {size} tokens, the model only {model.config.vocab_size}")
    worker: Worker
    if isinstance(model, GPT):
        worker, serves = TextGenerator(model, limits, quantize == "int8"), "/generate"
    else:
        if quantize is not None:
            raise ValueError("serve: quantize is for a GPT")
        encode_texts(tokenizer, [], longest)  # raises where it has no [CLS] and [SEP]
        worker, serves = Predictor(model, limits), "/predict"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()
        await asyncio.to_thread(worker.join, 5.0)

    app = FastAPI(title=f"FastLM: {kind}", lifespan=lifespan)
    app.state.worker = worker

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # which nobody reads

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": kind,
            "serves": serves,
            "waiting": len(worker.waiting),
            "running": len(worker.running),
            "answered": worker.answered,
            "passes": worker.passes,
            "limits": limits.to_dict() | {"max_seq_len": longest},
        }

    @app.post("/predict", openapi_extra=_body_of(PredictRequest))
    async def predict(request: Request) -> dict[str, Any]:
        if isinstance(model, GPT):
            raise HTTPException(404, f"this server serves a {kind}: POST {serves}")
        deadline = time.monotonic() + limits.timeout
        asked = await read(request, PredictRequest, limits)
        (ids,) = await run_in_threadpool(encode_texts, tokenizer, [asked.text], sys.maxsize)
        too_long = len(ids) > longest
        if too_long and not asked.truncate:
            need = f"the text must have at most {longest} tokens, [CLS] and [SEP] included"
            raise HTTPException(413, f'{need}, got {len(ids)}; "truncate": true cuts it')
        job = Job([*ids[: longest - 1], ids[-1]] if too_long else ids, deadline)
        return await first_event(request, worker, job) | {"truncated": too_long}

    @app.post("/generate", openapi_extra=_body_of(GenerateRequest), response_model=None)
    async def generate(request: Request) -> dict[str, Any] | Response:
        if not isinstance(model, GPT):
            raise HTTPException(404, f"this server serves a {kind}: POST {serves}")
        deadline = time.monotonic() + limits.timeout
        asked = await read(request, GenerateRequest, limits)
        try:
            ids = await run_in_threadpool(prompt_ids, model, tokenizer, asked.prompt, asked.max_new_tokens)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        job = Generation(
            ids,
            deadline,
            tokenizer,
            Sampling(asked.do_sample, asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty),
            asked.max_new_tokens or room(model, ids),
            seed=random.getrandbits(53) if asked.seed is None else asked.seed,
            stop=asked.stop,
            eos_token_id=None if asked.ignore_eos else tokenizer.token_to_id(EOS_TOKEN),
            stream=asked.stream,
        )
        event = await first_event(request, worker, job)
        return EventStream(worker, job, event) if asked.stream else event

    return app


def _body_of(kind: type[Asked]) -> dict[str, Any]:
    """For the documentation: `read` is nothing that FastAPI knows of."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


async def first_event(request: Request, worker: Worker, job: Job) -> dict[str, Any]:
    """What the worker has to say about a job first; HTTPException says why there is nothing."""
    limits = worker.limits
    try:
        worker.submit(job)
    except QueueFull:
        reason = f"{limits.max_queue} requests wait already, no more may"
        raise HTTPException(503, reason, {"Retry-After": "1"}) from None
    except Closed as error:
        raise _failure(error) from None
    said, gone = asyncio.ensure_future(job.events.get()), asyncio.ensure_future(_disconnected(request))
    try:
        left = max(0.0, job.deadline - time.monotonic())
        await asyncio.wait((said, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not said.done():
            raise ClientDisconnect if gone.done() else HTTPException(504, f"not done in {limits.timeout:g} seconds")
        event = said.result()
    except BaseException:
        worker.drop(job)
        raise
    finally:
        said.cancel()
        gone.cancel()
    if isinstance(event, Exception):
        raise _failure(event)
    return event


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(error: Exception) -> HTTPException:
    if isinstance(error, Closed):
        return HTTPException(503, "the server is stopping")
    return HTTPException(500, f"the model failed: {_short(error)}")


class EventStream(StreamingResponse):
    """The events of a job as server-sent ones, from its first to the one that says why the text ends."""

    def __init__(self, worker: Worker, job: Generation, first: dict[str, Any]) -> None:
        self.worker, self.job = worker, job
        super().__init__(self._events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the client may be gone
            self.worker.drop(self.job)

    async def _events(self, first: dict[str, Any]) -> AsyncIterator[str]:
        event: dict[str, Any] | Exception = first
        while True:
            if isinstance(event, Exception):
                event = {"text": "", "finish": "error", "detail": _failure(event).detail, **self.job.counts}
            yield f"data: {json.dumps(event)}\n\n"
            if "finish" in event:
                return
            try:
                event = await asyncio.wait_for(self.job.events.get(), max(0.0, self.job.deadline - time.monotonic()))
            except asyncio.TimeoutError:
                event = {"text": "", "finish": "timeout", **self.job.counts}
