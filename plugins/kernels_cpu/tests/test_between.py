"""Norms, rotations and gates: compared with torch's own operators, which round where these do."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted, Kernel
from quant_core.kernels.between import NORMS, gated_op, norm_op, rotary_op
from quant_core.kernels.choose import choose
from quant_core.registry import registry
from quant_kernels_cpu.between import BETWEEN, Gated, RmsNorm, Rotary

CPU = ("cpu", "")
TYPES = ("bfloat16", "float16", "float32")
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # half a unit
ACTS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def normal(*shape: int, dtype: str, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(getattr(torch, dtype))


def plain_norm(x, weight, eps, form):
    """As transformers writes it: of Llama (rounded before the weight) or of Gemma (after)."""
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    one = 1 if "unit_offset" in form else 0
    if "round_last" in form:
        return ((weight.float() + one) * h).to(x.dtype)
    return (weight + one) * h.to(x.dtype)


def near(got, want, dtype):
    """Equal up to a neighbour: float32 sums in another order (16 units) may tip a rounding."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    allowed = max(4 * ROUNDING[dtype], 2.0**-20) * want.double().abs() + 1e-12
    assert ((got.double() - want.double()).abs() <= allowed).all()


@pytest.mark.parametrize("form", NORMS, ids=lambda f: "+".join(sorted(f)) or "plain")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 576), (7, 33), (2, 40, 500), (3, 1)])
def test_norm_equals_torchs_operators(isa, shape, dtype, form):
    x, delta = normal(*shape, dtype=dtype) * 3, normal(*shape, dtype=dtype, seed=1)
    weight = normal(shape[-1], dtype=dtype, seed=2)
    run = RmsNorm().bind(norm_op(shape[-1], form, dtype, CPU))
    near(run([weight], x, 1e-5), plain_norm(x, weight, 1e-5, form), dtype)
    total, y = run([weight], x, 1e-5, delta)
    assert torch.equal(total, x + delta)
    near(y, plain_norm(total, weight, 1e-5, form), dtype)


def test_norm_adds_eps_to_the_mean_square(isa):
    x = normal(4, 64, dtype="float32") * 1e-4
    weight = torch.ones(64)
    run = RmsNorm().bind(norm_op(64, NORMS[0], "float32", CPU))
    near(run([weight], x, 1e-6), plain_norm(x, weight, 1e-6, ()), "float32")
    wrong = run([weight], x, 1e-5)
    assert (wrong - run([weight], x, 1e-6)).abs().max() > 1e-3


def test_norm_of_nan_infinity_and_zero(isa):
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    weight = torch.ones(32, dtype=torch.bfloat16)
    got = RmsNorm().bind(norm_op(32, NORMS[0], "bfloat16", CPU))([weight], x, 1e-6)
    want = plain_norm(x, weight, 1e-6, ())
    assert torch.equal(got.isnan(), want.isnan())
    assert (got[2] == 0).all()


def test_norm_of_many_rows_on_two_threads_is_the_same(threads):
    x, weight = normal(300, 256, dtype="bfloat16"), normal(256, dtype="bfloat16", seed=1)
    run = RmsNorm().bind(norm_op(256, NORMS[0], "bfloat16", CPU))
    one = run([weight], x, 1e-5)
    threads(2)
    assert torch.equal(run([weight], x, 1e-5), one)


def angles(batch, tokens, rotated, dtype, seed=3):
    half = normal(batch, tokens, rotated // 2, dtype="float32", seed=seed)
    whole = torch.cat([half, half], -1)
    return whole.cos().to(getattr(torch, dtype)), whole.sin().to(getattr(torch, dtype))


def plain_rotary(x, cos, sin):
    rotated = cos.shape[-1]
    cos, sin, turned, rest = cos[:, None], sin[:, None], x[..., :rotated], x[..., rotated:]
    low, high = turned[..., : rotated // 2], turned[..., rotated // 2 :]
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 32), (6, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotary_equals_torchs_operators_bit_for_bit(isa, dim, rotated, dtype, shared):
    q = normal(2, 5, 6, dim, dtype=dtype).transpose(1, 2)
    k = normal(2, 5, 2, dim, dtype=dtype, seed=1).transpose(1, 2)
    cos, sin = angles(1 if shared else 2, 5, rotated, dtype)
    before = q.clone()
    got = Rotary().bind(rotary_op(dim, rotated, dtype, CPU))([], q, k, cos, sin)
    assert torch.equal(got[0], plain_rotary(q, cos, sin))
    assert torch.equal(got[1], plain_rotary(k, cos, sin))
    assert torch.equal(q, before)
    assert not torch.equal(got[0], plain_rotary(q, sin, cos))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1536), (3, 7), (2, 600)])
