"""Random layers against packers that set one code at a time; zeros per dialect; what must fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import made_autoround as made
from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantWarning
from quant_core.packing import repack
from quant_core.spec import CANONICAL, LayerDesc, Transform
from quant_core.tensors import LayerTensors
from quant_plugin_autoround.scheme import AutoRoundScheme, build_scheme

LAYER = LayerDesc(kind="linear", name="proj", stored="proj")


def scheme(n: int = 32, k: int = 64, **changes: Any) -> AutoRoundScheme:
    kind: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "dialect": "minus_one"}
    return build_scheme(shape=(n, k), source="config.json", **(kind | changes))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    dialect=st.sampled_from(list(made.FORMATS)),
    sym=st.booleans(),
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 4)),
    group_size=st.sampled_from([16, 32, 48, 128, -1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_random_layers_read_exactly_and_come_back(
    bits: int,
    dialect: str,
    sym: bool,
    blocks: tuple[int, int],
    group_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    n, k = 32 * blocks[0], 32 * blocks[1]
    group_size = group_size if group_size <= k else -1
    kind: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "dialect": dialect}
    tensors, expected = made.layer(n, k, dtype=dtype, seed=seed, bias=sym, **kind)
    made_scheme = scheme(n, k, scale_dtype=str(dtype)[6:], **kind)
    lt = made_scheme.canonicalize(LAYER, tensors)
    assert torch.equal(lt.dequantize(), expected)
    assert lt.weight.codes is tensors["qweight"]  # stored words untouched
    back = made_scheme.serialize(LAYER, lt)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_last_short_group_is_read_without_padding() -> None:
    for dialect in made.FORMATS:
        kind: dict[str, Any] = {"group_size": 64, "sym": False, "dialect": dialect}
        tensors, expected = made.layer(32, 96, **kind)
        lt = scheme(32, 96, **kind).canonicalize(LAYER, tensors)
        assert lt.weight.scales[0].shape == (32, 2)
        assert torch.equal(lt.dequantize(), expected)


def test_plain_g_idx_is_dropped_and_written_again() -> None:
    tensors, expected = made.layer(32, 64, g_idx=True, sym=False, dialect="raw")
    made_scheme = scheme(sym=False, dialect="raw", has_g_idx=True)
    lt = made_scheme.canonicalize(LAYER, tensors)
    assert lt.weight.gather is None
    assert torch.equal(lt.dequantize(), expected)
    assert torch.equal(made_scheme.serialize(LAYER, lt)["g_idx"], tensors["g_idx"])


def test_g_idx_out_of_order_raises_and_is_named() -> None:
    tensors, _ = made.layer(32, 64, g_idx=True)
    tensors["g_idx"][5] = 1
    with pytest.raises(LayoutError, match="column 5 in group 1") as err:
        scheme(has_g_idx=True).canonicalize(LAYER, tensors)
    assert (err.value.code, err.value.tensor) == ("Q-VALUE-GIDX", "proj.g_idx")


# ------------------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_zero_of_zero_wraps_in_its_own_field(bits: int) -> None:
    """The tool stores (0 - 1) mod 2^b; without the mask the zero would read as 2^b."""
    kind: dict[str, Any] = {"bits": bits, "sym": False}
    tensors, _ = made.layer(32, 64, **kind)
    zeros = torch.arange(64).view(2, 32) % (1 << bits)
    zeros[0, 0] = 0
    tensors["qzeros"] = made.stored_zeros(zeros, bits, "minus_one")
    lt = scheme(**kind).canonicalize(LAYER, tensors)
    assert lt.weight.zeros is not None
    assert torch.equal(lt.weight.zeros.t().long(), zeros)
    unmasked = made.stored_zeros(zeros, bits, "raw")
    assert not torch.equal(tensors["qzeros"], unmasked)
    assert torch.equal(scheme(**kind).serialize(LAYER, lt)["qzeros"], tensors["qzeros"])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("stored", "read"), [("minus_one", "raw"), ("raw", "minus_one")])
def test_asymmetric_layer_read_in_the_other_dialect_is_off_by_one_step(
    bits: int, stored: str, read: str
) -> None:
    kind: dict[str, Any] = {"bits": bits, "sym": False}
    tensors, expected = made.layer(32, 64, dialect=stored, **kind)
    w = scheme(dialect=read, **kind).canonicalize(LAYER, tensors).dequantize()
    steps = (w - expected).abs() / tensors["scales"].float().t().repeat_interleave(32, 1)
    assert float(steps.min()) > 0.9  # every weight, not only some


def test_interleaved_words_read_along_n_in_natural_order_miss_the_weights() -> None:
    tensors, expected = made.layer(32, 64, dialect="interleaved")
    lt = scheme(dialect="interleaved").canonicalize(LAYER, tensors)
    natural = replace(lt.weight, packing=replace(lt.weight.packing, order=None))
    assert not torch.equal(natural.dequantize(), expected)


@pytest.mark.parametrize(("stored", "read"), [("minus_one", "raw"), ("raw", "minus_one")])
def test_symmetric_file_of_the_other_dialect_is_read_by_its_values(stored: str, read: str) -> None:
    tensors, expected = made.layer(32, 64, dialect=stored)
    with pytest.warns(QuantWarning, match="read by the values"):
        lt = scheme(dialect=read).canonicalize(LAYER, tensors)
    assert torch.equal(lt.dequantize(), expected)


def test_symmetric_file_without_a_stated_layout_is_read_silently(
    recwarn: pytest.WarningsRecorder,
) -> None:
    tensors, expected = made.layer(32, 64, dialect="raw")
    lt = scheme(stated=False).canonicalize(LAYER, tensors)
    assert torch.equal(lt.dequantize(), expected)
    assert not recwarn.list


@pytest.mark.parametrize("dialect", made.FORMATS)
def test_zeros_that_contradict_sym_raise(dialect: str) -> None:
    tensors, _ = made.layer(32, 64, sym=False, dialect=dialect)
    with pytest.raises(ConfigError, match="Set sym to false") as err:
        scheme(dialect=dialect).canonicalize(LAYER, tensors)
    assert (err.value.code, err.value.tensor) == ("Q-CFG-CONFLICT", "proj.qzeros")
    assert (err.value.path, err.value.plugin) == ("config.json", "autoround")


# ----------------------------------------------------------------------------------- what must fail


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("qweight", lambda t: t.t().contiguous(), "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: t.to(torch.int64), "Q-LAYOUT-DTYPE"),
        ("scales", lambda t: t[:, :1], "Q-LAYOUT-SHAPE"),
        ("scales", lambda t: t.to(torch.int32), "Q-LAYOUT-DTYPE"),
        ("qzeros", lambda t: t.flatten(), "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: None, "Q-TENSOR-MISSING"),
        ("qzeros", lambda t: None, "Q-TENSOR-MISSING"),
        ("scales", lambda t: None, "Q-TENSOR-MISSING"),
    ],
)
def test_wrong_or_missing_tensor_raises_and_is_named(name: str, change: Any, code: str) -> None:
    tensors, _ = made.layer(32, 64)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    with pytest.raises((LayoutError, CheckpointError)) as err:
        scheme().canonicalize(LAYER, tensors)
    assert (err.value.code, err.value.tensor) == (code, f"proj.{name}")


def test_other_packings_are_written_in_the_stored_order() -> None:
    for dialect in made.FORMATS:
        tensors, _ = made.layer(32, 64, dialect=dialect)
        made_scheme = scheme(dialect=dialect)
        lt = made_scheme.canonicalize(LAYER, tensors)
        qt = lt.weight
        codes = repack(qt.codes, 4, (32, 64), qt.packing, CANONICAL)
        lt.operands["weight"] = replace(qt, codes=codes, packing=CANONICAL)
        back = made_scheme.serialize(LAYER, lt)
        assert all(torch.equal(back[n], t) for n, t in tensors.items())


def test_constant_zero_is_written_as_the_zeros_of_an_asymmetric_layer() -> None:
    for dialect in made.FORMATS:
        tensors, _ = made.layer(32, 64, dialect=dialect)
        lt = scheme(dialect=dialect).canonicalize(LAYER, tensors)
        asym = scheme(dialect=dialect, sym=False)
        assert torch.equal(asym.serialize(LAYER, lt)["qzeros"], tensors["qzeros"])


def _with_transform(lt: LayerTensors) -> None:
    lt.transforms = ((Transform(site="input", kind="scale", key="a"), ()),)


def _with_gather(lt: LayerTensors) -> None:
    gather = torch.arange(64, dtype=torch.int32).flip(0)
    lt.operands["weight"] = replace(lt.weight, gather=gather)


def _with_zeros(lt: LayerTensors) -> None:
    zero = replace(lt.weight.spec.zero, value=7)  # type: ignore[type-var]
    lt.operands["weight"] = replace(lt.weight, spec=replace(lt.weight.spec, zero=zero))


@pytest.mark.parametrize(
    ("change", "found"),
    [(_with_transform, "transforms"), (_with_gather, "column order"), (_with_zeros, "zero points")],
)
def test_what_autoround_cannot_hold_is_refused(change: Any, found: str) -> None:
    tensors, _ = made.layer(32, 64)
    lt = scheme().canonicalize(LAYER, tensors)
    change(lt)
    with pytest.raises(LayoutError, match=f"{found}.*cannot be stored as AutoRound") as err:
        scheme().serialize(LAYER, lt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_inputs_are_not_changed() -> None:
    tensors, _ = made.layer(32, 64, sym=False, g_idx=True)
    before = {n: t.clone() for n, t in tensors.items()}
    scheme(sym=False, has_g_idx=True).canonicalize(LAYER, tensors)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
