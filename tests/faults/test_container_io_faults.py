"""Section A of the fault list, A24 to A30: files that change or fail, sizes, names, writers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faults.safetensors_cases import (
    GOOD,
    INDEX,
    MODEL,
    assert_good_load,
    entry,
    raw_file,
    with_model,
)
from quant_core.checkpoint import open_checkpoint, write_safetensors
from quant_core.errors import CheckpointError


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    with_model(folder, GOOD)
    return folder


@pytest.mark.parametrize("keep", [0, 40, len(GOOD) - 1])
def test_a24_file_cut_after_open_is_noticed(tmp_path: Path, good: Path, keep: int):
    with_model(tmp_path, GOOD)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("b")[0] == 16
    os.truncate(tmp_path / MODEL, keep)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("b")
    error = caught.value
    assert (error.code, error.tensor, error.actual) == ("Q-CKPT-CHANGED", "b", keep)
    assert MODEL in str(error)
    assert str(len(GOOD)) in str(error)
    assert_good_load(good)


def test_a24_file_rewritten_or_replaced_after_open_is_noticed(tmp_path: Path):
    with_model(tmp_path, GOOD)
    checkpoint = open_checkpoint(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(GOOD)
    os.replace(other, tmp_path / MODEL)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("a")
    assert caught.value.code == "Q-CKPT-CHANGED"
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / MODEL).open("r+b") as file:
        file.write(GOOD)
    os.utime(tmp_path / MODEL, ns=(1, 1))  # clocks of file systems may be coarse
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("a")
    assert caught.value.code == "Q-CKPT-CHANGED"


def test_a25_overwritten_file_leaves_loaded_tensors_alone(tmp_path: Path):
    with_model(tmp_path, GOOD)
    loaded = open_checkpoint(tmp_path).read("b")
    with (tmp_path / MODEL).open("r+b") as file:
        file.write(b"\xff" * len(GOOD))
    assert torch.equal(loaded, torch.arange(16, 24, dtype=torch.uint8))


def test_a26_read_error_mid_file(tmp_path: Path, good: Path, monkeypatch):
    with_model(tmp_path, GOOD)
    checkpoint = open_checkpoint(tmp_path)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read("b")
        with pytest.raises(CheckpointError):
            open_checkpoint(good)
    assert caught.value.code == "Q-CKPT-IO"
    assert "Input/output error" in str(caught.value)
    assert MODEL in str(caught.value)
    assert checkpoint.read("b")[0] == 16
    assert_good_load(good)


def test_a26_disk_full_leaves_nothing(tmp_path: Path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensors = {"a": torch.ones(8), "b": torch.ones(8)}
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CheckpointError) as caught:
                write_safetensors(folder, tensors, max_shard_bytes=32)
        assert caught.value.code == "Q-CKPT-IO"
        assert "No space left on device" in str(caught.value)
        assert os.listdir(tmp_path) == []
    write_safetensors(tmp_path, tensors)
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


CHILD = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
"""


