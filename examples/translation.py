"""English to German with an encoder and a decoder, written for torch.nn: `nn` is all that FastLM changes.

    python examples/translation.py                  # three minutes on two CPU cores
    python examples/translation.py --plain          # the same with torch.nn
    python examples/translation.py pairs.tsv        # other pairs: source, tab, target on each line

The model, its masks and the greedy decoding have the structure of PyTorch's tutorial "Language Translation with
nn.Transformer". The sentences are the messages of Home Assistant (Apache-2.0) and their German translations, which pip
downloads in the wheel of `homeassistant`, 27 MB; they are kept in data/translation.

With the same seed both start from the same weights and see the same batches, so with `--dropout 0` their losses are the
same but for rounding. Dropout takes other random numbers, and losses then differ by chance.
"""

import argparse
import json
import math
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch
from reviews import package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if "--plain" in sys.argv:
    from torch import nn
else:
    from fastlm import nn

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<bos>", "<eos>"]
BATCH, LONGEST, HELD_OUT = 32, 48, 400
SHOWN = 8


# The model ----------------------------------------------------------------------------------------------------------


class PositionalEncoding(nn.Module):
    """Sines and cosines of the position, added; Vaswani et al. 2017."""

    def __init__(self, features, dropout, longest=512):
        super().__init__()
        angles = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, features, 2) * (-math.log(1e4) / features))
        self.register_buffer("table", torch.stack((angles.sin(), angles.cos()), -1).flatten(1), persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(x + self.table[: x.shape[1]])


class Translator(nn.Module):
    """Token ids (batch, source length) and (batch, target length) to logits (batch, target length, vocabulary)."""

    def __init__(self, vocabulary, features=192, heads=6, layers=3, feedforward=384, dropout=0.1):
        super().__init__()
        self.features = features
        self.source = nn.Embedding(vocabulary, features, padding_idx=PAD)
        self.target = nn.Embedding(vocabulary, features, padding_idx=PAD)
        self.position = PositionalEncoding(features, dropout)
        self.transformer = nn.Transformer(
            features, heads, layers, layers, feedforward, dropout, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(features, vocabulary)
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=features**-0.5)

    def forward(self, source, target):
        return self.decode(target, *self.encode(source))

    def encode(self, source):
        padding = source == PAD
        x = self.position(self.source(source) * math.sqrt(self.features))
        return self.transformer.encoder(x, src_key_padding_mask=padding), padding

    def decode(self, target, memory, padding):
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        y = self.transformer.decoder(
            self.position(self.target(target) * math.sqrt(self.features)),
            memory,
            tgt_mask=later,
            tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )
        return self.head(y)


@torch.no_grad()
def greedy_decode(model, source, longest):
    """The most likely token after what there is, one after the other: ids without <bos> and <eos>."""
    model.eval()
    encoded, tokens = model.encode(source[None]), [BOS]
    while len(tokens) <= longest and tokens[-1] != EOS:
        tokens.append(model.decode(torch.tensor([tokens]), *encoded)[0, -1].argmax().item())
    return [token for token in tokens if token >= len(SPECIAL)]


# The data -----------------------------------------------------------------------------------------------------------


def messages(tree, path=()):
    """(path, message) of a tree of dictionaries."""
    for key, value in tree.items():
        yield from messages(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def download(path):
    """Writes the English messages of Home Assistant with their German translations, each message once."""
    pairs = {}
    with package("homeassistant==2023.7.3", "--only-binary=:all:") as wheel, zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(name for name in names if name.endswith("translations/en.json")):
            german = name.replace("en.json", "de.json")
            if german in names:
                translated = dict(messages(json.loads(archive.read(german))))
                for place, message in messages(json.loads(archive.read(name))):
                    pairs.setdefault(" ".join(message.split()), " ".join(translated.get(place, "").split()))
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [f"{source}\t{target}\n" for source, target in pairs.items() if target and " " in source != target]
    path.write_text("".join(kept), encoding="utf-8")


def byte_pairs(texts, size=4000):
    """A tokenizer for both languages, trained on these texts; it adds <bos> and <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $0 <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def padded(sequences):
    return nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=PAD)


def batches(pairs, generator=None):
    """(source, target) of like lengths together; in random order if there is a generator."""
    order = torch.randperm(len(pairs), generator=generator).tolist() if generator else range(len(pairs))
    order = sorted(order, key=lambda n: (len(pairs[n][1]), len(pairs[n][0])))
    starts = torch.arange(0, len(pairs), BATCH)
    for start in starts[torch.randperm(len(starts), generator=generator)] if generator else starts:
        sources, targets = zip(*(pairs[n] for n in order[start : start + BATCH]), strict=True)
        yield padded(sources), padded(targets)


# Training -----------------------------------------------------------------------------------------------------------


def loss_of(model, criterion, source, target):
    return criterion(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


@torch.no_grad()
def validate(model, criterion, pairs):
    model.eval()
    losses = [(loss_of(model, criterion, *batch).item(), len(batch[0])) for batch in batches(pairs)]
    model.train()
    return sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", type=Path, help="file of pairs; none is those of Home Assistant")
    parser.add_argument("--plain", action="store_true", help="torch.nn instead of fastlm.nn")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (1500)")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of progress (100)")
    parser.add_argument("--dropout", type=float, default=0.1, help="probability of dropping (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "enable_nested_tensor is True")  # with norm_first it has no effect

    path = args.pairs or Path("data/translation/german.tsv")
    if args.pairs is None and not path.exists():
        print("downloading the messages of Home Assistant")
        download(path)
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]

    generator = torch.Generator().manual_seed(args.seed)
    shuffled = [lines[n] for n in torch.randperm(len(lines), generator=generator)]
    held_out = min(HELD_OUT, len(lines) // 5)
    tokenizer = byte_pairs(text for pair in shuffled[held_out:] for text in pair)
    encoded = [[tokenizer.encode(text).ids for text in pair] for pair in shuffled]
    short = [pair for pair in encoded[held_out:] if max(map(len, pair)) <= LONGEST]
    validation = [pair for pair in encoded[:held_out] if max(map(len, pair)) <= LONGEST]

    torch.manual_seed(args.seed)
    model = Translator(tokenizer.get_vocab_size(), dropout=args.dropout)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 100) * (1 - n / args.steps))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(short):,} pairs to train on, {len(validation)} to validate on, {parameters / 1e6:.1f} M parameters")
    print(f"{type(model.transformer).__module__}.{type(model.transformer).__name__}")

    step, spent, losses = 0, 0.0, []
    while step < args.steps:
        for source, target in batches(short, generator):
            start = time.perf_counter()
            loss = loss_of(model, criterion, source, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            spent, step = spent + time.perf_counter() - start, step + 1
            if step % args.every == 0 or step == args.steps:
                trained = sum(losses) / len(losses)
                said = f"step {step}: loss {trained:.4f}, validation loss {validate(model, criterion, validation):.4f}"
                print(f"{said}, {spent / step:.3f} s per step", flush=True)
                losses = []
            if step == args.steps:
                break

    for (english, german), (ids, _) in list(zip(shuffled, encoded, strict=True))[: min(SHOWN, held_out)]:
        translation = tokenizer.decode(greedy_decode(model, torch.tensor(ids), LONGEST)).strip()
        print(f"\n  English  {english}\n  German   {german}\n  model    {translation}")


if __name__ == "__main__":
    main()
