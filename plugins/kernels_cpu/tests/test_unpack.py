"""Codes out of words, of many tensors in one call, against ``quant_core.packing.unpack``."""

from __future__ import annotations

import pytest
import torch

from quant_core.intspec import INTERLEAVE
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.unpack import TorchUnpack, unpack_of
from quant_core.packing import Packed, packed_shape
from quant_core.registry import registry
from quant_core.spec import OpSpec, Packing
from quant_kernels_cpu.unpack import CpuUnpack, _known

OP = OpSpec(op="unpack", operands=())
ORDERS = (None, INTERLEAVE, (7, 6, 5, 4, 3, 2, 1, 0), (2, 0, 1, 3, 7, 4, 6, 5))
RUNS = [CpuUnpack().bind(OP), TorchUnpack().bind(OP)]


def _packed(shape: tuple[int, int], packing: Packing, bits: int = 4) -> Packed:
    dtype = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}[packing.word]
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    words = torch.randint(low, high, packed_shape(shape, bits, packing)).to(dtype)
    return Packed(words=words, bits=bits, shape=shape, packing=packing)


def _expected(packed: Packed) -> torch.Tensor:
    """By definition: code i of a run of eight is the bits of its slot."""
    words = packed.words.to(torch.int64) & 0xFFFFFFFF
    slots = packed.packing.order or range(8)
    return torch.stack([(words >> (4 * s)) & 15 for s in slots], dim=-1).flatten(1).to(torch.uint8)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("run", RUNS, ids=["c", "torch"])
def test_every_code_of_all_tensors_is_unpacked(run, order) -> None:
    packing = Packing(word="int32", order=order)
    shapes = ((1, 8), (3, 24), (7, 56), (0, 8), (32, 4096), (5, 4096 * 16 + 8))
    all_of_them = [_packed(shape, packing) for shape in shapes]
    assert all(_known(p, p.words) for p in all_of_them)
    guarded = [torch.full((p.shape[0] + 2, p.shape[1]), 99, dtype=torch.uint8) for p in all_of_them]
    run([], [(p, g[1:-1]) for p, g in zip(all_of_them, guarded, strict=True)])
    for packed, held in zip(all_of_them, guarded, strict=True):
        assert torch.equal(held[1:-1], _expected(packed))
        assert bool((held[0] == 99).all()), "written in front of the room"
        assert bool((held[-1] == 99).all()), "written behind the room"


@pytest.mark.parametrize(
    ("packing", "bits", "shape"),
    [
        (Packing(word="int32"), 8, (4, 32)),
        (Packing(word="int32"), 2, (4, 32)),
        (Packing(word="int32"), 4, (4, 29)),
        (Packing(), 4, (4, 32)),
        (Packing(word="int32", axis="out", order=INTERLEAVE), 4, (16, 8)),
        (Packing(word="int32", k_major=True), 4, (16, 8)),
    ],
    ids=str,
)
def test_other_packings_are_left_to_the_reference(packing, bits, shape) -> None:
    packed, out = _packed(shape, packing, bits), torch.empty(shape, dtype=torch.uint8)
    assert not _known(packed, out)
    CpuUnpack().bind(OP)([], [(packed, out)])
    assert torch.equal(out, packed.codes())


def test_words_that_do_not_follow_each_other_are_left_to_the_reference() -> None:
    whole = _packed((4, 64), Packing(word="int32", order=INTERLEAVE))
    part = Packed(words=whole.words[:, 2:6], bits=4, shape=(4, 32), packing=whole.packing)
    out = torch.empty(4, 32, dtype=torch.uint8)
    assert not _known(part, out)
    CpuUnpack().bind(OP)([], [(part, out)])
    assert torch.equal(out, _expected(whole)[:, 16:48])


def test_kernel_is_chosen_and_takes_nothing_else() -> None:
    assert isinstance(CpuUnpack().accepts(OP), Accepted)
    other = OpSpec(op="unpack", operands=(), device=("cuda", "9.0"))
    assert isinstance(CpuUnpack().accepts(other), Rejected)
    for kernel in (CpuUnpack(), TorchUnpack()):
        assert isinstance(kernel.accepts(OpSpec(op="gated", operands=())), Rejected)
    packed = _packed((4, 32), Packing(word="int32", order=INTERLEAVE))
    out = torch.empty(4, 32, dtype=torch.uint8)
    unpack_of(registry())([(packed, out)])
    assert torch.equal(out, _expected(packed))
