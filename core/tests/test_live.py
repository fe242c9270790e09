"""Weights in memory quantized and bound: the same values as the plugins' own rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import toy
from quant_core.errors import ConfigError, LayoutError, PluginError
from quant_core.kernels.warmup import warmup
from quant_core.live import linear_of, quantize_matrix, quantize_model_
from quant_core.nn import QuantLinear
from quant_core.online import OnlineScheme


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 64), nn.Linear(64, 128, bias=False)
        self.lm_head = nn.Linear(128, 32)

    def forward(self, x):
        return self.lm_head(self.down(torch.relu(self.up(x))))


def test_layer_multiplies_by_the_quantized_weight():
    torch.manual_seed(0)
    w, b, x = torch.randn(64, 128), torch.randn(64), torch.randn(5, 128)
    layer = linear_of("int4", w, b, options={"group_size": 32})
    dense = layer.restore().dequantize()
    step = (w.view(64, 4, 32).abs().amax(-1) / 7).repeat_interleave(32, 1)
    assert ((dense - w).abs() <= step * 0.6).all()  # half a step, and the scale's own rounding
    assert torch.allclose(layer(x), x @ dense.t() + b, rtol=1e-4, atol=1e-4)


def test_model_is_quantized_in_place_except_what_is_skipped():
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(3, 128)
    before = net(x)
    assert quantize_model_(net, "int8", options={"activations": False}) == ("up", "down")
    assert isinstance(net.up, QuantLinear)
    assert isinstance(net.lm_head, nn.Linear)
    error = (net(x) - before).norm() / before.norm()
    assert 1e-4 < error < 2e-2
    assert quantize_model_(Net(), "int8", skip=["up", "!lm_head"]) == ("down", "lm_head")


def test_matrix_that_a_scheme_cannot_hold_is_an_error():
    with pytest.raises(LayoutError) as e:
        quantize_matrix("int4", torch.randn(8, 100), options={"group_size": 32})
    assert e.value.code == "Q-LAYOUT-REPRESENT"
    with pytest.raises(ConfigError, match="nothing_known"):
        quantize_matrix("nothing_known", torch.randn(8, 128))


def test_option_that_the_scheme_does_not_have_is_named():
    with pytest.raises(ConfigError, match="'nothing' is no option of 'int4'") as e:
        quantize_matrix("int4", torch.randn(8, 128), options={"nothing": 1})
    assert e.value.code == "Q-CFG-KEY"


def _offering(make):
    offer = OnlineScheme(summary="", make=make)
    return toy.toy_registry(toy.toy_module(online_schemes=lambda: {"toy": offer}))


def _raise(*args):
    raise KeyError("inside")


@pytest.mark.parametrize(
    ("make", "quantize", "told"),
    [
        (_raise, None, "make of an online scheme raised KeyError: 'inside'"),
        (lambda *a: None, None, "make of an online scheme returned None, expected a Scheme of"),
        (lambda *a: torch.ones(4, 8), None, "make of an online scheme returned tensor"),
        (None, _raise, "quantize of scheme 'w8a16' (toy) raised KeyError: 'inside'"),
        (None, lambda *a: 3, "quantize of scheme 'w8a16' (toy) returned 3, expected LayerTensors"),
    ],
)
def test_online_scheme_that_fails_is_named_with_its_layer(make, quantize, told, monkeypatch):
    good = toy.ToyScheme(name="w8a16", shape=(4, 8), operands={"weight": toy.SPEC})
    if quantize is not None:
        monkeypatch.setattr(toy.ToyScheme, "quantize", quantize)
    registry = _offering(make or (lambda *a: good))
    with pytest.raises(PluginError) as e:
        quantize_matrix("toy", torch.ones(4, 8), name="m.up", registry=registry)
    assert (e.value.code, e.value.plugin, e.value.tensor) == ("Q-PLUGIN-RESULT", "toy", "m.up")
    assert told in str(e.value)
    assert isinstance(e.value.__cause__, KeyError) == (_raise in (make, quantize))


def test_nan_weight_is_refused():
    w = torch.randn(8, 128)
    w[3, 5] = float("nan")
    with pytest.raises(LayoutError) as e:
        linear_of("int8", w)
    assert e.value.code == "Q-VALUE-WEIGHT"


def test_warmup_runs_each_distinct_operation_once():
    net = nn.Sequential(*(linear_of("int8", torch.randn(32, 32), name=str(i)) for i in range(3)))
    net.append(linear_of("int8", torch.randn(64, 32)))
    calls = []
    for i, layer in enumerate(net):
        layer.register_forward_hook(lambda m, a, y, i=i: calls.append((i, a[0].shape[0])))
    done = warmup(net, rows=(1, 5), most=4)
    assert [w.module for w in done] == ["0", "3"]
    assert calls == [(0, 1), (3, 1)]
    assert all(w.rows == (1,) and w.seconds >= 0 for w in done)
