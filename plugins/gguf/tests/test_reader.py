"""The header reader: what it accepts, and every fault of a hostile or damaged file."""

from __future__ import annotations

import random
import struct
import sys
import time

import pytest

from quant_core.errors import CheckpointError, LimitError
from quant_plugin_gguf.reader import read_header

OK = [("blk.0.attn_q.weight", "q4_0", (2, 32), bytes(36))]


def _fails(path, code, *in_message, error=CheckpointError):
    start = time.perf_counter()
    with pytest.raises(error) as err:
        read_header(path)
    assert time.perf_counter() - start < 0.5
    assert err.value.code == code, str(err.value)
    assert err.value.path == str(path)
    for part in (path.name, *in_message):
        assert part in str(err.value)
    return err.value


# ----------------------------------------------------------------------------------- accepted


def test_header_lists_tensors_in_torch_order(gguf):
    meta = {"general.architecture": "qwen2", "x.f": 0.5, "x.names": ["a", "é"], "x.n": [1, 2, 3]}
    data = gguf.model([*OK, ("n", "f32", (3, 5, 2), bytes(120))], meta)
    h = read_header(gguf.write(data))
    assert h.version == 3
    assert h.metadata["x.f"] == 0.5
    assert list(h.metadata["x.names"]) == ["a", "é"]
    assert h.metadata["x.n"] == [1, 2, 3]
    assert h.metadata["x.n"][1:] == (2, 3)
    t = h.tensors["n"]
    assert (t.shape, t.nbytes, t.type.name) == ((3, 5, 2), 120, "F32")
    assert data[t.offset : t.offset + 120] == bytes(120)
    assert h.tensors["blk.0.attn_q.weight"].nbytes == 36
    assert h.trailing == 0


def test_header_honours_alignment_and_reports_trailing_bytes(gguf):
    meta = {"general.architecture": "qwen2", "general.alignment": 64}
    data = gguf.model([*OK, ("n", "f32", (4,), bytes(16))], meta, alignment=64)
    h = read_header(gguf.write(data + b"tail"))
    assert h.tensors["n"].offset % 64 == 0
    assert h.trailing == 4


def test_header_version_2_and_last_tensor_without_padding(gguf):
    data = bytearray(gguf.model([("n", "f32", (3,), bytes(12))]))
    data[4:8] = struct.pack("<I", 2)
    h = read_header(gguf.write(bytes(data[: len(data) - 20])))
    assert (h.version, h.trailing) == (2, 0)


# --------------------------------------------------------------------------- D01 magic, version


def test_file_of_zero_bytes_is_truncated(gguf):
    _fails(gguf.write(b""), "Q-CKPT-TRUNCATED")


@pytest.mark.parametrize("magic", [b"GGML", b"FUGG", b"<!DO"])
def test_bad_magic(gguf, magic):
    _fails(gguf.write(gguf.header([], [], magic=magic)), "Q-GGUF-MAGIC", magic.decode())


def test_git_lfs_pointer(gguf):
    text = b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 98362432\n"
    _fails(gguf.write(text), "Q-CKPT-LFS", "git lfs pull")


@pytest.mark.parametrize("version", [0, 1, 4, 255])
def test_bad_version(gguf, version):
    data = gguf.header([], [], version=struct.pack("<I", version))
    assert str(version) in str(_fails(gguf.write(data), "Q-GGUF-VERSION"))


def test_big_endian_file_names_endianness(gguf):
    data = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    _fails(gguf.write(data), "Q-GGUF-VERSION", "big-endian", "version 3")


# --------------------------------------------------------------------------------- D02 counts


@pytest.mark.parametrize("counts", [(2**63, 0), (0, 2**63), (2**40, 1), (1, 2**40), (100, 0)])
def test_counts_beyond_the_file_are_refused_before_any_loop(gguf, counts):
    data = gguf.header([gguf.kv("a", 1)], [], counts=counts)
    _fails(gguf.write(data), "Q-LIMIT-COUNT", error=LimitError)


# ------------------------------------------------------------------------------- D03 metadata


def _kv_file(gguf, *kvs, counts=None):
    return gguf.write(gguf.header(list(kvs), [], counts=counts) + bytes(64))


def test_key_length_beyond_the_file(gguf):
    _fails(_kv_file(gguf, struct.pack("<Q", 2**62) + b"abcdefgh"), "Q-GGUF-KV", "at byte")


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (struct.pack("<IQ", 8, 2**62), str(2**62)),  # a string value
        (struct.pack("<IIQ", 9, 4, 2**61), str(2**61)),  # an array of u32
        (struct.pack("<IIQ", 9, 8, 2**50), str(2**50)),  # an array of strings
        (struct.pack("<IIQQ", 9, 8, 1, 2**61), str(2**61)),  # a string in an array
        (struct.pack("<IIQ", 9, 9, 1), "array of array"),  # nested
        (struct.pack("<IIQ", 9, 77, 1), "77"),
        (struct.pack("<I", 13), "value type 13"),
    ],
)
def test_bad_value_names_key_and_offset(gguf, raw, found):
    err = _fails(_kv_file(gguf, gguf.kv("some.key", raw)), "Q-GGUF-KV", "some.key", found)
    assert "at byte " in str(err)


