"""What keeps scales of keys and values from going into another format, reason by reason."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quant_core.convert.cache import cache_label, check_cache, fit_cache
from quant_core.errors import LayoutError
from quant_core.kv_cache import CacheForm, CacheScheme, CacheTensor
from quant_core.spec import TENSOR, Element, LayerDesc, QuantSpec, Scale, Zero

LAYER = LayerDesc(kind="attention", name="m.attn", stored="m.attn")
FORM = CacheForm(
    names={"k": "k_scale", "v": "v_scale", "k_zero": "k_zp", "v_zero": "v_zp"},
    elements=("fp8_e4m3",),
    shape=(1,),
    default=True,
)


def scheme(element="fp8_e4m3", grain=TENSOR, zero="", roles="kv", site="cache") -> CacheScheme:
    kind = Element(name=element, bits=8, kind="int" if element == "int8" else "float")
    spec = QuantSpec(
        element=kind,
        scales=(Scale(element="f32", grain=grain),),
        zero=Zero(kind="code", element="int8") if zero else None,
    )
    shape = () if grain == TENSOR else (8,)
    tensors = [
        CacheTensor(role=r, what=w, stored=f"old.{r}_{w}", shape=shape, dtype=t)
        for r in roles
        for w, t in (("scale", "float32"), ("zero", zero))
        if t
    ]
    return CacheScheme(
        name="kv", shape=(0, 0), operands=dict.fromkeys(roles, spec), tensors=tuple(tensors),
        site=site, default=False, plugin="old",
    )  # fmt: skip


def fitted(source: CacheScheme, form: CacheForm | None = FORM, allow_inexact: bool = False):
    registry = SimpleNamespace(call_one=lambda plugin, hook: form)
    return fit_cache(registry, "new", LAYER, source, allow_inexact)


def test_names_and_shapes_become_the_targets_and_values_stay():
    found, losses = fitted(scheme())
    assert losses == ()
    assert found is not None
    assert [(t.stored, t.shape, t.dtype) for t in found.tensors] == [
        ("m.attn.k_scale", (1,), "float32"),
        ("m.attn.v_scale", (1,), "float32"),
    ]
    assert (found.plugin, found.default, found.site) == ("new", True, "cache")
    stored = {t.name: torch.tensor([0.1 + i]) for i, t in enumerate(found.tensors)}
    lt = found.canonicalize(LAYER, stored)
    back = found.serialize(LAYER, lt)
    assert all(torch.equal(back[n], v) for n, v in stored.items())
    other = found.canonicalize(LAYER, stored | {"v_scale": torch.tensor([0.2])})
    assert check_cache(lt, lt)
    assert not check_cache(lt, other)


@pytest.mark.parametrize(
    ("source", "form", "reason"),
    [
        (scheme("int8"), FORM, "int8 codes, expected fp8_e4m3 codes in 'new'"),
        (scheme(grain=(0, 1)), FORM, "scales per feature, expected one scale per tensor"),
        (scheme(), replace(FORM, grain=(0, 1)), "one scale per tensor, expected scales per feat"),
        (scheme(zero="int8"), FORM, "zero points of int8, expected no zero points"),
        (scheme(zero="float32"), replace(FORM, zeros=("int8",)), "expected int8 zero points"),
        (scheme(roles="kvq"), FORM, "scales of 'q', expected scales of k, v in 'new'"),
        (scheme(roles="k"), FORM, "no scales of v, expected scales of keys and values both"),
        (scheme(), None, "expected no scales of keys and values in 'new'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_or_left_behind(source, form, reason):
    with pytest.raises(LayoutError, match=r"m\.attn: keys and values") as err:
        fitted(source, form)
    assert reason in str(err.value)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    left = ("keys and values are no longer quantized",)
    assert fitted(source, form, allow_inexact=True) == (None, left)


def test_zero_points_go_along_where_the_target_has_them():
    found, losses = fitted(scheme(zero="int8"), replace(FORM, zeros=("int8",)))
    assert losses == ()
    assert found is not None
    assert {t.stored for t in found.tensors if t.what == "zero"} == {"m.attn.k_zp", "m.attn.v_zp"}


def test_another_place_of_rounding_keys_is_a_loss():
    source = scheme(site="projection")
    with pytest.raises(LayoutError, match="quantized before the rotary embedding, expected after"):
        fitted(source)
    found, losses = fitted(source, allow_inexact=True)
    assert found is not None
    assert (found.site, losses) == ("cache", ("keys quantized after the rotary embedding",))
    both = replace(FORM, sites=("projection", "cache"))
    assert [fitted(scheme(site=s), both)[0].site for s in both.sites] == list(both.sites)


def test_label_names_queries_only_where_they_are():
    assert cache_label(scheme()) == "keys and values fp8_e4m3 tensor:f32"
    assert cache_label(scheme(roles="qkv")).startswith("queries, keys and values")
