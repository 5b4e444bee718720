"""`fastlm generate`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm import data
from fastlm.cli.parser import Parser
from fastlm.data import EOS_TOKEN
from fastlm.models import GPT
from fastlm.text import NEW_TOKENS, TEMPERATURE, pieces, prompt_ids, room

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def generate(argv: list[str]) -> int:
    """continue texts with a trained model"""
    from fastlm.folder import model_folder, tokenizer_of

    parser = Parser("generate", generate.__doc__)
    parser.add_argument("directory", metavar="RUN_OR_DIR", help="a run, or a folder with a model and tokenizer.json")
    parser.add_argument("--prompt", metavar="TEXT", help="what to go on from [the start of a document]")
    parser.add_argument(
        "--prompts", metavar="FILE", help='prompts, a line each, in a .jsonl {"prompt": ..}; - is stdin'
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each text when it is complete")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, help=f"[{NEW_TOKENS}, or fewer where the model ends]"
    )
    parser.add_argument("--stop", metavar="TEXT", action="append", help="ends a text, and is left out; can be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    parser.add_argument("--temperature", metavar="X", type=float, help=f"[{TEMPERATURE}]")
    parser.add_argument("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens [0: from all]")
    parser.add_argument("--top-p", metavar="P", type=float, help="draw from the likeliest that hold this much [1]")
    parser.add_argument("--repetition-penalty", metavar="X", type=float, help="of what is there already [1: none]")
    parser.add_argument("--seed", metavar="N", type=int, help="of the draws [new ones every time]")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token every time")
    parser.add_argument("--num-beams", metavar="N", type=int, help="search with so many beams, without draws [1]")
    parser.add_argument("--length-penalty", metavar="X", type=float, help="of beams: above 0 for longer texts [1]")
    parser.add_argument("--num-return-sequences", metavar="N", type=int, help="texts for each prompt [1]")
    parser.add_argument("--quantize", choices=["int8"], help="read new tokens' weights as int8: faster, less exact")
    given = parser.parse(argv)

    folder, as_json = model_folder(given.pop("directory")), given.pop("json", False)
    if "" in given.get("stop", ()):
        raise ValueError("--stop must not be empty")
    prompts = _prompts(given.pop("prompt", None), given.pop("prompts", None))
    tokenizer = data.load_tokenizer(tokenizer_of(folder))
    model = GPT.from_pretrained(folder)
    ignore_eos, greedy = given.pop("ignore_eos", False), given.pop("greedy", False) or given.get("num_beams", 1) > 1
    eos = None if ignore_eos else tokenizer.token_to_id(EOS_TOKEN)
    options = {"temperature": TEMPERATURE, "do_sample": not greedy, "seed": torch.seed(), "eos_token_id": eos, **given}
    several = options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1
    asked = [(prompt, prompt_ids(model, tokenizer, prompt, options.get("max_new_tokens"))) for prompt in prompts]
    for n, (prompt, ids) in enumerate(asked):
        if n and not as_json:
            print()
        if as_json or several:
            for text in texts(model, tokenizer, ids, **options):
                print(json.dumps({"prompt": prompt} | text, ensure_ascii=False) if as_json else prompt + text["text"])
            sys.stdout.flush()
        else:
            print_text(model, tokenizer, prompt, ids, **options)
    return 0


def _prompts(prompt: str | None, file: str | None) -> list[str]:
    if file is None:
        return [prompt or ""]
    if prompt is not None:
        raise ValueError("--prompt and --prompts exclude each other")
    lines = (sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")).splitlines()
    prompts = []
    for number, line in enumerate(lines, 1):
        if file.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
                if not isinstance(line, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise ValueError(f'{file}: line {number} must be {{"prompt": a text}}') from None
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{file} has no prompts")
    return prompts


def print_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    ids: list[int],
    max_new_tokens: int | None = None,
    eos_token_id: int | None = None,
    stop: Sequence[str] = (),
    **options: Any,
) -> None:
    """Print the prompt and, as it comes, what the model adds to it."""
    most = room(model, ids) if max_new_tokens is None else max_new_tokens
    tokens = model.stream(torch.tensor([ids]), most, eos_token_id=eos_token_id, **options)  # raises before it prints
    print(prompt, end="", flush=True)
    new = itertools.takewhile(lambda token: token != eos_token_id, map(int, tokens))
    for piece in pieces(new, tokenizer, stop, most):
        print(piece, end="", flush=True)
    print()


def texts(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int | None = None,
    eos_token_id: int | None = None,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """What the model adds to a prompt, and why it ends: the document has ended, a stop text, or its length."""
    most = room(model, ids) if max_new_tokens is None else max_new_tokens
    for row in model.generate(torch.tensor([ids]), most, eos_token_id=eos_token_id, **options).tolist():
        new = list(itertools.takewhile(lambda token: token != eos_token_id, row[len(ids) :]))
        text = tokenizer.decode(new, skip_special_tokens=False)
        cut = "".join(pieces(new, tokenizer, stop, len(new)))
        finish = "stop" if cut != text else "length" if len(new) == most else "end"
        yield {"text": cut, "finish": finish}