def test_empty_key(gguf):
    _fails(_kv_file(gguf, gguf.kv("", 1)), "Q-GGUF-KV", "empty key")


def test_duplicate_key(gguf):
    _fails(_kv_file(gguf, gguf.kv("k", 1), gguf.kv("k", 2)), "Q-GGUF-KV", "'k' twice")


def test_header_cut_inside_an_array_is_truncated(gguf):
    tokens = ["token"] * 100
    data = gguf.model(OK, {"general.architecture": "qwen2", "tokenizer.ggml.tokens": tokens})
    _fails(gguf.write(data[:1000]), "Q-CKPT-TRUNCATED", "tokenizer.ggml.tokens")


# ------------------------------------------------------------------------------ D04 alignment


@pytest.mark.parametrize(
    "raw",
    [struct.pack("<II", 4, v) for v in (0, 13, 4, 2**31, 2**21)]
    + [struct.pack("<IQ", 10, 32), struct.pack("<If", 6, 32.0), struct.pack("<IQ", 8, 2) + b"32"],
)
def test_bad_alignment(gguf, raw):
    _fails(_kv_file(gguf, gguf.kv("general.alignment", raw)), "Q-GGUF-ALIGN")


# ---------------------------------------------------------------------------------- D05 shapes


def _tensor_file(gguf, *infos, data=bytes(256)):
    return gguf.write(gguf.pad(gguf.header([], list(infos))) + data)


@pytest.mark.parametrize(
    ("dims", "n_dims"),
    [
        ([1], 0),
        ([1, 1, 1, 1, 1], None),
        ([1], 200),
        ([32, 0], None),
        ([2**60], None),
        ([2**32, 2**32], None),
        ([2**63, 2], None),
        ([2**64 - 32], None),  # -32 as a signed number
    ],
)
def test_bad_dimensions(gguf, dims, n_dims):
    info = gguf.tensor("w.weight", dims, 0, 0, n_dims)
    _fails(_tensor_file(gguf, info), "Q-GGUF-SHAPE", "w.weight")


# ---------------------------------------------------------------------------- D06, D07 types


@pytest.mark.parametrize("type_id", [999, 4, 5, 31, 36, 9, 15, 41, 2**32 - 1])
def test_type_we_cannot_read_lists_supported(gguf, type_id):
    info = gguf.tensor("w.weight", [256], type_id, 0)
    path = _tensor_file(gguf, info, data=bytes(4096))
    err = _fails(path, "Q-GGUF-TYPE", str(type_id), "Q4_K", "MXFP4")
    assert err.actual == type_id


@pytest.mark.parametrize(("columns", "type_id"), [(63, 2), (33, 8), (128, 12), (32, 40)])
def test_row_no_multiple_of_block(gguf, columns, type_id):
    info = gguf.tensor("w.weight", [columns, 2], type_id, 0)
    _fails(_tensor_file(gguf, info, data=bytes(4096)), "Q-GGUF-BLOCK", str(columns))


# -------------------------------------------------------------------------------- D08 offsets


@pytest.mark.parametrize("second", [16, 0, 32, 96, 2**40])  # unaligned, overlaps, hole, far away
def test_bad_offset_names_both_tensors(gguf, second):
    infos = [gguf.tensor("a", [16], 0, 0), gguf.tensor("b", [4], 0, second)]
    _fails(_tensor_file(gguf, *infos), "Q-GGUF-OFFSET", "'a'", "'b'", str(second))


def test_first_offset_not_zero(gguf):
    _fails(_tensor_file(gguf, gguf.tensor("a", [4], 0, 32)), "Q-GGUF-OFFSET", "'a'")


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_data_cut_short_names_first_tensor_and_missing_bytes(gguf, cut):
    data = gguf.model([("a", "f32", (256,), bytes(1024)), ("b", "f32", (256,), bytes(1024))])
    which = "'b'" if cut < 1024 else "'a'"
    _fails(gguf.write(data[: len(data) - cut]), "Q-CKPT-TRUNCATED", which, f"{cut} are missing")


def test_header_cut_anywhere_is_an_error_of_ours(gguf):
    data = gguf.model(OK, {"general.architecture": "qwen2", "x.y": ["a", "b"], "n": 7})
    for size in range(len(data) - 36 - 28):
        with pytest.raises((CheckpointError, LimitError)) as err:
            read_header(gguf.write(data[:size]))
        assert err.value.code in ("Q-CKPT-TRUNCATED", "Q-LIMIT-COUNT", "Q-GGUF-KV")


