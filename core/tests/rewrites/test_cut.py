"""Cuts equal the slices of the dequantized weight, bit for bit, whatever the cut goes through."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.dequantize import dense_weight, dequantize
from quant_core.errors import LayoutError
from quant_core.registry import Registry
from quant_core.rewrites import slice_in, slice_out, to_gather
from quant_core.spec import (
    CHANNEL,
    TENSOR,
    BlockType,
    Element,
    QuantSpec,
    Scale,
    Transform,
    Zero,
    block,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

from .strategies import (
    FP8,
    PACKINGS,
    layer,
    make,
    same_bits,
    snapshot,
    tensors,
    unchanged,
)

GPTQ = PACKINGS[1]
CODE4 = Zero(kind="code", element="uint4")


def w4(n: int, k: int, g: int, **kw: object) -> QuantizedTensor:
    return make(
        n=n,
        k=k,
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(g)),),
        zero=CODE4,
        **kw,  # type: ignore[arg-type]
    )


def dense(lt: LayerTensors, k: int | None = None) -> torch.Tensor:
    return dense_weight(lt.weight, k)


# ------------------------------------------------------------------------------ properties


@settings(derandomize=True, max_examples=150, deadline=None)
@given(qt=tensors(), data=st.data())
def test_slice_out_equals_rows_of_dequantized(qt: QuantizedTensor, data: st.DataObject) -> None:
    n, k = qt.shape[-2:]
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    lt, before = layer(qt), snapshot(qt)
    out = slice_out(lt, start, stop)
    assert same_bits(dense(out, k), dense(lt, k)[..., start:stop, :])
    assert same_bits(dequantize(out.weight), dequantize(qt)[..., start:stop, :])
    assert lt.bias is not None
    assert out.bias is not None
    assert torch.equal(out.bias, lt.bias[..., start:stop])
    assert lt.acc_bias is not None
    assert out.acc_bias is not None
    assert torch.equal(out.acc_bias, lt.acc_bias[..., start:stop])
    assert out.weight.packing == qt.packing
    assert unchanged(qt, before)


@settings(derandomize=True, max_examples=250, deadline=None)
@given(qt=tensors(), data=st.data())
def test_slice_in_equals_columns_of_dequantized(qt: QuantizedTensor, data: st.DataObject) -> None:
    k = qt.shape[-1]
    start = data.draw(st.integers(0, k - 1))
    stop = data.draw(st.integers(start + 1, k))
    min_group = data.draw(st.sampled_from([1, 8, 16, 32]))
    lt, before = layer(qt), snapshot(qt)
    out = slice_in(lt, start, stop, min_group=min_group)
    assert same_bits(dense(out, stop - start), dense(lt, k)[..., start:stop])
    assert out.bias is lt.bias
    assert out.acc_bias is lt.acc_bias
    assert out.weight.spec.gather == (out.weight.gather is not None)
    assert unchanged(qt, before)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(qt=tensors(experts=False), parts=st.sampled_from([2, 3]))
def test_cuts_of_both_axes_commute(qt: QuantizedTensor, parts: int) -> None:
    n, k = qt.shape
    n0, k0 = n // parts, k // parts
    lt = layer(qt)
    one = slice_in(slice_out(lt, n0, n), k0, k)
    two = slice_out(slice_in(lt, k0, k), n0, n)
    expected = dense(lt, k)[n0:, k0:]
    assert same_bits(dense(one, k - k0), expected)
    assert same_bits(dense(two, k - k0), expected)


# ---------------------------------------------------------------------- tensor parallelism

RATIOS = [  # (K, group): down_proj ratios that real models have, scaled down
    (1024, 128),
    (231 * 32, 32),  # 29568 = 231 * 128: 14784 is no multiple of 128
    (231 * 16, 16),
    (4304, 32),  # 4304 / 16 = 269, odd
    (2 * 269, 32),
    (320, 64),
]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("k", "g"), RATIOS)
@pytest.mark.parametrize("act_order", [False, True])
def test_tensor_parallel_columns_join_to_the_whole(
    k: int, g: int, tp: int, act_order: bool
) -> None:
    qt = w4(8, k, g, packing=PACKINGS[0] if k % 8 else GPTQ)
    if act_order:
        qt = to_gather(qt, torch.randperm(k, generator=torch.Generator().manual_seed(3)) // g, g)
    lt = layer(qt)
    cuts = list(itertools.pairwise(k * r // tp for r in range(tp + 1)))
    parts = [dense(slice_in(lt, a, b), b - a) for a, b in cuts]
    assert same_bits(torch.cat(parts, dim=1), dense(lt, k))
    if tp > 1:  # negative control: ranks in the wrong order
        assert not torch.equal(torch.cat(parts[::-1], dim=1), dense(lt, k))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("grain", [TENSOR, CHANNEL, group(32), block(128, 128), block(24, 32)])
def test_tensor_parallel_rows_join_to_the_whole(tp: int, grain: tuple[int, int]) -> None:
    qt = make(n=240, k=160, element=FP8, scales=(Scale(element="bf16", grain=grain),))
    lt = layer(qt)
    parts = [slice_out(lt, 240 * r // tp, 240 * (r + 1) // tp) for r in range(tp)]
    assert same_bits(torch.cat([dense(p) for p in parts]), dense(lt))
    assert torch.equal(torch.cat([p.bias for p in parts if p.bias is not None]), lt.bias)


def test_cut_at_a_group_boundary_keeps_spec_and_shares_memory() -> None:
    lt = layer(w4(8, 512, 128, packing=GPTQ))
    out = slice_in(lt, 256, 512)
    assert out.weight.spec == lt.weight.spec
    assert out.weight.codes.data_ptr() == lt.weight.codes[32:].data_ptr()


def test_cut_through_a_group_splits_it_when_wide_enough() -> None:
    lt = layer(w4(4, 231 * 128, 128))
    out = slice_in(lt, 14784, 29568).weight
    assert out.spec.scales[0].grain == (1, 64)
    assert out.gather is None
    assert out.zeros is not None
    assert out.zeros.shape == out.scales[0].shape == (4, 231)


def test_cut_through_a_group_pads_it_when_parts_would_be_narrow() -> None:
    lt = layer(w4(4, 4304, 32))
    out = slice_in(lt, 269, 538).weight
    assert out.spec.scales[0].grain == (1, 32)
    assert out.gather is not None
    assert out.shape == (4, 269 + 269 % 32)
    assert out.gather.tolist() == [-1] * (269 % 32) + list(range(269))


def test_cut_of_act_order_stores_few_padding_columns() -> None:
    k, g = 4096, 128
    order = torch.randperm(k, generator=torch.Generator().manual_seed(5)) // g
    lt = layer(to_gather(w4(2, k, g), order, g))
    out = slice_in(lt, 0, k // 8).weight
    assert out.spec.scales[0].grain[1] >= 16
    assert out.shape[1] < 2 * k // 8
    assert sorted(x for x in out.gather.tolist() if x >= 0) == list(range(k // 8))


def test_cut_without_stored_columns_is_all_padding() -> None:
    qt = make(
        n=2,
        k=8,
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(4)),),
        gather=True,
    )
    qt.gather[:] = torch.arange(8)
    out = slice_in(layer(qt), 8, 12)
    assert dense(out, 4).tolist() == [[0.0] * 4] * 2


# ------------------------------------------------------------------- activations, transforms


def test_slice_in_cuts_per_feature_input_scales_only() -> None:
    lt = layer(w4(4, 64, 32))
    lt.input_scale = torch.arange(64.0)
    assert slice_in(lt, 32, 64).input_scale.tolist() == list(range(32, 64))
    lt.input_scale = torch.ones(1)
    assert slice_in(lt, 32, 64).input_scale.tolist() == [1.0]
    assert slice_out(lt, 0, 2).input_scale.tolist() == [1.0]


def test_slice_out_cuts_combined_output_scales() -> None:
    lt = layer(w4(4, 64, 32))
    lt.out_scale = torch.arange(4.0)
    assert slice_out(lt, 1, 3).out_scale.tolist() == [1.0, 2.0]
    assert slice_in(lt, 0, 32).out_scale is lt.out_scale


def with_transform(
    tp: str, kind: str = "matrix", size: int = 16, site: str = "input"
) -> LayerTensors:
    lt = layer(w4(4, 64, 32))
    t = Transform(site=site, kind=kind, key="r4", block=size, tp=tp)  # type: ignore[arg-type]
    tensor = torch.arange(64.0) if kind == "scale" else torch.randn(64 // size, size, size)
    lt.transforms = ((t, (tensor,)),)
    return lt


def test_block_diagonal_transform_is_cut_between_blocks() -> None:
    lt = with_transform("block")
    ((_, (matrix,)),) = slice_in(lt, 32, 64).transforms
    assert torch.equal(matrix, lt.transforms[0][1][0][2:])


@pytest.mark.parametrize(
    ("tp", "start", "stop"), [("block", 0, 24), ("block", 8, 16), ("refuse", 0, 32)]
)
def test_cut_through_a_transform_raises_layout_error(tp: str, start: int, stop: int) -> None:
    with pytest.raises(LayoutError, match="r4") as err:
        slice_in(with_transform(tp), start, stop)
    assert err.value.code == "Q-LAYOUT-TP"
    assert err.value.actual == (start, stop)


def test_whole_cut_and_other_site_leave_transforms_alone() -> None:
    lt = with_transform("refuse")
    assert slice_in(lt, 0, 64).transforms == lt.transforms
    assert slice_out(lt, 0, 2).transforms[0][1][0] is lt.transforms[0][1][0]
    assert slice_in(with_transform("replicate"), 0, 32).transforms[0][0].key == "r4"


def test_scale_transform_is_sliced() -> None:
    ((_, (vector,)),) = slice_in(with_transform("refuse", "scale"), 16, 32).transforms
    assert vector.tolist() == list(range(16, 32))


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 2), (0, 65)])
def test_range_outside_the_axis_raises_layout_error(start: int, stop: int) -> None:
    lt = layer(w4(64, 64, 32))
    for cut in (slice_in, slice_out):
        with pytest.raises(LayoutError) as err:
            cut(lt, start, stop)
        assert err.value.code == "Q-LAYOUT-TP"
        assert err.value.actual == (start, stop)


def test_vector_codes_raise_layout_error() -> None:
    spec = QuantSpec(element=Element(name="e8p", bits=8, kind="vector", covers=(1, 8)))
    qt = QuantizedTensor(spec=spec, shape=(4, 64), codes=torch.zeros(4, 8, dtype=torch.uint8))
    for cut in (slice_in, slice_out):
        with pytest.raises(LayoutError, match="e8p") as err:
            cut(LayerTensors(operands={"weight": qt}), 0, 2)
        assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_attention_operands_raise_layout_error() -> None:
    lt = LayerTensors(operands={"k": w4(4, 64, 32)})
    with pytest.raises(LayoutError, match="operands"):
        slice_out(lt, 0, 2)


def opaque(monkeypatch: pytest.MonkeyPatch) -> LayerTensors:
    kind = BlockType(name="iq", weights=256, bytes=66, target="x:y")
    monkeypatch.setattr(Registry, "block_type", lambda self, name: kind)
    spec = QuantSpec(element=Element.uint(8), blocks="iq")
    codes = torch.randint(0, 256, (6, 4 * 66), dtype=torch.uint8)
    qt = QuantizedTensor(spec=spec, shape=(6, 1024), codes=codes)
    return LayerTensors(operands={"weight": qt})


def test_opaque_blocks_are_cut_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    lt = opaque(monkeypatch)
    part = slice_in(lt, 256, 768).weight
    assert part.shape == (6, 512)
    assert torch.equal(part.codes, lt.weight.codes[:, 66 : 3 * 66])
    rows = slice_out(lt, 2, 5).weight
    assert torch.equal(rows.codes, lt.weight.codes[2:5])


def test_cut_inside_an_opaque_block_names_sizes_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LayoutError) as err:
        slice_in(opaque(monkeypatch), 0, 128)
    assert err.value.code == "Q-LAYOUT-TP"
    assert err.value.expected == 256
    assert "[1, 2, 4]" in str(err.value)
