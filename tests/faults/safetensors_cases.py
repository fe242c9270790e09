"""Faulty safetensors files, indexes and folders by hand, and what each must raise."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from quant_core.checkpoint import open_checkpoint

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(header: object, data: bytes | int = b"") -> bytes:
    """A safetensors file by hand: length, header, data (a number stands for so many zeros)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(data) if isinstance(data, int) else data)


AB = {"a": entry("F32", [4], 0, 16), "b": entry("U8", [8], 16, 24)}
GOOD = raw_file(AB, bytes(range(24)))


def with_model(folder: Path, raw: bytes) -> None:
    (folder / MODEL).write_bytes(raw)


def with_shards(folder: Path, weight_map: object = None, total_size: object = 24) -> None:
    """Two shards (a in the first, b in the second) and an index."""
    (folder / SHARDS[0]).write_bytes(raw_file({"a": entry("F32", [4], 0, 16)}, 16))
    (folder / SHARDS[1]).write_bytes(raw_file({"b": entry("U8", [8], 0, 8)}, 8))
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {"a": SHARDS[0], "b": SHARDS[1]} if weight_map is None else weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index))


def index_value(folder: Path, name: str, value: str) -> None:
    with_shards(folder, {"a": value, "b": SHARDS[1]})


def model(raw: bytes) -> Callable[[Path], None]:
    return lambda folder: with_model(folder, raw)


def header_fault(header: object, data: int = 24) -> Callable[[Path], None]:
    return model(raw_file(header, data))


def index_fault(weight_map: object) -> Callable[[Path], None]:
    return lambda folder: with_shards(folder, weight_map)


def sized(length: int, size: int) -> Callable[[Path], None]:
    """A sparse file whose header claims ``length`` bytes."""

    def build(folder: Path) -> None:
        with (folder / MODEL).open("wb") as file:
            file.write(length.to_bytes(8, "little") + b"{")
            file.truncate(size)

    return build


def a14_bin_only(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    (folder / "config.json").write_text("{}")


def a17_no_shard(folder: Path) -> None:
    with_shards(folder)
    for name in SHARDS:
        (folder / name).unlink()


def a18_beside(folder: Path) -> None:
    with_shards(folder)
    (folder / SHARDS[1]).rename(folder / f"{SHARDS[1]}.incomplete")


def a18_downloader(folder: Path) -> None:
    with_shards(folder)
    cache = folder / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (folder / SHARDS[1]).rename(cache / f"{SHARDS[1]}.9f86d0.incomplete")


def a19_two(folder: Path) -> None:
    with_shards(folder)
    (folder / SHARDS[1]).write_bytes(GOOD)


def a19_none(folder: Path) -> None:
    with_shards(folder, {"a": SHARDS[0]})
    (folder / SHARDS[0]).write_bytes(GOOD)


def a20_link_out(folder: Path) -> None:
    with_shards(folder)
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(GOOD)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(outside)


def a20_fifo(folder: Path) -> None:
    with_shards(folder)
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])