# ---------------------------------------------------------------------------------- D09 names


def test_duplicate_tensor_name(gguf):
    infos = [gguf.tensor("a", [8], 0, 0), gguf.tensor("a", [8], 0, 32)]
    _fails(_tensor_file(gguf, *infos), "Q-GGUF-NAME", "'a'")


@pytest.mark.parametrize("name", ["", "n" * 64, "n" * 100_000])
def test_empty_or_over_long_tensor_name(gguf, name):
    info = gguf.tensor(name, [8], 0, 0)
    _fails(_tensor_file(gguf, info), "Q-GGUF-NAME", str(len(name)))


def test_longest_allowed_name_and_odd_characters_are_read_and_shown_escaped(gguf):
    names = ["n" * 63, "a\n\x1b[31mb", "ü"]
    infos = [gguf.tensor(n, [8], 0, 32 * i) for i, n in enumerate(names)]
    assert list(read_header(_tensor_file(gguf, *infos)).tensors) == names
    bad = gguf.tensor("a\n\x1b[31mb", [8], 999, 0)
    err = _fails(_tensor_file(gguf, bad), "Q-GGUF-TYPE")
    assert "\x1b" not in str(err)
    assert "\n" not in str(err)


# ------------------------------------------------------------------------ D11 hostile tokenizer


def test_hostile_tokens_are_kept_as_bytes(gguf):
    raw = [b"<0x-1>", b"\xff\xfe", b"", b"<0xZZ>"]
    items = b"".join(gguf.text(r) for r in raw)
    value = struct.pack("<IIQ", 9, 8, len(raw)) + items
    data = gguf.header([gguf.kv("tokenizer.ggml.tokens", value)], [])
    tokens = read_header(gguf.write(data)).metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == ["<0x-1>", "\\xff\\xfe", "", "<0xZZ>"]


def test_hundred_million_tokens_declared_in_a_small_file(gguf):
    value = struct.pack("<IIQ", 9, 8, 10**8) + bytes(4096)
    _fails(_kv_file(gguf, gguf.kv("tokenizer.ggml.tokens", value)), "Q-GGUF-KV", "100000000")


def test_flipped_header_bytes_never_escape_as_foreign_errors(gguf):
    """Every single byte of a small header, set to three values."""
    data = gguf.model(OK, {"general.architecture": "qwen2", "x.y": ["a", "b"], "n": 7})
    for at in range(len(data) - 36 - 28):
        for value in (0, 0x7F, 0xFF):
            broken = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                read_header(gguf.write(broken))
            except (CheckpointError, LimitError) as err:
                assert err.code.startswith("Q-")  # noqa: PT017


def test_missing_file_and_folder_are_io_errors(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError) as err:
            read_header(path)
        assert err.value.code == "Q-CKPT-IO"


# --------------------------------------------------------------------------- arrays of strings


def _vocabularies():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcé<0x00>Ġ", k=rng.randint(1, 12))) for _ in range(60000)]
    odd = list(words)
    for at in (0, 1, 70, 300, 30000, 30001, 59998, 59999):
        odd[at] = rng.choice(
            ["", "\0", "\0" * 9, "x" * 255, "y" * 256, "z" * 70000, "\1" + "\0" * 7]
        )
    zeros = ["\0" * (i % 19) for i in range(3000)]
    fakes = ["ab" + "\3" + "\0" * 7 + "abc"] * 500  # what lies inside looks like a length
    return {"words": words, "odd": odd, "zeros": zeros, "fakes": fakes, "long": ["w" * 300] * 2000,
            "empty": [""] * 5000, "few": ["a", "b"], "none of many": ["v" * 255] * 65}  # fmt: skip


@pytest.mark.parametrize("loaded", [True, False], ids=["numpy", "no numpy"])
@pytest.mark.parametrize("name", _vocabularies())
def test_arrays_of_strings_of_every_length_end_where_they_end(gguf, monkeypatch, name, loaded):
    if not loaded:
        monkeypatch.setitem(sys.modules, "numpy", None)
    strings = _vocabularies()[name]
    meta = {"general.architecture": "qwen2", "a.strings": strings, "b.after": 7, "c.more": ["end"]}
    found = read_header(gguf.write(gguf.model(OK, meta))).metadata
    assert list(found["a.strings"]) == strings
    assert (found["b.after"], list(found["c.more"])) == (7, ["end"])


def test_array_of_strings_that_is_cut_short_is_truncated(gguf):
    meta = {"general.architecture": "qwen2", "a.strings": ["abcd"] * 20000}
    data = gguf.model(OK, meta)
    for size in (165000, 200003):
        _fails(gguf.write(data[:size]), "Q-CKPT-TRUNCATED")
    _fails(gguf.write(data[:70001]), "Q-GGUF-KV")
