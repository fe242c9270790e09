"""All modules of a model, as torch itself lists them."""

from __future__ import annotations

from torch import nn

from quant_core.walk import modules_of, named_modules_of


def _model() -> nn.Module:
    shared = nn.Linear(1, 1)
    block = nn.Sequential(nn.ReLU(), shared)
    model = nn.Sequential(block, nn.ModuleList([shared, nn.Sequential(nn.Tanh(), block)]))
    model.register_module("gone", None)
    return model


def test_modules_are_those_of_torch_in_its_order() -> None:
    model = _model()
    assert modules_of(model) == list(model.modules())
    assert list(named_modules_of(model).items()) == list(model.named_modules())
    assert len(modules_of(model)) == 7, "what is in two places is there once"


def test_module_alone_is_all_there_is() -> None:
    leaf = nn.ReLU()
    assert named_modules_of(leaf) == {"": leaf}
