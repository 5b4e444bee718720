"""The `fastlm` command.

What a user can get wrong ends in one line on stderr and exit code 2, a run that fails in 1, one that is stopped in 130.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import torch

import fastlm
from fastlm import data, models
from fastlm.config import Config, nearest, read_toml
from fastlm.data import EOS_TOKEN
from fastlm.models import GPT, BERTConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["main"]

# What `fastlm train` makes of no options, beside the defaults of the configurations: of GPT, the model that learns most
# in two minutes on two cores.
SIZE: dict[str, Any] = {"hidden_size": 192, "num_layers": 3, "num_heads": 3, "max_seq_len": 256}
DEFAULTS: dict[str, dict[str, Any]] = {
    "GPT": {"model": {**SIZE, "position": "alibi", "activation": "relu"}, "data": {}},
    "BERTForMaskedLM": {"model": SIZE, "data": {"tokenizer": "wordpiece"}},
    "BERTForPreTraining": {"model": SIZE, "data": {"tokenizer": "wordpiece"}},
}
TABLES = ("model", "data", "train")
NEW_TOKENS = 200
TEMPERATURE = 0.8


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments, the process's own if None; returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print("usage: fastlm COMMAND [OPTION ...]\n")
            print("\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items()))
            print("\nfastlm COMMAND --help lists the options of a command.")
            return 0
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        print("\nfastlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, TypeError, IndexError, OSError, ImportError, RuntimeError) as error:
        print(f"fastlm: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def train(argv: list[str]) -> int:
    """train a GPT or a BERT on text; without options a GPT on the sources of Python's library, for two minutes"""
    from fastlm.train import TrainConfig, Trainer, speedup

    parser = _Parser("train", train.__doc__)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="TOML with the tables model, data and train")
    parser.add_argument("--name", help="of the run [that of the data]")
    parser.add_argument("--out", metavar="DIR", help="where runs are kept [runs]")
    parser.add_argument("--resume", action="store_true", help="go on with a run: the latest, or the one --name says")
    parser.add_argument("--profile", action="store_true", help="write a trace of three steps to trace.json")
    parser.add_argument("--price-per-hour", metavar="X", type=float, help="of the machine: says what the run costs")
    parser.add_argument("--model.type", choices=list(DEFAULTS), help="[GPT]", dest="model.type")
    parser.add_fields("model", BERTConfig, DEFAULTS["GPT"]["model"], leave_out=("vocab_size",))
    parser.add_fields("data", data.DataConfig, {}, also={"path": "--data"})
    parser.add_fields("train", TrainConfig, {})
    given = parser.parse(argv)

    out, name = Path(given.pop("out", "runs")), given.pop("name", None)
    options = {key: given.pop(key) for key in ("profile", "price_per_hour") if key in given}
    file = given.pop("config", None)
    resume = given.pop("resume", False)
    folder = _existing_run(out, name) if resume else None
    if folder is not None and file is not None:
        raise ValueError("--resume takes the configuration of the run, and no other")
    settings = _settings(folder / "config.toml" if folder else file, given)
    kind = settings["model"].pop("type")
    config, of_data = TrainConfig.from_dict(settings["train"]), data.DataConfig.from_dict(settings["data"])
    model_type = getattr(models, kind)
    shape = {**settings["model"], "vocab_size": of_data.vocab_size}
    model_type.config_type.from_dict(shape)  # whatever is wrong with it, say so before the text is read
    if folder is None:
        folder = _new_run(out, name, of_data.path)
    how = {key: value for key, value in of_data.to_dict().items() if key not in ("path", *_OF_EXAMPLES)}
    dataset = data.prepare(of_data.path, **how, progress=_tell)
    _tell(dataset.summary)
    torch.manual_seed(config.seed)
    model = model_type(model_type.config_type.from_dict({**shape, "vocab_size": dataset.vocab_size}))
    objectives = [_objective(model, of_data, config.seq_len, dataset, part) for part in ("train", "val")]
    step_seconds, ratio = (None, None) if resume else speedup(model, config, objectives[0])
    tokenizer = dataset.tokenizer_path
    trainer = Trainer(
        model, config, *objectives, folder=folder, source=of_data.to_dict(), tokenizer=tokenizer, **options
    )
    if resume:
        trainer.resume()
    figures = {}
    if isinstance(model, GPT):
        figures = data.baselines(dataset, progress=_tell)
        trainer.baselines = {"n-gram": figures["ngram"]}
    _tell(f"{folder}: from step {trainer.step:,} to {config.steps:,}")
    evaluation = trainer.train()
    command = _command()
    if trainer.interrupted or evaluation is None:
        where = [] if out == Path("runs") else ["--out", str(out)]
        print(f"stopped and saved at step {trainer.step:,}; to go on:")
        print(f"  {shlex.join([command, 'train', '--resume', '--name', folder.name, *where])}")
        return 130
    print(f"\nvalidation loss {evaluation.loss:.3f} nats per token, perplexity {evaluation.perplexity:.1f}\n")
    if figures:
        print("bits per byte of the validation text")
        print(f"  this model                    {evaluation.bits_per_byte:.3f}")
        print(f"  n-gram of six bytes           {figures['ngram']:.3f}")
        print(f"  xz alone                      {figures['xz']:.3f}")
        print(f"  xz, given the training text   {figures['xz_given_train']:.3f}\n")
    if ratio is not None:
        print(
            f"A step of {step_seconds:.3f} s is {ratio:.2f} times as fast as the same model's in plain PyTorch here.\n"
        )
    if isinstance(model, GPT):
        print(f"A sample at temperature {TEMPERATURE}:\n")
        sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "seed": config.seed}
        _print_text(model.eval(), dataset.tokenizer(), "", _ids(model, dataset.tokenizer(), ""), **sampling)
        print()
    print(f"Curves in {folder / 'loss.png'}.", end="")
    if isinstance(model, GPT):
        print(f" Next:\n  {shlex.join([command, 'generate', str(folder)])} --prompt 'def '", end="")
    print()
    return 0


