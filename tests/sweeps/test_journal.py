"""The journal: half a line hurts nobody, whoever left it and whoever comes next; no lock outlives its process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage

from mutransfer.errors import RequestError
from mutransfer.sweeps import storage as module
from mutransfer.sweeps.storage import Journal

from ..helpers.small import within


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", [b'{"op_code":4,"work', b"{", b"\x00" * 70_000, b'{"op_code":4}'])
def test_half_a_line_is_cut_off_before_the_next_one(tail: bytes, path: Path) -> None:
    mine = JournalStorage(Journal(path))
    study = optuna.create_study(storage=mine, study_name="s")
    whole = path.read_bytes()
    with path.open("ab") as file:  # another worker is killed in a write, while this one has the journal open
        file.write(tail)
    study.set_user_attr("after", 1)
    assert path.read_bytes().startswith(whole + b'{"op_code"')
    assert optuna.load_study(storage=JournalStorage(Journal(path)), study_name="s").user_attrs == {"after": 1}


def test_a_reader_who_had_seen_half_a_line_reads_the_whole_one_that_takes_its_place(path: Path) -> None:
    mine, other = JournalStorage(Journal(path)), JournalStorage(Journal(path))
    study = optuna.create_study(storage=mine, study_name="s")
    with path.open("ab") as file:
        file.write(b'{"op_code":2,"half')
    seen = optuna.load_study(storage=other, study_name="s")
    assert seen.user_attrs == {}
    study.set_user_attr("after", 1)
    assert seen.user_attrs == {"after": 1}


def test_what_is_no_journal_is_refused_and_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"notes, without a newline")
    with pytest.raises(RequestError, match="is not a study journal"):
        Journal(path)
    assert path.read_bytes() == b"notes, without a newline"


@pytest.mark.parametrize("block", [1, 7, 65536])
def test_the_last_line_is_found_however_far_back_it_ends(
    block: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    path.write_bytes(b'{"op_code":1}\n' * 3 + b"x" * 20)
    Journal(path)
    assert path.read_bytes() == b'{"op_code":1}\n' * 3
    path.write_bytes(b'{"op_code":')
    Journal(path)
    assert path.read_bytes() == b""


APPENDS = """
import sys
from pathlib import Path
from mutransfer.sweeps.storage import Journal

journal, first = Journal(Path(sys.argv[1])), int(sys.argv[2])
for number in range(first, first + 100):
    journal.append_logs([{"op_code": 2, "worker_id": "w" * 50, "number": number}])
"""
HOLDS = """
import sys, time
from pathlib import Path
from mutransfer.sweeps.storage import Journal

with Journal(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def test_lines_of_many_writers_are_whole_and_each_is_there(path: Path) -> None:
    writers = [started(APPENDS, str(path), str(1000 * i)) for i in range(3)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    assert sorted(numbers(path)) == [1000 * i + k for i in range(3) for k in range(100)]


def test_a_writer_waits_for_the_lock_which_is_free_at_once_when_its_holder_is_killed(path: Path) -> None:
    with started(HOLDS, str(path)) as holder:
        try:
            assert holder.stdout is not None
            with within(60):
                assert holder.stdout.readline() == "held\n"
            writer = threading.Thread(target=lambda: Journal(path).append_logs([{"op_code": 2, "number": 1}]))
            writer.start()
            writer.join(0.3)
            assert writer.is_alive()
            assert path.read_bytes() == b""
        finally:
            holder.kill()
    writer.join(5)
    assert numbers(path) == [1]
