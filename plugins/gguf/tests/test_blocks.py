"""Every block type against the gguf package, bit for bit, and back to the same bytes."""

from __future__ import annotations

import struct

import gguf as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.errors import LayoutError
from quant_core.packing import repack
from quant_core.spec import Packing, Scale, Zero
from quant_plugin_gguf import opaque
from quant_plugin_gguf.blocks import check_scales, dequantize_rows, join_rows, split_rows
from quant_plugin_gguf.layouts import LAYOUTS, spec_of
from quant_plugin_gguf.types import BY_ID, BY_NAME, KNOWN_UNSUPPORTED, opaque_block_types

SCALED = sorted(t.dtype for t in BY_NAME.values() if t.kind == "scaled")
OPAQUE = sorted(t.dtype for t in BY_NAME.values() if t.kind == "opaque")


def _expected(rows: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        kind = oracle.GGMLQuantizationType(BY_NAME[name].id)
        return oracle.quants.dequantize(rows, kind).astype(np.float32)


def _differences(have: torch.Tensor, want: np.ndarray) -> int:
    """Values whose bits differ; two NaNs are the same."""
    a, b = have.numpy(), want
    return int(((a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))).sum())


def test_type_table_agrees_with_gguf_package():
    theirs = {int(k): v for k, v in oracle.GGML_QUANT_SIZES.items()}
    assert {i: (t.weights, t.bytes) for i, t in BY_ID.items()} == {
        i: theirs[i] for i in theirs if i not in KNOWN_UNSUPPORTED
    }
    assert all(oracle.GGMLQuantizationType(i).name == t.name for i, t in BY_ID.items())


def test_every_byte_of_a_block_belongs_to_one_field():
    for layout in LAYOUTS.values():
        spans = [(f.at, f.nbytes) for f in (*layout.codes, *layout.sub)]
        spans += [(at, 2) for at in (layout.d, layout.m) if at is not None]
        spans += [(layout.kquant_scales, 12)] if layout.kquant_scales is not None else []
        covered = [b for at, n in spans for b in range(at, at + n)]
        assert sorted(covered) == list(range(layout.nbytes)), layout.name


@pytest.mark.parametrize("name", SCALED + OPAQUE)
def test_dequantize_random_blocks_equals_gguf_package(name, random_rows):
    rows = random_rows(name, BY_NAME[name].bytes, 7, 6)
    want = _expected(rows, name)
    if name in SCALED:
        have = dequantize_rows(torch.from_numpy(rows), name)
    else:
        have = getattr(opaque, name)(torch.from_numpy(rows), 6 * 256)
    assert have.dtype == torch.float32
    assert have.shape == want.shape
    if name in ("mxfp4", "nvfp4"):  # code 8 is -0 here and +0 there; all else is equal
        assert torch.equal(have, torch.from_numpy(want))
    else:
        assert _differences(have, want) == 0


@pytest.mark.parametrize("name", [n for n in SCALED if n not in ("mxfp4", "nvfp4")])
def test_dequantize_random_float16_bits_equals_gguf_package(name, random_rows):
    rows = random_rows(name, BY_NAME[name].bytes, 33, 16, seed=3, halves=False)
    assert _differences(dequantize_rows(torch.from_numpy(rows), name), _expected(rows, name)) == 0


@pytest.mark.parametrize("name", SCALED)
def test_dequantize_broken_block_differs_from_gguf_package(name, random_rows):
    """Negative control: one code bit and one scale bit each change the result."""
    layout = LAYOUTS[name]
    rows = random_rows(name, BY_NAME[name].bytes, 2, 3, seed=5)
    scale_at = layout.d if layout.d is not None else layout.sub[0].at
    for at in (layout.codes[0].at, scale_at):
        broken = rows.copy()
        broken[0, at] ^= 1
        have = dequantize_rows(torch.from_numpy(broken), name)
        assert not torch.equal(have, torch.from_numpy(_expected(rows, name)))


