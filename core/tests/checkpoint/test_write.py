from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core.checkpoint import SafetensorsCheckpoint, write_safetensors
from quant_core.errors import CheckpointError, ConfigError, LayoutError


def state() -> dict[str, torch.Tensor]:
    return {
        "z.half": torch.randn(7, 3).to(torch.bfloat16),
        "a.bytes": torch.arange(5, dtype=torch.uint8),
        "m.scalar": torch.tensor(2.5),
        "m.empty": torch.empty(0, 4, dtype=torch.int32),
        "b.view": torch.arange(24, dtype=torch.int32).reshape(4, 6).t()[1:4:2],
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "p": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "größe\n": torch.ones(1, dtype=torch.bool),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_write_is_read_equal_by_the_safetensors_package_and_us(tmp_path):
    tensors = state()
    [path] = write_safetensors(tmp_path, tensors, metadata={"format": "pt"})
    assert path == tmp_path / "model.safetensors"
    theirs, ours = load_file(path), SafetensorsCheckpoint.open(tmp_path)
    assert set(theirs) == set(tensors) == set(ours.tensors)
    for name, tensor in tensors.items():
        assert same(theirs[name], tensor), name
        assert same(ours.read(name), tensor), name
    assert ours.metadata == {"format": "pt"}


def test_write_same_bytes_as_the_safetensors_package(tmp_path):
    """Distinct element sizes: their order among equal sizes is by type, ours by name."""
    tensors = {
        "b": torch.ones(3, dtype=torch.float16),
        "a": torch.ones(2, 2),
        "c": torch.ones(5, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    [ours] = write_safetensors(tmp_path, tensors, metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_write_tensors_begin_aligned(tmp_path):
    write_safetensors(tmp_path, state())
    for info in SafetensorsCheckpoint.open(tmp_path).tensors.values():
        dtype = getattr(torch, info.dtype)
        assert info.offset % torch.empty(0, dtype=dtype).element_size() == 0, info.name


def test_write_shards_from_an_iterable_with_index(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    paths = write_safetensors(tmp_path / "new" / "out", iter(tensors.items()), max_shard_bytes=100)
    names = [p.name for p in paths]
    assert names == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == names
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"]["t6"] == names[3]
    checkpoint = SafetensorsCheckpoint.open(tmp_path / "new" / "out")
    assert checkpoint.warnings == []
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())


def test_write_tensor_above_shard_size_gets_its_own_shard(tmp_path):
    tensors = {"a": torch.ones(2), "big": torch.ones(100), "b": torch.ones(2)}
    paths = write_safetensors(tmp_path, tensors, max_shard_bytes=16)
    assert len(paths) == 4
    assert {tuple(load_file(p)) for p in paths[:-1]} == {("a",), ("big",), ("b",)}


def test_write_holds_one_shard_of_an_iterable_at_a_time(tmp_path):
    alive, most = 0, 0

    class Counted:
        def __del__(self):
            nonlocal alive
            alive -= 1

    def produce():
        nonlocal alive, most
        for i in range(20):
            tensor = torch.ones(100)
            tensor.counted = Counted()
            alive += 1
            most = max(most, alive)
            yield f"t{i:02d}", tensor
            del tensor

    write_safetensors(tmp_path, produce(), max_shard_bytes=800)
    assert most <= 3  # the two of a shard, and the one that did not fit


def test_write_no_tensors_gives_a_valid_file(tmp_path):
    [path] = write_safetensors(tmp_path, {})
    assert load_file(path) == {}
    assert dict(SafetensorsCheckpoint.open(tmp_path).tensors) == {}


def test_write_existing_weights_are_kept_unless_overwrite(tmp_path):
    write_safetensors(tmp_path, {"a": torch.ones(10), "b": torch.ones(10)}, max_shard_bytes=40)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path, {"a": torch.zeros(1)})
    assert caught.value.code == "Q-CKPT-EXISTS"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write_safetensors(tmp_path, {"a": torch.zeros(1)}, overwrite=True)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    write_safetensors(tmp_path, {"x": torch.zeros(1)}, stem="draft")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "Q-CKPT-DUPLICATE"),
        ([("a", torch.ones(1)), ("__metadata__", torch.ones(1))], "Q-CKPT-NAME"),
        ([("a", torch.ones(1)), ("\ud800", torch.ones(1))], "Q-CKPT-NAME"),
        ([("a", torch.ones(1)), (3, torch.ones(1))], "Q-CKPT-NAME"),
        ([("a", torch.ones(1)), ("b", torch.ones(1, device="meta"))], "Q-LAYOUT-DTYPE"),
        ([("a", torch.ones(1)), ("b", torch.ones(1).to_sparse())], "Q-LAYOUT-DTYPE"),
        ([("a", torch.ones(1)), ("b", torch.ones(1, dtype=torch.complex128))], "Q-LAYOUT-DTYPE"),
        ([("a", torch.ones(1)), ("b", [1.0])], "Q-LAYOUT-DTYPE"),
    ],
)
def test_write_impossible_tensor_raises_and_leaves_nothing(tmp_path, tensors, code: str):
    with pytest.raises((CheckpointError, LayoutError)) as caught:
        write_safetensors(tmp_path / "out", tensors, max_shard_bytes=1)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
    write_safetensors(tmp_path / "out", {"a": torch.ones(1)})


