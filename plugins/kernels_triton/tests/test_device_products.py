"""The kernels with weights on a CUDA device: products, and CUDA graphs side by side.

Every kind of layer, numbers of rows and dtype, and the kernels' other rules:
benchmarks/gpu_accuracy.py.
"""

from __future__ import annotations

import pytest
import torch

from quant_core.dequantize import dense_weight
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import Rejected
from quant_core.spec import CHANNEL, Element, QuantSpec, Scale
from triton_hadamard import hadamard_matrix
from triton_made import SPECS, make_layer, make_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUND = {"bfloat16": 2.2e-3, "float16": 4.5e-4}  # y is rounded: 1.66e-3 and 2.1e-4 of it


def device():
    return "cuda", "{}.{}".format(*torch.cuda.get_device_capability())


def loaded(kernel, op, lt):
    answer = kernel.accepts(op)
    if isinstance(answer, Rejected):
        pytest.skip(str(answer))
    buffers = kernel.allocate(op, "cuda")
    kernel.load_(buffers, op, lt, {"row": 0})
    return kernel.bind(op), list(buffers.values())


def kernels():
    from quant_kernels_triton.wna16 import Dense, GluonTiles, PlainTriton

    return {k.name: k for k in (GluonTiles(), PlainTriton(), Dense())}


def error(y, want):
    return ((y.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("act", BOUND)
@pytest.mark.parametrize("kernel", ["gluon_wna16", "triton_wna16", "triton_dense"])
@pytest.mark.parametrize("name", ["uint4 g128 bf16", "uint4 g32 bf16 code", "nvfp4", "fp8 block"])
def test_products_equal_those_of_weights_rounded_to_the_type_of_x(kernel, name, act):
    n, k = 200, 544
    lt = make_layer(SPECS[name], n, k, bias=True)
    op = make_op(SPECS[name], n, k, act=act, bias=True, device=device())
    run, values = loaded(kernels()[kernel], op, lt)
    exact, bias = dense_weight(lt.weight, k).cuda(), lt.bias.double().cuda()
    dtype = getattr(torch, act)
    for m in (16, 33, 300):
        x = torch.randn(m, k, device="cuda").to(dtype)
        y = run(values, x)
        wanted = [x.double() @ w.double().T + bias for w in (exact.to(dtype), exact)]
        assert min(error(y, want) for want in wanted) <= BOUND[act]
        assert error(y, wanted[0].roll(1, 0)) > 0.5  # control: other rows


@pytest.mark.parametrize("rows", [1, 16, 33, 300])
@pytest.mark.parametrize("k", [32, 96, 128])
def test_products_of_one_group_of_columns(k, rows):
    """Triton 3.6 cannot compile a kernel whose loop over groups it knows to run once."""
    spec = SPECS["uint4 g128 bf16"]
    lt, op = make_layer(spec, 72, k), make_op(spec, 72, k, act="bfloat16", device=device())
    run, values = loaded(kernels()["gluon_wna16"], op, lt)
    x = torch.randn(rows, k, device="cuda").bfloat16()
    want = x.double() @ dense_weight(lt.weight, k).cuda().bfloat16().double().T
    assert error(run(values, x), want) <= 1.5 * BOUND["bfloat16"]  # a norm over few outputs


@pytest.mark.parametrize("rows", [16, 300])  # parts of K; shares that run over the ends of tiles
def test_graphs_replayed_at_the_same_time_equal_eager_calls(rows):
    n, k = 2048, 4096
    spec = SPECS["uint4 g128 bf16"]
    op = make_op(spec, n, k, act="bfloat16", device=device())
    run, values = loaded(kernels()["gluon_wna16"], op, make_layer(spec, n, k))
    xs = [torch.randn(rows, k, device="cuda").bfloat16() for _ in range(3)]
    wanted = [run(values, x) for x in xs]
    graphs, got = [torch.cuda.CUDAGraph() for _ in xs], []
    for graph, x in zip(graphs, xs, strict=True):
        with torch.cuda.graph(graph):
            got.append(run(values, x))
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(30):
        for y in got:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = run(values, xs[0])
        torch.cuda.synchronize()
        assert torch.equal(beside, wanted[0])
        assert all(torch.equal(y, want) for y, want in zip(got, wanted, strict=True))


@pytest.mark.parametrize("k", [128, 544])
@pytest.mark.parametrize("rows", [3, 64, 300])
@pytest.mark.parametrize("weight", ["fp8 channel", "uint4 g128 bf16"])
def test_products_of_rounded_activations_equal_emulated_ones(weight, rows, k):
    from dataclasses import replace

    from quant_kernels_triton.mixed_kernel import Mixed

    n = 200
    fp8 = Element(name="fp8_e4m3", bits=8, kind="float")
    acts = QuantSpec(element=fp8, scales=(Scale(element="f32", grain=CHANNEL, static=False),))
    op = make_op(SPECS[weight], n, k, act="bfloat16", device=device())
    op = replace(op, operands=(*op.operands, ("input", acts)))
    lt = make_layer(SPECS[weight], n, k)
    run, values = loaded(Mixed(), op, lt)
    x = torch.randn(rows, k, device="cuda").bfloat16()
    w = dense_weight(lt.weight, k).double().cuda()
    y = run(values, x)
    want = fake_quantize(x.float(), acts).double() @ w.T
    assert error(y, want) <= BOUND["bfloat16"]
    assert error(y, x.double() @ w.T) > 1e-2  # control: activations that nobody rounded


@pytest.mark.parametrize(("core", "size", "k"), [(1, 128, 256), (12, 32, 768), (1, 4096, 4096)])
def test_hadamard_transforms_equal_products_with_the_matrix(core, size, k):
    from quant_core.kernels.hadamard import factors
    from quant_core.spec import OpSpec
    from quant_kernels_triton.hadamard_kernel import Hadamard

    signs = hadamard_matrix(core, size, signs=True)
    f = factors(signs)
    sizes = (("k", k), ("n", core * size), ("m", core))
    op = OpSpec(op="hadamard", operands=(), sizes=sizes, act_dtype="float32", device=device())
    x = torch.randn(5, k, device="cuda")
    y = Hadamard().bind(op)([], x, *(t.cuda() for t in (f.rows, f.core, f.cols)), None)
    want = (x.double().view(-1, core * size) @ signs.double().cuda()).view(5, k)
    assert error(y, want) < 5e-6  # float32 sums
