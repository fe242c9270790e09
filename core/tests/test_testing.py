"""The checks that plugins' tests use: they pass what is right and name what is not."""

from __future__ import annotations

import pytest
import torch

import toy
from quant_core import testing
from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.reference import ReferenceKernel

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


@pytest.fixture
def made(monkeypatch):
    """(checkpoint, weights by the format's definition)."""
    layers = {NAMES[0]: toy.toy_layer(8, 16), NAMES[1]: toy.toy_layer(16, 8, bias=False, seed=1)}
    checkpoint = toy.toy_checkpoint(layers)
    monkeypatch.setattr(testing, "open_checkpoint", lambda path: checkpoint)
    return checkpoint, {n: t["q"].float() * t["s"].float()[:, None] for n, t in layers.items()}


def _check(weights, *, scheme=None, monkeypatch=None):
    if scheme is not None:
        monkeypatch.setattr(toy.ToyScheme, scheme[0], scheme[1])
    return testing.check_format("memory", weights, registry=toy.toy_registry())


def test_a_right_format_passes(made):
    assert _check(made[1]) == 2


def test_weights_that_differ_lack_or_are_too_many_are_named(made):
    _, weights = made
    wrong = weights[NAMES[1]].clone()
    wrong[3, 2] += 0.5
    with pytest.raises(AssertionError, match=r"down_proj: a weight is 0\.5 off, expected 0"):
        _check(weights | {NAMES[1]: wrong})
    with pytest.raises(AssertionError, match="up_proj: expected among the weights"):
        _check({NAMES[1]: weights[NAMES[1]]})
    with pytest.raises(AssertionError, match="other: expected among the weights"):
        _check(weights | {"other": wrong})
    with pytest.raises(AssertionError, match=r"up_proj: the weights given are \[1, 16, 8\]"):
        _check(weights | {NAMES[0]: weights[NAMES[1]]})


def test_a_scheme_that_loses_or_changes_what_is_stored_is_named(made, monkeypatch):
    own = toy.ToyScheme.serialize
    rounded = lambda self, layer, lt: own(self, layer, lt) | {"s": torch.ones(self.shape[0])}  # noqa: E731
    with pytest.raises(AssertionError, match="serialize gives another 's' than is stored"):
        _check(made[1], scheme=("serialize", rounded), monkeypatch=monkeypatch)
    read = toy.ToyScheme.canonicalize

    def edits(self, layer, tensors):
        lt = read(self, layer, {n: t.clone() for n, t in tensors.items()})
        tensors["s"].zero_()
        return lt

    monkeypatch.setattr(toy.ToyScheme, "serialize", own)
    with pytest.raises(AssertionError, match="changed the stored tensors"):
        _check(made[1], scheme=("canonicalize", edits), monkeypatch=monkeypatch)


class Mine(ReferenceKernel):
    """The reference under another name, broken in one way; at module level, so that it pickles."""

    name = "mine"

    def __init__(self, fault=""):
        self.fault = fault

    def accepts(self, op):
        if self.fault == "rejects":
            return Rejected(axis="op", have=op.op, need="something else")
        return Accepted(cost=1.0)

    def restore(self, buffers, op):
        lt = super().restore(buffers, op)
        if self.fault == "restore":
            lt.weight.scales[0].mul_(2)
        return lt

    def bind(self, op):
        run = super().bind(op)
        return (lambda *a: run(*a)) if self.fault == "pickle" else Run(run, self.fault)


class Run:
    def __init__(self, run, fault):
        self.run, self.fault = run, fault

    def __call__(self, values, x):
        if self.fault == "raises":
            raise ZeroDivisionError("inside")
        if self.fault == "input":
            x.mul_(0.5)
        y = self.run(values, x)
        if self.fault == "weights":
            values[0].zero_()
        if self.fault == "dtype":
            return y.double()
        return y * 1.001 if self.fault == "off" else y


def _kernel(fault=""):
    pack = toy.toy_module("mypack", apply=lambda op: [Mine(fault)] if op.op == "linear" else [])
    return testing.check_kernel("mine", "memory", registry=toy.toy_registry(toy.toy_module(), pack))


def test_a_right_kernel_passes(made):
    assert _kernel() == {}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("off", "1 rows are 0.001 off the reference"),
        ("dtype", r"gives \[1, 8\] torch.float64"),
        ("weights", "a call changed its input or its weights"),
        ("input", "a call changed its input or its weights|off the reference"),
        ("restore", "restore gives other weights than were loaded"),
        ("rejects", "mine accepts no layer of memory"),
    ],
)
def test_a_kernel_that_is_wrong_is_named_with_its_layer(made, fault, said):
    with pytest.raises(AssertionError, match=said) as e:
        _kernel(fault)
    assert NAMES[0] in str(e.value)


def test_a_run_that_does_not_pickle_fails(made):
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        _kernel("pickle")


def test_a_kernel_that_raises_shows_its_own_error(made):
    with pytest.raises((ZeroDivisionError, KernelError), match="inside"):
        _kernel("raises")
