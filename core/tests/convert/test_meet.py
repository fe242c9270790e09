"""A weight under another description, on values worked out by hand or counted over many floats."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from quant_core.convert.choose import first_fit, fit_linear
from quant_core.convert.fit import Fit, Losses
from quant_core.convert.stacks import Stack, whole_shape
from quant_core.convert.steps import input_distance, meet, same_input
from quant_core.convert.steps.scales import divisor_of
from quant_core.errors import LayoutError
from quant_core.packing import pack
from quant_core.scheme import Scheme
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    LayerDesc,
    QuantSpec,
    Scale,
    Span,
    TensorInfo,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
F32 = torch.float32


def fp4(scales: tuple[Scale, ...], *values: torch.Tensor) -> QuantizedTensor:
    """All sixteen codes in each of two rows of 32."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)
    spec = QuantSpec(element=FP4, scales=scales)
    return QuantizedTensor(spec=spec, shape=(2, 32), codes=pack(codes, 4, CANONICAL), scales=values)


def mx(*bytes_: int) -> QuantizedTensor:
    return fp4((Scale(element="e8m0", grain=group(32)),),
               torch.tensor(bytes_, dtype=torch.uint8).view(2, 1))  # fmt: skip


NV = (Scale(element="fp8_e4m3", grain=group(16)), Scale(element="f32", grain=TENSOR))


# ------------------------------------------------------------------------------- small floats


def test_fp4_codes_become_fp8_codes_of_the_same_values():
    want = QuantSpec(element=FP8, scales=(Scale(element="e8m0", grain=group(32)),))
    got = meet(mx(127, 130), want, 32, Losses("x"))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    row = torch.tensor(values + [-v for v in values])
    assert torch.equal(got.codes.view(torch.float8_e4m3fn).float()[0, :16], row)
    assert torch.equal(got.dequantize(), mx(127, 130).dequantize())


def test_fp8_codes_do_not_become_fp4_codes_that_lack_a_value():
    wide = meet(mx(127, 130), QuantSpec(element=FP8, scales=mx(1, 1).spec.scales), 32, Losses("x"))
    assert torch.equal(
        meet(wide, mx(1, 1).spec, 32, Losses("x")).dequantize(), wide.dequantize()
    )  # here all values are fp4 values
    other = replace(wide, codes=wide.codes.clone())
    other.codes[1, 3] = 0x3A  # 1.25
    with pytest.raises(LayoutError, match="values that fp4_e2m1 lacks"):
        meet(other, mx(1, 1).spec, 32, Losses("x"))


def test_powers_of_two_become_fp8_scales_under_a_power_of_two():
    """2**-40 and 2**-24 are no fp8 numbers, but 2**-8 and 2**8 are, under 2**-32."""
    source = mx(127 - 40, 127 - 24)
    got = meet(source, QuantSpec(element=FP4, scales=NV), 32, Losses("x"))
    fine = got.scales[0].view(torch.float8_e4m3fn).float()
    assert fine.shape == (2, 2)
    assert float(fine[1, 0] / fine[0, 0]) == 2.0**16
    assert torch.equal(got.dequantize(), source.dequantize())


def test_powers_of_two_too_far_apart_for_one_factor_are_refused():
    with pytest.raises(LayoutError, match="underflow"):
        meet(mx(127 - 40, 127), QuantSpec(element=FP4, scales=NV), 32, Losses("x"))


def test_scales_that_are_no_powers_of_two_are_refused_as_e8m0():
    source = fp4((Scale(element="f32", grain=CHANNEL),), torch.tensor([[1.5], [2.0]]))
    with pytest.raises(LayoutError, match="no powers of two"):
        meet(source, mx(1, 1).spec, 32, Losses("x"))


def test_equal_scales_become_one_and_unlike_ones_do_not():
    want = QuantSpec(element=FP4, scales=(Scale(element="f32", grain=TENSOR),))
    rows = (Scale(element="f32", grain=CHANNEL),)
    same = fp4(rows, torch.tensor([[0.3], [0.3]]))
    assert meet(same, want, 32, Losses("x")).scales[0].tolist() == [[pytest.approx(0.3)]]
    with pytest.raises(LayoutError, match="differ inside"):
        meet(fp4(rows, torch.tensor([[0.3], [0.4]])), want, 32, Losses("x"))


def test_integers_and_floats_are_not_exchanged():
    uint4 = QuantSpec(element=Element.uint(4), scales=mx(1, 1).spec.scales,
                      zero=Zero(kind="const", value=8))  # fmt: skip
    with pytest.raises(LayoutError, match="weights are fp4_e2m1"):
        meet(mx(127, 127), uint4, 32, Losses("x"))