_OF_EXAMPLES = ("separate_documents", "mask_probability")  # fields of DataConfig that are not prepare's


def _objective(model: Any, config: data.DataConfig, seq_len: int, dataset: data.Dataset, part: str) -> data.Objective:
    tokens = {"train": dataset.train_tokens, "val": dataset.val_tokens}[part]
    if isinstance(model, GPT):
        separator = dataset.eos_id if config.separate_documents else None
        size = {"train": dataset.train_bytes, "val": dataset.val_bytes}[part]
        return data.CausalLM(tokens, seq_len, document_id=separator, num_bytes=size)
    vocabulary = dataset.tokenizer().get_vocab()
    names: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    special = {name: vocabulary[name] for name in names if name in vocabulary}
    return data.MaskedLM(
        tokens,
        seq_len,
        special=special,
        vocab_size=dataset.vocab_size,
        probability=config.mask_probability,
        next_sentence=isinstance(model, models.BERTForPreTraining),
    )


def _settings(file: str | Path | None, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of a run: the defaults of its model's type, what the file says, what options say."""
    tables = {} if file is None else read_toml(Path(file))
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            raise ValueError(f"{file}: unknown table {table!r}{nearest(table, TABLES)}")
    said: dict[str, dict[str, Any]] = {table: dict(tables.get(table, {})) for table in TABLES}
    for key, value in given.items():
        table, _, field = key.partition(".")
        said[table][field] = value
    kind = said["model"].get("type", "GPT")
    if kind not in DEFAULTS:
        raise ValueError(f"model.type must be one of {', '.join(DEFAULTS)}, got {kind!r}")
    settings = {table: {**DEFAULTS[kind].get(table, {}), **said[table]} for table in TABLES}
    settings["model"]["type"] = kind
    if "seq_len" in said["train"] and "max_seq_len" not in said["model"]:
        settings["model"]["max_seq_len"] = said["train"]["seq_len"]
    return settings


def generate(argv: list[str]) -> int:
    """continue texts with a trained model"""
    from fastlm.train import checkpoint

    parser = _Parser("generate", generate.__doc__)
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

    folder, as_json = Path(given.pop("directory")), given.pop("json", False)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run or model: {folder}")
    last = checkpoint.latest(folder)
    if last is None and (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    if "" in given.get("stop", ()):
        raise ValueError("--stop must not be empty")
    prompts = _prompts(given.pop("prompt", None), given.pop("prompts", None))
    tokenizers = (folder / "tokenizer.json", folder.parent / "tokenizer.json")
    tokenizer = data.load_tokenizer(next((path for path in tokenizers if path.exists()), tokenizers[0]))
    model = GPT.from_pretrained(last or folder)
    ignore_eos, greedy = given.pop("ignore_eos", False), given.pop("greedy", False) or given.get("num_beams", 1) > 1
    eos = None if ignore_eos else tokenizer.token_to_id(EOS_TOKEN)
    options = {"temperature": TEMPERATURE, "do_sample": not greedy, "seed": torch.seed(), "eos_token_id": eos, **given}
    several = options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1
    asked = [(prompt, _ids(model, tokenizer, prompt, options.get("max_new_tokens"))) for prompt in prompts]
    for n, (prompt, ids) in enumerate(asked):
        if n and not as_json:
            print()
        if as_json or several:
            for text in _texts(model, tokenizer, ids, **options):
                print(json.dumps({"prompt": prompt} | text, ensure_ascii=False) if as_json else prompt + text["text"])
            sys.stdout.flush()
        else:
            _print_text(model, tokenizer, prompt, ids, **options)
    return 0


def info(argv: list[str]) -> int:
    """say what this installation has and lacks"""
    _Parser("info", info.__doc__).parse(argv)
    print(fastlm.info())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": train, "generate": generate, "info": info}


class _Parser(argparse.ArgumentParser):
    """`parse` gives only what was given, and raises ValueError with one line."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(f"fastlm {command}", description=description, allow_abbrev=False)

    def add_fields(
        self,
        table: str,
        kind: type[Config],
        defaults: Mapping[str, Any],
        leave_out: Sequence[str] = (),
        also: Mapping[str, str] | None = None,
    ) -> None:
        """An option for every field: --table.field, --field, and --table.field without a num- that it begins with."""
        group, documentation = self.add_argument_group(table), kind.documentation()
        for name, hint in kind.hints().items():
            if name in leave_out:
                continue
            default, bare = defaults.get(name, getattr(kind, name, None)), name.removeprefix("num_")
            flags = [f"--{table}.{name}", *([f"--{table}.{bare}"] if bare != name else []), f"--{name}"]
            flags = [flag.replace("_", "-") for flag in flags]
            flags[-1] = (also or {}).get(name, flags[-1])
            options: dict[str, Any] = {"help": f"{documentation[name]} [{default}]", "dest": f"{table}.{name}"}
            kinds = [part for part in get_args(hint) or (hint,) if part is not type(None)]
            if hint is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif get_origin(hint) is Literal or get_origin(kinds[0]) is Literal:
                options["choices"] = get_args(hint if get_origin(hint) is Literal else kinds[0])
            elif get_origin(hint) is dict:
                options |= {"type": json.loads, "metavar": "JSON"}
            else:
                options["type"] = kinds[0]
                options["metavar"] = {int: "N", float: "X"}.get(kinds[0], "TEXT")
            group.add_argument(*flags, **options)

    def parse(self, argv: list[str]) -> dict[str, Any]:
        for action in self._actions:
            action.default = argparse.SUPPRESS
        argv = [_dashed(argument) for argument in argv]
        options, unknown = self.parse_known_args(argv)
        for argument in unknown:
            option = argument.partition("=")[0]
            kind = "option" if option.startswith("-") else "argument"
            raise ValueError(f"unknown {kind} {option}{nearest(option, self._option_string_actions)}")
        return {name: value for name, value in vars(options).items() if value is not None}

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument ", "", message))


def _dashed(argument: str) -> str:
    """--num_layers=3 as --num-layers=3."""
    option, equals, value = argument.partition("=")
    return (option.replace("_", "-") if option.startswith("--") else option) + equals + value


def _new_run(out: Path, name: str | None, data: str | None) -> Path:
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise ValueError(f"--name must be the name of a folder, got {name!r}")
    if name is not None and (out / name).exists():
        raise FileExistsError(
            f"{out / name} exists: --resume --name {name} goes on with it, another --name starts anew"
        )
    base = "stdlib" if data is None else Path(data).resolve().stem or "root"
    names = (base if n == 1 else f"{base}-{n}" for n in itertools.count(1))
    return out / (name or next(name for name in names if not (out / name).exists()))


def _existing_run(out: Path, name: str | None) -> Path:
    runs = [path.parent for path in out.glob("*/config.toml") if name in (None, path.parent.name)]
    if not runs:
        raise FileNotFoundError(f"there is no run to resume in {out}" if name is None else f"no such run: {out / name}")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)


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


def _ids(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int | None = None) -> list[int]:
    """A prompt's tokens, for which there is room."""
    ids = tokenizer.encode(prompt).ids
    start = tokenizer.token_to_id(EOS_TOKEN)
    ids = ids if start is None else [start, *ids]  # in training it is what comes before a document
    if not ids:
        raise ValueError("a model without an end-of-text token needs a prompt")
    longest = model.config.max_seq_len
    if len(ids) >= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context only {longest}, new ones included")
    if max_new_tokens is not None and len(ids) + max_new_tokens > longest:
        got = f"{len(ids)} and {max_new_tokens}"
        raise ValueError(f"prompt and new tokens must fit max_seq_len = {longest}, got {got}")
    return ids


def _room(model: GPT, ids: list[int]) -> int:
    return min(NEW_TOKENS, model.config.max_seq_len - len(ids))


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str], last: int) -> Iterator[str]:
    """The text of tokens, as they come: whole characters, up to a text that ends it; of `last` tokens at most."""
    new: list[int] = []
    shown = 0
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=False)
        ends = [text.index(each) for each in stop if each in text]
        if ends:
            yield text[shown : min(ends)]
            return
        # What may yet become another character, or the beginning of what ends the text, waits.
        whole = len(text) if len(new) == last else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        begun = [n for each in stop for n in range(1, len(each)) if text.endswith(each[:n])]
        until = max(shown, min(whole, len(text) - (max(begun, default=0) if len(new) < last else 0)))
        if until > shown:
            yield text[shown:until]
            shown = until
    if shown < len(text := tokenizer.decode(new, skip_special_tokens=False)):
        yield text[shown:]


