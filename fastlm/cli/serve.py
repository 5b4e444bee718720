"""`fastlm serve`."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import torch

from fastlm.cli.parser import Parser, tell

HOST, PORT = "127.0.0.1", 8000
GRACE = 5  # seconds that requests have to be done after a signal to stop


def serve(argv: list[str]) -> int:
    """answer requests over HTTP: texts of a GPT, classes of a fine-tuned BERT"""
    try:
        import uvicorn

        from fastlm.serve import Limits, create_app
    except ModuleNotFoundError as error:
        raise ImportError(f"the {error.name} library is missing: pip install fastlm[serve]") from None
    from fastlm.folder import open_model
    from fastlm.train.signals import stop_signals

    parser = Parser("serve", serve.__doc__)
    parser.add_argument("directory", metavar="RUN_OR_DIR", help="a run, or a folder with a model and its tokenizer")
    parser.add_argument("--host", help=f"address to listen at [{HOST}: this machine alone]")
    parser.add_argument("--port", metavar="N", type=int, help=f"[{PORT}]; 0 takes a free one")
    parser.add_argument("--quantize", choices=["int8"], help="of a GPT: read new tokens' weights as int8")
    parser.add_fields("limits", Limits, {})
    given = parser.parse(argv)

    directory, quantize = Path(given.pop("directory")), given.pop("quantize", None)
    host, port = given.pop("host", HOST), given.pop("port", PORT)
    limits = Limits.from_dict({name.removeprefix("limits."): value for name, value in given.items()})
    bound = listening(host, port)
    model, tokenizer = open_model(directory)
    if torch.cuda.is_available():
        model.cuda()
    app = create_app(model, tokenizer, limits, quantize=quantize)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            shown = f"[{host}]" if ":" in host else host
            tell(f"serving {type(model).__name__} of {directory} on http://{shown}:{bound.getsockname()[1]}")

        async def shutdown(self, sockets: Any = None) -> None:
            asyncio.get_running_loop().call_later(GRACE, app.state.worker.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=2 * GRACE)
    with stop_signals():  # uvicorn's own handlers raise the signal again when it is done
        Server(config).run([bound])
    return 0


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens: a port that is taken is known before the model is read."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Where it is not told that this is TCP, asyncio leaves Nagle's algorithm on: 40 ms for an answer in two parts.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
    return bound
