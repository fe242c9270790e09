"""What schemes give back is checked where they are asked; hooks are in test_registry.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import toy
from quant_core.answers import ask_scheme
from quant_core.cli.verify import verify
from quant_core.errors import LayoutError, PluginError
from quant_core.load import read_matrix
from quant_core.plan import Plan, plan
from quant_core.registry import load_registry


@pytest.fixture
def made() -> Plan:
    checkpoint = toy.toy_checkpoint({"m": toy.toy_layer(4, 8)})
    return plan(checkpoint, registry=load_registry([toy.candidate(toy.toy_module())]))


def _raise(*args):
    raise KeyError("inside")


@pytest.mark.parametrize("answer", [_raise, lambda *a: None, lambda *a: 3, lambda *a: {"a": 1}])
@pytest.mark.parametrize("method", ["params", "canonicalize"])
def test_scheme_that_fails_is_named_with_its_layer(method, answer, made, monkeypatch):
    monkeypatch.setattr(toy.ToyScheme, method, answer)
    with pytest.raises(PluginError, match=rf"^m: {method} of scheme ") as e:
        read_matrix(plan(made.checkpoint, registry=made.registry), made.members["m"])
    assert (e.value.code, e.value.plugin, e.value.tensor) == ("Q-PLUGIN-RESULT", "toy", "m")
    assert isinstance(e.value.__cause__, KeyError) == (answer is _raise)


@pytest.mark.parametrize("answer", [_raise, lambda *a: None, lambda *a: [1]])
def test_serialize_that_fails_is_named_with_its_layer(answer, made, monkeypatch):
    member = made.members["m"]
    lt = read_matrix(made, member)
    assert ask_scheme(member.scheme, "serialize", member.layer, lt).keys() == {"q", "s"}
    monkeypatch.setattr(toy.ToyScheme, "serialize", answer)
    with pytest.raises(PluginError, match=r"^m: serialize of scheme "):
        ask_scheme(member.scheme, "serialize", member.layer, lt)


@pytest.mark.parametrize(
    "error",
    [LayoutError("m: said", code="Q-LAYOUT-SHAPE"), MemoryError("none left"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_considered_errors_and_lack_of_memory_are_nobodys_bug(error, made, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(toy.ToyScheme, "canonicalize", fail)
    with pytest.raises(type(error)) as e:
        read_matrix(made, made.members["m"])
    assert e.value is error


def _short_codes(qt):
    return replace(qt, codes=qt.codes[:-1])


def _wide_codes(qt):
    return replace(qt, codes=qt.codes.to(torch.int32))


def _short_scales(qt):
    return replace(qt, scales=(qt.scales[0][:-1],))


def _no_scales(qt):
    return replace(qt, scales=())


@pytest.mark.parametrize("spoil", [_short_codes, _wide_codes, _short_scales, _no_scales])
def test_verify_finds_tensors_that_do_not_fit_each_other(spoil, made, monkeypatch):
    assert verify(made)["problems"] == []
    canonicalize = toy.ToyScheme.canonicalize

    def spoilt(self, layer, tensors):
        lt = canonicalize(self, layer, tensors)
        return replace(lt, operands={"weight": spoil(lt.operands["weight"])})

    monkeypatch.setattr(toy.ToyScheme, "canonicalize", spoilt)
    (found, *_) = verify(plan(made.checkpoint, registry=made.registry))["problems"]
    assert (found["where"], found["code"]) == ("m", "Q-PLUGIN-RESULT")