def child(code: str, *args: object) -> str:
    """Output of ``code`` in a process with 6 GiB of addresses, 64 files and 20 seconds."""
    command = [sys.executable, "-c", CHILD + code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a26_file_size_limit_of_the_system_leaves_nothing(tmp_path: Path):
    code = """
import torch
from quant_core.checkpoint import write_safetensors
from quant_core.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    tensors = {f"t{i}": torch.ones(10**5) for i in range(4)}
    write_safetensors(sys.argv[1], tensors, max_shard_bytes=900_000)
except CheckpointError as err:
    print(err.code, err)
"""
    assert child(code, tmp_path) == ""  # two tensors, 800 kB a shard: fits
    for path in tmp_path.iterdir():
        path.unlink()
    printed = child(code.replace("900_000", "9_000_000"), tmp_path)
    assert printed.startswith("Q-CKPT-IO")
    assert "File too large" in printed
    assert os.listdir(tmp_path) == []


def test_a27_two_thousand_shards_with_64_file_handles(tmp_path: Path):
    count = 2000
    raw, weight_map = {}, {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        weight_map[f"t{i:05d}"] = name
        raw = raw_file({f"t{i:05d}": entry("U8", [2], 0, 2)}, i.to_bytes(2, "little"))
        (tmp_path / name).write_bytes(raw)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (tmp_path / INDEX).write_text(json.dumps(index))
    code = """
import torch
from quant_core.checkpoint import SafetensorsCheckpoint
c = SafetensorsCheckpoint.open(sys.argv[1])
assert not c.warnings
for i in range(0, 2000, 7):
    assert int.from_bytes(bytes(c.read(f"t{i:05d}").tolist()), "little") == i
print(len(c.tensors), len(os.listdir("/proc/self/fd")) < 20)
"""
    assert child(code, tmp_path) == "2000 True\n"


def test_a27_hundred_thousand_tensors_of_400_gb_open_in_200_mb(tmp_path: Path):
    size, header = 4_000_000, {}
    for i in range(100_000):
        name = f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.down_proj.weight_packed"
        header[name] = entry("I32", [1000, 1000], i * size, (i + 1) * size)
    with_model(tmp_path, raw_file(header))
    os.truncate(tmp_path / MODEL, (tmp_path / MODEL).stat().st_size + 100_000 * size)
    code = """
from quant_core.checkpoint import open_checkpoint
c = open_checkpoint(sys.argv[1])
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
nbytes = sum(t.nbytes for t in c.tensors.values())
print(len(c.tensors), nbytes, int(peak) // 1000, "torch" in sys.modules)
"""
    count, nbytes, peak_mb, torch_loaded = child(code, tmp_path).split()
    assert (int(count), int(nbytes), torch_loaded) == (100_000, 400_000_000_000, "False")
    assert int(peak_mb) < 200


def test_a28_empty_scalar_and_unaligned_tensors_are_accepted(tmp_path: Path):
    header = {
        "byte": entry("U8", [1], 0, 1),
        "double": entry("F64", [2], 1, 17),
        "empty": entry("F32", [0, 5], 17, 17),
        "scalar": entry("I16", [], 17, 19),
    }
    data = b"\x07" + torch.tensor([1.5, -2.0]).double().numpy().tobytes() + b"\xfe\xff"
    with_model(tmp_path, raw_file(header, data))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("double").tolist() == [1.5, -2.0]
    assert checkpoint.read("empty").shape == (0, 5)
    assert checkpoint.read("scalar").shape == ()
    assert checkpoint.read("scalar").item() == -2
    assert checkpoint.read("byte").tolist() == [7]


NAMES = ["größe.重み", "new\nline", "\x1b[31mred\x1b[0m", "x" * 10_000, "nul\0", "", "a b", '"\\']


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a29_strange_names_load(tmp_path: Path, ascii_only: bool):
    header = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(NAMES)}
    text = json.dumps(header, ensure_ascii=ascii_only).encode()
    with_model(tmp_path, raw_file(text, bytes(range(len(NAMES)))))
    checkpoint = open_checkpoint(tmp_path)
    for i, name in enumerate(NAMES):
        assert checkpoint.read(name).tolist() == [i]


@pytest.mark.parametrize("name", NAMES)
def test_a29_strange_names_are_escaped_in_messages(tmp_path: Path, name: str):
    with_model(tmp_path, raw_file({name: entry("U9", [1], 0, 1)}, 1))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-DTYPE"
    assert caught.value.tensor == name
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a30_second_writer_of_a_folder_fails_and_the_first_is_whole(tmp_path: Path):
    second = """
import torch
from quant_core.checkpoint import write_safetensors
from quant_core.errors import CheckpointError
try:
    write_safetensors(sys.argv[1], {"w": torch.zeros(4)}, overwrite=True)
except CheckpointError as err:
    print(err.code)
"""
    printed = []

    def produce():
        yield "w", torch.ones(4)
        printed.append(child(second, tmp_path / "out"))
        yield "v", torch.ones(4)

    write_safetensors(tmp_path / "out", produce(), max_shard_bytes=16)
    assert printed == ["Q-CKPT-LOCKED\n"]
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.read("w").tolist() == [1.0] * 4
    assert len(os.listdir(tmp_path / "out")) == 3