# ------------------------------------------------------------------------------- float zeros


def offsets(codes: list[int], steps: list[float], lows: list[float]) -> QuantizedTensor:
    """One row, two columns to each step and offset."""
    grain = (1, 2)
    zero = Zero(kind="offset", levels=(Scale(element="f16", grain=grain),))
    spec = QuantSpec(
        element=Element.uint(4), scales=(Scale(element="f16", grain=grain),), zero=zero
    )
    return QuantizedTensor(
        spec=spec,
        shape=(1, len(codes)),
        codes=pack(torch.tensor([codes], dtype=torch.uint8), 4, CANONICAL),
        scales=(torch.tensor([steps]).half(),),
        offset=(torch.tensor([lows]).half(),),
    )


FLOAT_ZEROS = QuantSpec(
    element=Element.uint(4),
    scales=(Scale(element="f32", grain=(1, 2)),),
    zero=Zero(kind="code", element="f32"),
)


def test_a_group_of_one_value_becomes_one_step_above_its_zero():
    """A scale of 0 has no multiple: 7 * 0 + 1.5 is (0 - -1) * 1.5."""
    source = offsets([1, 3, 7, 9, 5, 6], [0.5, 0.0, 0.0], [-1.0, 1.5, 0.0])
    losses = Losses("x")
    got = meet(source, FLOAT_ZEROS, 6, losses)
    assert losses.taken() == ()
    assert got.dequantize().tolist() == [[-0.5, 0.5, 1.5, 1.5, 0.0, 0.0]]
    assert got.zeros.tolist() == [[2.0, -1.0, 0.0]]
    assert source.codes.tolist() == offsets([1, 3, 7, 9, 5, 6], [0], [0]).codes.tolist()


def test_an_offset_between_two_floats_is_a_named_loss():
    losses = Losses("x", allowed=True)
    got = meet(offsets([0, 15], [3.0], [-1.0]), FLOAT_ZEROS, 2, losses)
    assert losses.taken() == ("zero points rounded to f32 quotients",)
    assert got.dequantize().tolist() == [[pytest.approx(-1, rel=2e-7), pytest.approx(44)]]


# ------------------------------------------------------------------------- factors and divisors


def test_86_percent_of_all_floats_have_a_divisor_and_each_gives_it_back():
    generator = torch.Generator().manual_seed(1)
    x = 2 ** torch.rand(4000, generator=generator)  # as magnitudes are; every binade is alike
    exact = 0
    for value in x:
        divisor, found = divisor_of(value.view(1, 1))
        assert found == bool(1 / divisor == value)
        exact += found
    assert 0.84 < exact / len(x) < 0.88


def test_divisor_as_a_factor_keeps_every_bit_and_comes_back():
    generator = torch.Generator().manual_seed(2)
    fine = torch.randint(1, 126, (2, 2), generator=generator, dtype=torch.uint8)
    inverse = (NV[0], replace(NV[1], inverse=True))
    for amax in torch.rand(50, generator=generator).bfloat16().float():
        factor = (2688 / amax).view(1, 1)
        source = fp4(inverse, fine, factor)
        there = meet(source, QuantSpec(element=FP4, scales=NV), 32, Losses("x"))
        assert torch.equal(there.dequantize(), source.dequantize())
        back = meet(there, source.spec, 32, Losses("x"))
        assert torch.equal(back.scales[1], factor)


def test_factor_without_a_divisor_is_a_loss_by_name():
    value = next(
        v for v in (torch.rand(100) + 1) if not divisor_of(v.view(1, 1))[1]
    )  # one in seven
    source = fp4(NV, torch.full((2, 2), 0x38, dtype=torch.uint8), value.view(1, 1))
    losses = Losses("x", allowed=True)
    want = QuantSpec(element=FP4, scales=(NV[0], replace(NV[1], inverse=True)))
    got = meet(source, want, 32, losses).dequantize()
    assert losses.taken() == ("factor of the tensor replaced by its nearest divisor",)
    torch.testing.assert_close(got, source.dequantize(), rtol=2**-22, atol=0)
    losses.allowed = False
    with pytest.raises(LayoutError, match="--allow-inexact"):
        losses.taken()


# ---------------------------------------------------------------------------------- activations

TOKEN = QuantSpec(element=FP8, scales=(Scale(element="f32", grain=CHANNEL, static=False),))
STATIC = QuantSpec(element=FP8, scales=(Scale(element="bf16", grain=TENSOR),))


