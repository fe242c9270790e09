"""Made experts through plan and loader, both ways; what must fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import CheckpointError, LayoutError, QuantError
from quant_core.load import load_tensor, read_matrix
from quant_core.nn import ClampedSwiglu
from quant_core.parts import matrices
from quant_core.spec import Unquantized

LEAVES = [f"{s}_{p}" for s in ("gate_up_proj", "down_proj") for p in ("blocks", "scales")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_experts_read_and_write_exactly(mx, write, flat, bias):
    made = mx.experts(bias=bias)
    stored = dict(made.stored)
    if flat:
        stored |= {n: stored[n].flatten(2) for n in stored if n.endswith("_blocks")}
    planned = mx.plan(write(mx.named(stored)))
    (warning,) = planned.warnings  # the config excludes modules that this file does not hold
    assert warning.startswith("2 name pattern(s) match no module")
    assert list(planned.quantized) == [f"{mx.PATH}.{r}_proj" for r in ("gate", "up", "down")]
    for role, first, step in (("gate", 0, 2), ("up", 1, 2), ("down", 0, 1)):
        member = planned.members[f"{mx.PATH}.{role}_proj"]
        whole = "down_proj" if role == "down" else "gate_up_proj"
        for e in range(3):
            lt = read_matrix(planned, member, e)
            assert torch.equal(lt.dequantize(), made.dense[role][e])
            back = member.scheme.serialize(member.layer, lt)
            assert back.keys() == {"blocks", "scales", *(["bias"] if bias else [])}
            for part, got in back.items():
                want = stored[f"{whole}_{part}"][e, first::step]
                assert got.dtype == want.dtype
                assert torch.equal(got, want), part
    planned.ledger.check_loaded()


def test_worked_bytes(mx, write):
    made = mx.experts()
    blocks, scales = made.stored["down_proj_blocks"], made.stored["down_proj_scales"]
    blocks[0, 0, 0, 0], scales[0, 0, 0] = 0x21, 127
    blocks[0, 1, 0, 0], scales[0, 1, 0] = 0xF7, 128
    w = load_tensor(mx.plan(write(mx.named(made.stored))), f"{mx.PATH}.down_proj").dequantize()
    assert w[0, 0, :2].tolist() == [0.5, 1.0]
    assert w[0, 1, :2].tolist() == [12.0, -12.0]


def test_experts_run_with_bias_and_gating(mx, write):
    made, gating = mx.experts(), ClampedSwiglu(limit=7.0, alpha=1.702)
    planned = mx.plan(write(mx.named(made.stored)))
    members = {r: planned.members[f"{mx.PATH}.{r}_proj"] for r in ("gate", "up", "down")}
    builder = Builder(plan=planned, dtype=torch.float32, kernels="torch_ref")
    module = builder.experts("experts", activation=None, gating=gating, **members)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    index = torch.arange(7)[:, None] % 3
    got = module(x, index, torch.ones(7, 1))
    both, last = made.stored["gate_up_proj_bias"].float(), made.stored["down_proj_bias"].float()
    for t in range(7):
        e = t % 3
        gate = made.dense["gate"][e] @ x[t] + both[e, ::2]
        up = made.dense["up"][e] @ x[t] + both[e, 1::2]
        want = made.dense["down"][e] @ gating(gate, up) + last[e]
        # sums over 64 columns in another order
        assert torch.allclose(got[t], want, rtol=1e-4, atol=1e-5)
    for e, part in matrices(module.up.restore(), 3):
        back = members["up"].scheme.serialize(members["up"].layer, part)
        assert torch.equal(back["blocks"], made.stored["gate_up_proj_blocks"][e, 1::2])


def test_other_modules_stay_floats(mx, write):
    tensors = mx.named(mx.experts().stored) | {
        "lm_head.weight": torch.zeros(8, 64).bfloat16(),
        "model.layers.0.mlp.router.weight": torch.zeros(3, 64).bfloat16(),
    }
    planned = mx.plan(write(tensors))
    rules = {n: m.scheme.rule for n, m in planned.members.items() if not m.quantized}
    assert rules == {
        "lm_head": "modules_to_not_convert", "model.layers.0.mlp.router": "no blocks stored",
    }  # fmt: skip
    assert all(isinstance(planned.members[n].scheme, Unquantized) for n in rules)


# ------------------------------------------------------------------------------- what must fail


def raises(code, mx, checkpoint, match=None):
    with pytest.raises(QuantError, match=match) as err:
        mx.plan(checkpoint)
    assert err.value.code == code
    return err.value


@pytest.mark.parametrize("leaf", LEAVES)
def test_lost_tensor_is_named(mx, write, leaf):
    stored = mx.experts().stored
    del stored[leaf]
    err = raises("Q-TENSOR-MISSING", mx, write(mx.named(stored)))
    assert f"{mx.PATH}.{leaf}" in str(err)


def test_bias_of_one_layer_only_is_named(mx, write):
    stored, other = mx.experts().stored, "model.layers.1.mlp.experts"
    tensors = mx.named(stored) | mx.named(stored, other)
    del tensors[f"{other}.down_proj_bias"]
    err = raises("Q-TENSOR-MISSING", mx, write(tensors))
    assert f"{other}.down_proj_bias" in str(err)


@pytest.mark.parametrize("leaf", [*LEAVES, "gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t[:-1], "Q-LAYOUT-SHAPE"),
        (lambda t: t[:, :-1], "Q-LAYOUT-SHAPE"),
        (lambda t: t.transpose(0, 1), "Q-LAYOUT-SHAPE"),
        (lambda t: t.to(torch.int32), "Q-LAYOUT-DTYPE"),
    ],
    ids=["experts", "rows", "transposed", "dtype"],
)
def test_wrong_shape_or_dtype_names_the_tensor(mx, write, leaf, change, code):
    stored = mx.experts().stored
    stored[leaf] = change(stored[leaf])
    err = raises(code, mx, write(mx.named(stored)))
    assert mx.PATH in str(err)


@pytest.mark.parametrize("width", [8, 15, 17])
def test_blocks_of_another_size_are_refused(mx, write, width):
    stored = mx.experts().stored
    stored["down_proj_blocks"] = torch.zeros(3, 64, 1, width, dtype=torch.uint8)
    raises("Q-LAYOUT-SHAPE", mx, write(mx.named(stored)), "blocks of 32")


def test_extra_tensor_is_named_once(mx, write):
    stored = mx.experts().stored | {"down_proj_zeros": torch.zeros(3, 64, dtype=torch.uint8)}
    err = raises("Q-TENSOR-UNEXPECTED", mx, write(mx.named(stored)), "1 unexpected")
    assert "down_proj_zeros" in str(err)


def test_quantized_but_excluded_raises(mx, write):
    config = {"quant_method": "mxfp4", "modules_to_not_convert": [r"model.layers.*.mlp.experts"]}
    err = raises("Q-CKPT-MISMATCH", mx, write(mx.named(mx.experts().stored), config))
    assert isinstance(err, CheckpointError)


def test_nan_scale_is_reported_and_the_smallest_is_no_zero(mx, write):
    made = mx.experts()
    made.stored["down_proj_scales"][1, 5, 0] = 255
    made.stored["down_proj_scales"][2, 0, 0] = 0
    made.stored["down_proj_blocks"][2, 0] = 0x22
    planned = mx.plan(write(mx.named(made.stored)))
    member = planned.members[f"{mx.PATH}.down_proj"]
    with pytest.raises(LayoutError, match="1 of 64") as err:
        read_matrix(planned, member, 1)
    assert err.value.code == "Q-VALUE-SCALE"
    assert read_matrix(planned, member, 2).dequantize()[0, 0].item() == 2.0**-127


def test_what_blocks_cannot_hold_raises(mx, write):
    planned = mx.plan(write(mx.named(mx.experts().stored)))
    member = planned.members[f"{mx.PATH}.gate_proj"]
    lt = read_matrix(planned, member, 0)
    qt = lt.weight
    wide = replace(qt.spec, scales=(replace(qt.spec.scales[0], grain=(1, 16)),))
    for bad in (
        replace(lt, operands={"weight": replace(qt, spec=wide)}),
        replace(lt, operands={"weight": replace(qt, shape=(qt.shape[0], 32))}),
        replace(lt, input_scale=torch.ones(1)),
    ):
        with pytest.raises(LayoutError) as err:
            member.scheme.serialize(member.layer, bad)
        assert err.value.code == "Q-LAYOUT-REPRESENT"
