"""The rounding of activations in Triton's interpreter: bit for bit what the reference gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core import kv_states
from quant_core.kernels.activations import fake_quantize, unsupported_input
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.quantizer import TorchRound
from quant_core.numerics import MX_RULES, mx_scale
from quant_core.spec import OpSpec
from quant_core.spec_json import to_text
from quant_kernels_triton.rounding_kernel import Round
from quant_kernels_triton.rounding_plan import describe_round
from quant_kernels_triton.rounding_run import own_columns, steps
from triton_rounded import SPECS, inputs, same_bits, small, stored

FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def op_of(name: str, k: int, act: str = "float32", experts: int = 0) -> OpSpec:
    scale, zero = stored(SPECS[name], k)
    features = {"input_scale"} if scale is not None else set()
    features |= {"input_zero"} if zero is not None else set()
    return OpSpec(
        op="quantize",
        operands=(("input", SPECS[name]),),
        sizes=(("k", k), *((("experts", experts),) if experts else ())),
        act_dtype=act,
        features=frozenset(features),
    )


# every rule in bfloat16 and float32; float16 differs in how x is read only
CASES = [(n, a) for n in SPECS for a in FLOATS if a != "float16" or not n.startswith("mx f")]


@pytest.mark.parametrize(("name", "act"), CASES)
def test_rounded_activations_are_the_references_bit_for_bit(name, act):
    for k in (96, 200) if act == "float32" else (200,):
        op, x = op_of(name, k, act), inputs(k, FLOATS[act])
        assert unsupported_input(op) is None
        assert isinstance(Round().accepts(op), Accepted), Round().accepts(op)
        run = Round().bind(op)
        scale, zero = stored(SPECS[name], k)
        for rows in (slice(None), slice(0, 8), slice(2, 3)):
            got = run([], x[rows], scale, zero)
            want = fake_quantize(x[rows], SPECS[name], scale, zero)
            same = same_bits(got, want)
            assert got.dtype == x.dtype
            assert same.all(), (k, rows, x[rows][~same][:5], got[~same][:5], want[~same][:5])


@pytest.mark.parametrize("name", ["int8 token", "int8 token, zero", "fp8 bounded", "fnuz token"])
def test_few_wide_tokens_are_shared_out_and_rounded_the_same(name):
    for k, act in ((1100, "bfloat16"), (2064, "float32")):
        op, x = op_of(name, k, act), inputs(k, FLOATS[act])
        op = replace(op, features=op.features | {"starts_early"})
        p = describe_round(op)
        assert own_columns(p, k, len(x)) > 0
        run, want = Round().bind(op), fake_quantize(x, SPECS[name])
        assert same_bits(run([], x), want).all()
        many = x.repeat(5, 1)  # more tokens: one program each
        assert own_columns(p, k, len(many)) == 0
        assert same_bits(run([], many), want.repeat(5, 1)).all()


@pytest.mark.parametrize("rule", MX_RULES)
def test_steps_of_an_exponent_are_those_of_the_rule(rule):
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 0x7F800000, (20000,), generator=g, dtype=torch.int32)
    edges = (torch.arange(256, dtype=torch.int32) << 23)[:, None] + torch.tensor([-1, 0, 1, 2])
    bits = torch.cat([bits, edges.flatten().clamp(min=0).to(torch.int32)])
    for name, peak in (("fp4_e2m1", 6.0), ("fp8_e4m3", 448.0), ("fp6_e3m2", 28.0)):
        table = steps(small(name), rule, peak, torch.device("cpu"))
        f = bits >> 23
        got = table[f] + (bits >= table[256 + f])
        assert torch.equal(got, mx_scale(bits.view(torch.float32), small(name), rule, peak).int())


@pytest.mark.parametrize("name", ["fp8 stored", "int8 stored", "nvfp4 stored inverse"])
def test_tokens_of_experts_take_their_own_stored_scale(name):
    k, spec = 96, SPECS[name]
    scale, zero = stored(spec, k, experts=3)
    op, x = op_of(name, k, experts=3), inputs(k, torch.float32)[[0, 1, 3, 11, 12]]
    index = torch.tensor([2, 0, 1, 2, 0])
    got = Round().bind(op)([], x, scale, zero, index)
    assert torch.equal(got, TorchRound().bind(op)([], x, scale, zero, index))
    for t, e in enumerate(index.tolist()):
        own = None if zero is None else zero[e]
        assert torch.equal(got[t], fake_quantize(x[t : t + 1], spec, scale[e], own)[0])
    assert not torch.equal(got, Round().bind(op)([], x, scale, zero, (index + 1) % 3))


def test_leading_axes_no_rows_views_and_other_dtypes():
    op = op_of("nvfp4", 96, "bfloat16")
    run, x = Round().bind(op), inputs(96, torch.float32)[:4]
    want = fake_quantize(x, SPECS["nvfp4"])
    assert torch.equal(run([], x.view(2, 2, 96)).view(4, 96), want)
    wide = torch.cat([x, x], 1)
    assert torch.equal(run([], wide[:, 96:]), want)
    assert run([], x[:0]).shape == (0, 96)
    assert torch.equal(run([], x.double()), fake_quantize(x.double(), SPECS["nvfp4"]))


def test_what_does_not_fit_a_program_is_rejected():
    answer = Round().accepts(op_of("int8 token", 65536))
    assert isinstance(answer, Rejected)
    assert answer.axis == "sizes"
    assert isinstance(Round().accepts(op_of("fp8 stored", 65536)), Accepted)


def test_negative_control_another_rule_rounds_otherwise():
    x = inputs(96, torch.float32)[:1]
    got = Round().bind(op_of("mx fp4_e2m1 floor", 96))([], x)
    assert not torch.equal(got, fake_quantize(x, SPECS["mx fp4_e2m1 ceil"]))


@pytest.mark.parametrize("name", ["fp8 stored", "fp8 stored columns", "int8 stored"])
def test_states_of_a_cache_take_the_same_kernel(name):
    spec, x = SPECS[name], inputs(96, torch.float32)[:4]
    scale, zero = stored(spec, 96)
    scale = scale[None]  # as a cache holds it: [1, 1] or [1, features]
    run, _ = kv_states._rounds(to_text(spec), 96, torch.float32, torch.device("cpu"))
    assert run.func.__module__ == "quant_kernels_triton.rounding_run"
    assert torch.equal(run([], x, scale, zero), fake_quantize(x, spec, scale, zero))
