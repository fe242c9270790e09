"""The storage order "tiles16": checked against its description, element by element, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_layers import SPECS, make_layer, make_op
from quant_core.errors import LayoutError
from quant_core.kernels import tiles
from quant_core.kernels.base import Rejected
from quant_core.packing import pack
from quant_core.parts import matrices
from quant_core.rewrites.join import same_bytes
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    Packing,
    QuantSpec,
    Scale,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def made(spec, n, k, seed=0, bias=False):
    """Random raw bits under every name of a spec: values do not matter to a storage order."""
    g = torch.Generator().manual_seed(seed)

    def grid(s):
        r, c = s.grain
        shape = (-(-n // r) if r else 1, -(-k // c) if c else 1)
        if s.element in DTYPES:
            return torch.randn(shape, generator=g).to(DTYPES[s.element])
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)

    bits, zero = spec.element.bits, spec.zero
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    zeros = None
    if zero is not None and zero.kind == "code":
        zeros = grid(Scale(element=zero.element, grain=spec.scales[0].grain))
    qt = QuantizedTensor(
        spec=spec,
        shape=(n, k),
        codes=pack(codes, bits, CANONICAL),
        scales=tuple(map(grid, spec.scales)),
        zeros=zeros,
        offset=tuple(map(grid, zero.levels if zero is not None else ())),
        gather=torch.randperm(k, generator=g).int() if spec.gather else None,
    )
    b = torch.randn(n, generator=g).half() if bias else None
    return LayerTensors(operands={"weight": qt}, bias=b)


def same(a, b):
    left, right = a.weight.tensors(), b.weight.tensors()
    assert set(left) == set(right)
    return all(same_bytes(left[x], right[x]) for x in left) and same_bytes(a.bias, b.bias)


def part_of(lt, start, stop):
    """Output rows [start, stop) of a layer whose grains have single rows or cover all."""
    qt = lt.weight

    def cut(name, t):
        whole = name == "gather" or (t.shape[0] == 1 and qt.shape[0] != 1)
        return t if whole else t[start:stop]

    cut_tensors = {name: cut(name, t) for name, t in qt.tensors().items()}
    one = qt.with_tensors(cut_tensors, shape=(stop - start, qt.shape[1]))
    return replace(
        lt, operands={"weight": one}, bias=None if lt.bias is None else lt.bias[start:stop]
    )


# -------------------------------------------------------------------------- the order as described


def code_at(planes, bits, n, k):
    """Code (n, k), read as the module's docstring says; plain integers, no tensor operation."""
    tile, h, row = n // 16, n % 16 // 8, n % 8
    g, rest = divmod(k, 128)
    step, rest = divmod(rest, 16)
    kh, rest = divmod(rest, 8)
    t, p = divmod(rest, 2)
    lane = row * 4 + t
    if bits == 8:
        return int(planes[0][tile, g, step // 2, lane, (step % 2) * 8 + kh * 4 + h * 2 + p])
    if bits == 4:
        word = int(planes[0][tile, g, step // 4, lane, step % 4 * 2 + p]) & 0xFFFF
        return word >> 4 * (2 * kh + h) & 15
    word = int(planes[0][tile, g, lane, step // 2 * 2 + p]) & 0xFFFF
    low = word >> 2 * (step % 2 * 4 + kh * 2 + h) & 3
    if bits == 2:
        return low
    word = int(planes[1][tile, g, lane, step // 4 * 2 + p]) & 0xFFFF
    return low | (word >> (step % 4 * 4 + kh * 2 + h) & 1) << 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tile_codes_order_is_the_documented_one(bits):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (32, 256), dtype=torch.uint8, generator=g)
    planes = tiles.tile_codes(codes, bits)
    found = [[code_at(planes, bits, n, k) for k in range(256)] for n in range(32)]
    assert torch.equal(torch.tensor(found, dtype=torch.uint8), codes)
    assert torch.equal(tiles.untile_codes(planes, bits), codes)


def test_tile_codes_four_bits_has_the_bytes_of_the_measured_prototype():
    """First words of a counting tile, worked out by hand: row 0 k 0, row 8 k 0, k 8, k 8."""
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    codes[0, 0], codes[8, 0], codes[0, 8], codes[8, 8], codes[0, 1] = 1, 2, 3, 4, 5
    words = tiles.tile_codes(codes, 4)[0]
    assert [int(w) for w in words[0, 0, 0, 0, :2]] == [0x4321, 0x0005]


def test_tile_grid_puts_rows_eight_apart_side_by_side():
    values = torch.arange(16 * 3).view(16, 3)  # row * 3 + group
    tiled = tiles.tile_grid(values)
    assert tiled[0, 2, 5].tolist() == [5 * 3 + 2, 13 * 3 + 2]
    assert torch.equal(tiles.untile_grid(tiled), values)


# ------------------------------------------------------------------------------- load and restore

ELEMENTS = [*map(Element.uint, range(2, 9)), Element.int(8),
            Element(name="fp4_e2m1", bits=4, kind="float")]  # fmt: skip
SCALES = [
    (Scale(element="bf16", grain=group(128)),),
    (Scale(element="f16", grain=group(64)),),
    (Scale(element="f32", grain=CHANNEL),),
    (Scale(element="e8m0", grain=group(32)),),
    (Scale(element="fp8_e4m3", grain=group(16)), Scale(element="f32", grain=TENSOR)),
    (Scale(element="uint6", grain=group(32)), Scale(element="f16", grain=group(256))),
]
ZEROS = [
    None,
    Zero(kind="const", value=2),
    Zero(kind="code", element="uint4"),
    Zero(kind="code", element="f16"),
    Zero(kind="offset", levels=(Scale(element="f16", grain=group(32)),)),
]


@given(
    element=st.sampled_from(ELEMENTS),
    scales=st.sampled_from(SCALES),
    zero=st.sampled_from(ZEROS),
    gather=st.booleans(),
    n=st.integers(1, 90),
    k=st.integers(1, 12).map(lambda v: 32 * v),
    cut=st.integers(0, 90),
    bias=st.booleans(),
)
def test_restore_gives_every_bit_back(element, scales, zero, gather, n, k, cut, bias):
    spec = QuantSpec(element=element, scales=scales, zero=zero, gather=gather)
    lt = made(spec, n, k, seed=n * 1000 + k, bias=bias)
    op = make_op("linear", lt, k)
    assert tiles.problem(op) is None
    buffers = tiles.allocate(op)
    cut = cut % n
    for start, stop in ((cut, n), (0, cut)):  # parts in any order, cut anywhere
        if stop > start:
            tiles.load_(buffers, op, part_of(lt, start, stop), {"row": start})
    assert same(tiles.restore(buffers, op), lt)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_restore_of_specs_of_the_formats(name):
    lt = make_layer(SPECS[name], n=40, k=96, bias=True)
    op = make_op("linear", lt, 96)
    buffers = tiles.allocate(op)
    tiles.load_(buffers, op, lt, {"row": 0})
    assert same(tiles.restore(buffers, op), lt)


def test_experts_are_loaded_one_by_one():
    spec = QuantSpec(element=Element.uint(3), scales=SCALES[1], zero=ZEROS[2], gather=True)
    each = [made(spec, 40, 160, seed=e) for e in range(3)]
    op = make_op("grouped_linear", each[0], 160, experts=3)
    buffers = tiles.allocate(op)
    for e in (2, 0, 1):
        tiles.load_(buffers, op, each[e], {"row": 0, "expert": e})
    back = tiles.restore(buffers, op)
    assert back.weight.shape == (3, 40, 160)
    assert all(same(one, each[e]) for e, one in matrices(back, 3) if e is not None)


def test_large_layers_are_loaded_in_row_blocks(monkeypatch):
    lt = made(QuantSpec(element=Element.uint(4), scales=SCALES[0]), 100, 256)
    op = make_op("linear", lt, 256)
    monkeypatch.setattr(tiles, "_BLOCK_CODES", 32 * 256)
    buffers = tiles.allocate(op)
    for start, stop in ((0, 7), (7, 100)):
        tiles.load_(buffers, op, part_of(lt, start, stop), {"row": start})
    assert same(tiles.restore(buffers, op), lt)


def test_padding_is_finite_and_without_scale():
    """N = 40 is kept as 64 rows, K = 160 as 256 columns: groups 5..7 of 32 are padding."""
    spec = QuantSpec(element=Element.uint(4), scales=(Scale(element="f16", grain=group(32)),),
                     zero=Zero(kind="const", value=8))  # fmt: skip
    lt = made(spec, 40, 160)
    op = make_op("linear", lt, 160)
    buffers = tiles.allocate(op)
    tiles.load_(buffers, op, lt, {"row": 0})
    codes = tiles.untile_codes((buffers["codes"],), 4)
    assert codes.shape == (64, 256)
    assert bool((codes[40:] == 8).all())
    assert bool((codes[:, 160:] == 8).all())
    scales = tiles.untile_grid(buffers["scales_0"])
    assert bool((scales[40:] == 0).all())
    assert bool((scales[:, 5:] == 0).all())


def test_unloaded_rows_are_poisoned():
    lt = made(QuantSpec(element=Element.uint(4), scales=SCALES[0]), 64, 128)
    buffers = tiles.allocate(make_op("linear", lt, 128))
    assert bool((buffers["codes"] == -1).all())
    assert bool(buffers["scales_0"].isnan().all())


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "k", "axis"),
    [
        (QuantSpec(element=Element.uint(4), scales=SCALES[0]), 48, "in_features"),
        (QuantSpec(element=Element.uint(4), scales=(Scale(element="f16", grain=group(48)),)), 96,
         "scales_0"),
        (QuantSpec(element=Element.uint(1), scales=SCALES[0]), 64, "element"),
        (QuantSpec(element=Element.uint(4), blocks="iq"), 64, "blocks"),
    ],
)  # fmt: skip
def test_problem_names_the_axis(spec, k, axis):
    op = replace(make_op("linear", make_layer(SPECS["uint4_code"])), operands=(("weight", spec),),
                 sizes=(("n", 40), ("k", k)))  # fmt: skip
    found = tiles.problem(op)
    assert isinstance(found, Rejected)
    assert found.axis == axis


def test_problem_names_packing_and_features():
    op = make_op("linear", make_layer(SPECS["uint4_code"]))
    assert tiles.problem(replace(op, packing=Packing(word="int32"))).axis == "packing"
    assert tiles.problem(replace(op, features=frozenset({"acc_bias"}))).axis == "features"


def test_load_refuses_another_spec_shape_or_rows():
    lt = make_layer(SPECS["uint4_code"])
    op = make_op("linear", lt)
    buffers = tiles.allocate(op)
    with pytest.raises(LayoutError) as e:
        tiles.load_(buffers, op, make_layer(SPECS["uint3_const"]), {"row": 0})
    assert e.value.code == "Q-LAYOUT-FUSED"
    with pytest.raises(LayoutError, match="rows 8 to 48"):
        tiles.load_(buffers, op, lt, {"row": 8})
    short = replace(lt.weight, scales=(lt.weight.scales[0][:, :2],))
    with pytest.raises(LayoutError, match="scales_0 has shape"):
        tiles.load_(buffers, op, replace(lt, operands={"weight": short}), {"row": 0})
