"""Random layers against packers that set one code at a time; order, zeros and what must fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import made_gptq as made
from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantWarning
from quant_core.intspec import weight_spec
from quant_core.numerics import decode_scale
from quant_core.packing import repack, unpack
from quant_core.spec import CANONICAL, LayerDesc, Transform
from quant_core.tensors import LayerTensors
from quant_plugin_gptq.scheme import GptqScheme

LAYER = LayerDesc(kind="linear", name="proj", stored="proj")
SCALE = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def scheme(n: int, k: int, *, bits: int = 4, group_size: int = 32, **changes: Any) -> GptqScheme:
    fields: dict[str, Any] = {"sym": True, "v1": True, "desc_act": None} | changes
    size = k if group_size == -1 else group_size
    dtype = fields.setdefault("scale_dtype", "float16")
    spec = weight_spec(
        bits, k, size, sym=fields["sym"] is not False, scale_dtype=dtype, gather=False
    )
    return GptqScheme(
        name=f"w{bits}a16",
        shape=(n, k),
        operands={"weight": spec},
        bits=bits,
        group_size=size,
        **fields,
    )


def check(made_scheme: GptqScheme, tensors: dict[str, Tensor], expected: Tensor) -> LayerTensors:
    """Weight equal, and the same bytes back."""
    lt = made_scheme.canonicalize(LAYER, tensors)
    assert torch.equal(lt.dequantize(), expected)
    back = made_scheme.serialize(LAYER, lt)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    return lt


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    dialect=st.sampled_from([(True, False), (False, False), (False, True)]),
    sym=st.booleans(),
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 4)),
    group_size=st.sampled_from([16, 32, 48, 128, -1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_random_layers_read_exactly_and_come_back(
    bits: int,
    dialect: tuple[bool, bool],
    sym: bool,
    blocks: tuple[int, int],
    group_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    (v1, planar), (n, k) = dialect, (32 * blocks[0], 32 * blocks[1])
    group_size = group_size if group_size <= k else -1
    kind: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "v1": v1,
        "planar": planar,
    }
    tensors, expected = made.layer(n, k, dtype=dtype, seed=seed, **kind)
    lt = check(scheme(n, k, scale_dtype=str(dtype)[6:], **kind), tensors, expected)
    assert lt.weight.codes is tensors["qweight"]  # columns in order: stored words untouched
    assert not lt.weight.spec.gather


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    planar=st.booleans(),
    groups=st.lists(st.integers(0, 4), min_size=64, max_size=64),
    seed=st.integers(0, 1000),
)
def test_any_group_map_reads_exactly_and_comes_back(
    bits: int, planar: bool, groups: list[int], seed: int
) -> None:
    k, g_idx = 64, torch.tensor(groups, dtype=torch.int32)
    _, g_idx = torch.unique(g_idx, return_inverse=True)  # every group has a column
    count = int(g_idx.max()) + 1
    size = -(-k // count)  # over-full and short groups
    assert -(-k // size) == count
    kind: dict[str, Any] = {
        "bits": bits,
        "group_size": size,
        "sym": False,
        "v1": not planar,
        "planar": planar,
    }
    tensors, expected = made.layer(32, k, g_idx=g_idx.to(torch.int32), seed=seed, **kind)
    check(scheme(32, k, desc_act=True, **kind), tensors, expected)


def test_act_order_sorts_columns_stably_without_padding() -> None:
    g_idx = torch.arange(63, -1, -1, dtype=torch.int32) % 2
    tensors, expected = made.layer(32, 64, g_idx=g_idx, sym=False)
    lt = check(scheme(32, 64, sym=False, desc_act=True), tensors, expected)
    assert lt.weight.gather is not None
    assert lt.weight.gather.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]
    assert lt.weight.gather.dtype == torch.int32
    assert lt.weight.spec.gather


def test_overfull_group_is_split_and_short_group_padded() -> None:
    g_idx = torch.tensor([0] * 40 + [1] * 24, dtype=torch.int32)
    tensors, expected = made.layer(32, 64, g_idx=g_idx, sym=False)
    lt = check(scheme(32, 64, sym=False, desc_act=True), tensors, expected)
    gather = lt.weight.gather
    assert gather is not None
    assert gather.shape == (96,)
    assert int((gather == -1).sum()) == 32
    codes = unpack(lt.weight.codes, 4, (32, 96), lt.weight.packing)
    assert int(codes[:, gather == -1].sum()) == 0
    scales = lt.weight.scales[0]
    assert scales.shape == (32, 3)
    assert torch.equal(scales[:, 0], scales[:, 1])


def test_split_group_among_groups_of_equal_scales_comes_back() -> None:
    g_idx = torch.tensor([1] * 40 + [2] * 24 + [0] * 32, dtype=torch.int32)
    tensors, _ = made.layer(32, 96, g_idx=g_idx)
    tensors["scales"] = torch.full((3, 32), 0.5, dtype=torch.float16)
    made_scheme = scheme(32, 96, desc_act=True)
    back = made_scheme.serialize(LAYER, made_scheme.canonicalize(LAYER, tensors))
    assert torch.equal(back["g_idx"], g_idx)


def test_last_short_group_is_read_without_padding() -> None:
    tensors, expected = made.layer(32, 96, group_size=64, sym=False)
    lt = check(scheme(32, 96, group_size=64, sym=False), tensors, expected)
    assert lt.weight.gather is None
    assert lt.weight.scales[0].shape == (32, 2)


@pytest.mark.parametrize("has_g_idx", [True, False])
def test_g_idx_is_written_only_if_it_was_stored(has_g_idx: bool) -> None:
    tensors, expected = made.layer(32, 64)
    if not has_g_idx:
        del tensors["g_idx"]
    check(scheme(32, 64, has_g_idx=has_g_idx), tensors, expected)


def test_negative_scales_and_bias_are_kept() -> None:
    tensors, expected = made.layer(32, 64, bias=True)
    tensors["scales"] = -tensors["scales"]
    lt = check(scheme(32, 64), tensors, -expected)
    assert lt.bias is not None
    assert torch.equal(lt.bias, tensors["bias"])


def test_symmetric_layer_has_a_constant_zero_and_one_group_is_per_channel() -> None:
    tensors, expected = made.layer(32, 64, group_size=-1)
    lt = check(scheme(32, 64, group_size=-1), tensors, expected)
    assert lt.weight.spec.label == "uint4 channel:f16 zero=8"
    assert lt.weight.zeros is None


@pytest.mark.parametrize(
    ("value", "found"),
    [(-1, "index 5: -1"), (2, "index 5: 2"), (0, "column 5 in group 0")],
)
def test_bad_g_idx_raises(value: int, found: str) -> None:
    index = torch.arange(64, dtype=torch.int32) // 32
    index[:32] = 1 - index[:32]  # column 5 is in group 1, so 0 is k // 32 only when ordered
    index[5] = value
    tensors, _ = made.layer(32, 64)
    tensors["g_idx"] = index if value else (torch.arange(64, dtype=torch.int32) // 32)
    if not value:
        tensors["g_idx"][5], tensors["g_idx"][40] = 1, 0
        found = "column 5 in group 1"
    with pytest.raises(LayoutError, match=found) as err:
        scheme(32, 64, desc_act=False).canonicalize(LAYER, tensors)
    assert err.value.code == "Q-VALUE-GIDX"
    assert err.value.tensor == "proj.g_idx"


def test_group_without_a_column_raises() -> None:
    tensors, _ = made.layer(32, 64)
    tensors["g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(LayoutError, match="1 groups without a column") as err:
        scheme(32, 64, desc_act=True).canonicalize(LAYER, tensors)
    assert err.value.code == "Q-VALUE-GIDX"


@pytest.mark.parametrize("v1", [True, False])
def test_symmetric_file_with_the_wrong_flag_is_read_by_its_values(v1: bool) -> None:
    tensors, expected = made.layer(32, 64, v1=not v1)
    with pytest.warns(QuantWarning, match="read by the values"):
        lt = scheme(32, 64, v1=v1).canonicalize(LAYER, tensors)
    assert torch.equal(lt.dequantize(), expected)


def test_asymmetric_file_read_with_the_wrong_flag_has_another_weight() -> None:
    tensors, expected = made.layer(32, 64, sym=False, v1=False)
    wrong = scheme(32, 64, sym=False, v1=True).canonicalize(LAYER, tensors).dequantize()
    assert not torch.equal(wrong, expected)


@pytest.mark.parametrize(("sym", "fix"), [(True, "Set sym to false"), (None, "quantize_config")])
def test_zeros_that_contradict_sym_raise(sym: bool | None, fix: str) -> None:
    tensors, _ = made.layer(32, 64, sym=False)
    with pytest.raises(ConfigError, match=fix) as err:
        scheme(32, 64, sym=sym, source="config.json").canonicalize(LAYER, tensors)
    assert err.value.code == "Q-CFG-CONFLICT"
    assert (err.value.tensor, err.value.expected) == ("proj.qzeros", 8)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("qweight", lambda t: t.t().contiguous(), "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: t.to(torch.int64), "Q-LAYOUT-DTYPE"),
        ("scales", lambda t: t[:, :1], "Q-LAYOUT-SHAPE"),
        ("scales", lambda t: t.to(torch.int32), "Q-LAYOUT-DTYPE"),
        ("qzeros", lambda t: t.flatten(), "Q-LAYOUT-SHAPE"),
        ("g_idx", lambda t: t[:-1], "Q-LAYOUT-SHAPE"),
    ],
)
def test_wrong_shape_or_dtype_raises_and_names_the_tensor(
    name: str, change: Any, code: str
) -> None:
    tensors, _ = made.layer(32, 64)
    tensors[name] = change(tensors[name])
    with pytest.raises(LayoutError) as err:
        scheme(32, 64).canonicalize(LAYER, tensors)
    assert (err.value.code, err.value.tensor) == (code, f"proj.{name}")


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_tensor_raises_and_is_named(name: str) -> None:
    tensors, _ = made.layer(32, 64)
    del tensors[name]
    with pytest.raises(CheckpointError) as err:
        scheme(32, 64, desc_act=True).canonicalize(LAYER, tensors)
    assert (err.value.code, err.value.tensor) == ("Q-TENSOR-MISSING", f"proj.{name}")


def test_other_packings_are_written_in_the_stored_order() -> None:
    g_idx = torch.arange(64, dtype=torch.int32) % 2
    for index in (None, g_idx):
        tensors, _ = made.layer(32, 64, g_idx=index)
        made_scheme = scheme(32, 64, desc_act=True)
        lt = made_scheme.canonicalize(LAYER, tensors)
        qt = lt.weight
        codes = repack(qt.codes, 4, (32, 64), qt.packing, CANONICAL)
        lt.operands["weight"] = replace(qt, codes=codes, packing=CANONICAL)
        back = made_scheme.serialize(LAYER, lt)
        assert all(torch.equal(back[n], t) for n, t in tensors.items())


def _with_transform(lt: LayerTensors) -> None:
    lt.transforms = ((Transform(site="input", kind="scale", key="a"), ()),)


def _with_scale_element(lt: LayerTensors) -> None:
    qt = lt.weight
    level = replace(qt.spec.scales[0], element="fp8_e4m3")
    lt.operands["weight"] = replace(qt, spec=replace(qt.spec, scales=(level,)))


def _with_zeros(lt: LayerTensors) -> None:
    zero = replace(lt.weight.spec.zero, value=7)  # type: ignore[type-var]
    lt.operands["weight"] = replace(lt.weight, spec=replace(lt.weight.spec, zero=zero))


def _without_a_feature(lt: LayerTensors) -> None:
    gather = torch.arange(64, dtype=torch.int32)
    gather[3] = -1
    lt.operands["weight"] = replace(lt.weight, gather=gather)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_with_transform, "transforms"),
        (_with_scale_element, "fp8_e4m3"),
        (_with_zeros, "zero points"),
        (_without_a_feature, "63 columns"),
    ],
)
def test_what_gptq_cannot_hold_is_refused(change: Any, found: str) -> None:
    tensors, _ = made.layer(32, 64)
    lt = scheme(32, 64).canonicalize(LAYER, tensors)
    change(lt)
    with pytest.raises(LayoutError, match=found) as err:
        scheme(32, 64).serialize(LAYER, lt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_inputs_are_not_changed() -> None:
    g_idx = torch.arange(64, dtype=torch.int32) % 2
    tensors, _ = made.layer(32, 64, g_idx=g_idx, sym=False)
    before = {n: t.clone() for n, t in tensors.items()}
    scheme(32, 64, sym=False, desc_act=True).canonicalize(LAYER, tensors)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


def test_scale_elements_follow_the_stored_dtype() -> None:
    for element, dtype in SCALE.items():
        tensors, _ = made.layer(32, 64, dtype=getattr(torch, dtype))
        qt = scheme(32, 64, scale_dtype=dtype).canonicalize(LAYER, tensors).weight
        assert qt.spec.scales[0].element == element
        assert torch.equal(decode_scale(qt.scales[0], element), tensors["scales"].float().t())
