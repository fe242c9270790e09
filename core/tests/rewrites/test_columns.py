"""Act-order and ragged groups: columns sorted by group hold the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.dequantize import dense_weight, unpack_codes
from quant_core.errors import LayoutError
from quant_core.numerics import decode_scale
from quant_core.packing import unpack
from quant_core.rewrites import drop_gather, from_gather, repack, to_gather
from quant_core.spec import CANONICAL, TENSOR, Element, Packing, QuantSpec, Scale, Zero, group
from quant_core.tensors import QuantizedTensor

from .strategies import PACKINGS, make, same_bits, snapshot, tensors, unchanged

SHARED = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"
GPTQ = Packing(word="int32", k_major=True)


def by_group(n: int, k: int, groups: int, g: int, packing: Packing = GPTQ) -> QuantizedTensor:
    """Codes [N, K] in input order whose scales and zeros have one column per group."""
    scales = (Scale(element="f16", grain=group(g)), Scale(element="f32", grain=TENSOR))
    zero = Zero(kind="code", element="uint4")
    plain = make(n=n, k=k, element=Element.uint(4), scales=scales, zero=zero, packing=packing)
    grid = make(n=n, k=groups * g, element=Element.uint(4), scales=scales, zero=zero)
    return replace(plain, scales=grid.scales, zeros=grid.zeros)


def reference(qt: QuantizedTensor, g_idx: torch.Tensor) -> torch.Tensor:
    """W[n, k] = (c - z[n, g_idx[k]]) * (s1 * s0[n, g_idx[k]]): the format's own formula."""
    assert qt.zeros is not None
    at = g_idx.long()
    s = decode_scale(qt.scales[1], "f32") * decode_scale(qt.scales[0], "f16")[:, at]
    return (unpack_codes(qt).float() - qt.zeros.float()[:, at]) * s


@settings(derandomize=True, max_examples=120, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 140),
    g=st.sampled_from([4, 16, 32]),
    groups=st.integers(1, 9),
    packing=st.sampled_from(PACKINGS),
    seed=st.integers(0, 99),
)
def test_to_gather_keeps_every_weight(
    n: int, k: int, g: int, groups: int, packing: Packing, seed: int
) -> None:
    g_idx = torch.randint(0, groups, (k,), generator=torch.Generator().manual_seed(seed))
    qt = by_group(n, k, groups, g, packing)
    before = snapshot(qt)
    out = to_gather(qt, g_idx, g)
    assert same_bits(dense_weight(out, k), reference(qt, g_idx))
    back, g_back = from_gather(out, k)
    assert same_bits(reference(back, g_back), reference(qt, g_idx))
    assert torch.equal(unpack_codes(back), unpack_codes(qt))
    assert unchanged(qt, before)


