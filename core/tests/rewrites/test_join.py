"""Joined, padded and fused members dequantize to their parts side by side, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.dequantize import dense_weight, dequantize
from quant_core.errors import LayoutError
from quant_core.fuse import Composite, distinct_inputs, fuse
from quant_core.numerics import decode_scale
from quant_core.rewrites import concat_out, pad_out, repack, slice_out, to_gather
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
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
    AWQ,
    FP4,
    FP8,
    NF4,
    PACKINGS,
    layer,
    make,
    same_bits,
    snapshot,
    tensors,
    unchanged,
)


def nvfp4(n: int, seed: int, scale: float | None = None, inverse: bool = True) -> LayerTensors:
    qt = make(
        n=n,
        k=64,
        element=FP4,
        scales=(
            Scale(element="fp8_e4m3", grain=group(16)),
            Scale(element="f32", grain=TENSOR, inverse=inverse),
        ),
        seed=seed,
    )
    if scale is not None:
        qt = replace(qt, scales=(qt.scales[0], torch.full((1, 1), scale)))
    return layer(qt, seed=seed)


def w4(n: int, *, k: int = 64, seed: int = 0, **kw: object) -> LayerTensors:
    qt = make(
        n=n,
        k=k,
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(32)),),
        zero=Zero(kind="code", element="uint4"),
        seed=seed,
        **kw,  # type: ignore[arg-type]
    )
    return layer(qt, seed=seed)


def dense(lt: LayerTensors) -> torch.Tensor:
    return dequantize(lt.weight)


# ------------------------------------------------------------------------------- concat_out


@settings(derandomize=True, max_examples=150, deadline=None)
@given(qt=tensors(n=st.integers(3, 40)), data=st.data())
def test_parts_of_a_tensor_join_to_the_whole(qt: QuantizedTensor, data: st.DataObject) -> None:
    n = qt.shape[-2]
    a = data.draw(st.integers(1, n - 2))
    b = data.draw(st.integers(a + 1, n - 1))
    cuts = ((0, a), (a, b), (b, n))
    lt = layer(qt)
    parts = [slice_out(lt, x, y) for x, y in cuts]
    before = [snapshot(p.weight) for p in parts]
    out = concat_out(parts)
    assert same_bits(dense(out), dense(lt))
    assert torch.equal(out.bias, lt.bias)
    assert torch.equal(out.acc_bias, lt.acc_bias)
    assert out.weight.shape == qt.shape
    assert all(unchanged(p.weight, s) for p, s in zip(parts, before))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    qt=tensors(experts=False, gather=False),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    data=st.data(),
)
def test_members_of_one_spec_join_whatever_their_scales(
    qt: QuantizedTensor, sizes: list[int], data: st.DataObject
) -> None:
    kind = {"k": qt.shape[1], "element": qt.spec.element, "scales": qt.spec.scales}
    packings = [*PACKINGS, AWQ] if qt.spec.element.bits == 4 else PACKINGS
    members = [layer(qt)] + [
        layer(
            make(
                n=n,
                zero=qt.spec.zero,
                packing=data.draw(st.sampled_from(packings)),
                seed=i,
                **kind,  # type: ignore[arg-type]
            )
        )
        for i, n in enumerate(sizes)
    ]
    out = concat_out(members)
    assert same_bits(dense(out), torch.cat([dense(m) for m in members]))


def test_unequal_global_scales_widen_and_are_never_refolded() -> None:
    members = [nvfp4(8, 0, 6272.0), nvfp4(24, 1, 5120.0), nvfp4(16, 2, 0.5)]
    out = concat_out(members)
    assert out.weight.spec.scales[1].grain == CHANNEL
    assert out.weight.scales[1].flatten().tolist() == [6272.0] * 8 + [5120.0] * 24 + [0.5] * 16
    fine = torch.cat([m.weight.scales[0] for m in members])
    assert torch.equal(out.weight.scales[0], fine)  # the stored bytes
    assert same_bits(dense(out), torch.cat([dense(m) for m in members]))


def test_equal_global_scales_stay_one_value() -> None:
    out = concat_out([nvfp4(8, 0, 6272.0), nvfp4(24, 1, 6272.0)])
    assert out.weight.spec.scales[1].grain == TENSOR
    assert out.weight.scales[1].tolist() == [[6272.0]]


def test_blocks_cut_by_a_seam_get_a_finer_grain() -> None:
    # DeepSeek kv_a_proj: 160 rows under 128 x 128 blocks, then a member of 256 rows
    members = [
        layer(make(n=n, k=256, element=FP8, scales=(Scale(element="f32", grain=block(128, 128)),)))
        for n in (160, 256)
    ]
    out = concat_out(members)
    assert out.weight.spec.scales[0].grain == (32, 128)
    assert same_bits(dense(out), torch.cat([dense(m) for m in members]))


def test_unlike_row_grains_meet_on_the_common_grid() -> None:
    grains = [block(128, 128), block(64, 128), TENSOR]
    members = [
        layer(make(n=n, k=256, element=FP8, scales=(Scale(element="f32", grain=(g[0], 128)),)))
        for n, g in zip((256, 64, 100), grains)
    ]
    out = concat_out(members)
    assert out.weight.spec.scales[0].grain == (64, 128)
    assert same_bits(dense(out), torch.cat([dense(m) for m in members]))


def test_word_aligned_members_join_on_words() -> None:
    members = [w4(16, seed=i, packing=AWQ) for i in range(2)]
    out = concat_out(members).weight
    assert out.packing == AWQ
    assert torch.equal(out.codes, torch.cat([m.weight.codes for m in members], dim=1))


def test_unlike_packings_become_canonical() -> None:
    a, b = w4(16, seed=1), w4(16, seed=2)
    b = replace(b, operands={"weight": repack(b.weight, AWQ)})
    out = concat_out([a, b])
    assert out.weight.packing == CANONICAL
    assert same_bits(dense(out), torch.cat([dense(a), dense(b)]))


def test_missing_bias_counts_as_zeros() -> None:
    a, b = w4(4, seed=1), replace(w4(6, seed=2), bias=None, acc_bias=None)
    out = concat_out([a, b])
    assert torch.equal(out.bias, torch.cat([a.bias, torch.zeros(6)]))
    assert out.acc_bias.dtype == torch.int32
    assert concat_out([b, b]).bias is None


def test_scalar_output_scales_become_one_per_row() -> None:
    a, b = w4(2), w4(3)
    a.out_scale, b.out_scale = torch.tensor([2.0]), torch.arange(3.0)
    assert concat_out([a, b]).out_scale.tolist() == [2, 2, 0, 1, 2]


def rotated(lt: LayerTensors, key: str = "r1", value: float = 1.0) -> LayerTensors:
    t = Transform(site="input", kind="scale", key=key)
    return replace(lt, transforms=((t, (torch.full((64,), value),)),))


UNLIKE = {
    "specs": lambda: (w4(4), nvfp4(4, 0)),
    "shapes": lambda: (w4(4), w4(4, k=96)),
    "gather": lambda: (w4(4, gather=True, seed=1), w4(4, gather=True, seed=2)),
    "input scales": lambda: (w4(4), replace(w4(4), input_scale=torch.ones(1))),
    "input transforms": lambda: (rotated(w4(4)), rotated(w4(4), value=2.0)),
    "dtypes of bias": lambda: (w4(4), replace(w4(4), bias=torch.ones(4, dtype=torch.float16))),
    "output scales": lambda: (w4(4), replace(w4(4), out_scale=torch.ones(4))),
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_unlike_members_raise_layout_error_naming_the_reason(reason: str) -> None:
    members = UNLIKE[reason]()
    with pytest.raises(LayoutError, match=reason) as err:
        concat_out(members)
    assert err.value.code == "Q-LAYOUT-FUSED"
    composite = fuse(members)
    assert isinstance(composite, Composite)
    assert reason in composite.reason


def test_unlike_codebooks_raise_layout_error() -> None:
    qt = make(n=2, k=8, element=NF4, scales=(Scale(element="f32", grain=group(8)),))
    other = replace(qt, codebook=(qt.codebook[0] * 2,))
    with pytest.raises(LayoutError, match="codebooks"):
        concat_out([layer(qt), layer(other)])


# ---------------------------------------------------------------------------------- pad_out


@settings(derandomize=True, max_examples=150, deadline=None)
@given(qt=tensors(), rows=st.integers(1, 40))
def test_padded_rows_are_zero_and_the_others_unchanged(qt: QuantizedTensor, rows: int) -> None:
    n = qt.shape[-2]
    lt, before = layer(qt), snapshot(qt)
    out = pad_out(lt, n + rows)
    w = dense(out)
    assert w.shape == (*qt.shape[:-2], n + rows, qt.shape[-1])
    assert same_bits(w[..., :n, :], dense(lt))
    assert not w[..., n:, :].any()
    assert torch.equal(out.bias[..., :n], lt.bias)
    assert not out.bias[..., n:].any()
    assert not out.acc_bias[..., n:].any()
    assert unchanged(qt, before)


def test_pad_to_the_same_size_is_the_same_layer() -> None:
    lt = w4(4)
    assert pad_out(lt, 4) is lt


def test_pad_to_fewer_rows_raises_layout_error() -> None:
    with pytest.raises(LayoutError) as err:
        pad_out(w4(4), 3)
    assert err.value.code == "Q-LAYOUT-TP"


def test_codebook_without_zero_cannot_be_padded() -> None:
    qt = make(n=2, k=8, element=NF4, scales=(Scale(element="f32", grain=group(8)),))
    qt = replace(qt, codebook=(qt.codebook[0] + 0.01,))
    with pytest.raises(LayoutError) as err:
        pad_out(layer(qt), 4)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


@pytest.mark.parametrize("zero_bytes_are_zero", [True, False])
def test_opaque_blocks_pad_only_if_zero_bytes_are_zero_weights(
    monkeypatch: pytest.MonkeyPatch, zero_bytes_are_zero: bool
) -> None:
    def reference(blocks: torch.Tensor, k: int) -> torch.Tensor:
        rows = blocks.float().sum(1, keepdim=True).expand(-1, k)
        return rows if zero_bytes_are_zero else rows + 1

    monkeypatch.setattr("quant_core.dequantize.block_reference", lambda name: reference)
    spec = QuantSpec(element=Element.uint(8), blocks="iq")
    qt = QuantizedTensor(spec=spec, shape=(2, 256), codes=torch.ones(2, 66, dtype=torch.uint8))
    lt = LayerTensors(operands={"weight": qt})
    if zero_bytes_are_zero:
        assert not dense(pad_out(lt, 5))[2:].any()
    else:
        with pytest.raises(LayoutError) as err:
            pad_out(lt, 5)
        assert err.value.code == "Q-LAYOUT-REPRESENT"


# ------------------------------------------------------------------------------------- fuse


def test_equal_members_fuse_to_one_layer() -> None:
    members = [w4(n, seed=n) for n in (16, 8, 8)]
    out = fuse(members)
    assert isinstance(out, LayerTensors)
    assert same_bits(dense(out), torch.cat([dense(m) for m in members]))


def test_neighbours_that_agree_are_one_part() -> None:
    q, k, v = w4(16, seed=1), w4(8, seed=2), nvfp4(8, 3)
    out = fuse([q, k, v])
    assert isinstance(out, Composite)
    assert [start for start, _ in out.parts] == [0, 24]
    assert out.out_features == 32
    assert same_bits(dense(out.parts[0][1]), torch.cat([dense(q), dense(k)]))
    assert out.parts[1][1] is v
    assert out.reason == (
        "members 1 and 2 have unlike specs 'uint4 group(32):f16 code-zero' and "
        "'fp4_e2m1 group(16):fp8_e4m3 tensor:f32/inv'"
    )
    assert out.distinct_inputs == 1


def test_members_apart_keep_their_order() -> None:
    out = fuse([w4(16), nvfp4(8, 1), w4(4)])
    assert isinstance(out, Composite)
    assert [start for start, _ in out.parts] == [0, 16, 24]
    assert out.reason.count("unlike specs") == 2


def test_static_input_scales_count_as_distinct_inputs() -> None:
    members = [
        replace(nvfp4(8, i, 2.0), input_scale=torch.tensor([s]))
        for i, s in enumerate((1.0, 2.0, 1.0))
    ]
    out = fuse(members)
    assert isinstance(out, Composite)
    assert out.inputs == (0, 1, 0)
    assert out.distinct_inputs == 2
    same = [replace(m, input_scale=torch.tensor([1.0])) for m in members]
    assert isinstance(fuse(same), LayerTensors)


def test_input_specs_keep_members_apart() -> None:
    a8 = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))
    members = [w4(8, seed=1), w4(8, seed=2)]
    assert isinstance(fuse(members, [a8, a8]), LayerTensors)
    out = fuse(members, [a8, None])
    assert isinstance(out, Composite)
    assert "input specs" in out.reason
    assert out.distinct_inputs == 2
    assert distinct_inputs(members, [None, None]) == (0, 0)


def test_transforms_decide_on_shared_inputs() -> None:
    assert distinct_inputs([rotated(w4(4)), rotated(w4(4)), w4(4)]) == (0, 0, 1)
    assert distinct_inputs([rotated(w4(4)), rotated(w4(4), value=3.0)]) == (0, 1)


def test_equal_act_orders_fuse() -> None:
    g_idx = torch.randperm(64, generator=torch.Generator().manual_seed(2)) // 32
    members = []
    for i in range(2):
        qt = w4(8, seed=i).weight
        members.append(LayerTensors(operands={"weight": to_gather(qt, g_idx, 32)}))
    out = fuse(members)
    assert isinstance(out, LayerTensors)
    expected = torch.cat([dense_weight(m.weight) for m in members])
    assert same_bits(dense_weight(out.weight), expected)


@pytest.mark.parametrize("inputs", [(), (None,)])
def test_no_members_raise_layout_error(inputs: tuple[None, ...]) -> None:
    with pytest.raises(LayoutError) as err:
        fuse([], inputs)
    assert err.value.code == "Q-LAYOUT-FUSED"


def test_negative_control_refolded_scales_change_weights() -> None:
    a, b = nvfp4(8, 0, 6272.0).weight, nvfp4(8, 1, 5121.5).weight
    ratio = a.scales[1] / b.scales[1]
    refolded = (decode_scale(b.scales[0], "fp8_e4m3") * ratio).to(torch.float8_e4m3fn)
    folded = replace(b, scales=(refolded.view(torch.uint8), a.scales[1]))
    assert not torch.equal(dequantize(folded), dequantize(b))
