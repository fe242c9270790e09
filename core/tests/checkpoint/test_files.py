from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from quant_core.checkpoint import files
from quant_core.checkpoint.files import FilePool, OpenFile, resolve_inside
from quant_core.errors import CheckpointError


def open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../../x", "/etc/hostname", "a\0b", "a\\b", "sub"]
)
def test_resolve_name_that_is_no_file_inside_raises(tmp_path, name: str):
    (tmp_path / "sub").mkdir()
    with pytest.raises(CheckpointError) as caught:
        resolve_inside(tmp_path, name, named_by="x.index.json")
    assert caught.value.code == "Q-CKPT-PATH"
    assert str(caught.value).startswith("x.index.json: ")


def test_resolve_absent_file_is_left_to_the_caller(tmp_path):
    assert resolve_inside(tmp_path, "sub/a.bin") == tmp_path.resolve() / "sub" / "a.bin"


def test_resolve_symlink_inside_is_followed_and_outside_refused(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "in").symlink_to("a")
    (folder / "out").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    assert resolve_inside(folder, "in").name == "a"
    with pytest.raises(CheckpointError, match="symlink out of the folder"):
        resolve_inside(folder, "out")
    with pytest.raises(CheckpointError):
        resolve_inside(folder, "loop")


def test_resolve_hub_cache_link_into_own_blobs_only(tmp_path):
    repo, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    for r in (repo, other):
        (r / "blobs").mkdir(parents=True)
        (r / "blobs" / "hash").write_bytes(b"x")
    snapshot = repo / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "good").symlink_to("../../blobs/hash")
    (snapshot / "bad").symlink_to("../../../models--c--d/blobs/hash")
    (snapshot / "deep").symlink_to("../../refs")
    (repo / "refs").write_bytes(b"r")
    assert resolve_inside(snapshot, "good") == (repo / "blobs" / "hash").resolve()
    for name in ("bad", "deep"):
        with pytest.raises(CheckpointError) as caught:
            resolve_inside(snapshot, name)
        assert caught.value.code == "Q-CKPT-PATH"


def test_pool_keeps_at_most_limit_files_open(tmp_path):
    paths = [tmp_path / str(i) for i in range(40)]
    for p in paths:
        p.write_bytes(p.name.encode())
    pool, before = FilePool(limit=4), open_count()
    for p in paths * 2:
        with pool.open(p) as file:
            assert file.read(10, 0) == p.name.encode()
        assert open_count() <= before + 4
    pool.close()
    assert open_count() == before
    with pytest.raises(CheckpointError) as caught, pool.open(paths[0]):
        pass
    assert caught.value.code == "Q-CKPT-CLOSED"


def test_pool_file_in_use_outlives_its_eviction(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"aaa")
    b.write_bytes(b"bbb")
    pool, before = FilePool(limit=1), open_count()
    with pool.open(a) as first:
        with pool.open(b) as second:
            assert second.read(3, 0) == b"bbb"
        assert first.read(3, 0) == b"aaa"
        pool.close()
        assert first.read(3, 0) == b"aaa"
    assert open_count() == before


def test_pool_many_threads_read_the_right_bytes(tmp_path):
    paths = [tmp_path / str(i) for i in range(12)]
    for p in paths:
        p.write_bytes(p.name.encode() * 1000)
    pool, wrong = FilePool(limit=2), []

    def work(seed: int) -> None:
        for i in range(200):
            p = paths[(seed * 7 + i * 5) % len(paths)]
            with pool.open(p) as file:
                if file.read(len(p.name) * 1000, 0) != p.name.encode() * 1000:
                    wrong.append(p)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_open_file_reads_in_pieces_and_stops_at_the_end(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    monkeypatch.setattr("quant_core.checkpoint.files._MAX_PREAD", 7)
    file = OpenFile(path)
    try:
        assert file.read(50, 10) == bytes(range(10, 60))
        assert file.read(50, 90) == bytes(range(90, 100))
    finally:
        file.close()


# -------------------------------------------------------------------------------- shared reads


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 1 MB, read in shares of 64 KiB by up to four threads."""
    monkeypatch.setattr(files, "_SHARE", 64 << 10)
    monkeypatch.setattr(files, "_ALIGN", 4096)
    monkeypatch.setattr(files, "threads_for", lambda nbytes: 4 if nbytes >= 128 << 10 else 1)
    path = tmp_path / "large"
    path.write_bytes(bytes(i * 7 % 251 for i in range(1_000_003)))
    return path


@pytest.mark.parametrize(("size", "offset"), [(1_000_003, 0), (999_000, 1003), (131_072, 5)])
def test_shared_read_is_exact(large: Path, size: int, offset: int) -> None:
    file, buffer = OpenFile(large), bytearray(size)
    assert file.read_into(memoryview(buffer), offset) == size
    assert buffer == large.read_bytes()[offset : offset + size]
    file.close()


@pytest.mark.parametrize("left", [0, 1, 300_000, 900_000])
def test_shared_read_past_the_end_says_how_much_there_is(large: Path, left: int) -> None:
    want = large.read_bytes()[:left]
    file, buffer = OpenFile(large), bytearray(1_000_003)
    os.truncate(large, left)
    assert file.read_into(memoryview(buffer), 0) == left
    assert buffer[:left] == want
    file.close()


def test_shared_read_that_fails_is_an_error_and_leaves_no_reader(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, ended = OpenFile(large), OpenFile._read_part, []

    def fail_first(self: OpenFile, buffer: memoryview, offset: int) -> int:
        if offset == 0:
            raise CheckpointError("broken", code="Q-CKPT-IO")
        time.sleep(0.05)
        done = real(self, buffer, offset)
        ended.append(offset)
        return done

    monkeypatch.setattr(OpenFile, "_read_part", fail_first)
    with pytest.raises(CheckpointError):
        file.read_into(memoryview(bytearray(1_000_003)), 0)
    assert len(ended) == 3
    file.close()


def test_threads_of_a_read_follow_its_size() -> None:
    assert files.threads_for(1 << 20) == 1
    assert 1 <= files.threads_for(1 << 30) <= 4
