"""Experts with quantized activations: each expert rounds with its own stored scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quant_core.build import Builder
from quant_core.kernels.activations import fake_quantize
from quant_core.load import read_matrix
from quant_core.parts import matrices

E, H, INNER = 3, 32, 48
STEM = "model.layers.0.mlp.experts"


def _expert(n, k, seed, static):
    rng = torch.Generator().manual_seed(seed)
    out = {
        "weight": torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int8),
        "weight_scale": torch.rand(n, 1, generator=rng).mul(0.01).half(),
    }
    if static:
        out["input_scale"] = torch.tensor([0.01 * (seed + 1)]).half()
        out["input_zero_point"] = torch.tensor([seed], dtype=torch.int8)
    return out


@pytest.mark.parametrize("static", [False, True], ids=["run time", "stored"])
def test_experts_round_their_own_inputs_and_come_back(ct, write, static):
    tensors = {}
    for e in range(E):
        for i, (proj, n, k) in enumerate(
            (("gate", INNER, H), ("up", INNER, H), ("down", H, INNER))
        ):
            tensors |= ct.named(_expert(n, k, 3 * e + i, static), f"{STEM}.{e}.{proj}_proj")
    inputs = {"num_bits": 8, "strategy": "tensor", "symmetric": False}
    if not static:
        inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    config = ct.block(ct.args(8, -1), inputs, format="int-quantized")
    planned = ct.plan(write(tensors, config))
    gate, up, down = (planned.members[f"{STEM}.{p}_proj"] for p in ("gate", "up", "down"))
    builder = Builder(plan=planned, dtype=torch.float32)
    module = builder.experts("experts", gate=gate, up=up, down=down, activation=F.silu)

    def linear(member, e, x):
        lt = read_matrix(planned, member, e)
        spec = member.scheme.operands["input"]
        return F.linear(fake_quantize(x, spec, lt.input_scale, lt.input_zero), lt.dequantize())

    x = torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    index = torch.arange(7)[:, None] % E
    got = module(x, index, torch.ones(7, 1))
    for t in range(7):
        e, row = t % E, x[t : t + 1]
        want = linear(down, e, F.silu(linear(gate, e, row)) * linear(up, e, row))
        # one row or several rows of a matmul: float32 sums in another order over 48 columns
        assert torch.allclose(got[t : t + 1], want, rtol=1e-4, atol=1e-5)

    for e, part in matrices(module.gate.restore(), E):
        stored = gate.scheme.serialize(gate.layer, part)
        for name, value in stored.items():
            assert torch.equal(value, tensors[f"{STEM}.{e}.gate_proj.{name}"]), name
