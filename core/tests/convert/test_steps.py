"""The rewrites that targets are made of, on values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from quant_core.convert import steps
from quant_core.convert.fit import Losses, check_options
from quant_core.errors import ConfigError, LayoutError
from quant_core.packing import pack, unpack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    Packing,
    QuantSpec,
    Scale,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

F16, F32 = torch.float16, torch.float32


def made(
    codes, *, bits=4, kind="uint", scales, zero=None, zeros=None, offset=(), packing=CANONICAL
):
    """One matrix from lists; ``scales`` and ``offset``: (element, grain, values) each."""
    element = Element.uint(bits) if kind == "uint" else Element.int(bits)
    dtypes = {"f16": F16, "bf16": torch.bfloat16, "f32": F32}

    def values(level):
        return torch.tensor(level[2], dtype=dtypes.get(level[0], torch.uint8))

    levels = tuple(Scale(element=e, grain=g) for e, g, _ in offset)
    if offset:
        zero = Zero(kind="offset", levels=levels)
    raw = torch.tensor(codes).to(torch.int16).to(torch.uint8)
    return QuantizedTensor(
        spec=QuantSpec(
            element=element,
            scales=tuple(Scale(element=e, grain=g) for e, g, _ in scales),
            zero=zero,
        ),
        shape=tuple(raw.shape),
        codes=pack(raw, bits, packing),
        packing=packing,
        scales=tuple(map(values, scales)),
        zeros=None if zeros is None else torch.tensor(zeros, dtype=torch.uint8),
        offset=tuple(map(values, offset)),
    )


def codes_of(qt):
    return unpack(qt.codes, qt.spec.element.bits, qt.shape, qt.packing).tolist()


def no_loss():
    return Losses("layer")


# ----------------------------------------------------------------------------------------- codes


def test_int8_becomes_uint8_around_128():
    qt = made([[-128, -1, 0, 127]], bits=8, kind="int", scales=[("f16", CHANNEL, [[0.5]])])
    out = steps.recenter(qt, 8, 128)
    assert codes_of(out) == [[0, 127, 128, 255]]
    assert out.spec.zero == Zero(kind="const", value=128)
    assert out.dequantize().tolist() == [[-64.0, -0.5, 0.0, 63.5]]


def test_zero_codes_are_subtracted_into_five_bits():
    zero = Zero(kind="code", element="uint4")
    qt = made([[0, 15, 3, 4]], scales=[("f16", group(2), [[1.0, 2.0]])], zero=zero, zeros=[[15, 0]])
    assert steps.recenter(qt, 4, 8) is None  # 0 - 15 needs more than 4 bits
    out = steps.recenter(qt, 5, 16)
    assert codes_of(out) == [[1, 16, 19, 20]]
    assert out.dequantize().tolist() == [[-15.0, 0.0, 6.0, 8.0]]


def test_symmetric_three_bits_widen_to_four():
    qt = made(
        [[0, 7, 4, 1]], bits=3, scales=[("f16", CHANNEL, [[2.0]])], zero=Zero(kind="const", value=4)
    )
    out, sym = steps.narrowest(qt, (4, 8), "layer")
    assert sym
    assert (out.spec.element.bits, codes_of(out)) == (4, [[4, 11, 8, 5]])
    assert torch.equal(out.dequantize(), qt.dequantize())


def test_constant_off_center_becomes_zero_codes():
    zero = Zero(kind="const", value=2)
    qt = made([[0, 15]], scales=[("f16", CHANNEL, [[1.0]])], zero=zero)
    out, sym = steps.narrowest(qt, (4, 8), "layer")  # 15 - 2 + 8 does not fit 4 bits
    assert not sym
    assert (out.zeros.tolist(), out.dequantize().tolist()) == ([[2]], [[-2.0, 13.0]])


def test_code_zeros_keeps_the_packing_of_codes_that_fit():
    packing = Packing(word="int32")
    zero = Zero(kind="const", value=8)
    qt = made([[1] * 8], scales=[("f16", CHANNEL, [[1.0]])], zero=zero, packing=packing)
    out = steps.code_zeros(qt, 4)
    assert out.packing == packing
    assert out.codes is qt.codes


def test_opaque_blocks_are_refused():
    qt = made([[1]], scales=[("f16", CHANNEL, [[1.0]])])
    qt.spec = QuantSpec(element=Element.uint(8), blocks="made_up")
    with pytest.raises(LayoutError, match="expected integer codes") as caught:
        steps.plain_codes(qt, "layer")
    assert caught.value.code == "Q-LAYOUT-REPRESENT"


# ---------------------------------------------------------------------------------------- scales


def test_two_factors_fold_where_the_product_is_exact():
    qt = made(
        [[1, 2, 3, 4]],
        scales=[("uint6", group(2), [[3, 5]]), ("f16", group(4), [[0.25]])],
    )
    out = steps.one_scale(qt, ("f16",), no_loss())
    assert out.spec.scales == (Scale(element="f16", grain=group(2)),)
    assert out.scales[0].tolist() == [[0.75, 1.25]]
    assert torch.equal(out.dequantize(), qt.dequantize())


def test_product_that_is_no_half_is_a_loss_or_the_next_type():
    # 63 * (1 + 2**-10) needs 16 bits of mantissa
    qt = made([[1, 2]], scales=[("uint6", group(2), [[63]]), ("f16", group(2), [[1.0009765625]])])
    losses = no_loss()
    steps.one_scale(qt, ("f16", "bf16"), losses)
    with pytest.raises(LayoutError, match="scales rounded to f16"):
        losses.taken()
    wide = steps.one_scale(qt, ("f16", "f32"), no_loss())
    assert wide.spec.scales[0].element == "f32"
    assert torch.equal(wide.dequantize(), qt.dequantize())
    allowed = Losses("layer", allowed=True)
    rounded = steps.one_scale(qt, ("f16",), allowed)
    assert allowed.taken() == ("scales rounded to f16",)
    assert rounded.scales[0].item() == 63.0625  # nearest half to 63.0615...


def test_scale_that_overflows_half_is_refused():
    qt = made([[1]], scales=[("f32", CHANNEL, [[1e6]])])
    with pytest.raises(LayoutError, match="overflow"):
        steps.one_scale(qt, ("f16",), Losses("layer", allowed=True))


@pytest.mark.parametrize("grain", [CHANNEL, TENSOR, (1, 8), (2, 4), (2, 8)])
def test_group_columns_repeats_coarser_scales(grain):
    rows = 1 if grain[0] in (0, 2) else 2
    cols = {0: 1, 8: 1, 4: 2}[grain[1]]
    values = [[1.0 + r + 10 * c for c in range(cols)] for r in range(rows)]
    qt = made([[1] * 8, [2] * 8], scales=[("f16", grain, values)])
    out = steps.group_columns(qt, 4, "layer")
    assert out.spec.scales[0].grain == (1, 4)
    assert out.scales[0].shape == (2, 2)
    assert torch.equal(out.dequantize(), qt.dequantize())


def test_group_columns_never_joins_groups():
    qt = made([[1] * 8], scales=[("f16", group(2), [[1.0, 2.0, 3.0, 4.0]])])
    with pytest.raises(LayoutError, match="groups of 2 columns"):
        steps.group_columns(qt, 4, "layer")


# ---------------------------------------------------------------------------------------- offset


def test_offset_that_is_a_multiple_becomes_integer_zeros():
    qt = made(
        [[0, 15, 7, 8]],
        scales=[("f16", group(2), [[0.5, 2.0]])],
        offset=[("f16", group(2), [[-4.0, -30.0]])],
    )
    out = steps.integer_zero(qt, no_loss())
    assert out.zeros.tolist() == [[8, 15]]
    assert out.dequantize().tolist() == qt.dequantize().tolist() == [[-4.0, 3.5, -16.0, -14.0]]


def half_off():
    return made(
        [[0, 15], [3, 9]],
        scales=[("f16", CHANNEL, [[0.5], [0.0]])],
        offset=[("f16", CHANNEL, [[-3.75], [2.0]])],
    )


def test_offset_between_two_codes_is_refused_with_the_count():
    losses = no_loss()
    steps.integer_zero(half_off(), losses)
    with pytest.raises(LayoutError, match="2 of 2 offsets are no multiple of their scale"):
        losses.taken()


def test_narrow_target_rounds_zero_points():
    losses = Losses("layer", allowed=True)
    out = steps.integer_zero(half_off(), losses)
    assert losses.taken() == ("zero points rounded to integers",)
    assert out.zeros[0].tolist() == [8]  # 7.5, to the even neighbour
    assert out.dequantize()[0].tolist() == [-4.0, 3.5]


def test_wide_target_finds_a_grid_that_holds_half_codes_and_constants():
    losses = Losses("layer", allowed=True)
    out = steps.integer_zero(half_off(), losses, wide=True)
    assert out.spec.element == Element.uint(8)
    assert losses.taken() == ("weights rounded to 8-bit codes",)
    # 7.5 codes are 15 half ones; the second row is constant: 64 steps of 2/64
    assert out.dequantize().tolist() == half_off().dequantize().tolist()
    assert out.scales[0][1].item() == 2.0 / 64


def test_float_zero_points_become_integers_where_they_are():
    zero = Zero(kind="code", element="f16")
    qt = made([[0, 15]], scales=[("f16", CHANNEL, [[0.5]])], zero=zero)
    qt.zeros = torch.tensor([[7.0]], dtype=F16)
    out = steps.integer_zero(qt, no_loss())
    assert (out.zeros.tolist(), out.zeros.dtype) == ([[7]], torch.uint8)
    assert out.dequantize().tolist() == qt.dequantize().tolist() == [[-3.5, 4.0]]
    qt.zeros = torch.tensor([[7.5]], dtype=F16)
    losses = Losses("layer", allowed=True)
    fine = steps.integer_zero(qt, losses, wide=True)
    assert losses.taken()
    assert fine.dequantize().tolist() == [[-3.75, 3.75]]


# --------------------------------------------------------------------------------- order, options


def test_shuffled_columns_of_whole_groups_are_put_back():
    qt = made([[1, 2, 3, 4]], scales=[("f16", group(2), [[1.0, 10.0]])])
    qt.spec = QuantSpec(element=qt.spec.element, scales=qt.spec.scales, gather=True)
    qt.gather = torch.tensor([3, 2, 0, 1], dtype=torch.int32)
    out = steps.in_order(qt, 4, "layer")
    assert out.gather is None
    assert out.dequantize().tolist() == [[30.0, 40.0, 2.0, 1.0]]


def test_columns_of_scattered_groups_are_refused():
    qt = made([[1, 2, 3, 4]], scales=[("f16", group(2), [[1.0, 10.0]])])
    qt.spec = QuantSpec(element=qt.spec.element, scales=qt.spec.scales, gather=True)
    qt.gather = torch.tensor([0, 2, 1, 3], dtype=torch.int32)
    with pytest.raises(LayoutError, match="activation order"):
        steps.in_order(qt, 4, "layer")


def test_quantized_activations_are_a_loss_and_accumulator_terms_a_refusal():
    qt = made([[1]], scales=[("f16", CHANNEL, [[1.0]])])
    operands = {"weight": qt.spec, "input": qt.spec}
    lt = LayerTensors(operands={"weight": qt}, input_scale=torch.ones(1))
    losses = Losses("layer", allowed=True)
    assert steps.weight_only(lt, operands, losses).input_scale is None
    assert losses.taken() == ("activations are no longer quantized",)
    assert steps.weight_only(lt, operands, no_loss(), keep_input=True) is lt
    lt.acc_bias = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(LayoutError, match="acc_bias"):
        steps.weight_only(lt, operands, Losses("layer", allowed=True))


def test_all_losses_of_a_matrix_are_named_at_once():
    losses = Losses("layer")
    losses.lose("a found", "a wanted", "a lost")
    losses.lose("b found", "b wanted", "b lost")
    with pytest.raises(LayoutError) as caught:
        losses.taken()
    for text in ("a found; b found", "a wanted and b wanted", "a lost; b lost"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"size": 3}, {"color": "red"}, {"group": "x"}, {"group": 0}, {"group": -1}, {"group": True}],
    ids=str,
)
def test_options_are_checked_by_name_and_value(options):
    known = {"size": (1, 2), "group": int, "any": ()}
    with pytest.raises(ConfigError) as caught:
        check_options(options, known, "made_up")
    assert caught.value.code == "Q-CFG-VALUE"
    assert caught.value.tensor in options
    check_options({"size": 2, "group": 32, "any": "x"}, known, "made_up")
