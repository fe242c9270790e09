"""Layers of one input whose activations are rounded, in one call: the bits of the single calls."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from cpu_made_int8 import CASES, exact, make, make_op
from quant_core.kernels.choose import choose
from quant_core.nn import QuantLinear
from quant_core.registry import registry
from quant_core.shared import share_inputs
from quant_kernels_cpu import ops
from quant_kernels_cpu.w8a8 import W8A8

K = 192


@pytest.fixture(params=("avx2", "avx512", "amx"))
def isa(request, limit):
    """AVX2, vectors of 512 bits, matrix units."""
    return limit(request.param)


def loaded(names, seeds):
    kernel, out = W8A8(), []
    for i, (name, seed) in enumerate(zip(names, seeds, strict=True)):
        case = CASES[name]
        bias = (None, torch.float32)[i % 2]
        lt = make(case, (40, 96, 7)[i % 3], K, seed=seed, bias=bias)
        op = make_op(lt, case[1])
        buffers = kernel.allocate(op)
        kernel.load_(buffers, op, lt, {"row": 0})
        out.append((op, list(buffers.values()), lt, case[1]))
    return kernel, out


NAMES = list(CASES)
GROUPS = [  # layers that round alike, that differ in one thing, and anything beside anything
    *(([name] * 3, (0, 0, 0)) for name in NAMES),
    *(([name] * 3, (0, 1, 1)) for name in NAMES if "static" in name or "combined" in name),
    (NAMES, (0,) * len(NAMES)),
    (NAMES[::-1], (0, 1) * (len(NAMES) // 2)),
]


@pytest.mark.parametrize(("names", "seeds"), GROUPS)
def test_one_call_gives_the_bits_of_single_calls(isa, threads, names, seeds):
    kernel, made = loaded(names, seeds)
    run = kernel.bind_shared([op for op, *_ in made])
    values = [v for _, v, *_ in made]
    for count in (1, 2):
        threads(count)
        for tokens in (0, 1, 3, 13, 300):
            x = torch.randn(1, tokens, K, generator=torch.Generator().manual_seed(tokens)) * 2
            for y, (op, mine, lt, spec) in zip(run(values, x), made, strict=True):
                assert torch.equal(y, kernel.bind(op)(mine, x))
                if tokens == 3 and lt.bias is None:
                    want = exact(x[0], lt, spec)
                    assert float((y[0].double() - want).norm()) <= 1e-6 * float(want.norm())


def test_a_value_that_cannot_be_rounded_shows_in_every_layer(isa):
    kernel, made = loaded(NAMES[:3], (0, 0, 0))
    x = torch.randn(2, K)
    x[1, 5] = float("nan")
    for y in kernel.bind_shared([op for op, *_ in made])([v for _, v, *_ in made], x):
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


def test_neighbours_and_traced_calls_share(isa, monkeypatch):
    _, made = loaded(NAMES[:3], (0, 0, 0))
    block = torch.nn.ModuleList()
    for op, values, *_ in made:
        choice = choose(op, registry(), kernels="cpu_w8a8")
        names = choice.kernel.allocate(op)
        block.append(QuantLinear(choice, dict(zip(names, values, strict=True))))
    want = [layer(torch.ones(1, K)) for layer in block]
    seen = []

    def graph_of(graph, _):
        seen.extend(str(n.target) for n in graph.graph.nodes if "quant_cpu" in str(n.target))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=graph_of)
    run = torch.compile(lambda x: [layer(x) for layer in block], fullgraph=True, backend=backend)
    assert all(map(torch.equal, run(torch.ones(1, K)), want))
    assert seen == ["quant_cpu.linear_w8a8_shared.default"]
    share_inputs(block)
    calls, original = [], ops._linear_w8a8_shared
    monkeypatch.setattr(ops, "_linear_w8a8_shared", lambda *a: calls.append(1) or original(*a))
    for _ in range(2):
        x = torch.ones(1, K)
        assert all(map(torch.equal, [layer(x) for layer in block], want))
    assert len(calls) == 1  # the first pass learns
