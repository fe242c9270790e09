"""What killed writers leave is removed by the next one; what living ones hold is not."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from quant_core.convert.workplace import workplace
from quant_core.errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from quant_core.convert.workplace import workplace
with workplace(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_folder_of_a_killed_writer_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    path = tmp_path / "new" / "out"
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    theirs = writer.stdout.readline().strip()
    try:
        with workplace(path) as mine:  # while the other one lives
            assert _names(path.parent) == sorted([mine.name, os.path.basename(theirs)])
        assert os.path.exists(theirs)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert os.path.exists(theirs)
    with workplace(path) as mine:
        assert _names(path.parent) == [mine.name]
        mine.rename(path)
    assert _names(path.parent) == ["out"]


def test_a_new_writer_with_the_number_of_a_dead_one_starts_afresh(tmp_path):
    stale = tmp_path / f".out.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "half").touch()
    with workplace(tmp_path / "out") as mine:
        assert mine == stale
        assert _names(mine) == []


@pytest.mark.parametrize("name", [".other.123.tmp", ".out.x.tmp", ".out.123.tmp.gz", "out.123.tmp"])
def test_folders_of_other_names_are_left_alone(name, tmp_path):
    (tmp_path / name).mkdir()
    with workplace(tmp_path / "out"):
        pass
    assert _names(tmp_path) == [name]


def test_links_and_files_of_such_a_name_are_left_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.1.tmp").symlink_to("elsewhere")
    (tmp_path / ".out.2.tmp").touch()
    with workplace(tmp_path / "out"):
        pass
    assert _names(tmp_path) == [".out.1.tmp", ".out.2.tmp", "elsewhere"]


def _fail_half_way(path):
    with workplace(path) as mine:
        (mine / "half").touch()
        raise ZeroDivisionError


def test_error_leaves_nothing_and_parents_that_were_made_go_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(tmp_path / "a" / "b" / "out")
    assert _names(tmp_path) == []


def test_parent_that_is_a_file_is_an_error_and_stays(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as e, workplace(tmp_path / "file" / "out"):
        pass
    assert e.value.code == "Q-CKPT-IO"
    assert _names(tmp_path) == ["file"]


def test_lock_is_held_as_long_as_the_folder_is_used(tmp_path):
    with workplace(tmp_path / "out") as mine:
        fd = os.open(mine, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