def _print_text(
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
    most = _room(model, ids) if max_new_tokens is None else max_new_tokens
    tokens = model.stream(torch.tensor([ids]), most, eos_token_id=eos_token_id, **options)  # raises before it prints
    print(prompt, end="", flush=True)
    new = itertools.takewhile(lambda token: token != eos_token_id, map(int, tokens))
    for piece in _pieces(new, tokenizer, stop, most):
        print(piece, end="", flush=True)
    print()


def _texts(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int | None = None,
    eos_token_id: int | None = None,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """What the model adds to a prompt, and why it ends: the document has ended, a stop text, or its length."""
    most = _room(model, ids) if max_new_tokens is None else max_new_tokens
    for row in model.generate(torch.tensor([ids]), most, eos_token_id=eos_token_id, **options).tolist():
        new = list(itertools.takewhile(lambda token: token != eos_token_id, row[len(ids) :]))
        text = tokenizer.decode(new, skip_special_tokens=False)
        cut = "".join(_pieces(new, tokenizer, stop, len(new)))
        finish = "stop" if cut != text else "length" if len(new) == most else "end"
        yield {"text": cut, "finish": finish}


def _tell(line: str) -> None:
    print(line, flush=True)


def _command() -> str:
    """How this command can be called again: by its name, or by its path where the name means another or nothing."""
    called, known = sys.argv[0], shutil.which("fastlm")
    by_path = Path(called).name == "fastlm" and not (known and os.path.samefile(called, known))
    return called if by_path else "fastlm"


if __name__ == "__main__":
    sys.exit(main())
