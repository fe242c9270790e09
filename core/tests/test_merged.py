"""Traced calls of one input become one call, and only those."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from quant_core.kernels.merged import merge_calls, parts

K = 8
_lib = torch.library.Library("merged_test", "DEF")


def _single(x, tensors, layout):
    """y = x W^T + b, the layout naming nothing but the number of rows."""
    assert tensors[0].shape[0] == int(layout)
    return (x.double() @ tensors[0].T.double() + tensors[1]).float()


def _shared(x, tensors, layouts):
    ys = [_single(x, tensors[2 * i : 2 * i + 2], text) for i, text in enumerate(layouts)]
    count = math.prod(x.shape[:-1])
    return torch.cat([y.reshape(-1, count) for y in ys])


def _fake_single(x, tensors, layout):
    return x.new_empty(*x.shape[:-1], int(layout))


def _fake_shared(x, tensors, layouts):
    return x.new_empty(sum(map(int, layouts)), math.prod(x.shape[:-1]))


for name, schema, impl, fake in (
    ("single", "(Tensor x, Tensor[] t, str layout) -> Tensor", _single, _fake_single),
    ("shared", "(Tensor x, Tensor[] t, str[] layouts) -> Tensor", _shared, _fake_shared),
):
    _lib.define(name + schema)
    _lib.impl(name, impl, "CPU")
    torch.library.register_fake(f"merged_test::{name}", fake, lib=_lib)
_op = torch.ops.merged_test.single.default
merge_calls(_lib, _op, torch.ops.merged_test.shared.default)


class Layer(nn.Module):
    def __init__(self, n):
        super().__init__()
        g = torch.Generator().manual_seed(n)
        self.register_buffer("w", torch.randn(n, K, generator=g))
        self.register_buffer("b", torch.randn(n, generator=g))

    def forward(self, x):
        return _op(x, [self.w, self.b], str(self.w.shape[0]))


class Block(nn.Module):
    """Three layers of one input, in an order of their own, and one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = Layer(5), Layer(3), Layer(3), Layer(7)

    def forward(self, x):
        v = self.v(x)
        o = self.o(x + 1)
        q = self.q(x).relu()
        return q.sum(-1, keepdim=True) + self.k(x) * v + o.amax(-1, keepdim=True)


def compiled(module, **options):
    """The module compiled, and the graphs that were compiled for it."""
    graphs = []

    def keep(graph, _):
        graph.graph.lint()
        graphs.append([str(n.target) for n in graph.graph.nodes if "merged_test" in str(n.target)])
        return graph

    torch._dynamo.reset()
    return torch.compile(module, backend=aot_autograd(fw_compiler=keep), **options), graphs


ONE, ALL = "merged_test.single.default", "merged_test.shared.default"


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_of_one_input_are_one_call(dynamic, inference):
    block = Block()
    run, graphs = compiled(block, fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), torch.inference_mode(inference):
        for tokens in (3, 5, 7):  # of two sequences: equal sizes would be one symbol
            x = torch.randn(2, tokens, K)
            assert torch.equal(run(x), block(x))
    assert len(graphs) == (1 if dynamic else 3)  # retraced for every shape, or once for all
    assert all(sorted(graph) == [ALL, ONE] for graph in graphs)


def test_input_that_is_written_to_in_between_is_another():
    class Writes(Block):
        def forward(self, x):
            x = x * 1
            a = self.q(x)
            x.add_(1)
            return a, self.q(x), self.k(x)

    run, graphs = compiled(Writes(), fullgraph=True)
    x = torch.randn(4, K)
    for got, want in zip(run(x), Writes()(x), strict=True):
        assert torch.equal(got, want)
    assert graphs == [[ONE, ALL]]


def test_graph_break_between_layers_keeps_the_values():
    class Breaks(Block):
        def forward(self, x):
            a = self.q(x)
            torch._dynamo.graph_break()
            return a, self.k(x), self.v(x)

    run, graphs = compiled(Breaks())
    x = torch.randn(4, K)
    for got, want in zip(run(x), Breaks()(x), strict=True):
        assert torch.equal(got, want)
    assert graphs == [[ONE], [ALL]]


def test_weights_made_in_the_graph_are_left_alone():
    class Makes(Block):
        def forward(self, x):
            a = self.q(x)
            return a, _op(x, [self.k.w * 2, self.k.b], "3")

    run, graphs = compiled(Makes(), fullgraph=True)
    x = torch.randn(4, K)
    for got, want in zip(run(x), Makes()(x), strict=True):
        assert torch.equal(got, want)
    assert graphs == [[ONE, ONE]]


def test_reloaded_weights_are_seen():
    block = Block()
    run, graphs = compiled(block, fullgraph=True)
    x = torch.randn(4, K)
    before = run(x)
    block.k.w.mul_(3)
    assert torch.equal(run(x), block(x))
    assert not torch.equal(run(x), before)
    assert len(graphs) == 1


def test_parts_are_each_layers_own_result():
    x, layers = torch.randn(2, 3, K), [Layer(5), Layer(3)]
    whole = _shared(x, [t for a in layers for t in (a.w, a.b)], ["5", "3"])
    for got, layer in zip(parts(whole, x, [5, 3]), layers, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, layer(x))
