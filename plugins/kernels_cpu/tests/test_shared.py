"""Several layers of one x in one call: the bits of the single calls."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from cpu_made import SPECS, make_layer, make_op
from quant_core.errors import LayoutError
from quant_core.kernels.choose import choose
from quant_core.nn import QuantLinear
from quant_core.registry import registry
from quant_core.shared import share_inputs
from quant_kernels_cpu import ops
from quant_kernels_cpu.kernel import W4A8, WnA16
from quant_kernels_cpu.library import library, unavailable
from quant_kernels_cpu.watch import watched

K = 352
ROWS = (40, 96, 32, 7)


def layers(names, k=K):
    kernel, out = WnA16(), []
    for i, name in enumerate(names):
        lt = make_layer(
            SPECS[name], ROWS[i % 4], k, seed=i, bias=(None, torch.float16, torch.float32)[i % 3]
        )
        op = make_op("linear", lt, k)
        buffers = kernel.allocate(op)
        kernel.load_(buffers, op, lt, {"row": 0})
        out.append((op, list(buffers.values())))
    return kernel, out


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("start", range(0, len(SPECS), 3))
def test_shared_call_gives_the_bits_of_single_calls(isa, threads, start, count):
    threads(count)
    names = [list(SPECS)[(start + i * 5) % len(SPECS)] for i in range(4)]
    kernel, made = layers([*names, "uint4 g32 code gather", names[0]])
    run = kernel.bind_shared([op for op, _ in made])
    values = [v for _, v in made]
    g = torch.Generator().manual_seed(3)
    for tokens in (0, 1, 2, 3, 4, 7, 8, 33):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(1, tokens, K, generator=g).to(dtype)
            for y, (op, mine) in zip(run(values, x), made, strict=True):
                assert torch.equal(y, kernel.bind(op)(mine, x))


def test_scratch_beyond_the_stack_gives_the_same(isa):
    kernel, made = layers(["uint4 g32 f16 code", "int8 g32 f16"], 4128)
    x = torch.randn(3, 4128, generator=torch.Generator().manual_seed(1))
    got = kernel.bind_shared([op for op, _ in made])([v for _, v in made], x)
    for y, (op, mine) in zip(got, made, strict=True):
        assert torch.equal(y, kernel.bind(op)(mine, x))


def test_shared_run_pickles_checks_its_input_and_passes_opcheck(isa):
    kernel, made = layers(["uint4 g32 f16 code", "uint8 g32 code"])
    run, values = kernel.bind_shared([op for op, _ in made]), [v for _, v in made]
    x = torch.randn(2, K)
    again = pickle.loads(pickle.dumps(run))(values, x)
    assert all(map(torch.equal, again, run(values, x)))
    with pytest.raises(LayoutError):
        run(values, torch.randn(2, K + 32))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    texts = [kernel._bound(op).text() for op, _ in made]
    args = (x, [t for v in values for t in v], texts)
    torch.library.opcheck(torch.ops.quant_cpu.linear_shared.default, args, test_utils=checks)


def test_rounded_activations_are_not_shared():
    if unavailable() or not library().vnni:
        pytest.skip("this processor has no VNNI")
    _, made = layers(["uint4 g32 f16 code"] * 2)
    assert W4A8().bind_shared([op for op, _ in made]) is None


def test_neighbours_become_one_call(isa, monkeypatch):
    block, alone = (torch.nn.ModuleList(_modules()) for _ in range(2))
    share_inputs(block)
    calls = []
    original = ops._linear_shared
    monkeypatch.setattr(ops, "_linear_shared", lambda *a: calls.append(1) or original(*a))
    for seed in range(3):
        x = torch.randn(1, K, generator=torch.Generator().manual_seed(seed))
        for a, b in zip(block, alone, strict=True):
            assert torch.equal(a(x), b(x))
    assert len(calls) == 2  # the first pass learns


def test_layers_of_one_input_are_one_call_of_a_compiled_graph(isa):
    block, alone = (torch.nn.ModuleList(_modules()) for _ in range(2))
    seen = []

    def graph_of(graph, _):
        seen.extend(str(n.target) for n in graph.graph.nodes if "quant_cpu" in str(n.target))
        return graph

    def both(x):
        return [layer(x) for layer in block]

    torch._dynamo.reset()
    for backend in (aot_autograd(fw_compiler=graph_of), "inductor"):
        run = torch.compile(both, fullgraph=True, backend=backend)
        for tokens in (1, 3, 33):
            x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens))
            assert all(map(torch.equal, run(x), [layer(x) for layer in alone]))
    assert set(seen) == {"quant_cpu.linear_shared.default"}


def test_layout_texts_need_no_escape_in_generated_code():
    kernel, made = layers(list(SPECS)[:3])
    for op, _ in made:
        assert not set(kernel._bound(op).text()) & set('"\\')


def _modules():
    _, made = layers(["uint4 g32 f16 code", "uint8 g32 code"])
    for (op, _), name, i in zip(made, ("uint4 g32 f16 code", "uint8 g32 code"), range(2)):
        lt = make_layer(SPECS[name], ROWS[i], K, seed=i, bias=(None, torch.float16)[i])
        choice = choose(op, registry(), kernels="cpu_wna16")
        buffers = choice.kernel.allocate(choice.op)
        choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
        yield QuantLinear(choice, buffers)


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_watches_the_dispatcher_sees_the_op(isa):
    kernel, ((op, values),) = layers(["uint4 g32 f16 code"])
    run, x = kernel.bind(op), torch.randn(1, K)
    assert not watched(x, values[0])
    want = run(values, x)
    with _Seen() as seen:
        assert torch.equal(run(values, x), want)
    assert "quant_cpu.linear.default" in seen.ops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(values, x)
    assert "quant_cpu::linear" in {e.key for e in profile.key_averages()}
    assert watched(torch.nn.Parameter(x), values[0])
    assert watched(x, values[0].to("meta"))
    rows = torch.vmap(lambda row: row if watched(row, values[0]) else row.new_zeros(K))(x)
    assert torch.equal(rows, x)
