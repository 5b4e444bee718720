"""Files of every kind, cleaning, tokenizers, and token ids over shards: what `fastlm.data.prepare` is made of."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import data
from fastlm.data import Tokens
from fastlm.data import corpus as corpus_module
from fastlm.data import dataset as dataset_module
from fastlm.data import tokenizer as tokenizer_module
from fastlm.data.clean import Cleaner

VOCAB = 300


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def sentences(n: int = 200) -> list[str]:
    return [f"sentence number {i} of a text, with {i * 7919 % 1000} and {i * 104729 % 977} in it" for i in range(n)]


def read(path: Path, **kwargs) -> tuple[dict[str, str], int]:
    """Texts by name, and how many were skipped."""
    corpus = data.read_corpus(path, **kwargs)
    return {name: text.decode() for name, text in corpus}, corpus.skipped


# --- files


def test_rows_of_json_are_objects_or_strings_and_blank_or_null_ones_are_skipped(tmp_path):
    lines = [
        '\ufeff{"text": "one\\ntwo", "id": 1}',
        '"a bare string"',
        "",
        '{"text": null}',
        "null",
        '{"text": " \\n"}',
        '{"text": "\\ud800 is half a character"}',
        '{"id": {}, "text": "é \\u00e9 \\u2028"}',
    ]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    expected = {"a.jsonl:1": "one\ntwo", "a.jsonl:2": "a bare string", "a.jsonl:8": "é é \u2028"}
    assert read(tmp_path / "a.jsonl") == (expected, 5)


def test_rows_of_csv_may_hold_quoted_line_ends_and_are_named_by_the_line_they_start_at(tmp_path):
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["id", "body"], [1, 'a "quoted"\nline, and\r\nanother'], [2, ""], [3, "x" * 300_000], [4, "é"]]
        )
        file.write("\n5,last")
    (tmp_path / "b.tsv").write_text("body\tid\ntab separated, with a comma\t7\n")
    limit = csv.field_size_limit()
    texts, skipped = read(tmp_path, text_column="body")
    assert texts == {
        "a.csv:2": 'a "quoted"\nline, and\r\nanother',
        "a.csv:6": "x" * 300_000,
        "a.csv:7": "é",
        "a.csv:9": "last",
        "b.tsv:2": "tab separated, with a comma",
    }
    assert skipped == 2
    assert csv.field_size_limit() == limit


def test_rows_of_parquet_are_read_from_their_column_alone(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" for i in range(5000)]
    texts[7], texts[8] = None, "  "
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(texts).cast(kind)
        parquet.write_table(
            pa.table({"n": list(range(5000)), "text": column}), tmp_path / "a.parquet", row_group_size=999
        )
        found, skipped = read(tmp_path / "a.parquet")
        assert list(found.items()) == [(f"a.parquet:{i + 1}", t) for i, t in enumerate(texts) if i not in (7, 8)]
        assert skipped == 2
    with pytest.raises(ValueError, match=r"a.parquet has no column 'body' .*it has n, text"):
        read(tmp_path / "a.parquet", text_column="body")
    with pytest.raises(ValueError, match=r"a.parquet:1: the text must be a string or null, got int"):
        read(tmp_path / "a.parquet", text_column="n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(ValueError, match=r"a.parquet"):
        read(tmp_path / "a.parquet")


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install fastlm\[parquet\]"):
        data.prepare(tmp_path / "a.parquet")
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_compressed_files_are_read_and_other_archives_are_no_text(tmp_path):
    for name, content in (("a.jsonl.gz", '"one"\n'), ("b.csv.gz", "text\ntwo\n"), ("c.txt.gz", "three"), ("d.gz", "x")):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path) == ({"a.jsonl.gz:1": "one", "b.csv.gz:2": "two", "c.txt.gz": "three"}, 1)
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"fine"\n{"text": \n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'"fine"\n"\xff"\n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a.jsonl:1 has no column 'text' \(text_column\), it has body, id"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: the text must be a string or null, got int"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: the text must be a string or null, got list"),
        ("a.csv", b"id,body\n1,x\n", r"a.csv:1 has no column 'text' .*it has id, body"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a.csv:3 has 1 fields, the header has 2"),
        ("a.csv", b"id,text\n1,x,y\n", r"a.csv:2 has 3 fields, the header has 2"),
        ("a.csv", b'id,text\n1,x\n2,"never ends\n3,y\n', r"a.csv:3 is not CSV"),
        ("a.csv", b"id,text\n1,x\n2,\xff\n", r"a.csv:3 is not UTF-8"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line_and_leaves_nothing(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.prepare(tmp_path / name)
    assert [p for p in cache.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_an_empty_file_is_skipped_and_counted(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path) == ({}, 1)


def test_a_large_text_file_is_read_in_parts_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_PART_BYTES", 1000)
    text = "".join(f"line {i} é\n" for i in range(500)) + "x" + "行" * 2000 + "\nlast"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("small")
    *parts, small = data.read_corpus(tmp_path)
    assert small == ("b.txt", b"small")
    assert b"".join(part.text for part in parts).decode() == text
    assert max(len(part.text) for part in parts) <= 1000
    assert all(part.text.decode() for part in parts)
    assert parts[0].name == "a.txt:1"
    assert parts[1].text.startswith(b"line %d " % (int(parts[1].name.split(":")[1]) - 1))
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    assert read(tmp_path) == ({"b.txt": "small"}, 1)


def test_a_folder_of_every_kind_of_file_is_one_corpus(tmp_path, cache):
    lines = sentences()
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines[:80]))
    (folder / "b.csv").write_text("text\n" + "".join(f'"{t}"\n' for t in lines[80:150]))
    for i, line in enumerate(lines[150:]):
        (folder / f"c{i}.txt").write_text(line)
    ds = data.prepare(folder, VOCAB)
    assert ds.train_documents + ds.val_documents == 200
    assert Counter((ds.train_text() + ds.val_text()).decode()) == Counter("".join(lines))


# --- iterables


def test_an_iterable_is_read_once_and_known_again_by_its_content(cache, monkeypatch):
    lines = sentences()
    read_so_far = []

    def generator():
        for line in [*lines, None, "", "\ud800"]:
            read_so_far.append(line)
            yield line

    ds = data.prepare(generator(), VOCAB)
    assert read_so_far == [*lines, None, "", "\ud800"]
    assert ds.skipped_documents == 3
    assert "iterable" in ds.summary
    assert Counter((ds.train_text() + ds.val_text()).decode()) == Counter("".join(lines))
    monkeypatch.setattr(dataset_module, "_build", None)
    assert data.prepare([*lines, None, None, None], VOCAB).path == ds.path
    assert [p for p in cache.iterdir() if p.is_dir()] == [ds.path]
    monkeypatch.undo()
    monkeypatch.setenv("FASTLM_CACHE", str(cache.parent))
    assert data.prepare(["".join(lines[:2]), *lines[2:]], VOCAB).path != ds.path


def test_an_iterable_that_fails_leaves_nothing_and_its_error_is_not_the_caches(cache):
    def generator(error):
        yield from sentences()
        raise error

    for error in (OSError("the network is down"), KeyError("x")):
        with pytest.raises(type(error)) as raised:
            data.prepare(generator(error), VOCAB)
        assert raised.value is error
    with pytest.raises(TypeError, match=r"must hold strings, got int \(element 200\)"):
        data.prepare([*sentences(), 3], VOCAB)
    for wrong in (b"bytes", 3):
        with pytest.raises(TypeError, match="must be a path, an iterable of strings or None, got"):
            data.prepare(wrong, VOCAB)
    assert list(cache.iterdir()) == []
    with pytest.raises(ValueError, match="no text in an iterable"):
        data.prepare(iter([]), VOCAB)


# --- cleaning


def clean(text: str, **steps) -> str:
    return Cleaner(**steps)(text.encode()).decode()


def test_html_becomes_text():
    html = (
        "<!DOCTYPE html><html><head><title>T &amp; U</title><style>p { color: red }</style>"
        "<script>if (a < b) { document.write('<p>no</p>') }</script></head><!-- no -->"
        "<body><p>one <b>bold</b>&nbsp;caf&eacute; &#x884c; &lt;kept&gt;</p>two<br/>three<table><tr><td>4<td>5</table>"
        "<img src='x' alt='>'>x &unknown; 1 < 2</body>"
    )
    expected = "T & U\none bold\xa0café 行 <kept>\ntwo\nthree\n4\n5\nx &unknown; 1 < 2\n"
    assert clean(html, strip_html=True) == expected
    assert clean("plain text, 1 > 0", strip_html=True) == "plain text, 1 > 0"


def test_control_characters_go_and_those_that_scripts_need_stay():
    assert clean("\ufeffa\0b\x1b[0m\tc\r\nd\re\x85\u200b\u202ef\n", strip_control=True) == "ab[0m\tc\nd\nef\n"
    joined = "می\u200cخواهم \U0001f469\u200d\U0001f4bb \u2028 ﬁ"
    assert clean(joined, strip_control=True) == joined


def test_the_normal_form_is_the_one_named():
    assert clean("ﬁ é", normalize="NFKC") == "fi é"
    assert clean("ﬁ é", normalize="NFD") == "ﬁ e\u0301"
    with pytest.raises(ValueError, match="normalize must be None or one of NFC, NFD, NFKC, NFKD, got 'nfc'"):
        data.prepare([], normalize="nfc")


def test_every_step_is_counted_and_duplicates_are_those_after_the_other_steps(cache):
    lines = sentences(100)
    texts = [
        *lines,
        f"<b>{lines[0]}</b>",
        f"{lines[1]}\0",
        lines[2],
        "ﬁ" + lines[3],
        "fi" + lines[3],
        "<p></p>",
        " ",
        "\0",
    ]
    steps = {"strip_html": True, "normalize": "NFKC", "strip_control": True, "deduplicate": True}
    ds = data.prepare(texts, VOCAB, **steps)
    assert ds.cleaned == {"strip_html": 2, "normalize": 1, "strip_control": 2, "deduplicate": 4}
    assert ds.skipped_documents == 3
    assert ds.train_documents + ds.val_documents + ds.dropped_documents == 101
    manifest = json.loads((ds.path / "manifest.json").read_text().split("\n", 1)[1])
    assert manifest["cleaned"] == ds.cleaned
    assert "strip_html 2, normalize 1, strip_control 2, deduplicate 4" in ds.summary
    assert data.prepare(texts, VOCAB, **{**steps, "strip_html": False}).path != ds.path
    raw = data.prepare(texts, VOCAB)
    assert raw.cleaned == {}
    assert raw.train_documents + raw.val_documents + raw.dropped_documents == 107


# --- tokenizers


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sentence", "number", "of", "a", "text", ",", "with", "and"]
    words += ["in", "it", "caf", "##e", "Café", "[", "]", "行", "sep", *"0123456789", *(f"##{i}" for i in range(10))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


TEXTS = (*sentences(5), "Café CAFE\u0301 行行 [SEP] [MASK] unknown\u200b\n\t12")


@pytest.mark.parametrize("lowercase", [True, False])
def test_berts_vocabulary_gives_berts_ids(bert_folder, tmp_path, lowercase):
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_bytes((bert_folder / "vocab.txt").read_bytes())
    if not lowercase:
        (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    ours = data.load_tokenizer(tmp_path)
    library = tokenizers.BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=lowercase)
    library._tokenizer.encode_special_tokens = True
    hugging_face = BertTokenizerFast.from_pretrained(str(tmp_path), do_lower_case=lowercase)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == library.encode(text, add_special_tokens=False).ids
        if "[" not in text:
            assert ids == hugging_face(text, add_special_tokens=False).input_ids


def test_gpt2s_files_give_the_ids_of_the_tokenizer_json_of_the_same_model(tmp_path, cache):
    ds = data.prepare(sentences(), VOCAB)
    files = tmp_path / "gpt2"
    files.mkdir()
    ds.tokenizer().model.save(str(files))
    assert {p.name for p in files.iterdir()} == {"vocab.json", "merges.txt"}
    for path in (files, files / "vocab.json", files / "merges.txt"):
        loaded = data.load_tokenizer(path)
        for text in (*TEXTS, "<|endoftext|> x"):
            assert loaded.encode(text).ids == ds.tokenizer().encode(text).ids
    again = data.prepare(sentences(), tokenizer=files)
    assert (np.asarray(again.train_tokens) == np.asarray(ds.train_tokens)).all()
    assert (again.eos_id, again.vocab_size) == (ds.eos_id, ds.vocab_size)
    from_json = data.prepare(sentences(), 9999, tokenizer=str(ds.path))
    assert (np.asarray(from_json.train_tokens) == np.asarray(ds.train_tokens)).all()
    assert from_json.path != again.path
    assert data.prepare(sentences(), 5000, tokenizer=str(ds.path)).path == from_json.path


def test_a_loaded_tokenizer_neither_truncates_nor_pads_nor_adds_special_tokens(bert_folder, tmp_path, cache):
    library = tokenizers.BertWordPieceTokenizer(str(bert_folder / "vocab.txt"))
    library.enable_truncation(max_length=4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    ds = data.prepare(sentences(), tokenizer=tmp_path / "tokenizer.json")
    ids = np.asarray(ds.val_tokens)
    assert ds.eos_id == library.token_to_id("[SEP]")
    assert (ids == ds.eos_id).sum() == ds.val_documents
    assert not np.isin(ids, [library.token_to_id("[CLS]"), library.token_to_id("[PAD]")]).any()
    library.no_truncation()
    library.no_padding()
    first = ids[1 : np.flatnonzero(ids == ds.eos_id)[1]].tolist()
    assert first in [library.encode(t, add_special_tokens=False).ids for t in sentences()]


def test_wordpiece_has_berts_special_tokens_first_and_is_the_same_in_every_process(tmp_path, cache):
    ds = data.prepare(sentences(), VOCAB, tokenizer="wordpiece")
    tokenizer = ds.tokenizer()
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert ds.eos_id == 3
    assert ds.vocab_size <= VOCAB
    assert tokenizer.decode(tokenizer.encode("Sentence number 12").ids) == "sentence number 12"
    assert not (np.asarray(ds.train_tokens) == 1).any()
    assert 3 not in tokenizer.encode("before [SEP] after").ids
    script = "import sys\nfrom fastlm import data\nprint(data.prepare(sys.argv[1:], 300, tokenizer='wordpiece').path)"
    environment = {**os.environ, "FASTLM_CACHE": str(tmp_path / "another")}
    command = [sys.executable, "-c", script, *sentences()]
    there = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert Path(there, "tokenizer.json").read_bytes() == ds.tokenizer_path.read_bytes()


def test_what_is_wrong_with_a_tokenizer_is_named(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match=r"a folder needs tokenizer.json, vocab.json .*, or vocab.txt"):
        data.prepare(sentences(), tokenizer=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*worpdiece"):
        data.prepare(sentences(), tokenizer="worpdiece")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*merges.txt"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"vocab.txt is not a tokenizer: it has no \[UNK\]"):
        data.load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[UNK]\nb\n")
    with pytest.raises(ValueError, match=r"tokenizer must have one of <\|endoftext\|>, </s>, \[SEP\]"):
        data.prepare(sentences(), tokenizer=tmp_path / "vocab.txt")


def test_a_vocabulary_is_trained_on_a_sample_of_a_large_corpus(cache, monkeypatch):
    trained_on = []

    def train(kind, vocab_size, texts):
        trained_on.extend(texts())
        return tokenizer_module.train_tokenizer(kind, vocab_size, texts)

    monkeypatch.setattr(dataset_module, "train_tokenizer", train)
    monkeypatch.setattr(dataset_module, "_MAX_LEARNT_BYTES", 3000)
    data.prepare(sentences(), VOCAB)
    assert 3000 <= sum(map(len, trained_on)) < 3100
    numbers = [int(t.split()[2]) for t in trained_on]
    assert numbers == sorted(numbers)
    assert max(numbers) - min(numbers) > 150


# --- tokens


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_tokens_over_shards_are_indexed_like_the_array_they_make(draw):
    sizes = draw.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    whole = np.arange(1000, 1000 + sum(sizes), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(sizes)[:-1]))
    n = len(whole)
    assert (len(tokens), tokens.shape, tokens.dtype) == (n, (n,), whole.dtype)
    assert (np.asarray(tokens) == whole).all()
    assert np.asarray(tokens, dtype=np.int64).dtype == np.int64
    place = st.none() | st.integers(-2 * n, 2 * n)
    where = slice(draw.draw(place), draw.draw(place), draw.draw(st.none() | st.integers(-9, 9).filter(bool)))
    assert tokens[where].tolist() == whole[where].tolist()
    assert tokens[where].dtype == whole.dtype
    shape = draw.draw(st.sampled_from([(), (0,), (5,), (2, 3), (3, 0), (2, 1, 4)]))
    dtype = draw.draw(st.sampled_from([np.int64, np.int32]))
    index = np.array(draw.draw(st.lists(st.integers(-n, n - 1), min_size=24, max_size=24)), dtype)
    index = index[: int(np.prod(shape))].reshape(shape)
    np.testing.assert_array_equal(tokens[index], whole[index])
    assert tokens[index].dtype == whole.dtype
    assert tokens[-1] == whole[-1]
    for beyond in (n, -n - 1, np.array([0, n])):
        with pytest.raises(IndexError):
            tokens[beyond]


def test_tokens_refuse_other_indices_and_shards():
    for shards in ([np.arange(3)], [np.arange(3), np.arange(2)]):
        for index in (0.5, np.array([True, False, True])):
            with pytest.raises(IndexError, match="must be integers or slices"):
                Tokens(shards)[index]
    for shards in ([], [np.zeros((2, 2))], [np.zeros(2), np.zeros(2, np.uint16)]):
        with pytest.raises(ValueError, match="shards must be"):
            Tokens(shards)


# --- larger than memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM of Linux")
def test_memory_does_not_grow_with_the_corpus(tmp_path, cache):
    script = """
