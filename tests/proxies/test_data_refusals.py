"""Data that cannot be had: a sentence each."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mutransfer.errors import RequestError
from mutransfer.proxies.data import corpora, load_data

from ..helpers.corpora import TOKEN_SOURCES, T, marked_files, refusal


def test_an_unknown_name_gets_the_nearest_one():
    assert refusal("digitz") == "unknown data 'digitz': did you mean 'digits'?"
    assert refusal("imagenet") == "unknown data 'imagenet': known names are bin, bytes, digits, markov, text."


def test_a_path_is_given_where_one_is_taken():
    assert refusal("text") == "the data 'text' has no path: write text:PATH."
    assert refusal("bin:") == "the data 'bin:' has no path: write bin:PATH."
    assert refusal("digits:x") == "the data 'digits' takes no path, but 'digits:x' gives one: write digits."


@pytest.mark.parametrize("kind", ["text", "bin"])
def test_a_missing_path_is_named(tmp_path: Path, kind: str):
    assert refusal(f"{kind}:{tmp_path / 'no.txt'}").startswith(f"there is no {tmp_path / 'no.txt'}: give a ")
    (tmp_path / "train.bin").write_bytes(b"x" * 1000)
    if kind == "bin":
        assert refusal(f"bin:{tmp_path}") == (
            f"there is no {tmp_path / 'val.bin'}: give a folder with train.bin and val.bin, or one .bin file."
        )


@pytest.mark.parametrize("kind", ["text", "bin"])
def test_an_empty_corpus_is_named(tmp_path: Path, kind: str):
    (tmp_path / "empty").touch()
    assert refusal(f"{kind}:{tmp_path / 'empty'}").startswith(f"{tmp_path / 'empty'} is empty (0 tokens): ")


@pytest.mark.parametrize("count", [0, 12])
def test_an_empty_folder_is_named(tmp_path: Path, count: int):
    for number in range(count):
        (tmp_path / str(number)).touch()
    assert refusal(f"text:{tmp_path}").startswith(f"{tmp_path} is empty (0 tokens): ")


@pytest.mark.parametrize(("kind", "width"), [("text", 1), ("bin", 2)])
def test_a_tiny_corpus_is_told_what_it_needs(tmp_path: Path, kind: str, width: int):
    path = tmp_path / "tiny"
    path.write_bytes(b"\0" * 339 * width)
    assert refusal(f"{kind}:{path}") == (
        f"{path} has 33 tokens in its held-out part, but sequences of 16 tokens need at least 34: "
        "give a larger corpus or a sequence length of at most 15."
    )
    assert load_data(f"{kind}:{path}", sequence_length=15).validation()[0][0].shape == (2, 15)
    path.write_bytes(b"\0" * 340 * width)
    assert load_data(f"{kind}:{path}", T).validation()[0][0].shape == (2, T)
    path.write_bytes(b"\0" * 10 * width)
    assert refusal(f"{kind}:{path}").endswith("need at least 34: give a larger corpus.")


def test_a_tiny_training_part_is_told_too(tmp_path: Path):
    np.zeros(33, dtype="<u2").tofile(tmp_path / "train.bin")
    np.zeros(100, dtype="<u2").tofile(tmp_path / "val.bin")
    assert "33 tokens in its training part" in refusal(f"bin:{tmp_path}")


@pytest.mark.parametrize("name", TOKEN_SOURCES)
def test_sequences_have_a_length(files: Path, name: str):
    spec = {"text": f"text:{files / 'text.txt'}", "bin": f"bin:{files / 'tokens.bin'}"}.get(name, name)
    assert refusal(spec, sequence_length=0) == "the sequence length is 0: it should be at least 1 token."


def test_files_that_are_not_bare_tokens_are_refused(tmp_path: Path):
    (tmp_path / "odd.bin").write_bytes(b"x" * 1001)
    assert "1001 bytes, an odd number" in refusal(f"bin:{tmp_path / 'odd.bin'}")
    np.array([20240520, 1, 5000] + [0] * 5000, dtype="<i4").tofile(tmp_path / "headed.bin")
    assert "llm.c's header" in refusal(f"bin:{tmp_path / 'headed.bin'}")


def test_an_unreadable_path_is_named(tmp_path: Path):
    assert refusal("text:" + "x" * 5000).startswith("cannot read xxxx")
    if Path("/proc/self/mem").exists():  # fails to be read even by root
        (tmp_path / "broken.txt").symlink_to("/proc/self/mem")
        assert refusal(f"text:{tmp_path}").startswith(f"cannot read {tmp_path / 'broken.txt'} (")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file nor a folder" in refusal(f"text:{tmp_path / 'pipe'}")


def test_a_forbidden_folder_is_not_left_out(request: pytest.FixtureRequest):
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    request.addfinalizer(lambda: shutil.rmtree(folder))
    marked_files(folder, 12, ".txt")
    folder.chmod(0o755)
    (folder / "part0").chmod(0)
    if os.geteuid() == 0:  # root reads everything
        os.seteuid(65534)
        request.addfinalizer(lambda: os.seteuid(0))
    assert refusal(f"text:{folder}").startswith(f"cannot read {folder / 'part0'} (")


def test_a_folder_without_python_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="holds no Python source files: give your own text as text:PATH"):
        corpora.load_standard_library(T, root=str(tmp_path))
