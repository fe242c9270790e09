"""Round trips, padding, symmetric zeros and what a layout refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.errors import CheckpointError, ConfigError, LayoutError
from quant_core.packing import repack
from quant_core.spec import CANONICAL, Element, LayerDesc, QuantSpec, Scale, Zero, group
from quant_plugin_awq.layout import pack_tiles, unpack_tiles
from quant_plugin_awq.scheme import build_scheme

LAYER = LayerDesc(kind="linear", name="l", stored="l")


def _random(shape, dtype, rng):
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=rng) + 0.1).to(dtype)
    return torch.randint(-(2**15), 2**15, shape, generator=rng).to(dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(["gemm", "gemv", "gemv_fast", "llm-awq"]),
    n=st.integers(1, 4).map(lambda v: 8 * v),
    groups=st.integers(1, 5),
    g=st.sampled_from([64, 128]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_random_words_come_back_through_stored_and_canonical_packing(
    layout, n, groups, g, dtype, seed
):
    rng = torch.Generator().manual_seed(seed)
    k = groups * g
    zeros = "scaled_zeros" if layout == "llm-awq" else "qzeros"
    scheme = build_scheme(
        layout=layout, shape=(n, k), bits=4, group_size=g, scale_dtype=dtype, zeros=zeros
    )
    stored = {
        p.name: _random(p.shape, getattr(torch, p.dtypes[0]), rng)
        for p in scheme.params(LAYER)
        if p.need == "required"
    }
    if layout == "gemv":
        stored["qzeros"][:, -(-groups // 8) :] = 0
        stored["qzeros"][:, groups // 8] &= (1 << (4 * (groups % 8))) - 1
        stored["scales"][:, groups:] = 0
    elif layout != "gemm":
        stored["scales"][groups:] = 0
        stored[zeros][groups:] = 0
    lt = scheme.canonicalize(LAYER, stored)
    restored = replace(lt.weight, packing=CANONICAL)
    restored.codes = repack(lt.weight.codes, 4, (n, k), lt.weight.packing, CANONICAL)
    for weight in (lt.weight, restored):
        back = scheme.serialize(LAYER, replace(lt, operands={"weight": weight}))
        assert all(torch.equal(back[name], t) for name, t in stored.items())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(quads=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_tiles_round_trip_both_ways(quads, blocks, seed):
    rng = torch.Generator().manual_seed(seed)
    words = _random((quads, 64 * blocks), torch.int16, rng)
    assert torch.equal(pack_tiles(unpack_tiles(words)), words)


def test_tiles_in_small_row_blocks_equal_one_block(monkeypatch):
    words = _random((6, 128), torch.int16, torch.Generator().manual_seed(1))
    whole = unpack_tiles(words)
    monkeypatch.setattr("quant_plugin_awq.layout._ROW_CODES", 4 * 128 * 4)
    assert torch.equal(unpack_tiles(words), whole)
    assert torch.equal(pack_tiles(whole), words)


def test_tiles_of_a_non_contiguous_view_equal_those_of_a_copy():
    wide = _random((4, 256), torch.int16, torch.Generator().manual_seed(2))
    view = wide[::2, 64:192]
    assert torch.equal(unpack_tiles(view), unpack_tiles(view.contiguous()))


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast"])
@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_values_in_padding_raise_layout_group(ref, linear, layout, leaf):
    stored = ref.stored_layer(layout, *ref.random_layer(8, 256, 128), 128)
    at = (slice(None), -1) if layout == "gemv" else (-1, slice(None))
    stored[leaf][at] = 1 << 28 if stored[leaf].dtype == torch.int32 else 1  # the last nibble
    scheme = build_scheme(layout=layout, shape=(8, 256), bits=4, group_size=128)
    with pytest.raises(LayoutError, match=f"up_proj.{leaf}.*expected 2") as err:
        scheme.canonicalize(linear(), stored)
    assert err.value.code == "Q-LAYOUT-GROUP"


def test_padded_scales_made_with_a_larger_group_raise_layout_group(ref, linear):
    """Widths of group sizes 128 and 256 are equal, so only the values can tell."""
    stored = ref.stored_layer("gemv", *ref.random_layer(8, 512, 256), 256)
    scheme = build_scheme(layout="gemv", shape=(8, 512), bits=4, group_size=128)
    with pytest.raises(LayoutError, match="smaller than the one") as err:
        scheme.canonicalize(linear(), stored)
    assert err.value.code == "Q-LAYOUT-GROUP"


def test_zero_point_false_without_stored_zeros_is_constant_8(ref, linear):
    codes, _, scales = ref.random_layer(8, 64, 32)
    stored = ref.stored_layer("gemm", codes, torch.full((8, 2), 8), scales, 32)
    del stored["qzeros"]
    scheme = build_scheme(
        layout="gemm", shape=(8, 64), bits=4, group_size=32, zeros="", zero_point=False
    )
    assert scheme.weight.zero == Zero(kind="const", value=8)
    lt = scheme.canonicalize(linear(), stored)
    expected = (codes.float() - 8) * scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(lt.dequantize(), expected)
    assert scheme.serialize(linear(), lt).keys() == stored.keys()


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast"])
def test_zero_point_false_with_stored_zeros_of_8_is_read_and_others_conflict(ref, linear, layout):
    codes, zeros, scales = ref.random_layer(8, 256, 128)
    scheme = build_scheme(layout=layout, shape=(8, 256), bits=4, group_size=128, zero_point=False)
    stored = ref.stored_layer(layout, codes, torch.full_like(zeros, 8), scales, 128)
    lt = scheme.canonicalize(linear(), stored)
    expected = (codes.float() - 8) * scales.float().repeat_interleave(128, dim=1)
    assert torch.equal(lt.dequantize(), expected)  # c*s - 8*s is exact in float32
    back = scheme.serialize(linear(), lt)
    assert all(torch.equal(back[name], t) for name, t in stored.items())
    with pytest.raises(ConfigError, match="zero_point false") as err:
        scheme.canonicalize(linear(), ref.stored_layer(layout, codes, zeros, scales, 128))
    assert err.value.code == "Q-CFG-CONFLICT"


def test_constant_zero_is_written_as_stored_zeros(ref, linear):
    codes, zeros, scales = ref.random_layer(8, 64, 32)
    stored = ref.stored_layer("gemm", codes, torch.full_like(zeros, 8), scales, 32)
    made = {
        zero_name: build_scheme(
            layout="gemm", shape=(8, 64), bits=4, group_size=32, zeros=zero_name, zero_point=False
        )
        for zero_name in ("", "qzeros")
    }
    lt = made[""].canonicalize(linear(), {k: v for k, v in stored.items() if k != "qzeros"})
    back = made["qzeros"].serialize(linear(), lt)
    assert torch.equal(back["qzeros"], stored["qzeros"])


@pytest.mark.parametrize(
    "change",
    [
        {"gather": torch.arange(64, dtype=torch.int32)},
        {
            "spec": QuantSpec(
                element=Element.uint(4),
                scales=(Scale(element="f16", grain=group(16)),),
                zero=Zero(kind="code", element="uint4"),
            )
        },
        {
            "spec": QuantSpec(
                element=Element.uint(4), scales=(Scale(element="f16", grain=group(32)),)
            )
        },
    ],
    ids=["gather", "other-group", "no-zero"],
)
def test_serialize_of_what_awq_cannot_hold_raises_represent(ref, linear, change):
    stored = ref.stored_layer("gemm", *ref.random_layer(8, 64, 32), 32)
    scheme = build_scheme(layout="gemm", shape=(8, 64), bits=4, group_size=32)
    lt = scheme.canonicalize(linear(), stored)
    lt.operands["weight"] = replace(lt.weight, **change)
    with pytest.raises(LayoutError) as err:
        scheme.serialize(linear(), lt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


@pytest.mark.parametrize(
    ("leaf", "change", "code"),
    [
        ("qweight", lambda t: t[:-1], "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: t.long(), "Q-LAYOUT-DTYPE"),
        ("scales", lambda t: t[0], "Q-LAYOUT-SHAPE"),
        ("scales", lambda t: t.int(), "Q-LAYOUT-DTYPE"),
        ("qzeros", lambda t: None, "Q-TENSOR-MISSING"),
    ],
)
def test_canonicalize_wrong_tensor_raises_and_names_it(ref, linear, leaf, change, code):
    stored = ref.stored_layer("gemm", *ref.random_layer(8, 64, 32), 32)
    changed = change(stored.pop(leaf))
    if changed is not None:
        stored[leaf] = changed
    scheme = build_scheme(layout="gemm", shape=(8, 64), bits=4, group_size=32)
    with pytest.raises((LayoutError, CheckpointError), match=f"up_proj.{leaf}") as err:
        scheme.canonicalize(linear(), stored)
    assert err.value.code == code
