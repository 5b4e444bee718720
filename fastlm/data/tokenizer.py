"""Tokenizers of the `tokenizers` library: trained here, or loaded from the files of Hugging Face, GPT-2 and BERT."""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "EOS_TOKEN",
    "TRAINED",
    "import_tokenizers",
    "load_tokenizer",
    "separator",
    "tokenizer_files",
    "train_tokenizer",
]

EOS_TOKEN = "<|endoftext|>"
TRAINED = ("bpe", "wordpiece")

_SEPARATORS = (EOS_TOKEN, "</s>", "[SEP]")
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BPE_TOKENS = (EOS_TOKEN, "<s>", "</s>", "<pad>", "<unk>", "<mask>")  # GPT-2's and RoBERTa's
_COVERED = 0.9995  # of a text by the characters that are in a vocabulary; those of Chinese are thousands


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer so that text is only ever text: `<|endoftext|>` in it is thirteen characters.

    `path` is a `tokenizer.json`; GPT-2's `vocab.json`, `merges.txt` standing beside it; BERT's `vocab.txt`, letters
    being lowered unless `do_lower_case` in a `tokenizer_config.json` beside it is false; or a folder of these. Nothing
    is ever truncated or padded, whatever a `tokenizer.json` says. `[CLS]` and `[SEP]` are added as it says; call
    `encode(text, add_special_tokens=False)` for the text alone.

    With byte-level BPE `decode(encode(text).ids, skip_special_tokens=False) == text` for every text; WordPiece does not
    keep spaces, nor BERT's kind of it case and accents.

    Raises FileNotFoundError for a missing file, ValueError for one that is not a tokenizer, ImportError without the
    `tokenizers` library.
    """
    tokenizers = import_tokenizers()
    files = tokenizer_files(path)
    try:
        if files[0].name == "vocab.json":
            tokenizer = _byte_level(tokenizers, tokenizers.models.BPE.from_file(*map(str, files)))
            _add_special(tokenizer, _BPE_TOKENS)
        elif files[0].name == "vocab.txt":
            config = json.loads(files[1].read_text(encoding="utf-8")) if files[1:] else {}
            vocab = tokenizers.models.WordPiece.read_file(str(files[0]))
            if "[UNK]" not in vocab:
                raise ValueError("it has no [UNK]")
            tokenizer = _bert(tokenizers, vocab, bool(config.get("do_lower_case", True)))
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(files[0]))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data: {files[0]} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files that `load_tokenizer(path)` reads. Raises FileNotFoundError for a missing one."""
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.json", "vocab.json", "vocab.txt")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"data: no tokenizer at {path}: a folder needs tokenizer.json, vocab.json and merges.txt, or vocab.txt"
            )
        path = found
    if path.name in ("vocab.json", "merges.txt"):
        files = [path.with_name("vocab.json"), path.with_name("merges.txt")]
    elif path.name == "vocab.txt":
        config = path.with_name("tokenizer_config.json")
        files = [path, config] if config.is_file() else [path]
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data: no tokenizer at {file}")
    return files


def train_tokenizer(kind: str, vocab_size: int, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Train a vocabulary of at most `vocab_size` on `texts()`, which is called once per pass over the texts.

    `bpe`: byte-level, with GPT-2's splitting of words (Radford et al. 2019), no normalisation, all 256 bytes in it, so
    that no text is unknown or changed; `<|endoftext|>` is 0.

    `wordpiece`: BERT's (Devlin et al. 2019), lowered, without accents; [PAD] [UNK] [CLS] [SEP] [MASK] are 0 to 4. In it
    are the most frequent characters that make up 99.95% of the text, or three quarters of the vocabulary.
    """
    tokenizers = import_tokenizers()
    if kind == "wordpiece":
        return _train_wordpiece(tokenizers, vocab_size, texts)
    tokenizer = _byte_level(tokenizers, tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _train_wordpiece(tokenizers: Any, vocab_size: int, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    # The library numbers the characters in the order of a hash map, another one in every process, and its merges depend
    # on the numbers. So they are numbered here: those inside words by being given as special tokens.
    tokenizer = _bert(tokenizers, {}, lowercase=True)
    characters = _characters(tokenizer, texts())
    sums = list(itertools.accumulate(count for _, count in characters))
    covering = bisect.bisect_left(sums, _COVERED * sums[-1]) + 1 if sums else 0
    alphabet = sorted(c for c, _ in characters[: min(covering, 3 * vocab_size // 4)])
    inside = [f"##{c}" for c in alphabet if len(_words(tokenizer, f"a{c}")) == 1]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_BERT_TOKENS, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return _bert(tokenizers, tokenizer.get_vocab(), lowercase=True)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def _characters(tokenizer: Tokenizer, texts: Iterable[str]) -> list[tuple[str, int]]:
    """The normalised characters and how often they occur, the most frequent first."""
    raw, counts = Counter[str](), Counter[str]()
    for text in texts:
        raw.update(text)
    for character, count in raw.items():
        for normalised in tokenizer.normalizer.normalize_str(character).strip():
            counts[normalised] += count
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def separator(tokenizer: Tokenizer) -> int:
    """The id that stands before each document: of `<|endoftext|>`, `</s>` or `[SEP]`, the first that there is.

    Raises ValueError where there is none.
    """
    ids: Iterator[int | None] = map(tokenizer.token_to_id, _SEPARATORS)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ValueError(f"data: tokenizer must have one of {', '.join(_SEPARATORS)} to stand between documents")
    return found


def _byte_level(tokenizers: Any, model: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _bert(tokenizers: Any, vocab: dict[str, int], lowercase: bool) -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    _add_special(tokenizer, _BERT_TOKENS)
    return tokenizer


def _add_special(tokenizer: Any, names: Iterable[str]) -> None:
    tokenizer.add_special_tokens([name for name in names if tokenizer.token_to_id(name) is not None])


def import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("data: the tokenizers library is missing: pip install fastlm[train]") from None
    return tokenizers
