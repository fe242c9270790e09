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
from quant_core.nn import load_part_
from quant_core.packing import WORD_DTYPES, pack, packed_shape, unpack
from quant_core.spec import CANONICAL, OpSpec, Packing
from quant_core.tensors import LayerTensors
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
FOUR = "uint4 g32 f16 code"
SIZES = [(32, 64), (33, 128), (64, 192), (72, 320), (200, 64), (8, 1088)]


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


def case(spec: str, n: int, k: int) -> tuple[LayerTensors, OpSpec]:
    lt = make_layer(SPECS[spec], n, k)
    return lt, make_op("linear", lt, k)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_order_is_loaded_as_the_canonical_codes_are(name: str, size: tuple[int, int]) -> None:
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
def test_eight_bit_order_is_loaded(spec: str, packing: Packing, size: tuple[int, int]) -> None:
    lt, op = case(spec, *size)
    got = loaded(stored(lt, packing), op)
    assert torch.equal(got["codes"], loaded(lt, op)["codes"])
    assert torch.equal(WnA16().restore(got, op).weight.codes, lt.weight.codes)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("cut", [8, 24, 32, 40, 7])
def test_part_after_another_lands_behind_it(name: str, cut: int) -> None:
    packing, (n, k) = ORDERS[name], (96, 128)
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
        Packing(order=(1, 0)),
        Packing(order=tuple(reversed(range(32)))),
        Packing(word="int16", k_major=True),
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
