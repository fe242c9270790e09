"""Rotations that run with the model: the layer's output is as if nothing had been rotated."""

from __future__ import annotations

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import CheckpointError, ConfigError, LayoutError
from quant_core.load import read_matrix

N, K = 12, 16
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"


def hadamard(n):
    """Sylvester's construction: entries +-1."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def signed(n):
    """Not symmetric, so that a transposition shows."""
    return hadamard(n) * torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(n // 4)


def config(ct, *uses, head_dim=None, **group):
    raw = {"type": "random-hadamard", "head_dim": head_dim, "apply": list(uses)} | group
    block = ct.block(FP8, format="float-quantized", ignore=[])
    return block | {"transform_config": {"config_groups": {"R": raw}}}


def use(location="input", inverse=False, targets=("re:.*down_proj$",), ignore=()):
    return {
        "location": location, "inverse": inverse, "targets": list(targets), "ignore": list(ignore),
    }  # fmt: skip


def layer(weight):
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}


def powers(n, k):
    """Exact in fp8."""
    return torch.exp2((torch.arange(n * k).view(n, k) * 7 % 5 - 2).float())


def run(ct, checkpoint, name, x):
    planned = ct.plan(checkpoint)
    module = Builder(plan=planned, dtype=torch.float32, kernels="torch_ref").linear(
        name, [planned.members[name]]
    )
    return planned, module(x)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("location", ["input", "output"])
def test_matrix_is_applied_at_its_place(ct, write, location, block, inverse):
    n = 16
    weight, size = powers(n, K), block or K
    h = signed(size)
    tensors = ct.named(layer(weight), DOWN) | {f"{DOWN}.R_{location}.weight": h}
    raw = config(ct, use(location, inverse), use("weight_input"), head_dim=block)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    planned, got = run(ct, write(tensors, raw), DOWN, x)
    v = torch.block_diag(*[(h.t() if inverse else h) / size**0.5] * (K // size)).float()
    want = (x @ v) @ weight.t() if location == "input" else (x @ weight.t()) @ v
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    plain = x @ weight.t()
    assert not torch.allclose(got, plain, rtol=1e-2, atol=1e-2)
    member = planned.members[DOWN]
    back = member.scheme.serialize(member.layer, read_matrix(planned, member))
    assert torch.equal(back[f"R_{location}.weight"], h)
    assert back[f"R_{location}.weight"].dtype == h.dtype


def test_one_stored_matrix_serves_all_layers_of_its_size(ct, write):
    weight, other = powers(N, K), "model.layers.2.mlp.down_proj"
    tensors = ct.named(layer(weight), DOWN) | ct.named(layer(weight), UP)
    tensors |= ct.named(layer(powers(N, 8)), other)
    tensors |= {f"{DOWN}.R_input.weight": signed(K), f"{other}.R_input.weight": signed(8)}
    checkpoint = write(tensors, config(ct, use()))
    x = torch.randn(3, K)
    planned, first = run(ct, checkpoint, DOWN, x)
    _, second = run(ct, checkpoint, UP, x)
    assert torch.equal(first, second)
    assert run(ct, checkpoint, other, x[:, :8])[1].shape == (3, N)
    stored = {f"{DOWN}.R_input.weight", f"{other}.R_input.weight"}
    assert all(map(planned.ledger.is_claimed, stored))
    assert not stored & set(planned.dense)


def test_ignored_and_untargeted_modules_are_not_rotated(ct, write):
    tensors = ct.named(layer(powers(N, K)), DOWN) | ct.named(layer(powers(N, K)), UP)
    tensors |= {f"{DOWN}.R_input.weight": signed(K)}
    planned = ct.plan(write(tensors, config(ct, use(ignore=["re:.*layers.1.*"]))))
    assert planned.members[DOWN].scheme.transforms
    assert not planned.members[UP].scheme.transforms


def test_lost_matrix_is_named(ct, write):
    with pytest.raises(CheckpointError) as err:
        ct.plan(write(ct.named(layer(powers(N, K)), DOWN), config(ct, use())))
    assert err.value.code == "Q-TENSOR-MISSING"
    assert f"{DOWN}.R_input.weight" in str(err.value)


def test_matrix_that_no_transform_asks_for_is_not_skipped(ct, write):
    name = f"{DOWN}.R_input.weight"
    tensors = ct.named(layer(powers(N, K)), DOWN) | {name: signed(K)}
    planned = ct.plan(write(tensors, config(ct, use(targets=["re:.*up_proj$"]))))
    assert name in planned.dense  # the engine has no place for it and says so
    assert name not in planned.ledger.skipped


def test_target_with_a_plain_weight_is_refused(ct, write):
    tensors = {f"{DOWN}.weight": powers(N, K), f"{DOWN}.R_input.weight": signed(K)}
    with pytest.raises(ConfigError, match="down_proj") as err:
        ct.plan(write(tensors, config(ct, use())))
    assert err.value.code == "Q-CFG-TRANSFORM"


def test_experts_are_refused(ct, write):
    stem = "model.layers.0.mlp.experts.0.down_proj"
    tensors = ct.named(layer(powers(N, K)), stem)
    with pytest.raises(ConfigError, match="linear layers only") as err:
        ct.plan(write(tensors, config(ct, use())))
    assert err.value.code == "Q-CFG-TRANSFORM"


@pytest.mark.parametrize("fault", ["zero", "two", "fraction", "flipped"])
def test_damaged_matrix_is_refused(ct, write, fault):
    h = signed(K)
    h[0, 1] = {"zero": 0.0, "two": 2.0, "fraction": 0.25, "flipped": -h[0, 1]}[fault]
    tensors = ct.named(layer(powers(N, K)), DOWN) | {f"{DOWN}.R_input.weight": h}
    planned = ct.plan(write(tensors, config(ct, use())))
    with pytest.raises(LayoutError, match="R_input") as err:
        read_matrix(planned, planned.members[DOWN])
    assert err.value.code == "Q-VALUE-ROTATION"
