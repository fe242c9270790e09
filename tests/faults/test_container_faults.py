"""Section A of the fault list: files, indexes and folders of safetensors, A01 to A23.

Every faulty folder is built beside a good one. Common to all: the class and code given, a message
that names the file, what was found, what was expected and how to fix it; nothing written; a good
load afterwards in the same process.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import tracemalloc
from pathlib import Path

import pytest

from faults.safetensors_cases import (
    CASES,
    GOOD,
    INDEX,
    MODEL,
    SHARDS,
    assert_good_load,
    raw_file,
    with_model,
    with_shards,
)
from quant_core.checkpoint import SafetensorsCheckpoint, open_checkpoint
from quant_core.errors import CheckpointError, LimitError, QuantError


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    with_model(folder, GOOD)
    return folder


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*"))


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Paths handed to the system's open by the reader."""
    paths: list[str] = []
    os_open = os.open

    def recording(path, *args, **kw):
        paths.append(os.fspath(path))
        return os_open(path, *args, **kw)

    monkeypatch.setattr(os, "open", recording)
    return paths


@pytest.mark.parametrize("case", CASES)
def test_faulty_folder_fails_by_name_and_a_good_load_follows(
    tmp_path: Path, good: Path, opened: list[str], case: str
):
    build, code, parts, tensor = CASES[case]
    folder = tmp_path / "faulty"
    folder.mkdir()
    build(folder)
    before = listing(tmp_path)
    with pytest.raises(QuantError) as caught:
        open_checkpoint(folder)
    error, message = caught.value, str(caught.value)
    assert error.code == code, message
    assert type(error) is (LimitError if code.startswith("Q-LIMIT") else CheckpointError)
    for part in parts:
        assert part in message
    assert "expected" in message
    assert error.tensor == tensor
    assert str(folder) in str(error.path) or "outside" in message
    assert message.isprintable()
    assert message.endswith(".")
    assert len(message) < 1500
    assert listing(tmp_path) == before
    if code in {"Q-CKPT-PATH", "Q-CKPT-AMBIGUOUS", "Q-CKPT-MISSING-SHARD"} or "bin" in case:
        assert opened == []
    assert_good_load(good)


@pytest.mark.parametrize("case", [c for c in CASES if c[:3] in {"A06", "A07", "A08"}])
def test_hostile_header_costs_little_memory(tmp_path: Path, case: str):
    build, code, *_ = CASES[case]
    build(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(QuantError) as caught:
            SafetensorsCheckpoint.open(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == code
    assert peak < 10e6


def test_a07_more_tensors_than_the_cap_stops_at_the_cap(tmp_path: Path):
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with_model(tmp_path, raw_file(b"{" + b",".join(one % i for i in range(20_000)) + b"}"))
    tracemalloc.start()
    try:
        with pytest.raises(LimitError) as caught:
            SafetensorsCheckpoint.open(tmp_path, max_tensors=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.code, caught.value.expected) == ("Q-LIMIT-HEADER", 1000)
    assert peak < 10e6  # 20,000 of them take 1.1 MB of header, bytes and text
    assert len(SafetensorsCheckpoint.open(tmp_path, max_tensors=20_000).tensors) == 20_000


def test_a07_cap_counts_all_shards_together(tmp_path: Path):
    with_shards(tmp_path)
    with pytest.raises(LimitError) as caught:
        SafetensorsCheckpoint.open(tmp_path, max_tensors=1)
    assert caught.value.code == "Q-LIMIT-HEADER"
    with pytest.raises(LimitError):
        SafetensorsCheckpoint.open(tmp_path, max_header_bytes=16)
    assert len(SafetensorsCheckpoint.open(tmp_path, max_tensors=2).tensors) == 2


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "a.ckpt", MODEL])
def test_a14_pickle_is_never_run(tmp_path: Path, name: str):
    folder, canary = tmp_path / "m", tmp_path / "canary"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Canary(str(canary)), 2))
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert caught.value.code == "Q-CKPT-PICKLE"
        assert name in str(caught.value)
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists()  # the canary does sing when it is let out


def test_a20_hub_cache_links_into_own_blobs_are_allowed(tmp_path: Path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    with_shards(snapshot)
    for i, name in enumerate([*SHARDS, INDEX]):
        (snapshot / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b"}
    (blobs / "1").rename(blobs / "1.incomplete")
    with pytest.raises(CheckpointError, match=r"blobs/1\.incomplete") as caught:
        open_checkpoint(snapshot)
    assert caught.value.code == "Q-CKPT-MISSING-SHARD"


@pytest.mark.parametrize("total_size", [25, 0, -1, "24", 1.5, True])
def test_a21_wrong_total_size_is_a_warning(tmp_path: Path, total_size: object):
    with_shards(tmp_path, total_size=total_size)
    checkpoint = open_checkpoint(tmp_path)
    [warning] = checkpoint.warnings
    assert "total_size" in warning
    assert "24 bytes" in warning
    assert checkpoint.read("a").shape == (4,)


def test_a21_right_total_size_is_silent(tmp_path: Path):
    with_shards(tmp_path)
    assert open_checkpoint(tmp_path).warnings == []
    files = sum((tmp_path / s).stat().st_size for s in SHARDS)
    with_shards(tmp_path, total_size=files)  # some tools count whole files
    assert open_checkpoint(tmp_path).warnings == []


def test_a22_all_shards_without_index_are_read_and_said(tmp_path: Path):
    with_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert "no index" in checkpoint.warnings[0]
    (tmp_path / SHARDS[1]).write_bytes(GOOD)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-INDEX"
    assert all(s in str(caught.value) for s in SHARDS)


def test_a22_family_that_claims_a_million_shards_stays_small(tmp_path: Path):
    (tmp_path / "m-00001-of-99999999.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-MISSING-SHARD"
    assert "99999998" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a23_missing_path_gives_the_reason_in_words(tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "nowhere")
    assert caught.value.code == "Q-CKPT-IO"
    assert "No such file or directory" in str(caught.value)
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize("name", ["open", "listdir"])
def test_a23_no_permission_gives_the_reason_in_words(tmp_path: Path, monkeypatch, name: str):
    with_model(tmp_path, GOOD)

    def refuse(*args, **kw):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:  # the super-user may read anything: chmod proves nothing
        patch.setattr(os, name, refuse)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-IO"
    assert "Permission denied" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert_good_load(tmp_path)


@pytest.mark.parametrize("path", ["/dev/null", "a\0b"])
def test_a23_no_file_at_all(path: str):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.code == "Q-CKPT-PATH"


def test_long_path_is_named_whole(tmp_path: Path):
    """The folders of a download cache alone have more than a hundred characters."""
    folder = tmp_path / "snapshots" / ("0123456789" * 12) / ("0123456789" * 12)
    folder.mkdir(parents=True)
    with_model(folder, b"x")
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        open_checkpoint(folder / "no-such.safetensors")