@pytest.mark.parametrize("name", SCALED + OPAQUE)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), blocks=st.integers(1, 3))
def test_join_rows_gives_back_any_bytes(name, seed, rows, blocks):
    """All bit patterns: NaN payloads, infinities and both zeros included."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks * BY_NAME[name].bytes), dtype=np.uint8)
    stored = torch.from_numpy(data)
    assert torch.equal(join_rows(split_rows(stored, name), name), stored)


@pytest.mark.parametrize("name", ["q4_0", "q6_k"])
def test_join_rows_of_another_packing_gives_same_bytes(name, random_rows):
    stored = torch.from_numpy(random_rows(name, BY_NAME[name].bytes, 4, 2))
    qt = split_rows(stored, name)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    other = Packing(word="int32", axis="in", order=order)
    qt.codes = repack(qt.codes, qt.spec.element.bits, qt.shape, qt.packing, other)
    qt.packing = other
    assert torch.equal(join_rows(qt, name), stored)


def test_split_rows_larger_than_one_chunk_equals_row_by_row(random_rows):
    rows = torch.from_numpy(random_rows("q5_k", BY_NAME["q5_k"].bytes, 600, 8))  # 1.2 M codes
    whole = split_rows(rows, "q5_k")
    for r in (0, 299, 511, 512, 599):
        one = split_rows(rows[r : r + 1], "q5_k")
        assert torch.equal(whole.codes[r : r + 1], one.codes)
        assert torch.equal(whole.offset[1][r : r + 1], one.offset[1])


def test_q4_0_worked_vector():
    block = bytes.fromhex("003c809191a2a2b3b3c4c4d5d5e6e6f7f7f8")
    w = dequantize_rows(torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, 18), "q4_0")
    assert w[0, :4].tolist() == [-8, -7, -7, -6]
    x = torch.arange(-8, 8, 0.5)
    assert (w[0] - x).abs().max() <= 0.5  # rounding to the nearest of step 1


def test_q4_1_worked_vector():
    block = bytes.fromhex("2240000080809191a2a2b3b3c4c4d5d5e6e6f7f7")
    qt = split_rows(torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, 20), "q4_1")
    (step,) = struct.unpack("<e", bytes.fromhex("2240"))
    expected = torch.tensor([[(i // 2) * step for i in range(32)]])
    assert torch.equal(qt.dequantize(), expected)
    assert (qt.dequantize()[0] - torch.arange(32)).abs().max() <= step / 2 + 1e-6


def test_specs_are_what_the_formulas_say():
    f16 = Scale(element="f16", grain=(1, 256))
    fine = Scale(element="uint6", grain=(1, 32))
    q4_k = spec_of("q4_k")
    assert (q4_k.element.name, q4_k.scales) == ("uint4", (fine, f16))
    assert q4_k.zero == Zero(kind="offset", levels=(fine, f16))
    assert spec_of("q6_k").label == "uint6 group(16):int8 group(256):f16 zero=32"
    assert spec_of("q3_k").label == "uint3 group(16):int8 group(256):f16 zero=4"
    assert spec_of("q5_1").label == "uint5 group(32):f16 offset-zero"
    assert spec_of("mxfp4").label == "fp4_e2m1 group(32):e8m0"
    assert spec_of("nvfp4").label == "fp4_e2m1 group(16):fp8_e4m3"
    assert spec_of("iq4_xs").label == "iq4_nl group(32):int8 group(256):f16"
    assert spec_of("iq3_s").blocks == "gguf_iq3_s"


def test_q4_k_minimum_is_stored_negated_and_nothing_else(random_rows):
    rows = random_rows("q4_k", 144, 2, 1)
    minimum = rows[:, 2:4].copy().view(np.float16)
    qt = split_rows(torch.from_numpy(rows), "q4_k")
    assert torch.equal(qt.offset[1], -torch.from_numpy(minimum))
    assert qt.offset[0].max() < 64
    assert qt.offset[0].dtype == torch.uint8


@pytest.mark.parametrize(("at", "value"), [(3, 0x7F), (0, 0x80), (2, 0xFF)])
def test_check_scales_nvfp4_sign_or_nan_raises_value_scale(at, value, random_rows):
    rows = random_rows("nvfp4", 36, 3, 2)
    check_scales(split_rows(torch.from_numpy(rows), "nvfp4"), "w")  # negative control
    rows[1, 36 + at] = value
    with pytest.raises(LayoutError) as err:
        check_scales(split_rows(torch.from_numpy(rows), "nvfp4"), "blk.0.w")
    assert err.value.code == "Q-VALUE-SCALE"
    assert "'blk.0.w': 1 scale byte(s)" in str(err.value)
    assert f"row 1, group {4 + at}: {value:#04x}" in str(err.value)


def test_opaque_reference_wrong_row_length_raises_layout_error():
    with pytest.raises(LayoutError) as err:
        opaque.iq3_s(torch.zeros(2, 109, dtype=torch.uint8), 256)
    assert err.value.code == "Q-LAYOUT-SHAPE"


def test_opaque_block_types_are_named_and_importable():
    types = opaque_block_types()
    assert set(types) == {f"gguf_{n}" for n in OPAQUE}
    for t in types.values():
        module, _, attr = t.target.partition(":")
        assert module == "quant_plugin_gguf.opaque"
        assert callable(getattr(opaque, attr))


@pytest.mark.parametrize("name", SCALED)
def test_tensors_in_place_are_the_same_bits_and_views_where_they_can_be(name, random_rows):
    rows = torch.from_numpy(random_rows(name, BY_NAME[name].bytes, 5, 4, seed=1, halves=False))
    copied, held = split_rows(rows, name), split_rows(rows, name, in_place=True)
    assert (copied.spec, copied.packing) == (held.spec, held.packing)
    for key, value in copied.tensors().items():
        raw, there = (t.contiguous().view(torch.uint8) for t in (value, held.tensors()[key]))
        assert torch.equal(raw, there), key
    inside = range(rows.data_ptr(), rows.data_ptr() + rows.nbytes)
    assert not any(t.data_ptr() in inside for t in (*copied.scales, *copied.offset))
    if name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"):
        assert all(t.data_ptr() in inside for t in (*held.scales, *held.offset))
    rows.zero_()
    assert not any(t.any() for t in held.scales if t.data_ptr() in inside)
