from __future__ import annotations

import pytest
import torch
from torch import nn

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.dense import DenseGrouped, dequantize_
from quant_core.kernels.choose import choose
from quant_core.nn import QuantComposite, QuantEmbedding, QuantGrouped, QuantLinear


def _bound(cls, lt, kind="linear", **sizes):
    choice = choose(make_op(kind, lt, **sizes), toy.toy_registry())
    buffers = choice.kernel.allocate(choice.op)
    at = [{"row": 0, "expert": e} for e in range(sizes["experts"])] if sizes else [{"row": 0}]
    for where in at:
        choice.kernel.load_(buffers, choice.op, lt, where)
    return cls(choice, buffers)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layer_computes_the_same(name, bias):
    model = nn.ModuleDict({"a": _bound(QuantLinear, make_layer(SPECS[name], bias=bias))})
    x = torch.randn(3, 96)
    want = model["a"](x)
    dequantize_(model, torch.float32)
    assert type(model["a"]) is nn.Linear
    assert torch.allclose(model["a"](x), want, rtol=1e-5, atol=1e-4)  # float32 sums of 96 products


def test_tied_head_stays_tied_to_the_dense_table():
    table = _bound(QuantEmbedding, make_layer(SPECS["uint4_code"]), "embedding")
    model = nn.ModuleDict({"embed": table, "head": QuantLinear.tied(table)})
    dequantize_(model)
    assert model["head"].weight is model["embed"].weight
    assert model["embed"].weight.dtype == torch.bfloat16


def test_composite_and_experts_become_dense():
    parts = [_bound(QuantLinear, make_layer(SPECS[n])) for n in ("uint4_code", "int8_channel")]
    stack = _bound(QuantGrouped, make_layer(SPECS["uint4_code"]), "grouped_linear", experts=2)
    model = nn.ModuleDict({"c": QuantComposite(parts, "unlike"), "e": stack})
    x, index = torch.randn(4, 96), torch.tensor([0, 1, 7, 1])
    want = model["c"](x), model["e"](x, index)
    dequantize_(model, torch.float32)
    assert type(model["c"]) is nn.Linear
    assert isinstance(model["e"], DenseGrouped)
    assert torch.allclose(model["c"](x), want[0], rtol=1e-5, atol=1e-4)
    assert torch.allclose(model["e"](x, index), want[1], rtol=1e-5, atol=1e-4)