import random, re, sys
from fastlm import data
from fastlm.data import corpus, dataset, split

corpus._PART_BYTES = split._BLOCK_BYTES = 1 << 20
dataset._BATCH_BYTES = dataset._MAX_LEARNT_BYTES = dataset._KEPT_BYTES = 1 << 18
dataset._PIECE_BYTES = 1 << 14
split._MAX_VALIDATION_BYTES = 1 << 18

def memory():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

words = [f"{random.Random(i).getrandbits(20):x}" for i in range(300)]
data.prepare((" ".join(random.choices(words, k=9)) for _ in range(2000)), 300)
with open(sys.argv[1], "w") as file:
    for i in range(25):
        part = "".join(f"{i} " + " ".join(random.choices(words, k=40)) + "\\n" for _ in range(5000))
        file.write(part)
size, before = 25 * len(part) >> 20, memory()
ds = data.prepare(sys.argv[1], tokenizer=sys.argv[2], deduplicate=True)
print(size, memory() - before, len(ds.train_tokens))
"""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]  # few ids, so that it is quick
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    command = [sys.executable, "-c", script, str(tmp_path / "large.txt"), str(tmp_path / "vocab.txt")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    size, growth, count = map(int, output.split())
    assert size >= 25
    assert count > 4e6
    assert growth < size / 2