@pytest.mark.parametrize("kw", [{"max_shard_bytes": 0}, {"stem": "../x"}, {"metadata": {"a": 1}}])
def test_write_wrong_argument_raises_config_error(tmp_path, kw):
    with pytest.raises(ConfigError) as caught:
        write_safetensors(tmp_path / "out", {}, **kw)
    assert caught.value.code == "Q-CFG-VALUE"
    assert not (tmp_path / "out").exists()


def test_write_producer_raises_leaves_nothing(tmp_path):
    def produce():
        yield "a", torch.ones(10)
        yield "b", torch.ones(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path, produce(), max_shard_bytes=40)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_write_failing_rename_leaves_nothing(tmp_path, monkeypatch, failing: int):
    calls, replace = 0, os.replace

    def flaky(src, dst):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(src, dst)

    monkeypatch.setattr(os, "replace", flaky)
    tensors = {f"t{i}": torch.ones(10) for i in range(3)}
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        write_safetensors(tmp_path, tensors, max_shard_bytes=40)
    assert caught.value.code == "Q-CKPT-IO"
    assert os.listdir(tmp_path) == []


def test_write_second_writer_of_a_folder_fails_while_the_first_goes_on(tmp_path):
    errors = []

    def produce():
        yield "a", torch.ones(3)
        try:
            write_safetensors(tmp_path / "out", {"b": torch.zeros(3)}, overwrite=True)
        except CheckpointError as err:
            errors.append(err)
        yield "c", torch.ones(3)

    write_safetensors(tmp_path / "out", produce())
    assert [e.code for e in errors] == ["Q-CKPT-LOCKED"]
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert set(SafetensorsCheckpoint.open(tmp_path / "out").tensors) == {"a", "c"}


_KILLED = """
import os, signal, sys, torch
from quant_core.checkpoint.write import write_safetensors

def produce():
    yield "a", torch.ones(64)
    yield "b", torch.ones(64)
    os.kill(os.getpid(), signal.SIGKILL)

write_safetensors(sys.argv[1], produce(), max_shard_bytes=64)
"""


def test_write_after_a_killed_writer_takes_over_and_clears_what_it_left(tmp_path):
    out = tmp_path / "out"
    dead = subprocess.run([sys.executable, "-c", _KILLED, out], capture_output=True)
    assert dead.returncode == -signal.SIGKILL
    left = sorted(os.listdir(out))
    assert ".quant-write.lock" in left
    assert any(n.endswith(".tmp") for n in left)
    write_safetensors(out, {"c": torch.zeros(3)})
    assert os.listdir(out) == ["model.safetensors"]
    assert set(SafetensorsCheckpoint.open(out).tensors) == {"c"}


def test_write_lock_of_a_living_process_is_not_taken_over(tmp_path):
    """The file says a process that is long gone; the lock on it is what counts."""
    lock = tmp_path / ".quant-write.lock"
    lock.write_text("999999999 elsewhere\n")
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError) as caught:
            write_safetensors(tmp_path, {"a": torch.zeros(3)})
        assert caught.value.code == "Q-CKPT-LOCKED"
    write_safetensors(tmp_path, {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_write_without_locks_in_the_file_system_the_file_counts(tmp_path, monkeypatch):
    def unsupported(fd, how):
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_safetensors(tmp_path / "new", {"a": torch.zeros(3)})
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]
    (tmp_path / ".quant-write.lock").write_text("1 elsewhere\n")
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path, {"a": torch.zeros(3)})
    assert caught.value.code == "Q-CKPT-LOCKED"


def test_write_eight_writers_at_once_one_wins_whole(tmp_path):
    folder: Path = tmp_path / "out"
    start, won, lost = threading.Barrier(8), [], []

    def work(i: int) -> None:
        tensors = {f"t{k}": torch.full((50,), float(i)) for k in range(4)}
        start.wait()
        try:
            write_safetensors(folder, tensors, max_shard_bytes=200)
            won.append(i)
        except CheckpointError as err:
            lost.append(err.code)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1
    assert len(lost) == 7
    assert set(lost) <= {"Q-CKPT-LOCKED", "Q-CKPT-EXISTS"}
    checkpoint = SafetensorsCheckpoint.open(folder)
    assert all(
        torch.equal(checkpoint.read(n), torch.full((50,), float(won[0])))
        for n in checkpoint.tensors
    )
    assert len(os.listdir(folder)) == 5


def test_write_aligned_data_begin_at_cache_lines_and_read_back(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.int32),
        "bytes": torch.arange(128).to(torch.uint8),
        "half": torch.arange(64).half(),
        "one": torch.tensor(1.5),
        "words": torch.arange(32, dtype=torch.int32),
    }
    (file,) = write_safetensors(tmp_path / "out", tensors, align=64)
    assert {n: t.tolist() for n, t in load_file(file).items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    with SafetensorsCheckpoint.open(file) as checkpoint:
        at = {n: t.offset for n, t in checkpoint.tensors.items()}
    assert all(at[n] % 64 == 0 for n in ("bytes", "half", "words"))
    assert min(at["odd"], at["one"]) > max(at["bytes"], at["half"], at["words"])
