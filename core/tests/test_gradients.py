from __future__ import annotations

import pytest
import torch

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.kernels.choose import choose
from quant_core.nn import QuantGrouped, QuantLinear


def _bound(cls, lts, kind, **sizes):
    choice = choose(make_op(kind, lts[0], **sizes), toy.toy_registry())
    buffers = choice.kernel.allocate(choice.op)
    for e, lt in enumerate(lts):
        at = {"row": 0, "expert": e} if sizes else {"row": 0}
        choice.kernel.load_(buffers, choice.op, lt, at)
    return cls(choice, buffers)


@pytest.mark.parametrize("name", SPECS)
def test_gradient_of_the_input_is_that_of_the_dense_layer(name):
    lt = make_layer(SPECS[name], bias=True)
    module = _bound(QuantLinear, [lt], "linear")
    x = torch.randn(2, 5, 96, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    seed = torch.randn(2, 5, 40)
    (module(x) * seed).sum().backward()
    weight = dense_weight(lt.weight, 96)
    (torch.nn.functional.linear(twin, weight, lt.bias.float()) * seed).sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.allclose(x.grad, twin.grad, rtol=1e-5, atol=1e-4)  # sums of 40 products


def test_gradient_through_experts_follows_each_tokens_expert():
    lts = [make_layer(SPECS["uint4_code"], seed=s) for s in range(2)]
    module = _bound(QuantGrouped, lts, "grouped_linear", experts=2)
    x = torch.randn(3, 96, requires_grad=True)
    index = torch.tensor([1, 9, 0])
    module(x, index).sum().backward()
    assert torch.equal(x.grad[1], torch.zeros(96))
    for row, expert in ((0, 1), (2, 0)):
        want = dense_weight(lts[expert].weight, 96).sum(dim=0)
        assert torch.allclose(x.grad[row], want, rtol=1e-5, atol=1e-4)


def test_training_an_adapter_beside_a_packed_layer_lowers_its_loss():
    module = _bound(QuantLinear, [make_layer(SPECS["uint4_code"])], "linear")
    torch.manual_seed(0)
    down = torch.nn.Linear(96, 96, bias=False)
    torch.nn.init.zeros_(down.weight)
    x, want = torch.randn(64, 96), torch.randn(64, 40)
    optimizer = torch.optim.Adam(down.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (module(x + down(x)) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_gradients_nothing_is_recorded():
    module = _bound(QuantLinear, [make_layer(SPECS["uint4_code"])], "linear")
    with torch.no_grad():
        y = module(torch.randn(1, 96, requires_grad=True))
    assert not y.requires_grad


def test_compiled_forward_is_one_graph_also_where_gradients_are_on():
    module = _bound(QuantLinear, [make_layer(SPECS["uint4_code"])], "linear")
    x = torch.randn(2, 96, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x.detach()))
