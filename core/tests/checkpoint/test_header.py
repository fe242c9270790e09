from __future__ import annotations

import json
import math

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.checkpoint.header import DTYPES, parse_header
from quant_core.errors import CheckpointError, LimitError, QuantError


def parse(header: object, data_bytes: int = 0, **kw):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(raw, file="m.safetensors", data_bytes=data_bytes, **kw)


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_parse_returns_tensors_by_offset_with_file_positions():
    header = {
        "b": entry("I8", [3], 8, 11),
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 1], 0, 8),
    }
    raw = json.dumps(header).encode()
    parsed = parse(raw, 11)
    a, b = parsed.tensors
    assert (a.name, a.dtype, a.shape, a.nbytes) == ("a", "float32", (2, 1), 8)
    assert a.offset == 8 + len(raw)
    assert (b.name, b.dtype, b.offset) == ("b", "int8", 16 + len(raw))
    assert b.file == "m.safetensors"
    assert parsed.metadata == {"format": "pt"}


@pytest.mark.parametrize("raw", [b"{}", b"{ }  ", b"{\n}"])
def test_parse_empty_object_is_accepted(raw: bytes):
    assert parse(raw).tensors == []


def test_parse_spaced_out_header_is_accepted():
    header = {"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 2, 3)}
    raw = json.dumps(header, indent="\t").encode() + b"  \n"
    assert [t.name for t in parse(raw, 3).tensors] == ["a", "b"]


def test_parse_sub_byte_types_count_bits():
    header = {"a": entry("F4", [3, 2], 0, 3), "b": entry("F6_E2M3", [4], 3, 6)}
    a, b = parse(header, 6).tensors
    assert (a.dtype, a.shape, a.nbytes) == ("fp4_e2m1", (3, 2), 3)
    assert (b.dtype, b.shape, b.nbytes) == ("fp6_e2m3", (4,), 3)


def test_parse_problems_of_one_kind_are_reported_together():
    header = {f"t{i}": entry("X7", [1], i, i + 1) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        parse(header, 30)
    message = str(caught.value)
    assert "'t0' has dtype 'X7'" in message
    assert "'t9'" in message
    assert "19 more" in message


def test_parse_tensor_limit_counts_tensors_not_metadata():
    header = {"__metadata__": {"k": "v"}} | {f"t{i}": entry("U8", [0], 0, 0) for i in range(3)}
    assert len(parse(header, max_tensors=3).tensors) == 3
    with pytest.raises(LimitError) as caught:
        parse(header, max_tensors=2)
    assert (caught.value.code, caught.value.expected) == ("Q-LIMIT-HEADER", 2)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        '"x"',
        "null",
        '{"a": 1}',
        '{"a": {"b": "c"}}',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        "[" * 100_000,
    ],
)
def test_parse_metadata_not_strings_raises(metadata: str):
    with pytest.raises(CheckpointError) as caught:
        parse(b'{"__metadata__":' + metadata.encode() + b"}")
    assert caught.value.code == "Q-CKPT-HEADER"
    assert caught.value.tensor == "__metadata__"


def test_parse_metadata_may_hold_braces_and_nested_json_text():
    raw = json.dumps({"__metadata__": {"t": '{"_type": "X", "d": {}}'}, "a": entry("U8", [], 0, 1)})
    parsed = parse(raw.encode(), 1)
    assert json.loads(parsed.metadata["t"])["_type"] == "X"
    assert parsed.tensors[0].shape == ()


_ITEM = {name: bits for name, (_, bits) in DTYPES.items()}
_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda n: n != "__metadata__"
)
_tensor = st.tuples(
    st.sampled_from([d for d, bits in _ITEM.items() if bits >= 8]),
    st.lists(st.integers(0, 4), max_size=3),
)


@st.composite
def headers(draw) -> tuple[bytes, int, dict[str, tuple[str, list[int], int]]]:
    """A valid header in any spelling JSON allows, its data size, and what it says."""
    tensors = draw(st.dictionaries(_names, _tensor, max_size=6))
    table, said, end = {}, {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _ITEM[dtype] // 8
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        table[name] = {k: fields[k] for k in draw(st.permutations(list(fields)))}
        said[name] = (dtype, shape, end)
        end += size
    table = {name: table[name] for name in draw(st.permutations(list(table)))}
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(_names, _names, max_size=2))
    text = json.dumps(
        table,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : ")])),
    )
    raw = text.encode()
    return raw + b" " * (-len(raw) % 8), end, said


@settings(deadline=None, derandomize=True, max_examples=150)
@given(headers())
def test_parse_valid_header_in_any_spelling(case):
    raw, size, said = case
    parsed = parse(raw, size)
    found = {t.name: (t.dtype, list(t.shape), t.offset - 8 - len(raw)) for t in parsed.tensors}
    # zero-size tensors may share an offset: compare by name
    assert found == {n: (DTYPES[d][0], s, o) for n, (d, s, o) in said.items()}


@settings(deadline=None, derandomize=True, max_examples=400)
@given(headers(), st.data())
def test_parse_mutated_header_raises_or_agrees_with_safetensors(case, data):
    """Whatever we accept, the safetensors package accepts with the same contents."""
    raw, size, _ = case
    mutated = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated)))
        byte = data.draw(st.sampled_from(list(b'{}[]",:0159eE.tF\\ \x00\xff')))
        kind = data.draw(st.sampled_from(["insert", "replace", "delete"]))
        end = at + (kind != "insert")
        mutated[at:end] = b"" if kind == "delete" else bytes([byte])
    raw = bytes(mutated)
    try:
        parsed = parse(raw, size)
    except QuantError as err:
        refused = err
    else:
        refused = None
    if refused is not None:
        assert refused.code.startswith(("Q-CKPT-", "Q-LIMIT-"))
        assert "m.safetensors" in str(refused)
        return
    theirs = safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + bytes(size))
    spelled = {ours: theirs for theirs, (ours, _) in DTYPES.items()}
    ours = {t.name: (spelled[t.dtype], list(t.shape), t.nbytes) for t in parsed.tensors}
    assert ours == {n: (v["dtype"], v["shape"], len(v["data"])) for n, v in theirs}
