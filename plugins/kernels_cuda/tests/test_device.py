"""On a CUDA device: the kernel against products with the oracle's weights.

Error bound 2.2e-3, relative Frobenius: rounding the output to bfloat16 alone is 1.65e-3.
"""

from __future__ import annotations

import pytest
import torch

from cuda_cases import SPECS, inputs_of, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.kernels.base import Rejected
from quant_kernels_cuda import driver, ops
from quant_kernels_cuda.kernel import Decode
from quant_kernels_cuda.schedule import candidates
from quant_kernels_cuda.variant import Variant, describe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("act", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_products_match_float64(name, act):
    n, k = 200, 1056
    spec = SPECS[name]
    lt = make_layer(spec, n, k)
    major, minor = torch.cuda.get_device_capability()
    op = make_op(lt, inputs_of(spec, k), act, capability=f"{major}.{minor}")
    kernel = Decode()
    answer = kernel.accepts(op)
    if isinstance(answer, Rejected):
        pytest.skip(str(answer))
    buffers = kernel.allocate(op, "cuda")
    kernel.load_(buffers, op, lt, {"row": 0})
    run = kernel.bind(op)
    weight = dense_weight(lt.weight, op.size("k")).double()
    for m in (1, 7, 16, 33):
        x = torch.randn(m, op.size("k"), dtype=getattr(torch, act))
        reference = x.double() @ weight.T + lt.bias.double()
        y = run(list(buffers.values()), x.cuda()).cpu().double()
        assert (y - reference).norm() / reference.norm() <= 2.2e-3


@pytest.mark.parametrize(
    "name", ["int4_g128", "int4_two_level", "fp4_e4m3_g16", "fp4_e8m0_g32", "fp8_block"]
)
@pytest.mark.parametrize("rows", [3, 13])
def test_cuts_of_every_kernel_and_cluster_match_float64(name, rows, monkeypatch):
    n, k = 1000, 3072
    lt = make_layer(SPECS[name], n, k)
    major, minor = torch.cuda.get_device_capability()
    op = make_op(lt, k, capability=f"{major}.{minor}")
    kernel, v = Decode(), describe(op)
    assert isinstance(v, Variant)
    buffers = kernel.allocate(op, "cuda")
    kernel.load_(buffers, op, lt, {"row": 0})
    run, values = kernel.bind(op), list(buffers.values())
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    reference = x.double() @ dense_weight(lt.weight, k).double().T + lt.bias.double()
    cuts = {}
    for _, s in candidates(v, rows, *driver.device_limits(0)[:3]):
        half = s.kernel == "resident" and s.run == 0
        cuts.setdefault((s.kernel, s.cluster, s.gpc, half), s)
    assert {"decode", "resident"} == {kind for kind, *_ in cuts}
    for s in cuts.values():
        monkeypatch.setattr(ops, "schedule", lambda *_a, s=s: s)
        monkeypatch.setattr(ops, "_entries", {})
        y = run(values, x.cuda())
        assert torch.equal(y, run(values, x.cuda())), s
        assert (y.cpu().double() - reference).norm() / reference.norm() <= 2.2e-3, s
