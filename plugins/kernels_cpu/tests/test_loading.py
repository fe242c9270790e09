"""Stored orders into blocks in one pass: equal to core's repacking, for layers and for parts.

What core's packing does with real files is held to the producers' values elsewhere; here each order
must end in the same blocks as the canonical bytes of the same codes, which restore as they were.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpu_made import SPECS, make_layer, make_op
from quant_core.errors import LayoutError
from quant_core.intspec import INTERLEAVE, halves
from quant_core.kernels.choose import Choice
from quant_core.packing import WORD_DTYPES, pack, packed_shape, unpack
from quant_core.parts import load_part_
from quant_core.spec import CANONICAL, Element, Field, OpSpec, Packing, QuantSpec
from quant_core.tensors import LayerTensors
from quant_kernels_cpu.blocks import write_grid_
from quant_kernels_cpu.kernel import WnA16
from quant_kernels_cpu.library import unavailable
from quant_kernels_cpu.loading import source_of

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")

WORDS = Packing(word="int32", k_major=True)
ORDERS = {
    "by word": WORDS,
    "across": Packing(word="int32", axis="out", order=INTERLEAVE, k_major=True),
    "across, natural": Packing(word="int32", axis="out", k_major=True),
    "row of int32": Packing(word="int32"),
    "halves of 16": Packing(order=halves(16)),
    "halves of 32": Packing(order=halves(32)),
    "halves of 64": Packing(order=halves(64)),
}
FIELDS = {  # as in ggml's blocks: element bits -> orders
    2: {"q2_k": Packing(fields=(Field(16, 64, 2, 32),), block=84)},
    3: {"q3_k": Packing(fields=(Field(32, 64, 2, 32), Field(0, 32, 1, 32)), block=110)},
    4: {
        "q4_0": Packing(fields=(Field(2, 16, 4, 16),), block=18),
        "q4_k": Packing(fields=(Field(16, 128, 4, 32),), block=144),
        "iq4_xs": Packing(fields=(Field(8, 128, 4, 16),), block=136),
        "nvfp4": Packing(fields=(Field(4, 32, 4, 8),), block=36),
    },
    5: {
        "q5_0": Packing(fields=(Field(6, 16, 4, 16), Field(2, 4, 1, 1)), block=22),
        "q5_k": Packing(fields=(Field(48, 128, 4, 32), Field(16, 32, 1, 32)), block=176),
    },
    6: {"q6_k": Packing(fields=(Field(0, 128, 4, 64), Field(128, 64, 2, 32)), block=210)},
    8: {"q8_0": Packing(fields=(Field(2, 32, 8, 1),), block=34)},
}
FIELD_CASES = [(bits, name) for bits, orders in FIELDS.items() for name in orders]
SEVEN = replace(SPECS["uint5 g32 offset"], element=Element.uint(7))
OF_BITS = {
    2: SPECS["uint2 g16 code"],
    3: SPECS["uint3 g32 const"],
    4: SPECS["uint4 g32 f16 code"],
    5: SPECS["uint5 g32 offset"],
    6: SPECS["uint6 two-level const"],
    7: SEVEN,
    8: SPECS["int8 g32 f16"],
}
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
STREAMS = [
    *((bits, packing) for bits in (2, 3, 5, 6, 7) for packing in (WORDS, Packing(word="int32"))),
    *((bits, CANONICAL) for bits in (2, 3, 5, 6, 7)),
    *((bits, replace(WORDS, planes=planes)) for bits, planes in PLANES.items()),
    *((bits, Packing(word="int32", planes=planes)) for bits, planes in PLANES.items()),
    (2, Packing(word="int16", straddle=False)),
    (4, Packing(axis="out")),
    (4, Packing(order=(1, 0))),
]
FOUR = "uint4 g32 f16 code"
SIZES = [(32, 64), (33, 128), (64, 192), (72, 320), (200, 64), (8, 1088), (288, 128)]


def stored(lt: LayerTensors, packing: Packing) -> LayerTensors:
    """The same layer with its codes in another order."""
    qt = lt.weight
    codes = unpack(qt.codes, qt.spec.element.bits, qt.shape, qt.packing)
    words = pack(codes, qt.spec.element.bits, packing)
    return LayerTensors(operands={"weight": replace(qt, codes=words, packing=packing)})


def loaded(lt: LayerTensors, op: OpSpec, row: int = 0) -> dict[str, torch.Tensor]:
    kernel = WnA16()
    buffers = kernel.allocate(op)
    load_part_(Choice(kernel=kernel, op=op, trace=()), buffers, lt, {"row": row})
    return buffers


def case(spec: str | QuantSpec, n: int, k: int) -> tuple[LayerTensors, OpSpec]:
    lt = make_layer(SPECS[spec] if isinstance(spec, str) else spec, n, k)
    return lt, make_op("linear", lt, k)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_order_is_loaded_as_the_canonical_codes_are(
    name: str, size: tuple[int, int], isa: str
) -> None:
    lt, op = case(FOUR, *size)
    if ORDERS[name].axis == "out" and size[0] % 8:
        pytest.skip("words across rows hold whole eights of them")
    want, got = loaded(lt, op), loaded(stored(lt, ORDERS[name]), op)
    assert torch.equal(got["codes"], want["codes"])
    back = WnA16().restore(got, op).weight
    assert back.packing == CANONICAL
    assert torch.equal(back.codes, lt.weight.codes)


@pytest.mark.parametrize("spec", ["uint8 g32 code", "uint8 channel const", "int8 g32 f16"])
@pytest.mark.parametrize("packing", [WORDS, Packing(word="int32"), CANONICAL], ids=str)
@pytest.mark.parametrize("size", [(33, 48), (64, 128), (5, 80)], ids=str)
def test_eight_bit_order_is_loaded(
    spec: str, packing: Packing, size: tuple[int, int], isa: str
) -> None:
    lt, op = case(spec, *size)
    got = loaded(stored(lt, packing), op)
    assert torch.equal(got["codes"], loaded(lt, op)["codes"])
    assert torch.equal(WnA16().restore(got, op).weight.codes, lt.weight.codes)


@pytest.mark.parametrize(("bits", "name"), FIELD_CASES)
@pytest.mark.parametrize("size", [(32, 256), (75, 512), (7, 768), (64, 96)], ids=str)
def test_codes_in_fields_are_loaded_as_the_canonical_ones_are(
    bits: int, name: str, size: tuple[int, int], isa: str
) -> None:
    packing = FIELDS[bits][name]
    lt, op = case(OF_BITS[bits], *size)
    part = stored(lt, packing)
    whole = size[1] % packing.fields[0].count == 0
    assert WnA16().reads(op, packing) is whole  # else core puts them in order
    noise = torch.randint(0, 256, part.weight.codes.shape, dtype=torch.uint8)
    held = pack(torch.full(size, (1 << bits) - 1, dtype=torch.uint8), bits, packing)
    part.weight.codes |= noise & ~held  # what lies beside the codes is not read
    assert torch.equal(loaded(part, op)["codes"], loaded(lt, op)["codes"])


@pytest.mark.parametrize(("bits", "packing"), STREAMS, ids=str)
@pytest.mark.parametrize("size", [(32, 256), (74, 64), (6, 192), (320, 128)], ids=str)
def test_streams_are_loaded_as_the_canonical_codes_are(
    bits: int, packing: Packing, size: tuple[int, int]
) -> None:
    lt, op = case(OF_BITS[bits], *size)
    part = stored(lt, packing)
    assert WnA16().reads(op, packing)
    got = loaded(part, op)
    canonical = unpack(lt.weight.codes, bits, size, lt.weight.packing)
    back = WnA16().restore(got, op).weight
    assert torch.equal(unpack(back.codes, bits, size, back.packing), canonical)
    part.weight.codes[-1, -1] ^= 1
    assert not torch.equal(loaded(part, op)["codes"], got["codes"])


@pytest.mark.parametrize(("bits", "packing"), STREAMS, ids=str)
@pytest.mark.parametrize("cut", [2, 32, 38])
def test_stream_behind_another_part_lands_behind_it(bits: int, packing: Packing, cut: int) -> None:
    n, k, kernel = 75 if packing.axis == "in" else 74, 128, WnA16()
    lt, op = case(OF_BITS[bits], n, k)
    want, buffers = loaded(lt, op), kernel.allocate(op)
    for start, stop in ((0, cut), (cut, n)):
        tensors = {key: t[start:stop] for key, t in lt.weight.tensors().items()}
        part = lt.weight.with_tensors(tensors, shape=(stop - start, k))
        part = stored(LayerTensors(operands={"weight": part}), packing)
        kernel.load_(buffers, op, part, {"row": start})
    assert torch.equal(buffers["codes"], want["codes"])


@pytest.mark.parametrize(("bits", "name"), FIELD_CASES)
def test_a_bit_of_each_field_is_noticed(bits: int, name: str, isa: str) -> None:
    packing = FIELDS[bits][name]
    lt, op = case(OF_BITS[bits], 32, 256)
    want = loaded(lt, op)["codes"]
    for field in packing.fields:
        part = stored(lt, packing)
        part.weight.codes[17, field.at + field.nbytes - 1] ^= 0x80
        assert not torch.equal(loaded(part, op)["codes"], want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("row", [0, 3, 40])
def test_grid_of_any_strides_lands_in_blocks(dtype: torch.dtype, row: int) -> None:
    wide = torch.randint(0, 100, (70, 2, 9)).to(dtype)
    long = torch.randint(0, 100, (70, 46)).to(dtype)
    views = (wide[:, 0], wide[:, 1, ::2], wide.view(70, 18).t()[:9, :].t(), wide[::3, 1])
    for values in (*views, long, long[:, ::2], long[:, 1::2], long[:, :32:2], long[:, :16]):
        n, groups = values.shape
        target = torch.zeros(4, groups, 32, dtype=dtype)
        write_grid_(target, row, values)
        rows = target.transpose(1, 2).reshape(128, groups)
        assert torch.equal(rows[row : row + n], values)
        assert not rows[:row].any()
        assert not rows[row + n :].any()


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("cut", [8, 24, 32, 40, 7])
def test_part_after_another_lands_behind_it(name: str, cut: int, isa: str) -> None:
    packing, (n, k) = ORDERS[name], (320, 128)
    if packing.axis == "out" and cut == 7:
        pytest.skip("words across rows hold whole eights of them")
    lt, op = case(FOUR, n, k)
    want, kernel = loaded(lt, op), WnA16()
    buffers = kernel.allocate(op)
    for start, stop in ((0, cut), (cut, n)):
        tensors = {key: t[start:stop] for key, t in lt.weight.tensors().items()}
        part = lt.weight.with_tensors(tensors, shape=(stop - start, k))
        part = stored(LayerTensors(operands={"weight": part}), packing)
        kernel.load_(buffers, op, part, {"row": start})
    assert torch.equal(buffers["codes"], want["codes"])


def test_swapped_nibbles_are_noticed() -> None:
    lt, op = case(FOUR, 64, 128)
    part = stored(lt, ORDERS["across"])
    words = part.weight.codes
    words[0, 0] = (int(words[0, 0]) ^ 0x31) & 0x7FFFFFFF
    assert not torch.equal(loaded(part, op)["codes"], loaded(lt, op)["codes"])


@pytest.mark.parametrize(
    "packing",
    [
        Packing(word="int32", planes=(2, 2)),
        Packing(word="int32", axis="out"),
        Packing(word="int32", order=(1, 0)),
        Packing(order=tuple(reversed(range(32)))),
        Packing(word="int16", k_major=True),
        Packing(fields=(Field(0, 16, 2, 16), Field(16, 16, 2, 16)), block=32),
    ],
    ids=str,
)
def test_unknown_order_is_left_to_core(packing: Packing) -> None:
    lt, op = case(FOUR, 32, 64)
    assert source_of(packing, bits=4, width=4, k=64, bias=8) is None
    assert not WnA16().reads(op, packing)
    assert torch.equal(loaded(stored(lt, packing), op)["codes"], loaded(lt, op)["codes"])


def test_halves_need_whole_runs() -> None:
    assert source_of(Packing(order=halves(64)), bits=4, width=4, k=96, bias=8) is None


@pytest.mark.parametrize("shape", [(64, 8), (8, 63), (64,)], ids=str)
def test_words_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    lt, op = case(FOUR, 64, 64)
    assert packed_shape((64, 64), 4, WORDS) == (8, 64)
    wrong = torch.zeros(shape, dtype=WORD_DTYPES["int32"])
    weight = replace(lt.weight, codes=wrong, packing=WORDS)
    with pytest.raises(LayoutError) as err:
        loaded(LayerTensors(operands={"weight": weight}), op)
    assert err.value.code == "Q-LAYOUT-SHAPE"
