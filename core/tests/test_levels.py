"""Levels of a scale beyond plain factors, float zeros, and flat blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.dequantize import combine_factors, dequantize
from quant_core.errors import LayoutError
from quant_core.flat import flat_count, flat_grain, flat_to_grid, grid_to_flat, shrink_grid
from quant_core.kernels.reference import ReferenceKernel
from quant_core.packing import pack
from quant_core.rewrites.join import concat_out
from quant_core.rewrites.values import code_to_offset, fold_scales
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

RNG = torch.Generator().manual_seed(0)
NESTED = QuantSpec(
    element=Element(name="nf4", bits=4, kind="lut"),
    scales=(
        Scale(element="f32", grain=TENSOR, add=True),
        Scale(element="lut8", grain=group(16)),
        Scale(element="f32", grain=CHANNEL),
    ),
)


def nested(n=6, k=48, mean=0.25):
    codes = torch.randint(0, 16, (n, k), generator=RNG, dtype=torch.uint8)
    return QuantizedTensor(
        spec=NESTED,
        shape=(n, k),
        codes=pack(codes, 4, CANONICAL),
        scales=(
            torch.tensor([[mean]]),
            torch.randint(0, 256, (n, k // 16), generator=RNG, dtype=torch.uint8),
            torch.rand(n, 1, generator=RNG),
        ),
        codebook=(torch.linspace(-1, 1, 16), torch.linspace(-0.9, 1, 256)),
    ), codes


def by_hand(qt, codes):
    a = qt.codebook[1][qt.scales[1].long()] * qt.scales[2] + qt.scales[0]
    return qt.codebook[0][codes.long()] * a.repeat_interleave(16, 1)


def test_added_level_and_table_of_scales_equal_the_formula():
    qt, codes = nested()
    assert torch.equal(dequantize(qt), by_hand(qt, codes))


def test_added_level_read_as_a_factor_differs():
    qt, codes = nested()
    scales = (replace(NESTED.scales[0], add=False), *NESTED.scales[1:])
    wrong = replace(qt, spec=replace(NESTED, scales=scales))
    assert not torch.allclose(dequantize(wrong), by_hand(qt, codes), atol=1e-2)


def test_members_with_unequal_means_join_exactly():
    parts = [nested(mean=m) for m in (0.25, 0.5)]
    books = parts[0][0].codebook
    parts = [(replace(qt, codebook=books), codes) for qt, codes in parts]
    joined = concat_out([LayerTensors(operands={"weight": qt}) for qt, _ in parts])
    want = torch.cat([by_hand(qt, codes) for qt, codes in parts])
    assert torch.equal(dequantize(joined.weight), want)


def test_folded_scales_give_the_same_weights():
    qt, codes = nested()
    folded = fold_scales(qt, allow_inexact=True)
    assert len(folded.spec.scales) == 1
    assert torch.equal(dequantize(folded), by_hand(qt, codes))


def test_table_of_scales_without_a_codebook_raises():
    qt, _ = nested()
    with pytest.raises(LayoutError, match="lut8"):
        combine_factors(qt.scales, qt.spec.scales, qt.shape)


def _run(qt, x):
    op = OpSpec(op="linear", operands=(("weight", qt.spec),), packing=qt.packing,
                sizes=(("n", qt.shape[0]), ("k", qt.shape[1])), act_dtype="float32")  # fmt: skip
    kernel = ReferenceKernel()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, LayerTensors(operands={"weight": qt}), {"row": 0})
    restored = kernel.restore(buffers, op).weight
    assert all(torch.equal(t, qt.tensors()[name]) for name, t in restored.tensors().items())
    return kernel.bind(op)(list(buffers.values()), x)


def test_reference_kernel_holds_both_codebooks():
    qt, codes = nested()
    x = torch.randn(3, 48, generator=RNG)
    assert torch.equal(_run(qt, x), x @ by_hand(qt, codes).T)


def float_zero(z):
    codes = torch.randint(0, 16, (4, 32), generator=RNG, dtype=torch.uint8)
    scale = torch.rand(4, 2, generator=RNG)
    spec = QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="f32", grain=group(16)),),
        zero=Zero(kind="code", element="f32"),
    )
    qt = QuantizedTensor(spec=spec, shape=(4, 32), codes=pack(codes, 4, CANONICAL),
                         scales=(scale,), zeros=z)  # fmt: skip
    spread = [t.repeat_interleave(16, 1) for t in (z, scale)]
    return qt, (codes.float() - spread[0]) * spread[1]


def test_float_zero_is_subtracted_before_the_scale():
    z = torch.rand(4, 2, generator=RNG) * 15
    qt, want = float_zero(z)
    assert torch.equal(dequantize(qt), want)
    x = torch.randn(3, 32, generator=RNG)
    assert torch.equal(_run(qt, x), x @ want.T)


def test_float_zero_that_is_no_integer_is_no_exact_offset():
    qt, _ = float_zero(torch.full((4, 2), 7.3))
    with pytest.raises(LayoutError, match="not exact"):
        code_to_offset(qt)


@pytest.mark.parametrize(
    ("block", "shape", "grain"),
    [
        (64, (3, 128), (1, 64)),
        (64, (8, 32), (2, 0)),
        (64, (5, 32), (2, 0)),  # the last block is half full
        (64, (3, 96), (1, 32)),
        (64, (5, 7), (1, 1)),
        (64, (2, 64), (1, 0)),
        (16384, (256, 11008), (1, 256)),
    ],
)
def test_flat_blocks_become_a_grid_and_come_back(block, shape, grain):
    n, k = shape
    values = torch.rand(flat_count(block, shape), generator=RNG)
    got = flat_grain(block, k)
    assert got == grain
    grid = flat_to_grid(values, block, shape)
    scale = Scale(element="f32", grain=got)
    spread = combine_factors((grid,), (scale,), shape).expand(n, k)
    want = values.repeat_interleave(block)[: n * k].view(n, k)
    assert torch.equal(spread, want)
    assert torch.equal(grid_to_flat(grid, got, block, shape, "w"), values)


def test_grid_that_differs_inside_a_block_is_refused():
    grid = flat_to_grid(torch.rand(5, generator=RNG), 64, (3, 96))
    grid[1, 1] += 1
    with pytest.raises(LayoutError, match="blocks of 64") as err:
        grid_to_flat(grid, (1, 32), 64, (3, 96), "w")
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_shrunk_grid_is_checked():
    grid = torch.tensor([[1.0], [1.0], [2.0]])
    assert torch.equal(shrink_grid(grid[:2], (1, 0), TENSOR, (2, 8), "w"), torch.tensor([[1.0]]))
    with pytest.raises(LayoutError, match="differ"):
        shrink_grid(grid, (1, 0), TENSOR, (3, 8), "w")
    with pytest.raises(LayoutError, match="differ"):
        shrink_grid(grid, (2, 0), (1, 0), (3, 8), "w")
