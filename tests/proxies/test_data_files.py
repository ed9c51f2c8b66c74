"""Files and folders as data: what is held out, and what their hash depends on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mutransfer.proxies.data import Data, builtin, corpora, load_data
from mutransfer.proxies.data.corpora import read_tree, tree_sha256

from ..helpers.corpora import T, equal, marked_files, rows


@pytest.mark.parametrize("name", ["bytes", "text"])
def test_files_are_held_out_whole(tmp_path: Path, name: str):
    contents = marked_files(tmp_path, 60, ".py")
    data = corpora.load_standard_library(T, root=str(tmp_path)) if name == "bytes" else load_data(f"text:{tmp_path}", T)
    seen = {"training": set(), "held out": set()}
    batches = {"training": [data.batch(step, 64, seed=0) for step in range(40)], "held out": data.validation()}
    for part, pairs in batches.items():
        for x, _ in pairs:
            for window in x.tolist():
                seen[part] |= {number for number, content in enumerate(contents) if bytes(window) in content}
    assert not seen["training"] & seen["held out"]
    assert len(seen["held out"]) >= 3
    assert len(seen["training"]) >= 45
    training, held_out = rows(data)  # the rows themselves, not only the windows that were drawn
    assert all((content in training) != (content in held_out) for content in contents)


def test_the_standard_library_comes_without_tests_and_packages(tmp_path: Path):
    marked_files(tmp_path, 60, ".py")
    before = corpora.load_standard_library(T, root=str(tmp_path)).sha256
    for path in ["test/a.py", "part0/tests/a.py", "site-packages/a.py", "part0/__pycache__/a.py", "notes.txt"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"not part of the corpus")
    assert corpora.load_standard_library(T, root=str(tmp_path)).sha256 == before


def test_the_standard_library_names_its_python(sources: dict[str, Data]):
    facts = sources["bytes"].facts
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(facts["training_tokens"]) > 1_000_000
    assert 0.05 < int(facts["held_out_files"]) / (int(facts["held_out_files"]) + int(facts["training_files"])) < 0.2
    assert b"class OrderedDict" in b"".join(rows(sources["bytes"]))


def test_copies_of_a_file_land_on_the_same_side(tmp_path: Path):
    for copy in ["a", "b"]:
        (tmp_path / copy).mkdir()
        contents = marked_files(tmp_path / copy, 30, ".txt")
    data = load_data(f"text:{tmp_path}", T)
    assert data.facts["held_out"] == "6 files"
    training, held_out = rows(data)
    assert {(training.count(content), held_out.count(content)) for content in contents} == {(2, 0), (0, 2)}


def test_a_small_or_uneven_folder_holds_out_its_end(tmp_path: Path):
    marked_files(tmp_path, 9, ".txt")
    assert load_data(f"text:{tmp_path}", T).facts["held_out"] == "last tenth of the bytes"
    (tmp_path / "huge.txt").write_bytes(bytes(range(256)) * 400)
    assert load_data(f"text:{tmp_path}", T).facts["held_out"] == "last tenth of the bytes"


def test_hidden_files_are_not_text(tmp_path: Path):
    marked_files(tmp_path, 12, ".txt")
    before = load_data(f"text:{tmp_path}", T).sha256
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"junk")
    (tmp_path / ".hidden").write_bytes(b"junk")
    assert load_data(f"text:{tmp_path}", T).sha256 == before


# Token files


def test_a_bin_file_is_split_at_its_end(tmp_path: Path):
    tokens = np.arange(1000, dtype="<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    data = load_data(f"bin:{tmp_path / 'tokens.bin'}", T)
    assert data.inputs == data.classes == 1000
    assert (data.facts["training_tokens"], data.facts["held_out_tokens"]) == (900, 100)
    assert max(int(data.batch(step, 64, seed=0)[1].max()) for step in range(20)) == 899  # the last target is reached
    assert min(int(x.min()) for x, _ in data.validation()) == 900
    assert max(int(y.max()) for _, y in data.validation()) == 999


def test_a_bin_folder_has_its_own_split(tmp_path: Path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(2000, 2100, dtype="<u2").tofile(tmp_path / "val.bin")
    data = load_data(f"bin:{tmp_path}", T)
    assert data.classes == 2100
    assert int(data.batch(0, 64, seed=0)[1].max()) < 1000
    assert all(int(x.min()) >= 2000 for x, _ in data.validation())


# Hashes


def test_the_hash_changes_with_the_content(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    text, tokens = load_data(f"text:{path}", T).sha256, load_data(f"bin:{path}", T).sha256
    path.write_bytes(b"x" * 999 + b"y")
    assert load_data(f"text:{path}", T).sha256 != text
    assert load_data(f"bin:{path}", T).sha256 != tokens
    assert builtin.load_markov(T, language=0).sha256 != builtin.load_markov(T, language=1).sha256
    assert len(text) == 64


def test_the_hash_of_a_folder_tells_paths_from_contents():
    trees = [{"ab": b"c"}, {"a": b"bc"}, {"a": b"b", "c": b""}, {"a": b"c"}, {"b": b"c"}, {"a": b"", "b": b"c"}, {}]
    assert len({tree_sha256(tree) for tree in trees}) == len(trees)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path):
    for path in ["b", "a/z", "c/a", "a.txt"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    files = read_tree(tmp_path, lambda folder: folder == "c", lambda name: True)
    assert list(files.items()) == [("a.txt", b"a.txt"), ("a/z", b"a/z"), ("b", b"b")]


def test_a_folder_moved_elsewhere_keeps_its_hash(tmp_path: Path):
    (tmp_path / "here").mkdir()
    marked_files(tmp_path / "here", 12, ".txt")
    before = load_data(f"text:{tmp_path / 'here'}", T)
    (tmp_path / "here").rename(tmp_path / "there")
    after = load_data(f"text:{tmp_path / 'there'}", T)
    assert before.sha256 == after.sha256
    assert equal(before.batch(0, 4, seed=0), after.batch(0, 4, seed=0))
    (tmp_path / "there" / "part0" / "0.txt").rename(tmp_path / "there" / "part0" / "00.txt")
    assert load_data(f"text:{tmp_path / 'there'}", T).sha256 != before.sha256
