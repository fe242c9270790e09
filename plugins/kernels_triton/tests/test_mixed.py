"""The kernels with 8-bit activations on "tiles16": what they take, how their bits are arranged.

The kernels need a GPU (benchmarks/gpu_mixed.py). Here their bit operations and their order of
columns, spelled out in torch, are compared with stored codes and torch's own float8 type, and both
kernels are compiled for sm_90.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_core.kernels.base import ANY_ROWS, Accepted, Rejected
from quant_core.kernels.family import layout_of
from quant_core.kernels.rounded import RoundedInput
from quant_core.kernels.tiles import tile_codes
from quant_core.numerics import element_table
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, group
from quant_core.spec_json import to_text
from quant_kernels_triton.mixed_kernel import Mixed, MixedStored
from quant_kernels_triton.mixed_plan import (
    MixedPair,
    MixedPlan,
    MixedRing,
    MixedWide,
    _few,
    config,
    describe_mixed,
    from_text,
)
from triton_made import SPECS, make_layer, make_op

FP8, INT8 = Element(name="fp8_e4m3", bits=8, kind="float"), Element.int(8)
POWER = {"fp8": 512.0, "fp4": 64.0, "int8": 0.0625, "bytes": 1.0}  # as in mixed_parts
EXCHANGED = {  # columns of 16 in the order in which x is stored
    4: [kh * 8 + t * 2 + p for t in range(4) for p in range(2) for kh in range(2)],
    8: [kh * 8 + t * 2 + p for t in range(4) for kh in range(2) for p in range(2)],
}


def acts(element: Element, grain: tuple[int, int] = CHANNEL, static: bool = False) -> QuantSpec:
    return QuantSpec(element=element, scales=(Scale(element="f32", grain=grain, static=static),))


def mixed_op(name: str, quantized: QuantSpec, n: int = 256, k: int = 512, **more: object) -> OpSpec:
    args = {"act": "bfloat16", "device": ("cuda", "9.0")} | more
    op = make_op(SPECS[name], n, k, **args)
    features = op.features | ({"input_scale"} if quantized.scales[0].static else set())
    operands = (("weight", SPECS[name]), ("input", quantized))
    return replace(op, operands=operands, features=frozenset(features))


# ------------------------------------------------------------------------------------- arithmetic


def halves(kind: str, byte: Tensor) -> tuple[Tensor, Tensor]:
    """What ``mixed_parts.ASM`` makes of bytes of two codes: one of row g, one of row g + 8."""
    low, high, up = byte & 15, byte >> 4, (byte << 4) & 255
    if kind == "int8":
        return (up & 0xF0) ^ 0x80, (byte & 0xF0) ^ 0x80
    if kind == "fp4":
        a, b = (byte << 2) & 0x1C, (byte >> 2) & 0x1C
        return a | (up & 0x80), b | (byte & 0x80)
    a, b = (low - 8).abs(), (high - 8).abs()
    return a | (~up & 0x80), b | (~byte & 0x80)


def real(kind: str, code: Tensor) -> Tensor:
    bits = code.to(torch.uint8)
    integer = kind in ("int8", "bytes")
    return (bits.view(torch.int8) if integer else bits.view(torch.float8_e4m3fn)).float() * POWER[
        kind
    ]


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp4"])
def test_every_byte_becomes_the_values_of_its_two_codes(kind):
    byte, codes = torch.arange(256), torch.arange(16)
    want = element_table("fp4_e2m1") if kind == "fp4" else codes.float() - 8
    for got, code in zip(halves(kind, byte), (byte & 15, byte >> 4), strict=True):
        assert torch.equal(real(kind, got), want[code])


def operand(words: Tensor, bits: int) -> Tensor:
    """Words of one matrix to the A operand [N, K] as ``mixed_parts.operand`` orders it."""
    r, g = words.shape[:2]
    raw = words.contiguous().view(torch.uint8).long()
    if bits == 4:  # tile group half row t S byte, then h behind
        a, b = halves("int8", raw.view(r, g, 2, 8, 4, 4, 4))
        v = torch.stack([a, b], -1).permute(0, 7, 3, 1, 2, 5, 4, 6)
        return real("int8", v.reshape(r * 16, g * 128))
    v = raw.view(r, g, 4, 8, 4, 2, 2, 2, 2)  # tile group piece row t S kh h p
    low, high = v[..., 0, :].flatten(-2), v[..., 1, :].flatten(-2)  # prmt 0x5410, 0x7632
    v = torch.stack([low, high], 1).permute(0, 1, 4, 2, 3, 6, 5, 7)
    return real("bytes", v.reshape(r * 16, g * 128))


@pytest.mark.parametrize("bits", [4, 8])
def test_operand_times_exchanged_columns_is_the_product(bits):
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (32, 256), generator=gen, dtype=torch.uint8)
    x = torch.randint(-20, 20, (5, 256), generator=gen).float()
    swapped = x.view(5, 16, 16)[:, :, EXCHANGED[bits]].reshape(5, 256)
    want = x @ (codes.float() - 8 if bits == 4 else codes.view(torch.int8).float()).t()
    (words,) = tile_codes(codes, bits)
    assert torch.equal(swapped @ operand(words, bits).t(), want)
    assert not torch.equal(x @ operand(words, bits).t(), want)


PROGRAM = """
import sys
from mixed_compiled import compile_mixed
compile_mixed(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("name", "element"),
    [("uint4 g128 bf16", FP8), ("uint4 channel", INT8), ("mxfp4", FP8), ("int8 channel", INT8)],
)
def test_kernels_compile_without_spills_or_layout_changes(name, element, tmp_path):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    op = mixed_op(name, acts(element), 4096, 4096)
    command = [sys.executable, "-c", PROGRAM, to_text(op)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split() == ["ok"] * 5


# ---------------------------------------------------------------------------------- what they take


def planned(name: str, element: Element = FP8, **more: object) -> MixedPlan:
    p = describe_mixed(mixed_op(name, acts(element), **more))
    assert isinstance(p, MixedPlan), p
    return p


@pytest.mark.parametrize(
    ("name", "element", "operand_of", "sub", "whole"),
    [
        ("uint4 g128 f16", FP8, "fp8", 1, False),
        ("uint4 g128 f16", INT8, "int8", 1, False),
        ("uint4 channel", INT8, "int8", 1, True),
        ("mxfp4", FP8, "fp4", 4, False),
        ("fp8 channel", FP8, "bytes", 1, False),
        ("int8 channel", INT8, "bytes", 1, True),
    ],
)
def test_plan_says_how_codes_are_multiplied(name, element, operand_of, sub, whole):
    p = planned(name, element)
    assert (p.operand, p.sub, p.whole) == (operand_of, sub, whole)
    assert from_text(p.text()).text() == p.text()


def test_refusals_name_the_axis():
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

    def refused(name: str, quantized: QuantSpec, kernel: object = None, **more: object) -> str:
        answer = (kernel or Mixed()).accepts(mixed_op(name, quantized, **more))
        assert isinstance(answer, Rejected)
        return answer.axis

    int4, token = "uint4 g128 bf16", acts(FP8)
    stored = acts(FP8, TENSOR, static=True)
    assert refused(int4, token, device=("cpu", "")) == "device"
    assert refused(int4, token, device=("cuda", "8.9")) == "compute capability"
    assert refused(int4, token, act="float32") == "act_dtype"
    assert refused(int4, acts(FP8, group(128))) == "input"
    assert refused(int4, acts(FP8, TENSOR)) == "input"
    assert refused(int4, stored) == "input"
    assert refused(int4, token, MixedStored()) == "input"
    assert refused(int4, stored, MixedStored(), op="grouped_linear", experts=2) == "input"
    assert refused("nvfp4", token) == "scales"
    assert refused("fp8 block", token) == "scales"
    assert refused("uint4 g32 bf16 code", token) == "element"
    assert refused("uint3 g128", token) == "element"
    assert refused("fp8 channel", acts(INT8)) == "element"
    assert refused(int4, token, k=65536) == "in_features"
    bare = replace(mixed_op(int4, token), operands=(("weight", SPECS[int4]),))
    answer = Mixed().accepts(bare)
    assert isinstance(answer, Rejected)
    assert answer.axis == "operands"


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("name", ["uint4 g128 bf16", "mxfp4", "fp8 channel"])
def test_accepted_costs_cover_all_rows(name, experts):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    what = "grouped_linear" if experts else "linear"
    op = mixed_op(name, acts(FP8), 4096, 4096, op=what, experts=experts)
    answer = Mixed().accepts(op)
    assert isinstance(answer, Accepted), answer
    bounds = [bound for bound, _ in answer.costs]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == ANY_ROWS
    assert answer.cost_at(4096) > answer.cost_at(256) > 0


@pytest.mark.parametrize("n", [64, 200, 4096, 28672])
@pytest.mark.parametrize("name", ["uint4 g128 bf16", "mxfp4", "fp8 channel"])
@pytest.mark.parametrize("experts", [0, 8])
def test_block_sizes_fit_shared_memory_and_k(name, n, experts):
    what = "grouped_linear" if experts else "linear"
    p = planned(name, n=n, k=544, op=what, experts=experts)
    for rows in (1, 16, 17, 33, 64, 65, 128, 129, 256, 257, 1000, 5000):
        c = config(p, rows)
        tile = 2048 if p.bytes else 1024  # bytes of 16 rows of a group
        if isinstance(c, MixedRing):
            assert c.stages * (c.bm * 128 + c.warps * tile) + 1024 <= 227 * 1024
            assert c.split == 1 or p.recipe.groups // c.split >= 2
        elif isinstance(c, MixedPair):
            assert not experts
            assert c.stages % 2 == 0
            # stages of x, four of codes for either warpgroup, and the sums of one
            assert c.stages * c.bm * 128 + 2 * 4 * 4 * tile + 256 * c.bm + 1024 <= 227 * 1024
            assert c.split == 1 or p.recipe.groups // c.split >= 8
            assert c.split * -(-rows // c.bm) * (p.recipe.rows // 64) <= 132
        else:
            assert isinstance(c, MixedWide)
            assert not (c.stay and (experts or c.partial))
            assert c.split == 1 or (c.stay and p.recipe.groups // c.split >= 8)
            # stages of x, as many of codes or four, and one block of results on its way out
            codes = (c.stages if c.stay else 4) * 8 * tile
            assert c.stages * c.bm * 128 + codes + 6144 <= 227 * 1024


def test_few_tiles_of_many_columns_are_cut_in_two():
    p = planned("uint4 g128 bf16", n=4096, k=14336)
    c = config(p, 512)
    assert isinstance(c, MixedWide)
    assert (c.bm, c.split) == (256, 2)  # 64 tiles, 132 multiprocessors
    assert config(planned("uint4 g128 bf16", n=28672, k=4096), 512).split == 1


def test_a_ring_has_stages_for_the_blocks_that_must_run_at_once():
    for n, each in ((13824, 2), (18944, 3)):  # of 64 outputs, on 132 multiprocessors
        for rows in (64, 128):
            c = _few(planned("uint4 g128 bf16", n=n, k=4096), rows)
            block = c.stages * (c.bm * 128 + 4096)
            assert each * block <= 227 << 10 < (each + 1) * (block + 1024)


def test_stored_scale_lies_where_the_rounding_kernels_have_it():
    op = mixed_op("uint4 g128 bf16", acts(FP8, TENSOR, static=True), bias=True)
    lt = make_layer(SPECS["uint4 g128 bf16"], 256, 512, bias=True)
    lt = replace(lt, input_scale=torch.tensor([0.25]))
    kernel = MixedStored()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    assert list(buffers)[-1] == "input_scale"
    rounded = RoundedInput(Mixed(), stored=True, quantizer=Mixed())
    assert layout_of(kernel) == rounded.layout
    other = rounded.allocate(op)
    assert [(n, t.shape, t.dtype) for n, t in buffers.items()] == [
        (n, t.shape, t.dtype) for n, t in other.items()
    ]
    back = kernel.restore(buffers, op)
    assert torch.equal(back.input_scale, lt.input_scale)
    assert torch.equal(back.weight.codes, lt.weight.codes)
