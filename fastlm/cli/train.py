"""`fastlm train`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm import data, models
from fastlm.cli.generate import TEMPERATURE, print_text
from fastlm.cli.parser import Parser, called, tell
from fastlm.cli.runs import RunAskedFor, how_to_go_on, new_run, tables_of
from fastlm.data.tokenizer import separator
from fastlm.models import GPT, BERTConfig
from fastlm.text import prompt_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What `fastlm train` makes of no options, beside the defaults of the configurations: of GPT, the model that learns most
# in two minutes on two cores.
SIZE: dict[str, Any] = {"hidden_size": 192, "num_layers": 3, "num_heads": 3, "max_seq_len": 256}
DEFAULTS: dict[str, dict[str, Any]] = {
    "GPT": {"model": {**SIZE, "position": "alibi", "activation": "relu"}, "data": {}},
    "BERTForMaskedLM": {"model": SIZE, "data": {"tokenizer": "wordpiece"}},
    "BERTForPreTraining": {"model": SIZE, "data": {"tokenizer": "wordpiece"}},
}


def train(argv: list[str]) -> int:
    """train a GPT or a BERT on text; without options a GPT on the sources of Python's library, for two minutes"""
    from fastlm.train.parallel import process_group

    with process_group():
        return _train(argv)


def _train(argv: list[str]) -> int:
    from fastlm.train import TrainConfig, Trainer, checkpoint, speedup
    from fastlm.train.parallel import Processes

    parser = Parser("train", train.__doc__)
    parser.add_run()
    parser.add_argument("--model.type", choices=list(DEFAULTS), help="[GPT]", dest="model.type")
    parser.add_fields("model", BERTConfig, DEFAULTS["GPT"]["model"], leave_out=("vocab_size",))
    parser.add_fields("data", data.DataConfig, {}, also={"path": "--data"})
    parser.add_fields("train", TrainConfig, {})
    given = parser.parse(argv)

    asked = RunAskedFor.of(given)
    resume, folder, options = asked.folder is not None, asked.folder, asked.options
    settings = settings_of(asked.file, given)
    kind = settings["model"].pop("type")
    config, of_data = TrainConfig.from_dict(settings["train"]), data.DataConfig.from_dict(settings["data"])
    model_type = getattr(models, kind)
    shape = {**settings["model"], "vocab_size": of_data.vocab_size}
    model_type.config_type.from_dict(shape)  # whatever is wrong with it, say so before the text is read
    processes = Processes()
    say = tell if processes.first else lambda line: None
    if folder is None:
        folder = processes.once(lambda: new_run(asked.out, asked.name, of_data.path))
    dataset = processes.before_others(lambda: prepared(of_data, say))
    say(dataset.summary)
    torch.manual_seed(config.seed)
    model = model_type(model_type.config_type.from_dict({**shape, "vocab_size": dataset.vocab_size}))
    parts = ((dataset.train_tokens, dataset.train_bytes), (dataset.val_tokens, dataset.val_bytes))
    objectives = [objective_of(model, of_data, config.seq_len, dataset.tokenizer(), *part) for part in parts]
    step_seconds, ratio = (None, None) if resume or processes.several else speedup(model, config, objectives[0])
    tokenizer = dataset.tokenizer_path
    trainer = Trainer(
        model, config, *objectives, folder=folder, source=of_data.to_dict(), tokenizer=tokenizer, **options
    )
    if resume:
        trainer.resume()
    figures = {}
    if isinstance(model, GPT) and processes.first:
        figures = data.baselines(dataset, progress=tell)
        trainer.baselines = {"n-gram": figures["ngram"]}
    say(f"{folder}: from step {trainer.step:,} to {config.steps:,}")
    evaluation = trainer.train()
    stopped = trainer.interrupted or evaluation is None
    if not processes.first:
        return 130 if stopped else 0
    if stopped:
        print(how_to_go_on("train", folder, trainer.step, processes.several), flush=True)
        return 130
    assert evaluation is not None
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
        if processes.several:  # which may have a share of it each
            model = GPT.from_pretrained(checkpoint.latest(folder) or folder)
        print(f"A sample at temperature {TEMPERATURE}:\n")
        sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "seed": config.seed}
        print_text(model.eval(), dataset.tokenizer(), "", prompt_ids(model, dataset.tokenizer(), ""), **sampling)
        print()
    then = ["generate", str(folder)] if isinstance(model, GPT) else ["finetune", "--model", str(folder)]
    rest = "--prompt 'def '" if isinstance(model, GPT) else "--data LABELLED.csv"
    print(f"Curves in {folder / 'loss.png'}. Next:\n  {shlex.join([called(), *then])} {rest}")
    return 0


_OF_EXAMPLES = ("separate_documents", "mask_probability")  # fields of DataConfig that are not prepare's


def prepared(config: data.DataConfig, progress: Callable[[str], None] | None) -> data.Dataset:
    how = {key: value for key, value in config.to_dict().items() if key not in ("path", *_OF_EXAMPLES)}
    return data.prepare(config.path, **how, progress=progress)


def objective_of(
    model: Any, config: data.DataConfig, seq_len: int, tokenizer: Tokenizer, tokens: Any, num_bytes: int
) -> data.Objective:
    """What a model of this type is to learn from tokens."""
    if isinstance(model, GPT):
        document_id = separator(tokenizer) if config.separate_documents else None
        return data.CausalLM(tokens, seq_len, document_id=document_id, num_bytes=num_bytes)
    vocabulary = tokenizer.get_vocab()
    names: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    special = {name: vocabulary[name] for name in names if name in vocabulary}
    return data.MaskedLM(
        tokens,
        seq_len,
        special=special,
        vocab_size=model.config.vocab_size,
        probability=config.mask_probability,
        next_sentence=isinstance(model, models.BERTForPreTraining),
    )


def settings_of(file: str | Path | None, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of a run: the defaults of its model's type, what the file says, what options say."""
    said = tables_of(file, given)
    kind = said["model"].get("type", "GPT")
    if kind not in DEFAULTS:
        raise ValueError(f"model.type must be one of {', '.join(DEFAULTS)}, got {kind!r}")
    settings = {table: {**DEFAULTS[kind].get(table, {}), **values} for table, values in said.items()}
    settings["model"]["type"] = kind
    if "seq_len" in said["train"] and "max_seq_len" not in said["model"]:
        settings["model"]["max_seq_len"] = said["train"]["seq_len"]
    return settings
