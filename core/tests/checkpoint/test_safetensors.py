from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quant_core.checkpoint import SafetensorsCheckpoint
from quant_core.checkpoint.header import DTYPES
from quant_core.errors import CheckpointError, LayoutError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (NaN included)."""
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    out = {}
    gen = torch.Generator().manual_seed(7)
    for name, bits in DTYPES.values():
        dtype = getattr(torch, name, None)
        if bits < 8 or dtype is None:
            continue
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (5, 3, bits // 8), generator=gen)
        out[f"model.{name}"] = raw.to(torch.uint8).view(dtype).reshape(5, 3)
    return out


def test_read_their_file_gives_equal_tensors_of_every_dtype(tmp_path):
    tensors = tensors_of_all_dtypes()
    # safetensors 0.8 writes these under names it cannot read back into torch on every version
    assert len(tensors) >= 17
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsCheckpoint.open(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}
        assert set(checkpoint.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert checkpoint.tensors[name].dtype == name.removeprefix("model.")
            assert same(checkpoint.read(name), tensor), name


@pytest.mark.parametrize(
    "index",
    [
        (),
        (2,),
        (0, 1),
        (4, 6, 2),
        ((1, 4),),
        ((0, 0),),
        ((5, 5),),
        ((0, 5, 2),),
        ((1, 5, 3), 2),
        (3, (2, 7)),
        (3, (0, 7, 2), 1),
        ((0, 5), (1, 3)),
        ((1, 4), 6, (1, 3)),
    ],
)
def test_read_part_equals_cutting_the_whole(tmp_path, index):
    whole = torch.arange(5 * 7 * 3, dtype=torch.int16).reshape(5, 7, 3)
    save_file({"pad": torch.zeros(1, dtype=torch.int8), "w": whole}, tmp_path / "a.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path / "a.safetensors")
    cut = whole[tuple(i if isinstance(i, int) else slice(*i) for i in index)]
    got = checkpoint.read("w", index)
    assert same(got, cut)
    assert got.is_contiguous()


@pytest.mark.parametrize(
    ("index", "expected_bytes"),
    [((), 4000), ((3,), 400), (((2, 4),), 800), ((3, (10, 20)), 40), ((1, 2), 4), (((0, 0),), 0)],
)
def test_read_part_takes_only_its_bytes(tmp_path, monkeypatch, index, expected_bytes: int):
    save_file({"w": torch.zeros(10, 100)}, tmp_path / "a.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path / "a.safetensors")
    taken, preadv = [], os.preadv

    def counting(fd, buffers, offset):
        n = preadv(fd, buffers, offset)
        taken.append(n)
        return n

    monkeypatch.setattr(os, "preadv", counting)
    got = checkpoint.read("w", index)
    assert sum(taken) == expected_bytes
    assert got.untyped_storage().nbytes() == expected_bytes  # owned, no larger buffer behind it


@pytest.mark.parametrize(
    "index",
    [(-1,), (5,), (0, 0, 0), ((3, 2),), ((0, 6),), ((-1, 2),), ((0, 5, 0),), ("expert",)],
)
def test_read_index_outside_raises_layout_error(tmp_path, index):
    save_file({"w": torch.zeros(5, 2)}, tmp_path / "a.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path / "a.safetensors")
    with pytest.raises(LayoutError) as caught:
        checkpoint.read("w", index)
    assert caught.value.code == "Q-LAYOUT-SHAPE"
    assert "'w'" in str(caught.value)


def test_read_sub_byte_type_gives_bytes_per_row(tmp_path):
    header = {"w": {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}}
    raw = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(range(6)))
    checkpoint = SafetensorsCheckpoint.open(path)
    assert checkpoint.tensors["w"].shape == (2, 6)
    assert torch.equal(checkpoint.read("w"), torch.arange(6, dtype=torch.uint8).reshape(2, 3))
    assert torch.equal(checkpoint.read("w", (1,)), torch.tensor([3, 4, 5], dtype=torch.uint8))


def test_read_inside_meta_device_context_still_reads(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path / "a.safetensors")
    with torch.device("meta"):
        got = checkpoint.read("w")
    assert got.device.type == "cpu"
    assert torch.equal(got, torch.ones(2))


def test_read_unknown_name_raises_and_escapes_it(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsCheckpoint.open(tmp_path / "a.safetensors").read("\x1b[31mw")
    assert caught.value.code == "Q-TENSOR-MISSING"
    assert "\x1b" not in str(caught.value)


def test_read_after_close_raises(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with SafetensorsCheckpoint.open(tmp_path / "a.safetensors") as checkpoint:
        checkpoint.read("w")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")
    assert caught.value.code == "Q-CKPT-CLOSED"


def test_read_from_many_threads_gives_the_same_tensors(tmp_path):
    tensors = {f"t{i}": torch.full((200,), i) for i in range(40)}
    weight_map = {}
    for i, (name, t) in enumerate(tensors.items()):
        save_file({name: t}, tmp_path / f"model-{i + 1:05d}-of-00040.safetensors")
        weight_map[name] = f"model-{i + 1:05d}-of-00040.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 64000}, "weight_map": weight_map}))
    checkpoint = SafetensorsCheckpoint.open(tmp_path)
    assert checkpoint.warnings == []
    assert list(checkpoint.tensors) == list(tensors)
    wrong = []

    def work(seed: int) -> None:
        for i in range(80):
            name = f"t{(seed * 11 + i * 7) % 40}"
            if not torch.equal(checkpoint.read(name), tensors[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_config_and_modules_come_with_the_checkpoint(tmp_path):
    save_file({"a.b.weight": torch.ones(1), "a.b.bias": torch.ones(1)}, tmp_path / "x.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path / "x.safetensors")
    assert checkpoint.config == {}
    assert set(checkpoint.modules["a.b"]) == {"weight", "bias"}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert SafetensorsCheckpoint.open(tmp_path).config == {"model_type": "llama"}


def test_open_hub_cache_snapshot_reads_through_its_links(tmp_path):
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "config.json").write_text('{"a": 1}')
    for path in (snapshot, snapshot / "model.safetensors"):
        checkpoint = SafetensorsCheckpoint.open(path)
        assert checkpoint.config == {"a": 1}
        assert torch.equal(checkpoint.read("w"), torch.ones(3))


def test_open_imports_no_torch(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from quant_core.checkpoint import open_checkpoint;"
        "assert list(open_checkpoint(sys.argv[1]).tensors) == ['w'];"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    env = os.environ | {"QUANT_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared checkpoints beside the repo")
def test_read_every_shared_file_equals_the_safetensors_package():
    files = sorted(SHARED.glob("**/*.safetensors"))
    assert len(files) > 100
    compared = 0
    for file in files:
        checkpoint = SafetensorsCheckpoint.open(file)
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == set(checkpoint.tensors)
            assert (theirs.metadata() or {}) == checkpoint.metadata
            for name in theirs.keys():  # noqa: SIM118 - not a dict
                assert same(checkpoint.read(name), theirs.get_tensor(name)), (file, name)
                compared += 1
        checkpoint.close()
    assert compared > 5000


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared checkpoints beside the repo")
def test_open_every_shared_folder_with_an_index_has_no_warning():
    folders = [p.parent for p in SHARED.glob("*/*.safetensors.index.json")]
    assert len(folders) > 10
    for folder in folders:
        checkpoint = SafetensorsCheckpoint.open(folder)
        assert checkpoint.warnings == []
        assert not any(t.file == "expected.safetensors" for t in checkpoint.tensors.values())