def test_distance_of_activations():
    bounded = replace(TOKEN, scales=(replace(TOKEN.scales[0], least=1e-6),))
    assert input_distance(TOKEN, TOKEN) == 0
    assert input_distance(TOKEN, bounded) == 1
    assert input_distance(TOKEN, None) == 2
    assert input_distance(None, TOKEN) == 3
    assert input_distance(STATIC, TOKEN) == 4
    assert input_distance(None, STATIC) == input_distance(TOKEN, STATIC) == 9  # never made up


def test_type_of_a_stored_input_scale_is_no_part_of_its_meaning():
    wide = replace(STATIC, scales=(replace(STATIC.scales[0], element="f32"),))
    assert same_input(STATIC, wide)
    assert not same_input(STATIC, TOKEN)


# --------------------------------------------------------------------------------------- choice


@dataclass(frozen=True, kw_only=True)
class Named(Scheme):
    def params(self, layer):
        return ()

    def canonicalize(self, layer, tensors):
        raise NotImplementedError


def scheme(name, weight, inputs=None):
    operands = {"weight": weight} | ({} if inputs is None else {"input": inputs})
    return Named(name=name, shape=(2, 32), operands=operands)


LAYER = LayerDesc(kind="linear", name="a.b", stored="a.b", inp=Span.whole(32), out=Span.whole(2))
MX_SPEC = mx(1, 1).spec


def choose(schemes, have, allow=False):
    operands = {"weight": MX_SPEC} | ({} if have is None else {"input": have})
    lt = LayerTensors(operands={"weight": mx(127, 128)})
    return first_fit(LAYER, lt, operands, schemes, allow_inexact=allow, holds="things")


def test_the_exact_scheme_wins_whatever_the_order():
    wide = scheme("wide", QuantSpec(element=FP8, scales=MX_SPEC.scales))
    same = scheme("same", MX_SPEC)
    assert choose([wide, same], None).scheme.name == "same"
    assert choose([wide], None).scheme.name == "wide"
    with_rule = scheme("rule", MX_SPEC, replace(TOKEN, ties="away"))
    assert choose([with_rule, scheme("exact", MX_SPEC, TOKEN), same], TOKEN).scheme.name == "exact"


def test_refusal_names_the_loss_that_could_be_taken_not_what_cannot_be_done():
    one = QuantSpec(element=FP8, scales=(Scale(element="f32", grain=TENSOR),))
    hopeless = scheme("hopeless", one, TOKEN)
    dropped = scheme("dropped", MX_SPEC)
    with pytest.raises(LayoutError, match="no longer quantized") as caught:
        choose([hopeless, dropped], TOKEN)
    assert "--allow-inexact" in str(caught.value)
    assert choose([hopeless, dropped], TOKEN, allow=True).losses == (
        "activations are no longer quantized",
    )


def test_no_scheme_at_all_says_what_the_format_holds():
    with pytest.raises(LayoutError, match="expected things"):
        choose([], None)


def test_lm_head_that_does_not_fit_becomes_floats_and_other_layers_are_refused():
    lt = LayerTensors(operands={"weight": mx(127, 128)})

    def refuse(allowed: bool) -> Fit:
        raise LayoutError("no", code="Q-LAYOUT-REPRESENT")

    head = replace(LAYER, name="lm_head")
    assert fit_linear(head, lt, True, refuse).scheme is None
    assert fit_linear(replace(LAYER, kind="embedding"), lt, True, refuse).scheme is None
    with pytest.raises(LayoutError):
        fit_linear(LAYER, lt, True, refuse)


def test_damage_of_an_lm_head_is_not_taken_for_a_format_that_cannot_hold_it():
    def broken(allowed: bool) -> Fit:
        raise LayoutError("damaged", code="Q-VALUE-SCALE")

    lt = LayerTensors(operands={"weight": mx(127, 128)})
    with pytest.raises(LayoutError, match="damaged"):
        fit_linear(replace(LAYER, name="lm_head"), lt, True, broken)


# --------------------------------------------------------------------------------------- stacks


def test_stack_is_whole_once_every_part_was_put():
    parts = {
        (e, (half, 6, 2)): torch.full((3, 4), 10.0 * e + half) for e in (0, 1) for half in (0, 1)
    }
    shape: tuple[int, ...] = ()
    for index in parts:
        shape = whole_shape(index, (3, 4), shape)
    assert shape == (2, 6, 4)
    info = TensorInfo(name="s", dtype="float32", shape=shape, file="", offset=0, nbytes=0)
    stack = Stack(info)
    done = [stack.put(index, part) for index, part in parts.items()]
    assert done == [False, False, False, True]
    assert stack.whole[1, :, 0].tolist() == [10, 11, 10, 11, 10, 11]
