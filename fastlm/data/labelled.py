"""Texts that each have a class: read from rows, without what would spoil a measurement, and split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.config import LabelledConfig
from fastlm.data.corpus import read_rows, utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LabelledTexts", "encode_texts", "read_labelled", "split_labelled"]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with classes.

    Args:
        texts: the texts.
        labels: of each the number of its class.
        classes: their names.
        left_out: counts of rows by why they are not there: blank, unlabelled, duplicate, contradictory.
    """

    texts: list[str]
    labels: list[int]
    classes: list[str]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, wanted: Callable[[str], bool]) -> LabelledTexts:
        """Those whose text is wanted."""
        pairs = [pair for pair in zip(self.texts, self.labels, strict=True) if wanted(pair[0])]
        return LabelledTexts([text for text, _ in pairs], [label for _, label in pairs], self.classes, {})

    def __str__(self) -> str:
        counts = [self.labels.count(n) for n in range(len(self.classes))]
        parts = ", ".join(f"{count:,} {name}" for name, count in zip(self.classes, counts, strict=True))
        left_out = ", ".join(f"{count:,} {why}" for why, count in self.left_out.items() if count)
        return f"{len(self):,} texts: {parts}" + (f" (left out: {left_out})" if left_out else "")


def read_labelled(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    *,
    classes: Sequence[str] | None = None,
    deduplicate: bool = True,
) -> LabelledTexts:
    """The labelled texts of a JSONL, CSV, TSV or parquet file, or of those of a folder.

    Args:
        path: where `read_rows` finds rows.
        text_column, label_column: of the rows. A label is a string, an integer or a truth value.
        classes: in the order of their numbers; None takes those that occur, integers in their order, else as strings.
        deduplicate: of a text that occurs several times keep the first, and none where its labels differ. Texts are
            the same where they differ in spaces at their ends at most.

    Raises ValueError for rows without these columns, texts that are no strings, a label that is not in `classes`, fewer
    than two classes, or nearly as many of them as texts.
    """
    if text_column == label_column:
        raise ValueError(f"data: text_column and label_column must differ, got {text_column!r} for both")
    left_out = {"blank": 0, "unlabelled": 0, "duplicate": 0, "contradictory": 0}
    labelled: dict[Any, tuple[str, str | None]] = {}
    for where, row in read_rows(path, {"text_column": text_column, "label_column": label_column}):
        text, label = row or (None, None)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"data: {where}: the text must be a string or null, got {type(text).__name__}")
        name = _class(where, label)
        if text is None or not text.strip() or not _is_unicode(text):
            left_out["blank"] += 1
        elif name is None:
            left_out["unlabelled"] += 1
        elif classes is not None and name not in classes:
            raise ValueError(f"data: {where}: the label must be of {_shown(classes)}, got {name!r}")
        else:
            key = text.strip() if deduplicate else where
            if key not in labelled:
                labelled[key] = text, name
            elif (before := labelled[key][1]) == name:
                left_out["duplicate"] += 1
            else:
                left_out["contradictory"] += 1 + (before is not None)
                labelled[key] = text, None
    pairs = [(text, name) for text, name in labelled.values() if name is not None]
    if not pairs:
        raise ValueError(f"data: {path} has no labelled texts ({_counts(left_out)})")
    names = list(classes) if classes is not None else sorted({name for _, name in pairs}, key=_order)
    if classes is None and (len(names) < 2 or len(names) > max(2, len(pairs) // 2)):
        raise ValueError(
            f"data: {path}: {label_column} (label_column) must have classes, from 2 to half as many as there are "
            f"texts, got {len(names):,} in {len(pairs):,} texts: {_shown(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return LabelledTexts([text for text, _ in pairs], [numbers[name] for _, name in pairs], names, left_out)


def split_labelled(config: LabelledConfig) -> dict[str, LabelledTexts]:
    """The parts "train", "val" and "test", in which each class has the same share, and no text is in two.

    Those of `val_path` and `test_path` are whole files; a text of theirs is left out of the others. The rest is drawn
    class by class, in the order of a hash of (`split_seed`, text), whatever the order of the rows.
    Raises as `read_labelled`, and where a part would have no text or the training part lacks a class.
    """
    columns = (config.text_column, config.label_column)
    rest = read_labelled(config.path, *columns, deduplicate=config.deduplicate)
    parts: dict[str, LabelledTexts] = {}
    for part, path in (("test", config.test_path), ("val", config.val_path)):
        if path is not None:
            parts[part] = read_labelled(path, *columns, classes=rest.classes, deduplicate=config.deduplicate)
            seen = {text.strip() for text in parts[part].texts}
            rest = _without(rest, seen, f"in {part}")
            if part == "val" and "test" in parts:
                tested = {text.strip() for text in parts["test"].texts}
                parts["val"] = _without(parts["val"], tested, "in test")
    drawn: dict[str, set[str]] = {"test": set(), "val": set()}
    for number in range(len(rest.classes)):
        texts = sorted(
            {text for text, label in zip(rest.texts, rest.labels, strict=True) if label == number}
            - drawn["test"]
            - drawn["val"],
            key=lambda text: blake2b(utf8(f"{config.split_seed}\0{text.strip()}")).digest(),
        )
        whole = len(texts)
        for part, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
            if part not in parts:
                count = min(round(fraction * whole), len(texts) - 1)
                drawn[part].update(texts[:count])
                texts = texts[count:]
    for part, texts_of in drawn.items():
        parts.setdefault(part, rest.only(texts_of.__contains__))
    train = rest.only(lambda text: text not in drawn["test"] and text not in drawn["val"])
    parts["train"] = LabelledTexts(train.texts, train.labels, train.classes, rest.left_out)
    if missing := [name for number, name in enumerate(rest.classes) if number not in parts["train"].labels]:
        raise ValueError(f"data: no text is left to train on with the label {_shown(missing)}")
    wanted = {"val": config.val_fraction > 0 or config.val_path, "test": config.test_fraction > 0 or config.test_path}
    for part, asked in wanted.items():
        if asked and not len(parts[part]):
            raise ValueError(f"data: {config.path} has too few texts for {part}: {rest}")
    return {part: parts[part] for part in ("train", "val", "test")}


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str], max_length: int) -> list[list[int]]:
    """The ids of [CLS] text [SEP] for each text.

    Args:
        tokenizer: has [CLS] and [SEP].
        texts: the texts.
        max_length: of a result; a text is cut to two tokens less.

    Raises:
        ValueError: the tokenizer has no [CLS] or no [SEP].
    """
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    if cls is None or sep is None:
        raise ValueError("data: the tokenizer must have [CLS] and [SEP] to classify texts")
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [[cls, *encoding.ids[: max_length - 2], sep] for encoding in encodings]


def _without(texts: LabelledTexts, seen: set[str], why: str) -> LabelledTexts:
    rest = texts.only(lambda text: text.strip() not in seen)
    left_out = texts.left_out | {why: len(texts) - len(rest)}
    return LabelledTexts(rest.texts, rest.labels, rest.classes, left_out)


def _class(where: str, label: Any) -> str | None:
    if label is None or (isinstance(label, str) and not label.strip()):
        return None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # what a column of integers with gaps becomes
        label = int(label)
    if not isinstance(label, (str, int)):
        raise ValueError(f"data: {where}: the label must be a string, an integer or null, got {label!r}")
    return str(label).strip()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _order(name: str) -> tuple[int, int, str]:
    try:
        return 0, int(name), name
    except ValueError:
        return 1, 0, name


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items())


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
