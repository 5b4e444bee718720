"""Labelled texts: what is read and what is left out, and parts that share no text."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from fastlm.data import LabelledConfig, encode_texts, load_tokenizer, read_labelled, split_labelled
from fastlm.data.tokenizer import train_tokenizer


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_of(n, labels=("neg", "pos")):
    return [(f"text number {i}, 行 {i * 7919 % n}", labels[i % len(labels)]) for i in range(n)]


def test_every_format_gives_the_same(tmp_path):
    rows = [("one, with\na line", "good"), ('"two"', "bad"), ("三", "good"), ("four", "bad")]
    write_csv(tmp_path / "a.csv", rows)
    with gzip.open(tmp_path / "b.csv.gz", "wt", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label", "text"), *((1, label, text) for text, label in rows)])
    lines = [json.dumps({"label": label, "text": text}) for text, label in rows]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    write_csv(tmp_path / "e.csv", [(text.replace("\n", " "), label) for text, label in rows])
    (tmp_path / "d.tsv").write_text("text\tlabel\n" + "".join(f"{t.replace(chr(10), ' ')}\t{n}\n" for t, n in rows[2:]))
    for name in ("a.csv", "b.csv.gz", "c.jsonl"):
        texts = read_labelled(tmp_path / name)
        assert texts.texts == [text for text, _ in rows]
        assert texts.classes == ["bad", "good"]
        assert texts.labels == [1, 0, 1, 0]
        assert not any(texts.left_out.values())
    assert read_labelled(tmp_path / "d.tsv").labels == [1, 0]


def test_parquet_and_a_folder_of_files(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"label": [3, 20, None, 3], "words": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
    texts = read_labelled(tmp_path / "a.parquet", "words")
    assert (texts.texts, texts.classes, texts.labels) == (["a", "b", "d"], ["3", "20"], [0, 1, 0])  # 3 before 20
    assert texts.left_out["unlabelled"] == 1
    write_csv(tmp_path / "b.csv", [("e", 3), ("f", 20)], ("words", "label"))
    assert read_labelled(tmp_path, "words").texts == ["a", "b", "d", "e", "f"]


@pytest.mark.parametrize(
    ("values", "classes"),
    [(["1", "0", "10", "2"], ["0", "1", "2", "10"]), ([True, False], ["false", "true"]), ([1.0, 2], ["1", "2"])],
)
def test_classes_are_in_the_order_of_their_numbers_or_names(tmp_path, values, classes):
    lines = [json.dumps({"text": f"{i} {v}", "label": v}) for v in values for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts = read_labelled(tmp_path / "a.jsonl")
    assert texts.classes == classes
    assert [classes[n] for n in texts.labels[::2]] == [str(v).lower().removesuffix(".0") for v in values]


def test_what_is_left_out_is_counted(tmp_path):
    rows = [
        ("a", "x"), ("b", "y"), (" a ", "x"), ("a", "x"),  # duplicates of the first
        ("c", "x"), ("c", "y"), ("c", "x"),  # one that says both
        ("", "x"), ("  ", "y"), ("d", ""), ("e", "y"),
    ]  # fmt: skip
    texts = read_labelled(write_csv(tmp_path / "a.csv", rows))
    assert texts.texts == ["a", "b", "e"]
    assert texts.left_out == {"blank": 2, "unlabelled": 1, "duplicate": 2, "contradictory": 3}
    assert str(texts) == "3 texts: 1 x, 2 y (left out: 2 blank, 1 unlabelled, 2 duplicate, 3 contradictory)"
    kept = read_labelled(tmp_path / "a.csv", deduplicate=False)
    assert kept.texts == ["a", "b", " a ", "a", "c", "c", "c", "e"]


def test_parts_share_no_text_and_have_the_shares_of_the_classes(tmp_path):
    rows = rows_of(300, ("neg", "pos", "pos"))
    config = LabelledConfig(str(write_csv(tmp_path / "a.csv", rows)), val_fraction=0.1, test_fraction=0.2)
    parts = split_labelled(config)
    texts = {part: set(labelled.texts) for part, labelled in parts.items()}
    assert {part: len(each) for part, each in texts.items()} == {"train": 210, "val": 30, "test": 60}
    assert set().union(*texts.values()) == {text for text, _ in rows}
    for part in parts.values():
        assert part.labels.count(1) == 2 * part.labels.count(0)
        assert all(dict(rows)[text] == part.classes[n] for text, n in zip(part.texts, part.labels, strict=True))
    shuffled = LabelledConfig(str(write_csv(tmp_path / "b.csv", rows[::-1])), val_fraction=0.1, test_fraction=0.2)
    assert {p: set(t.texts) for p, t in split_labelled(shuffled).items()} == texts
    again = LabelledConfig(config.path, val_fraction=0.1, test_fraction=0.2, split_seed=1)
    assert set(split_labelled(again)["test"].texts) != texts["test"]


def test_a_duplicate_that_is_kept_is_in_one_part(tmp_path):
    rows = [(text, label) for text, label in rows_of(60) for _ in range(3)] + [(f"text {i}", "pos") for i in range(9)]
    rows += [(text, "pos") for text, label in rows if label == "neg"]  # texts that say both
    halves = {"val_fraction": 0.4, "test_fraction": 0.4}
    parts = split_labelled(LabelledConfig(str(write_csv(tmp_path / "a.csv", rows)), deduplicate=False, **halves))
    sets = [set(labelled.texts) for labelled in parts.values()]
    assert sum(len(labelled) for labelled in parts.values()) == len(rows)
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_files_of_their_own_to_validate_and_to_test_on(tmp_path):
    rows = rows_of(40)
    whole, val, test = (write_csv(tmp_path / f"{i}.csv", each) for i, each in enumerate((rows, rows[:9], rows[6:12])))
    parts = split_labelled(LabelledConfig(str(whole), val_path=str(val), test_path=str(test)))
    assert parts["test"].texts == [text for text, _ in rows[6:12]]
    assert parts["val"].texts == [text for text, _ in rows[:6]]  # the others are in test
    assert parts["train"].texts == [text for text, _ in rows[12:]]
    assert parts["train"].left_out["in test"] == 6
    drawn = split_labelled(LabelledConfig(str(whole), test_path=str(test)))
    assert len(drawn["val"]) == 4
    assert not set(drawn["val"].texts) & set(drawn["test"].texts)


def test_a_text_of_each_class_is_left_to_train_on(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", rows_of(14)))
    parts = split_labelled(LabelledConfig(path, val_fraction=0.5, test_fraction=0.5))
    assert sorted(parts["train"].labels) == [0, 1]


def test_parts_that_nobody_asks_for_are_empty(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", [("a", "x"), ("b", "y"), ("c", "x")]))
    parts = split_labelled(LabelledConfig(path, val_fraction=0.0, test_fraction=0.0))
    assert [len(parts[part]) for part in ("train", "val", "test")] == [3, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", "text,label\na,x\n", "must have classes, from 2 to half as .* got 1 in 1 texts"),
        ("a.csv", "text,label\n" + "".join(f"t{i},{i}\n" for i in range(9)), "got 9 in 9 texts: '0', '1', .*"),
        ("a.csv", "text,kind\na,x\n", r"a.csv:1 has no column 'label' \(label_column\), it has text, kind"),
        ("a.csv", "body,label\na,x\n", r"a.csv:1 has no column 'text' \(text_column\), it has body, label"),
        ("a.csv", "text,label\n ,x\nb,\n", r"has no labelled texts \(1 blank, 1 unlabelled, 0 duplicate, 0 contra"),
        ("a.jsonl", '{"text": 1, "label": "x"}', "a.jsonl:1: the text must be a string or null, got int"),
        ("a.jsonl", '{"text": "t", "label": [1]}', r"jsonl:1: the label must be a string, an integer or null, got \[1"),
        ("a.jsonl", '{"text": "t", "label": 0.5}', "jsonl:1: the label must be a string, an integer or null, got 0.5"),
        ("a.jsonl", '"text"', "a.jsonl:1 must be an object, got str"),
        ("a.txt", "text", "a.txt must end in .jsonl, .csv, .tsv, .parquet to have text_column and label_column"),
        ("a.csv", "text,label\na,x\nb,y\n", "has too few texts for val: 2 texts"),
    ],
)  # fmt: skip
def test_bad_rows_are_a_clear_error(tmp_path, name, content, error):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=error):
        split_labelled(LabelledConfig(str(tmp_path / name)))


def test_other_bad_calls(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nope"):
        read_labelled(tmp_path / "nope")
    with pytest.raises(ValueError, match="there is no file in"):
        read_labelled(tmp_path)
    path = write_csv(tmp_path / "a.csv", rows_of(10))
    with pytest.raises(ValueError, match="text_column and label_column must differ, got 'text' for both"):
        read_labelled(path, "text", "text")
    with pytest.raises(ValueError, match=r"a.csv:3: the label must be of 'neg', got 'pos'"):
        read_labelled(path, classes=["neg"])
    with pytest.raises(ValueError, match=r"val_fraction must be from 0 to 0.5, got 0.6"):
        LabelledConfig(str(path), val_fraction=0.6)


def test_texts_are_encoded_as_bert_takes_them(tmp_path):
    texts = ["one two three", "[SEP] two", "", "three " * 20]
    train_tokenizer("wordpiece", 300, lambda: texts).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    ids = encode_texts(tokenizer, texts, 8)
    assert all(each[0] == cls and each[-1] == sep for each in ids)
    assert sep not in ids[1][1:-1]  # text is only ever text
    assert ids[2] == [cls, sep]
    assert len(ids[3]) == 8
    assert tokenizer.decode(ids[0]) == "one two three"
    with pytest.raises(ValueError, match=r"the tokenizer must have \[CLS\] and \[SEP\] to classify texts"):
        encode_texts(train_tokenizer("bpe", 300, lambda: texts), texts, 8)


def test_chinese_is_not_unknown_to_a_wordpiece_vocabulary():
    alphabet = [chr(0x4E00 + i) for i in range(3000)]
    texts = ["".join(alphabet[(i * 37 + j * j) % 3000] for j in range(200)) for i in range(600)]
    tokenizer = train_tokenizer("wordpiece", 4096, lambda: texts)
    assert tokenizer.get_vocab_size() <= 4096
    tokens = [token for text in texts for token in tokenizer.encode(text).tokens]
    assert tokens.count("[UNK]") <= 0.0006 * len(tokens)
    small = train_tokenizer("wordpiece", 400, lambda: texts)
    assert small.get_vocab_size() <= 400
