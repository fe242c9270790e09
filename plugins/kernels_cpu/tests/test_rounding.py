"""Rounded activations equal the reference bit for bit, for every rule, dtype and kind of row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.quantizer import cheapest
from quant_core.numerics import MX_RULES
from quant_core.registry import registry
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, Zero, group
from quant_core.spec_json import to_text
from quant_kernels_cpu.rounding import ROUND, steps

INT8, INT4, UINT8 = Element.int(8), Element.int(4), Element.uint(8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3_fnuz")


def small(name: str) -> Element:
    return Element(name=name, bits=int(name[2]), kind="float")


def f32(grain=TENSOR, **more) -> Scale:
    return Scale(element="f32", grain=grain, **more)


def run_time(element: Element, grain, scale: str = "f32", zero=None, ties="even", **more):
    fine = Scale(element=scale, grain=grain, static=False, **more)
    return QuantSpec(element=element, scales=(fine,), zero=zero, ties=ties)


def under(outer: Scale, scale: str = "fp8_e4m3", size: int = 16, **more) -> QuantSpec:
    fine = Scale(element=scale, grain=group(size), static=False, **more)
    return QuantSpec(element=small("fp4_e2m1"), scales=(fine, outer))


FP8, ZERO = small("fp8_e4m3"), Zero(kind="code", element="int8")
SPECS = {
    "int8 token": run_time(INT8, CHANNEL, peak=127.5),
    "int8 tensor": run_time(INT8, TENSOR),
    "int8 groups of 24": run_time(INT8, group(24)),
    "int8 token, zero": run_time(INT8, CHANNEL, zero=ZERO),
    "int8 groups, zero": run_time(INT8, group(32), zero=ZERO),
    "uint8 tensor, zero": run_time(UINT8, TENSOR, zero=Zero(kind="code", element="uint8")),
    "int4 up": run_time(INT4, CHANNEL, ties="up"),
    "int4 down": run_time(INT4, group(16), ties="down"),
    "int4 clipped": QuantSpec(element=INT4, scales=(f32(CHANNEL, static=False), f32())),
    "fp8 token": run_time(FP8, CHANNEL),
    "fp8 tensor": run_time(FP8, TENSOR),
    "fp8 groups": run_time(FP8, group(128)),
    "fp8 bounded": run_time(FP8, CHANNEL, least=1e-3, most=2e-3),
    "fp8 under fp8": run_time(FP8, group(32), "fp8_e4m3"),
    "fp6 away": run_time(small("fp6_e3m2"), CHANNEL, ties="away"),
    "mx bounded": run_time(small("fp4_e2m1"), group(32), "e8m0", least=2.0**-4, most=4.0),
    "mx peak": run_time(FP8, group(32), "e8m0", peak=240.0, rule="rceil"),
    "nvfp4": under(f32(static=False)),
    "nvfp4 token": under(f32(CHANNEL, static=False)),
    "nvfp4 peak": under(f32(static=False, peak=2688.0), least=2.0**-9),
    "nvfp4 stored": under(f32()),
    "nvfp4 stored inverse": under(f32(inverse=True)),
    "fp8 stored": QuantSpec(element=FP8, scales=(f32(),)),
    "fp8 stored inverse": QuantSpec(element=FP8, scales=(f32(inverse=True),)),
    "fp8 stored groups": QuantSpec(element=FP8, scales=(f32((0, 32)),)),
    "int8 stored": QuantSpec(
        element=INT8, scales=(Scale(element="bf16", grain=TENSOR),), zero=ZERO
    ),
    "uint8 stored groups": QuantSpec(
        element=UINT8,
        scales=(Scale(element="f16", grain=(0, 32)),),
        zero=Zero(kind="code", element="uint8"),
    ),
}
SPECS |= {f"{name} token": run_time(small(name), CHANNEL) for name in FLOATS}
SPECS |= {
    f"mx {name} {rule}": run_time(small(name), group(32), "e8m0", rule=rule)
    for name in FLOATS[:5]
    for rule in MX_RULES
}


def stored(spec: QuantSpec, k: int) -> tuple[Tensor | None, Tensor | None]:
    """Values of a static scale and its zero."""
    scale = next((s for s in spec.scales if s.static), None)
    if scale is None:
        return None, None
    count = -(-k // scale.grain[1]) if scale.grain[1] else 1
    g = torch.Generator().manual_seed(7)
    values = torch.rand(count, generator=g) * 0.05 + (0.9 if spec.element is INT4 else 0.01)
    values = 1 / values if scale.inverse else values
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    zero = torch.randint(0, 200, (count,), generator=g).to(torch.uint8)
    return values.to(kinds[scale.element]), None if spec.zero is None else zero


def rows(k: int, dtype: torch.dtype) -> list[Tensor]:
    """Usual rows, zeros, outliers, ties, tiny, huge and non-finite values; then all finite ones."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(12, k, generator=g)
    x[1] *= torch.logspace(-6, 4, k)
    x[2] = 0
    x[3] = x[3].round() * 0.5
    x[4] = -0.0
    x[4, k // 2] = -1e4
    x[5] *= 1e-38  # subnormal in float32
    x[6] *= 1e-44
    x[7] *= 1e36
    x[8] = -x[8].abs() * torch.logspace(-3, 0, k)
    x[9, k - 1] = float("nan")
    x[10, 0] = float("inf")
    x[11, 3] = float("-inf")
    x = x.to(dtype)
    finite = torch.isfinite(x).all(1)
    return [*x.unsqueeze(1), x[finite], x]


def asked(spec: QuantSpec, k: int, act: str = "bfloat16", **sizes: int) -> OpSpec:
    static = any(s.static for s in spec.scales)
    names = {"input_scale"} | ({"input_zero"} if spec.zero is not None else set())
    return OpSpec(
        op="quantize",
        operands=(("input", spec),),
        sizes=(("k", k), *sizes.items()),
        act_dtype=act,
        features=frozenset(names if static else ()),
    )


def equal(got: Tensor, want: Tensor) -> bool:
    """Bits, but those of a NaN."""
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    both = got.isnan() & want.isnan()
    return bool(((got.contiguous().view(kind) == want.view(kind)) | both).all())


@pytest.mark.parametrize("name", SPECS)
def test_every_bit_is_that_of_the_reference(isa, name):
    spec = SPECS[name]
    for k in (96, 352, 1000):
        scale, zero = stored(spec, k)
        run = ROUND.bind(asked(spec, k))
        for dtype in DTYPES:
            for x in rows(k, dtype):
                want = fake_quantize(x, spec, scale, zero)
                assert equal(run([], x, scale, zero), want), (k, dtype, x[0, :4])


@pytest.mark.parametrize("name", ["int8 token", "mx fp6_e2m3 even", "nvfp4", "fp8 stored"])
def test_threads_views_and_more_dimensions_change_nothing(isa, name, threads):
    spec, k = SPECS[name], 5000  # no row fits the stack
    scale, zero = stored(spec, k)
    run = ROUND.bind(asked(spec, k))
    x = torch.randn(3, 7, k + 8)[:, :, 8:].bfloat16()
    before = x.clone()
    want = fake_quantize(x.reshape(-1, k), spec, scale, zero).view(x.shape)
    for count in (1, 2):
        threads(count)
        got = run([], x, scale, zero)
        assert got.shape == x.shape
        assert equal(got, want)
    assert torch.equal(x, before)
    assert run([], x[:0], scale, zero).shape == (0, 7, k)


@pytest.mark.parametrize("name", ["fp8 stored", "uint8 stored groups", "nvfp4 stored inverse"])
def test_each_token_is_rounded_under_its_own_expert(isa, name):
    spec, k, experts = SPECS[name], 352, 5
    scale, zero = stored(spec, k * experts) if spec.scales[0].grain[1] == 32 else stored(spec, k)
    factors = torch.tensor([1.0, 3.0, 0.5, 2.0, 7.0])
    if scale.numel() == 1:
        scale, zero = (scale * factors).view(experts, 1), None
    else:
        scale, zero = scale.view(experts, -1), zero.view(experts, -1)
    run = ROUND.bind(asked(spec, k, experts=experts))
    for x in rows(k, torch.bfloat16)[-2:]:  # the last one holds NaN: all by the reference
        own = torch.arange(len(x)) * 3 % experts
        got = run([], x, scale, zero, own)
        for i, e in enumerate(own.tolist()):
            want = fake_quantize(x[i : i + 1], spec, scale[e], None if zero is None else zero[e])
            assert equal(got[i : i + 1], want), (i, e)
        assert not equal(got, run([], x, scale, zero, (own + 1) % experts))
        one = run([], x[:1], scale, zero, own[:1])
        assert equal(one, got[:1])
        run([], x, scale, zero, torch.full((len(x),), -1))


@pytest.mark.parametrize(
    "name", ["int8 token", "int8 groups, zero", "mx fp4_e2m1 even", "nvfp4 stored inverse"]
)
def test_another_rule_gives_other_values(isa, name):
    """Negative control of the comparison of bits."""
    spec, k = SPECS[name], 352
    fine = spec.scales[0]
    other = {"rule": "ceil"} if fine.element == "e8m0" else {"peak": 127.0 if fine.peak else 5.9}
    if spec.zero is not None:
        changed = replace(spec, zero=None)
    else:
        changed = replace(spec, scales=(replace(fine, **other), *spec.scales[1:]))
    scale, zero = stored(spec, k)
    x = rows(k, torch.float32)[0]
    run = ROUND.bind(asked(changed, k))
    assert not equal(run([], x, scale, zero), fake_quantize(x, spec, scale, zero))


@pytest.mark.parametrize("name", FLOATS[:5])
@pytest.mark.parametrize("rule", MX_RULES)
def test_steps_of_the_exponent_are_those_of_the_rule(name, rule):
    """On both sides of every step, where the table could be one off."""
    from quant_core.numerics import mx_scale

    table = steps(small(name), rule, 0.0)
    at = table[256:][table[256:] < 0x7F800000]
    bits = torch.cat([at - 1, at, torch.randint(0, 0x7F800000, (4096,), dtype=torch.int32)])
    bits = bits.clamp(min=0)
    f = (bits >> 23).long()
    byte = table[f] + (bits >= table[256 + f]).int()
    want = mx_scale(bits.view(torch.float32), small(name), rule)
    assert torch.equal(byte, want.int())


def test_it_is_chosen_to_round_on_a_cpu_and_can_be_named_or_not(isa):
    op = asked(SPECS["fp8 token"], 96)
    assert cheapest(op, registry())[0].name == "cpu_round"
    assert cheapest(op, registry(), kernels="quantize=torch_round")[0].name == "torch_round"


@pytest.mark.parametrize(
    ("axis", "op"),
    [
        ("op", replace(asked(SPECS["fp8 token"], 96), op="linear")),
        ("device", replace(asked(SPECS["fp8 token"], 96), device=("cuda", "90"))),
        ("act_dtype", asked(SPECS["fp8 token"], 96, "float64")),
        ("input", asked(run_time(Element.int(32), CHANNEL), 96)),
    ],
)
def test_what_it_does_not_round_is_refused_with_its_axis(isa, axis, op):
    answer = ROUND.accepts(op)
    assert isinstance(answer, Rejected)
    assert answer.axis == axis
    assert isinstance(ROUND.accepts(asked(SPECS["fp8 token"], 96)), Accepted)


def test_the_operator_is_one_of_torch(isa):
    spec, k = SPECS["nvfp4 stored"], 96
    scale, _ = stored(spec, k)
    x = rows(k, torch.bfloat16)[0]
    args = (x, scale, None, to_text(spec))
    torch.library.opcheck(torch.ops.quant_cpu.round_input.default, args)
    run = torch.compile(ROUND.bind(asked(spec, k)), fullgraph=True, backend="aot_eager")
    assert equal(run([], x, scale), fake_quantize(x, spec, scale))
    other = x.double()  # a dtype of the reference's
    assert torch.equal(
        ROUND.bind(asked(spec, k))([], other, scale), fake_quantize(other, spec, scale)
    )
