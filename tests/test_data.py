"""Text in, batches out: nothing lost, nothing leaked, the same every time, and nothing half-written left behind."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import data
from fastlm.data import Document
from fastlm.data import dataset as dataset_module
from fastlm.data.split import Spool, split
from fastlm.models.ngram import NGram

VOCAB = 300
WORDS = ["mean", "variance", "gradient", "weight", "tensor", "kernel", "stride", "shared", "barrier", "löss", "行列"]


def write_corpus(folder: Path, files: int = 60, reverse: bool = False) -> Path:
    """Files of distinct long lines, every tenth ends as the one before it does, and a few that are not text."""
    for i in sorted(range(files), reverse=reverse):
        path = folder / ("deep/er" if i % 3 else "") / f"file{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        origins = [i - 1 if i % 10 == 9 and j >= 24 else i for j in range(40)]
        lines = [
            f"{WORDS[(o + j) % 11]} {o * 1009 + j * 7} of {WORDS[(o * j) % 11]} {o}.{j}" for j, o in enumerate(origins)
        ]
        path.write_text("\n".join(lines) + f"\n{i}\n", encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (folder / "zeros.txt").write_bytes(b"text\0text")
    (folder / "blank.txt").write_bytes(b" \n")
    (folder / ".hidden").write_text("not looked at, whatever it holds\n" * 50)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def datasets(cache: Path) -> list[Path]:
    """What is in the cache, but for the empty files that processes lock."""
    return [p for p in cache.iterdir() if not (p.name.startswith(".lock-") and p.stat().st_size == 0)]


def divide(documents, fraction: float, seed: int) -> tuple[list[Document], list[Document], int]:
    """The training part, the validation part and the number of documents dropped from it."""
    documents = list(documents)
    with tempfile.TemporaryDirectory() as folder:
        Spool.write(Path(folder, "spool"), documents, seed)
        spool = Spool(Path(folder, "spool"))
        train, val, dropped = split(spool, fraction)
        starts = spool.ranges[:, 0]
        parts = [
            [
                Document(documents[int(np.searchsorted(starts, start, "right")) - 1].name, spool.read(start, stop))
                for start, stop in part.tolist()
            ]
            for part in (train, val)
        ]
        spool.close()
    return parts[0], parts[1], dropped


def long_lines(text: bytes) -> list[bytes]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 20]


# --- reading and splitting


def test_every_text_file_is_read_once_and_the_others_are_counted(corpus):
    read = data.read_corpus(corpus)
    documents = list(read)
    assert [d.name for d in documents] == sorted(("deep/er/" if i % 3 else "") + f"file{i:03}.txt" for i in range(60))
    assert documents[0].text == (corpus / documents[0].name).read_bytes()
    assert read.skipped == 3


def test_the_split_does_not_depend_on_where_and_in_which_order_the_files_were_written(tmp_path):
    one = data.read_corpus(write_corpus(tmp_path / "one"))
    two = data.read_corpus(write_corpus(tmp_path / "elsewhere" / "two", reverse=True))
    assert divide(one, 0.1, 0) == divide(two, 0.1, 0)
    assert divide(one, 0.1, 0)[1] != divide(one, 0.1, 1)[1]


def test_the_split_depends_on_names_and_seed_alone_so_an_unrelated_file_moves_few_others(corpus):
    before = {d.name for d in divide(data.read_corpus(corpus), 0.2, 0)[1]}
    (corpus / "one more.txt").write_text("a line that is long enough to be seen\n" * 40)
    after = {d.name for d in divide(data.read_corpus(corpus), 0.2, 0)[1]}
    assert len(before ^ after) <= 3


@pytest.mark.parametrize("seed", range(5))
def test_no_validation_file_shares_over_a_fifth_of_its_long_lines_with_the_training_part(corpus, seed):
    train, val, dropped = divide(data.read_corpus(corpus), 0.2, seed)
    assert not {d.name for d in train} & {d.name for d in val}
    assert len(train) + len(val) + dropped == 60
    known = {line for d in train for line in long_lines(d.text)}
    for d in val:
        lines = long_lines(d.text)
        assert sum(line in known for line in lines) <= 0.2 * len(lines)


def test_validation_files_copied_from_training_files_are_dropped_and_counted():
    unique = [
        Document(f"{i}", "".join(f"a line of its own, number {i} {j}\n" for j in range(20)).encode()) for i in range(50)
    ]
    copies = [Document(f"{i} copy", d.text) for i, d in enumerate(unique)]
    train, val, dropped = divide(sorted(unique + copies), 0.2, 0)
    texts = {d.text for d in train}
    assert dropped > 0
    assert not any(d.text in texts for d in val)


def test_copies_without_a_single_long_line_are_dropped_too():
    documents = [Document(f"{i:03}", f"{i // 2}\n".encode() * 30) for i in range(200)]
    train, val, _ = divide(documents, 0.2, 0)
    texts = {d.text for d in train}
    assert not any(d.text in texts for d in val)


def test_the_validation_part_holds_about_the_fraction_asked_for(corpus):
    documents = [Document(f"{i:03}", os.urandom(400 + 9 * i).hex().encode()) for i in range(300)]
    for fraction in (0.05, 0.08, 0.1):
        train, val, _ = divide(documents, fraction, 0)
        share = sum(len(d.text) for d in val) / sum(len(d.text) for d in train + val)
        assert 0.8 * fraction < share <= fraction


def test_a_single_file_is_cut_at_a_line_and_its_end_is_the_validation_part(tmp_path):
    text = "".join(f"line number {i} of a long poem\n" for i in range(1000))
    (tmp_path / "poem.txt").write_text(text)
    (tmp_path / "other.txt").write_text("not to be read")
    train, val, dropped = divide(data.read_corpus(tmp_path / "poem.txt"), 0.08, 0)
    assert (len(train), len(val), dropped) == (1, 1, 0)
    assert (train[0].text + val[0].text).decode() == text
    assert train[0].text.endswith(b"\n")
    assert 0.06 < len(val[0].text) / len(text) < 0.09


def test_a_few_large_files_are_all_cut(tmp_path):
    documents = [Document(n, "".join(f"line {i} of the book {n}\n" for i in range(500)).encode()) for n in "abc"]
    train, val, _ = divide(documents, 0.08, 0)
    assert [a.text + b.text for a, b in zip(train, val, strict=True)] == [d.text for d in documents]


# --- tokens


def test_decoding_the_tokens_gives_the_text_back_and_the_tokens_start_every_file_with_the_separator(corpus, cache):
    ds = data.prepare(corpus, VOCAB)
    tokenizer = ds.tokenizer()
    for ids, text, files in (
        (ds.train_tokens, ds.train_text(), ds.train_documents),
        (ds.val_tokens, ds.val_text(), ds.val_documents),
    ):
        assert isinstance(ids.shards[0].base, np.memmap)
        ids = np.asarray(ids)
        assert ids[0] == ds.eos_id
        assert (ids == ds.eos_id).sum() == files
        assert tokenizer.decode(ids[ids != ds.eos_id].tolist(), skip_special_tokens=False).encode() == text
        assert ids.max() < ds.vocab_size
        assert ids.dtype == np.uint16
    train, val, dropped = divide(data.read_corpus(corpus), 0.08, 0)
    assert ds.train_text() == b"".join(d.text for d in train)
    assert ds.val_text() == b"".join(d.text for d in val)
    assert (ds.train_bytes, ds.val_bytes) == (len(ds.train_text()), len(ds.val_text()))
    assert (ds.train_documents, ds.val_documents) == (len(train), len(val))
    assert (ds.dropped_documents, ds.skipped_documents, ds.cleaned) == (dropped, 3, {})
    assert ds.vocab_size == VOCAB


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_CACHE", str(folder / "cache"))
        yield data.prepare(write_corpus(folder / "corpus"), VOCAB).tokenizer()


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(alphabet=" \n\r\t\0aé行\ufeff\u2028\U0001f600") | st.just("a<|endoftext|>b <|endoftext|>"))
def test_any_text_survives_encoding_and_decoding_and_never_becomes_the_separator(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id(data.EOS_TOKEN) not in ids


def test_a_text_that_contains_the_separator_is_still_whole(tmp_path, cache):
    (tmp_path / "a.txt").write_text("".join(f"before <|endoftext|> after, number {i}\n" for i in range(400)))
    ds = data.prepare(tmp_path / "a.txt", VOCAB)
    assert (np.asarray(ds.val_tokens) == ds.eos_id).sum() == 1
    ids = ds.val_tokens[1:].tolist()
    assert ds.tokenizer().decode(ids, skip_special_tokens=False).encode() == ds.val_text()


def test_a_file_larger_than_one_piece_is_encoded_whole(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(dataset_module, "_PIECE_BYTES", 100)
    (tmp_path / "a.txt").write_text("".join(f"{i} words\r\nin lines\x0b\u2028  \n\n" for i in range(500)), newline="")
    ds = data.prepare(tmp_path / "a.txt", VOCAB)
    ids = ds.train_tokens[1:].tolist()
    assert ds.tokenizer().decode(ids, skip_special_tokens=False).encode() == ds.train_text()


def test_vocabularies_above_16_bits_are_stored_in_32(tmp_path, cache, corpus, monkeypatch):
    small = data.prepare(corpus, VOCAB)
    monkeypatch.setattr(dataset_module, "_16_BIT_VOCABULARY", VOCAB - 1)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "another"))
    large = data.prepare(corpus, VOCAB)
    assert large.train_tokens.dtype == np.uint32
    assert (np.asarray(large.train_tokens) == np.asarray(small.train_tokens)).all()


# --- the cache

FILES = ("tokenizer.json", "train-00000.bin", "train.txt", "val-00000.bin", "val.txt")


def test_the_same_text_and_settings_give_the_same_bytes_in_another_cache(tmp_path, corpus, cache, monkeypatch):
    first = contents(data.prepare(corpus, VOCAB).path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "another"))
    copy = write_corpus(tmp_path / "copy", reverse=True)
    assert contents(data.prepare(copy, VOCAB).path) == first
    assert set(first) == {"manifest.json", *FILES}


def test_a_second_call_opens_the_first_ones_files_and_any_change_makes_others(corpus, cache, monkeypatch):
    first = data.prepare(corpus, VOCAB)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "_build", None)
        assert data.prepare(corpus, VOCAB).path == first.path
    paths = {first.path, data.prepare(corpus, VOCAB + 1).path, data.prepare(corpus, VOCAB, split_seed=1).path}
    paths.add(data.prepare(corpus, VOCAB, val_fraction=0.2).path)
    (corpus / "file000.txt").rename(corpus / "file000.text")
    paths.add(data.prepare(corpus, VOCAB).path)
    text = (corpus / "file000.text").read_bytes()
    (corpus / "file000.text").write_bytes(text[:-1] + b" ")
    paths.add(data.prepare(corpus, VOCAB).path)
    assert len(paths) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_a_build_that_is_interrupted_is_no_dataset_and_is_gone_on_with(corpus, cache, monkeypatch, error):
    expected = contents(data.prepare(corpus, VOCAB).path)
    monkeypatch.setenv("FASTLM_CACHE", str(cache.parent.parent / "another"))
    cache = cache.parent.parent / "another" / "data"

    def stop(text):
        if text.startswith("encoding val"):
            assert any(cache.rglob("train-00000.bin"))
            raise error

    with pytest.raises((KeyboardInterrupt, OSError), match=r"^$|disk full"):
        data.prepare(corpus, VOCAB, progress=stop)
    assert all(p.name.startswith(".partial-") for p in datasets(cache))
    told = []
    ds = data.prepare(corpus, VOCAB, progress=told.append)
    assert [line.split(":")[0] for line in told] == ["encoding train", "encoding val"]
    assert contents(ds.path) == expected
    assert datasets(cache) == [ds.path]


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_a_damaged_cache_is_made_again(corpus, cache, name, damage):
    path = data.prepare(corpus, VOCAB).path
    good = contents(path)
    content = bytearray(good[name])
    if damage == "removed":
        (path / name).unlink()
    elif damage == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    assert data.prepare(corpus, VOCAB).path == path
    assert contents(path) == good
    assert datasets(cache) == [path]


def test_a_manifest_with_one_digit_changed_is_not_believed(corpus, cache):
    path = data.prepare(corpus, VOCAB).path / "manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"skipped_documents": 3', '"skipped_documents": 4'))
    assert data.prepare(corpus, VOCAB).skipped_documents == 3
    assert path.read_text() == good


def test_a_file_where_the_dataset_should_be_is_replaced(corpus, cache):
    path = data.prepare(corpus, VOCAB).path
    path.rename(cache.parent / "aside")
    path.write_text("not a folder")
    assert data.prepare(corpus, VOCAB).path.is_dir()


def test_what_a_killed_process_left_is_removed_a_day_later_and_a_running_ones_is_not(corpus, cache):
    old, new = cache / ".partial-old", cache / ".partial-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "train.bin").write_bytes(b"x")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    data.prepare(corpus, VOCAB)
    assert not old.exists()
    assert new.exists()


def prepare_in_turn(corpus: Path, begun, waiting, results) -> None:
    told = []

    def tell(text):
        told.append(text)
        if text.startswith("encoding val"):
            begun.set()
            assert waiting.wait(30)
        elif text.startswith("waiting"):
            waiting.set()

    ds = data.prepare(corpus, VOCAB, progress=tell)
    results.put((len(told), int(np.asarray(ds.train_tokens).astype(np.int64).sum())))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_second_process_waits_for_the_one_that_makes_the_same_dataset(corpus, cache):
    context = multiprocessing.get_context("fork")
    begun, waiting, results = context.Event(), context.Event(), context.Queue()
    arguments = (corpus, begun, waiting, results)
    processes = [context.Process(target=prepare_in_turn, args=arguments, daemon=True) for _ in range(2)]
    processes[0].start()
    assert begun.wait(60)
    processes[1].start()
    lines, sums = zip(*(results.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert sorted(lines) == [1, 5]  # one waited and made nothing
    assert set(sums) == {int(np.asarray(data.prepare(corpus, VOCAB).train_tokens).astype(np.int64).sum())}
    assert len(datasets(cache)) == 1


def killed_after_two_shards(corpus: Path) -> None:
    save = dataset_module._save_state

    def save_and_die(folder, state, **finished):
        save(folder, state, **finished)
        if len(finished.get("train", {"shards": []})["shards"]) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    dataset_module._save_state = save_and_die
    data.prepare(corpus, VOCAB)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_after_a_kill_the_next_call_goes_on_and_encodes_no_finished_shard_again(corpus, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "_SHARD_TOKENS", 5000)
    monkeypatch.setattr(dataset_module, "_PIECE_BYTES", 300)
    monkeypatch.setattr(dataset_module, "_BATCH_BYTES", 1000)
    process = multiprocessing.get_context("fork").Process(target=killed_after_two_shards, args=(corpus,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (partial,) = datasets(cache)
    assert partial.name.startswith(".partial-")
    finished = {name: (partial / name).stat().st_ino for name in ("train-00000.bin", "train-00001.bin")}

    encoded, told = [], []
    encode = dataset_module._encode

    def counted(tokenizer, batch, *rest):
        ids, ends = encode(tokenizer, batch, *rest)
        encoded.append(len(ids))
        return ids, ends

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "_encode", counted)
        ds = data.prepare(corpus, VOCAB, progress=told.append)
    assert [line.split(":")[0] for line in told] == ["encoding train", "encoding val"]
    tokens = len(ds.train_tokens) + len(ds.val_tokens)
    assert len(ds.train_tokens.shards) > 3
    assert tokens - 10_000 <= sum(encoded) < tokens - 10_000 + 300  # of one piece the start is encoded again
    assert {name: (ds.path / name).stat().st_ino for name in finished} == finished
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "another"))
    assert contents(data.prepare(corpus, VOCAB).path) == contents(ds.path)
    monkeypatch.setattr(dataset_module, "_SHARD_TOKENS", 1 << 27)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "one shard"))
    whole = data.prepare(corpus, VOCAB)
    assert (np.asarray(whole.train_tokens) == np.asarray(ds.train_tokens)).all()
    assert (np.asarray(whole.val_tokens) == np.asarray(ds.val_tokens)).all()


def test_a_finished_dataset_that_was_not_yet_given_its_name_is_not_made_again(corpus, cache, monkeypatch):
    def stop(partial, final):
        for path in partial.glob("spool.*"):
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(corpus, VOCAB)
    monkeypatch.setattr(dataset_module, "_build", None)
    ds = data.prepare(corpus, VOCAB)
    assert datasets(cache) == [ds.path]


def test_of_large_files_the_size_and_spaced_pieces_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "_HASHED_BYTES", 1000)
    monkeypatch.setattr(dataset_module, "_HASHED_PIECE_BYTES", 100)
    content = bytearray(os.urandom(10_000))
    path = tmp_path / "large"

    def hashed():
        path.write_bytes(content)
        return dataset_module._file_hash(path)

    first = hashed()
    for position in (0, 99, 9_900, 9_999, 660):
        content[position] ^= 1
        assert hashed() != first
        content[position] ^= 1
    assert hashed() == first
    content += b"x"
    assert hashed() != first


def test_the_cache_is_named_by_the_environment(corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.prepare(corpus, VOCAB).path.parent == tmp_path / "xdg" / "fastlm" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.prepare(corpus, VOCAB).path.parent == tmp_path / "home" / ".cache" / "fastlm" / "data"


# --- errors


@pytest.mark.parametrize("vocab_size", [-1, 256, 10**12])
def test_a_vocabulary_that_cannot_be_is_refused(corpus, cache, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size must be from 257 .*got {vocab_size}"):
        data.prepare(corpus, vocab_size)


def test_a_validation_fraction_out_of_range_is_refused(corpus, cache):
    for fraction in (0, 0.6, -1, math.nan):
        with pytest.raises(ValueError, match="val_fraction must be above 0"):
            data.prepare(corpus, VOCAB, val_fraction=fraction)


def test_a_path_that_does_not_exist_is_named(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        data.prepare(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\xfd"])
def test_a_folder_or_file_without_text_is_named(tmp_path, cache, content):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder"
    if content is not None:
        path = path / "file"
        path.write_bytes(content)
    for given_path in {path, tmp_path / "folder"}:
        with pytest.raises(ValueError, match=f"no text in .*{given_path.name}"):
            data.prepare(given_path)
    assert not cache.exists() or datasets(cache) == []


@pytest.mark.parametrize(("text", "why"), [("x", "too small"), ("the same line over and over\n" * 500, "repeat")])
def test_a_text_without_a_validation_part_is_refused_with_the_reason(tmp_path, cache, text, why):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=f"no validation part .*a.txt .*{why}"):
        data.prepare(tmp_path / "a.txt")
    assert datasets(cache) == []


@pytest.mark.skipif(os.name != "posix", reason="device files and pipes")
def test_pipes_and_dangling_links_in_a_folder_are_skipped_and_a_device_is_refused(tmp_path, cache):
    (tmp_path / "a.txt").write_text("a line of text\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    read = data.read_corpus(tmp_path)
    assert [d.name for d in read] == ["a.txt"]
    assert read.skipped == 2
    with pytest.raises(ValueError, match="neither a file nor a folder: /dev/null"):
        data.read_corpus("/dev/null")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, corpus, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write the cache .*file.*FASTLM_CACHE"):
        data.prepare(corpus, VOCAB)


def test_a_missing_tokenizers_library_is_named_with_the_command_that_installs_it(corpus, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install fastlm\[train\]"):
        data.prepare(corpus, VOCAB)


def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        data.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*absent"):
        data.load_tokenizer(tmp_path / "absent")


# --- baselines


def test_baselines_are_bits_per_byte_of_the_validation_text_and_are_kept(corpus, cache, monkeypatch):
    ds = data.prepare(corpus, VOCAB)
    told = []
    figures = data.baselines(ds, told.append)
    train, val = ds.train_text(), ds.val_text()

    def bits(text):
        return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    assert figures == {
        "ngram": NGram(6).fit(train).bits_per_byte(val),
        "xz": pytest.approx(bits(val) / len(val), rel=0.01),
        "xz_given_train": pytest.approx((bits(train + val) - bits(train)) / len(val), rel=0.02),
    }
    assert told
    monkeypatch.setattr("fastlm.data.baseline.NGram", None)
    assert data.baselines(ds) == figures
    assert data.baselines(data.prepare(corpus, VOCAB)) == figures


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1, "ngram": 1}', '{"version": 0, "ngram": 1, "xz": 1, "xz_given_train": 1}']
)
def test_damaged_baseline_figures_are_made_again(corpus, cache, content):
    ds = data.prepare(corpus, VOCAB)
    figures = data.baselines(ds)
    (ds.path / "baselines.json").write_text(content)
    assert data.baselines(ds) == figures
    assert json.loads((ds.path / "baselines.json").read_text())["ngram"] == figures["ngram"]


def test_interrupted_baselines_leave_nothing(corpus, cache):
    ds = data.prepare(corpus, VOCAB)
    before = contents(ds.path)

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.baselines(ds, stop)
    assert contents(ds.path) == before


# --- the default corpus


def test_the_standard_library_is_a_corpus_of_sources_alone(cache):
    read = data.read_corpus()
    documents = list(read)
    assert len(documents) > 200
    assert sum(len(d.text) for d in documents) > 4e6
    for d in documents:
        folders = d.name.split("/")[:-1]
        assert d.name.endswith(".py")
        assert not {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages"} & set(folders)
    train, val, _ = divide(documents, 0.08, 0)
    val_bytes = sum(len(d.text) for d in val)
    assert 0.05 < val_bytes / sum(len(d.text) for d in train) < 0.1
    assert max(len(d.text) for d in val) < 0.2 * val_bytes
    bits = NGram(6).fit(b"".join(d.text for d in train)).bits_per_byte(b"".join(d.text for d in val))
    assert 1.5 < bits < 2.1


def test_the_summary_tells_people_the_sizes(corpus, cache):
    ds = data.prepare(corpus, VOCAB)
    assert f"{len(ds.train_tokens):,} tokens" in ds.summary
    assert "3 empty or not UTF-8" in ds.summary
    assert "\n" not in ds.summary
    assert "1 document to validate" in dataclasses.replace(ds, val_documents=1).summary