@pytest.mark.parametrize("k", [256, 240])
def test_from_gather_inverts_full_groups_byte_for_byte(k: int) -> None:
    g_idx = torch.randperm(k, generator=torch.Generator().manual_seed(1)) // 32
    qt = by_group(5, k, -(-k // 32), 32)
    back, g_back = from_gather(to_gather(qt, g_idx, 32), k)
    assert torch.equal(g_back.long(), g_idx)
    for name, tensor in qt.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert back.spec == qt.spec
    assert back.packing == qt.packing


def test_sort_is_stable_and_short_groups_are_filled_up() -> None:
    qt = by_group(1, 7, 3, 4)
    out = to_gather(qt, torch.tensor([1, 0, 1, 0, 1, 2, 2]), 4)
    assert out.gather.tolist() == [1, 3, -1, -1, 0, 2, 4, -1, 5, 6]
    assert out.shape == (1, 10)
    padding = unpack_codes(out)[0, out.gather < 0]
    assert padding.tolist() == [0, 0, 0]
    assert out.scales[0].shape == (1, 3)


def test_oversized_group_is_split_and_repeats_its_scales() -> None:
    qt = by_group(2, 6, 2, 4)
    out = to_gather(qt, torch.tensor([0, 0, 0, 0, 0, 1]), 4)
    assert out.gather.tolist() == [0, 1, 2, 3, 4, -1, -1, -1, 5]
    assert torch.equal(out.scales[0], qt.scales[0][:, [0, 0, 1]])


def test_group_without_columns_keeps_its_scales() -> None:
    qt = by_group(2, 8, 3, 4)
    g_idx = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    back, g_back = from_gather(to_gather(qt, g_idx, 4), 8)
    assert torch.equal(g_back.long(), g_idx)
    assert torch.equal(back.scales[0], qt.scales[0])


def test_plain_order_drops_to_no_gather() -> None:
    qt = by_group(4, 70, 3, 32)
    out = drop_gather(to_gather(qt, torch.arange(70) // 32, 32))
    assert out.gather is None
    assert out.spec == qt.spec
    assert out.shape == (4, 70)
    for name, tensor in qt.tensors().items():
        assert torch.equal(out.tensors()[name], tensor), name


def test_scattered_order_keeps_its_gather() -> None:
    out = to_gather(by_group(4, 64, 2, 32), torch.arange(64) % 2, 32)
    assert drop_gather(out) is out


def test_drop_gather_cuts_padding_at_the_end() -> None:
    qt = make(
        n=2,
        k=8,
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(4)),),
        gather=True,
        experts=2,
    )
    qt.gather[:] = torch.tensor([0, 1, 2, 3, 4, -1, -1, -1])
    out = drop_gather(qt)
    assert out.gather is None
    assert out.shape == (2, 2, 5)
    assert same_bits(dense_weight(out), dense_weight(qt, 5))


@pytest.mark.parametrize(
    "g_idx", [torch.tensor([0, 0, 2, 1]), torch.tensor([0, -1, 0, 1]), torch.tensor([0, 1])]
)
def test_group_index_out_of_range_raises_layout_error(g_idx: torch.Tensor) -> None:
    with pytest.raises(LayoutError, match="g_idx") as err:
        to_gather(by_group(2, 4, 2, 2), g_idx, 2)
    assert err.value.code == "Q-LAYOUT-GROUP"


def test_levels_of_several_grains_raise_layout_error() -> None:
    qt = make(
        n=2,
        k=64,
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(16)), Scale(element="f32", grain=group(32))),
    )
    with pytest.raises(LayoutError) as err:
        to_gather(qt, torch.arange(64) // 16, 16)
    assert err.value.code == "Q-LAYOUT-GROUP"
    assert err.value.actual == [(1, 32)]


def test_second_gather_and_missing_features_raise_layout_error() -> None:
    out = to_gather(by_group(2, 8, 2, 4), torch.arange(8) % 2, 4)
    with pytest.raises(LayoutError) as err:
        to_gather(out, torch.arange(8) % 2, 4)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    with pytest.raises(LayoutError) as err:
        from_gather(out, 9)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    assert err.value.expected == 9


def test_opaque_blocks_have_no_column_order() -> None:
    spec = QuantSpec(element=Element.uint(8), blocks="iq")
    qt = QuantizedTensor(spec=spec, shape=(1, 256), codes=torch.zeros(1, 66, dtype=torch.uint8))
    with pytest.raises(LayoutError) as err:
        to_gather(qt, torch.zeros(256, dtype=torch.int32), 256)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    with pytest.raises(LayoutError) as err:
        repack(qt, GPTQ)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(qt=tensors(), packing=st.sampled_from(PACKINGS))
def test_repack_keeps_every_code_and_returns(qt: QuantizedTensor, packing: Packing) -> None:
    out = repack(qt, packing)
    assert out.packing == packing
    assert torch.equal(unpack_codes(out), unpack_codes(qt))
    assert torch.equal(repack(out, qt.packing).codes, qt.codes)
    assert repack(out, packing) is out


@pytest.mark.shared
def test_real_act_order_weight_equals_the_producers() -> None:
    if not SHARED.is_dir():
        pytest.skip("the full set of checkpoints is not beside the repository")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = SHARED / "gptqmodel-4bit-g32-descact-sym"
    stored = safetensors.load_file(folder / "model.safetensors")
    expected = safetensors.load_file(folder / "expected.safetensors")
    name = "model.layers.1.mlp.down_proj"
    (weight,) = [v for k, v in expected.items() if k.startswith("weight." + name)]
    qweight, g_idx = stored[name + ".qweight"], stored[name + ".g_idx"]
    k, n = 8 * qweight.shape[0], qweight.shape[1]
    assert not torch.equal(g_idx.long(), torch.arange(k) // 32)  # act-order for real
    qt = QuantizedTensor(
        spec=QuantSpec(
            element=Element.uint(4),
            scales=(Scale(element="f16", grain=group(32)),),
            zero=Zero(kind="const", value=8),
        ),
        shape=(n, k),
        codes=qweight,
        packing=GPTQ,
        scales=(stored[name + ".scales"].t(),),
    )
    out = to_gather(qt, g_idx, 32)
    assert torch.equal(dense_weight(out, k)[: weight.shape[0]], weight)
    back, g_back = from_gather(out, k)
    assert torch.equal(back.codes, qweight)
    assert torch.equal(g_back, g_idx)
    assert torch.equal(unpack(back.codes, 4, (n, k), GPTQ), unpack_codes(repack(qt, CANONICAL)))
    assert not torch.equal(qt.dequantize()[: weight.shape[0]], weight)  # g_idx matters