def test_gate_equals_torchs_operators(isa, shape, dtype, act):
    gate, up = normal(*shape, dtype=dtype) * 8, normal(*shape, dtype=dtype, seed=1)
    got = Gated().bind(gated_op(shape[-1], act, dtype, CPU))([], gate, up)
    want = ACTS[act](gate) * up
    # 1 + tanh loses places of float32 where it is near zero; the kernel does not
    allowed = 4 * ROUNDING[dtype] * want.double().abs() + 2.0**-21 * gate.double().abs()
    assert ((got.double() - want.double()).abs() <= allowed.clamp(min=1e-7)).all()


def test_gate_of_extremes(isa):
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, torch.nan, torch.inf])
    got = Gated().bind(gated_op(8, "silu", "float32", CPU))([], gate, torch.ones(8))
    assert torch.equal(got.nan_to_num(7), (F.silu(gate)).nan_to_num(7))


@pytest.mark.parametrize("name", ["float32", "another size", "float32 weight", "delta", "meta"])
def test_norm_declines_what_it_was_not_bound_for(isa, name):
    x, weight = normal(2, 32, dtype="bfloat16"), normal(32, dtype="bfloat16")
    run = RmsNorm().bind(norm_op(32, NORMS[0], "bfloat16", CPU))
    args = {
        "float32": ([weight], x.float(), 1e-5),
        "another size": ([weight], x[:, :16], 1e-5),
        "float32 weight": ([weight.float()], x, 1e-5),
        "delta": ([weight], x, 1e-5, x[:1]),
        "meta": ([weight], x.to("meta"), 1e-5),
    }
    assert run(*args[name]) is None
    assert run([weight], x, 1e-5) is not None


def test_rotary_and_gate_decline_what_they_do_not_take(isa):
    q, k = (normal(1, 2, 3, 64, dtype="bfloat16", seed=s) for s in (0, 1))
    cos, sin = angles(1, 3, 64, "bfloat16")
    run = Rotary().bind(rotary_op(64, 64, "bfloat16", CPU))
    assert run([], q, k, cos, sin) is not None
    assert run([], q, k, cos[..., :32], sin[..., :32]) is None
    assert run([], q, k, cos.float(), sin.float()) is None
    assert run([], q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin) is None
    gate = Gated().bind(gated_op(64, "silu", "bfloat16", CPU))
    assert gate([], q, k[:, :1]) is None
    assert gate([], q.half(), k.half()) is None


def test_ops_pass_opcheck_compile_and_pickle(isa):
    x, weight = normal(2, 3, 64, dtype="bfloat16"), normal(64, dtype="bfloat16", seed=1)
    q = normal(1, 3, 2, 64, dtype="bfloat16").transpose(1, 2)
    cos, sin = angles(1, 3, 64, "bfloat16")
    ops, checks = (
        torch.ops.quant_cpu,
        ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    for op, args in (
        (ops.rms_norm.default, (x, weight, 1e-5, 0)),
        (ops.add_rms_norm.default, (x, x, weight, 1e-5, 3)),
        (ops.rotary.default, (q, cos, sin)),
        (ops.gated.default, (x, x, 0)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)
    op = norm_op(64, NORMS[0], "bfloat16", CPU)
    run = pickle.loads(pickle.dumps(RmsNorm().bind(op)))
    compiled = torch.compile(
        lambda x, d: run([weight], x, 1e-5, d)[1] * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, x), run([weight], x, 1e-5, x)[1] * 2)


def test_kernels_of_the_contract_say_what_they_run(isa):
    ops = {
        "rms_norm": norm_op(64, NORMS[2], "bfloat16", CPU),
        "rotary": rotary_op(64, 32, "float16", CPU),
        "gated": gated_op(64, "gelu_tanh", "float32", CPU),
    }
    for name, op in ops.items():
        kernel = BETWEEN[name]
        assert isinstance(kernel, Kernel)
        assert isinstance(kernel.accepts(op), Accepted)
        assert choose(op, registry()).kernel.name == kernel.name
        assert kernel.accepts(replace(op, op="linear")).axis == "op"
        assert kernel.accepts(replace(op, device=("cuda", "9.0"))).axis == "device"
        assert kernel.accepts(replace(op, act_dtype="float64")).axis == "act_dtype"
        with pytest.raises(KernelError):
            kernel.restore({}, op)
        with pytest.raises(KernelError):
            kernel.load_({}, op, None, {})
    assert RmsNorm().accepts(replace(ops["rms_norm"], features={"mean"})).axis == "features"
    assert Gated().accepts(replace(ops["gated"], features=frozenset())).axis == "features"
    assert Rotary().accepts(rotary_op(64, 31, "float16", CPU)).axis == "rotated"