def a20_device(folder: Path) -> None:
    with_shards(folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to("/dev/zero")


def a20_single_link_out(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(GOOD)
    (folder / MODEL).symlink_to(folder.parent / "outside.safetensors")


def a22_both(folder: Path) -> None:
    with_shards(folder)
    with_model(folder, GOOD)


def a22_incomplete(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes(GOOD)


def a23_a_folder(folder: Path) -> None:
    (folder / MODEL).mkdir()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
U64 = 2**63

# id: (what makes the folder faulty, code, parts of the message, value of .tensor)
CASES: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...], str | None]] = {
    "A01-empty": (model(b""), "Q-CKPT-TRUNCATED", (MODEL, "0 bytes"), None),
    "A02-cut-in-length": (model(GOOD[:5]), "Q-CKPT-TRUNCATED", (MODEL, "5 bytes"), None),
    "A02-length-only": (model(GOOD[:8]), "Q-CKPT-TRUNCATED", (MODEL, "the file 8"), None),
    "A03-cut-in-header": (
        model(GOOD[:60]),
        "Q-CKPT-TRUNCATED",
        (MODEL, f"header has {int.from_bytes(GOOD[:8], 'little')} bytes, the file 60"),
        None,
    ),
    "A04-cut-in-last": (model(GOOD[:-3]), "Q-CKPT-TRUNCATED", (MODEL, "3 are missing", "'b'"), "b"),
    "A04-cut-in-first": (model(GOOD[:-9]), "Q-CKPT-TRUNCATED", ("9 are missing", "'a'"), "a"),
    "A05-trailing": (model(GOOD + b"PK"), "Q-CKPT-TRAILING", (MODEL, "2 bytes follow"), None),
    "A06-length-2^40": (sized(2**40, 4096), "Q-CKPT-HEADER", (MODEL, str(2**40)), None),
    "A06-length-2^63": (sized(U64, 4096), "Q-CKPT-HEADER", (MODEL, str(U64)), None),
    "A06-length-2^64-1": (sized(2**64 - 1, 4096), "Q-CKPT-HEADER", (str(2**64 - 1),), None),
    "A06-length-0": (sized(0, 4096), "Q-CKPT-HEADER", (MODEL, "length 0"), None),
    "A06-zeros": (model(bytes(4096)), "Q-CKPT-HEADER", (MODEL, "length 0"), None),
    "A07-over-cap": (
        sized(65 * 2**20, 80 * 2**20),
        "Q-LIMIT-HEADER",
        (MODEL, str(65 * 2**20), str(64 * 2**20)),
        None,
    ),
    "A08-not-utf8": (header_fault(b'{"\xff":1}'), "Q-CKPT-HEADER", (MODEL, "UTF-8"), None),
    "A08-not-json": (header_fault(b'{"a" 1}'), "Q-CKPT-HEADER", (MODEL, "not JSON"), None),
    "A08-cut-json": (header_fault(b'{"a":{"dtype":'), "Q-CKPT-HEADER", (MODEL, "'a'"), "a"),
    "A08-array": (header_fault(b'[{"a":1}]'), "Q-CKPT-HEADER", (MODEL,), None),
    "A08-trailing-comma": (
        header_fault(json.dumps(AB)[:-1].encode() + b",}"),
        "Q-CKPT-HEADER",
        (MODEL, "not JSON"),
        None,
    ),
    "A08-second-object": (header_fault(b"{}{}"), "Q-CKPT-HEADER", (MODEL, "goes on"), None),
    "A08-entry-number": (header_fault({"a": 1}), "Q-CKPT-HEADER", (MODEL, "'a'"), "a"),
    "A08-entry-empty": (header_fault({"a": {}}), "Q-CKPT-HEADER", ("'a'", "no keys"), "a"),
    "A08-entry-keys": (header_fault({"a": {"dtype": "U8"}}), "Q-CKPT-HEADER", ("'a'",), "a"),
    "A08-deep": (
        header_fault(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "Q-CKPT-HEADER",
        (MODEL, "'a'"),
        "a",
    ),
    "A08-deep-objects": (
        header_fault(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
        "Q-CKPT-HEADER",
        (MODEL, "'a'"),
        "a",
    ),
    "A08-deep-metadata": (
        header_fault(b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "Q-CKPT-HEADER",
        (MODEL, "__metadata__"),
        "__metadata__",
    ),
    "A09-same-offsets": (
        header_fault(
            b'{"a":{"dtype":"U8","shape":[24],"data_offsets":[0,24]},'
            b'"a":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}'
        ),
        "Q-CKPT-DUPLICATE",
        (MODEL, "'a'", "twice"),
        "a",
    ),
    "A09-other-offsets": (
        header_fault(
            b'{"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},'
            b'"\\u0061":{"dtype":"U8","shape":[12],"data_offsets":[12,24]}}'
        ),
        "Q-CKPT-DUPLICATE",
        (MODEL, "'a'", "twice"),
        "a",
    ),
    "A09-field-twice": (
        header_fault(b'{"a":{"dtype":"U8","dtype":"I8","shape":[24],"data_offsets":[0,24]}}'),
        "Q-CKPT-DUPLICATE",
        (MODEL, "'a'", "'dtype'"),
        "a",
    ),
    "A10-overlap": (
        header_fault({"a": entry("U8", [16], 0, 16), "b": entry("U8", [16], 8, 24)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'b'", "overlaps tensor 'a'"),
        "b",
    ),
    "A10-same-range": (
        header_fault({"a": entry("U8", [24], 0, 24), "b": entry("U8", [24], 0, 24)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'b'", "overlaps tensor 'a'"),
        "b",
    ),
    "A10-empty-inside": (
        header_fault({"a": entry("U8", [24], 0, 24), "b": entry("U8", [0], 8, 8)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'b'", "overlaps tensor 'a'"),
        "b",
    ),
    "A10-hole": (
        header_fault({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 16, 24)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'b'", "hole after tensor 'a'"),
        "b",
    ),
    "A10-hole-at-start": (
        header_fault({"b": entry("U8", [16], 8, 24)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'b'", "hole after the header"),
        "b",
    ),
    "A10-end-before-begin": (
        header_fault({"a": entry("U8", [8], 16, 8)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'a'", "[16, 8]"),
        "a",
    ),
    "A10-past-the-end": (
        header_fault({"a": entry("U8", [24], 0, 24), "b": entry("U8", [8], 2**40, 2**40 + 8)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'b'", "'a'"),
        "b",
    ),
    "A10-overflow": (
        header_fault({"a": entry("U8", [8], 2**64 - 8, 2**64)}),
        "Q-CKPT-OFFSET",
        (MODEL, "'a'"),
        "a",
    ),
    "A10-not-integers": (
        header_fault({"a": entry("U8", [24], 0.0, "24")}),
        "Q-CKPT-OFFSET",
        (MODEL, "'a'"),
        "a",
    ),
    "A11-size": (
        header_fault({"a": entry("F32", [5], 0, 24)}),
        "Q-CKPT-SIZE",
        (MODEL, "'a'", "24 bytes", "20 for shape [5] of F32"),
        "a",
    ),
    "A12-overflow": (
        header_fault({"a": entry("U8", [2**32, 2**32], 0, 24)}),
        "Q-CKPT-SHAPE",
        (MODEL, "'a'"),
        "a",
    ),
    "A12-overflow-empty": (
        header_fault({"a": entry("U8", [2**40, 0, 2**40], 0, 0)}, 0),
        "Q-CKPT-SHAPE",
        (MODEL, "'a'"),
        "a",
    ),
    "A12-negative": (header_fault({"a": entry("U8", [-24], 0, 24)}), "Q-CKPT-SHAPE", ("-24",), "a"),
    "A12-two-negative": (
        header_fault({"a": entry("U8", [-4, -6], 0, 24)}),
        "Q-CKPT-SHAPE",
        ("[-4, -6]",),
        "a",
    ),
    "A12-float": (header_fault({"a": entry("U8", [24.0], 0, 24)}), "Q-CKPT-SHAPE", ("24.0",), "a"),
    "A12-string": (header_fault({"a": entry("U8", ["24"], 0, 24)}), "Q-CKPT-SHAPE", ("'24'",), "a"),
    "A12-bool": (header_fault({"a": entry("U8", [24, True], 0, 24)}), "Q-CKPT-SHAPE", ("a",), "a"),
    "A12-no-list": (header_fault({"a": entry("U8", 24, 0, 24)}), "Q-CKPT-SHAPE", ("24",), "a"),
    "A12-many-dims": (
        header_fault({"a": entry("U8", [1] * 65, 0, 1)}),
        "Q-CKPT-SHAPE",
        ("a",),
        "a",
    ),
    "A13-unknown": (header_fault({"a": entry("F12", [24], 0, 24)}), "Q-CKPT-DTYPE", ("F12",), "a"),
    "A13-no-string": (header_fault({"a": entry(8, [24], 0, 24)}), "Q-CKPT-DTYPE", ("'a'",), "a"),
    "A13-odd-f4": (header_fault({"a": entry("F4", [47], 0, 24)}), "Q-CKPT-DTYPE", ("F4",), "a"),
    "A13-odd-row-f4": (
        header_fault({"a": entry("F4", [16, 3], 0, 24)}),
        "Q-CKPT-DTYPE",
        ("whole bytes",),
        "a",
    ),
    "A13-odd-f6": (
        header_fault({"a": entry("F6_E2M3", [30], 0, 23)}),
        "Q-CKPT-DTYPE",
        ("F6",),
        "a",
    ),
    "A14-zip": (model(b"PK\x03\x04" + bytes(100)), "Q-CKPT-PICKLE", (MODEL, "Convert"), None),
    "A14-pickle-2": (
        model(pickle.dumps([1] * 9, 2)),
        "Q-CKPT-PICKLE",
        (MODEL, "safetensors"),
        None,
    ),
    "A14-pickle-4": (model(pickle.dumps(["x"] * 99, 4)), "Q-CKPT-PICKLE", (MODEL,), None),
    "A14-bin-only": (a14_bin_only, "Q-CKPT-PICKLE", ("pytorch_model.bin", "not opened"), None),
    "A15-lfs": (model(LFS), "Q-CKPT-LFS", (MODEL, "Git LFS pointer", "4976698672 bytes"), None),
    "A16-html": (
        model(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        "Q-CKPT-HEADER",
        (MODEL, "<!DOCTYPE html>", "web page"),
        None,
    ),
    "A16-json": (
        model(b'{"error":"Entry not found"}'),
        "Q-CKPT-HEADER",
        (MODEL, "Entry not found", "JSON text"),
        None,
    ),
    "A16-short-json": (model(b'{"e": {}}'), "Q-CKPT-HEADER", (MODEL, '{"e"'), None),
    "A16-escape-codes": (
        model(b"\x1b[31mred\x1b[0m oops, not a model"),
        "Q-CKPT-HEADER",
        ("red",),
        None,
    ),
    "A17-missing": (a17_no_shard, "Q-CKPT-MISSING-SHARD", (INDEX, *SHARDS), None),
    "A18-incomplete": (
        a18_beside,
        "Q-CKPT-MISSING-SHARD",
        (INDEX, f"'{SHARDS[1]}'", f"{SHARDS[1]}.incomplete"),
        None,
    ),
    "A18-downloader": (
        a18_downloader,
        "Q-CKPT-MISSING-SHARD",
        (f"'{SHARDS[1]}'", "9f86d0.incomplete"),
        None,
    ),
    "A19-other-shard": (
        index_fault({"a": SHARDS[1], "b": SHARDS[0]}),
        "Q-CKPT-INDEX",
        (INDEX, "'a'", "'b'", *SHARDS),
        None,
    ),
    "A19-in-none": (a19_none, "Q-CKPT-INDEX", (INDEX, "'b'", "nowhere"), None),
    "A19-in-two": (a19_two, "Q-CKPT-INDEX", (INDEX, "'a'", SHARDS[1]), None),
    "A19-not-stored": (
        index_fault({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}),
        "Q-CKPT-INDEX",
        (INDEX, "'c'", SHARDS[1]),
        None,
    ),
    "A19-no-map": (index_fault({}), "Q-CKPT-INDEX", (INDEX, "weight_map"), None),
    "A19-map-is-list": (index_fault(["a"]), "Q-CKPT-INDEX", (INDEX, "weight_map"), None),
    "A19-value-number": (index_fault({"a": 1}), "Q-CKPT-INDEX", (INDEX, "'a'"), None),
    "A20-parent": (index_fault({"a": "../../x"}), "Q-CKPT-PATH", (INDEX, "../../x"), None),
    "A20-absolute": (index_fault({"a": "/etc/passwd"}), "Q-CKPT-PATH", (INDEX, "passwd"), None),
    "A20-nul": (index_fault({"a": "x\0y"}), "Q-CKPT-PATH", (INDEX,), None),
    "A20-backslash": (index_fault({"a": "..\\x"}), "Q-CKPT-PATH", (INDEX,), None),
    "A20-link-out": (a20_link_out, "Q-CKPT-PATH", (INDEX, SHARDS[0], "outside"), None),
    "A20-fifo": (a20_fifo, "Q-CKPT-PATH", (INDEX, SHARDS[0]), None),
    "A20-device": (a20_device, "Q-CKPT-PATH", (INDEX, SHARDS[0]), None),
    "A20-single-link-out": (a20_single_link_out, "Q-CKPT-PATH", (MODEL, "outside"), None),
    "A22-both": (a22_both, "Q-CKPT-AMBIGUOUS", (MODEL, INDEX), None),
    "A22-no-index-one-missing": (a22_incomplete, "Q-CKPT-MISSING-SHARD", (SHARDS[0],), None),
    "A23-folder-as-file": (a23_a_folder, "Q-CKPT-PATH", (MODEL, "regular file"), None),
    "A29-lone-surrogate": (
        header_fault(b'{"\\ud800":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}'),
        "Q-CKPT-NAME",
        (MODEL, "ud800"),
        "\ud800",
    ),
}


def assert_good_load(good: Path) -> None:
    checkpoint = open_checkpoint(good)
    assert checkpoint.warnings == []
    expected = torch.arange(16, 24, dtype=torch.uint8)
    assert torch.equal(checkpoint.read("b"), expected)
