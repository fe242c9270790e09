"""Float weights, tables and scales that C does not read: values, restore, parts, experts."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch

from cpu_made import (
    HALF_ULP,
    RESOLVED_SPECS,
    RESOLVED_TABLE_SPECS,
    SPECS,
    TABLE_SPECS,
    bind,
    excess,
    make_layer,
    make_op,
)
from quant_core.dequantize import dense_weight
from quant_core.errors import LayoutError
from quant_core.kernels.base import Rejected
from quant_core.packing import pack
from quant_core.spec import CANONICAL, CHANNEL, Element, QuantSpec, Scale
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_cpu.kernel import W4A8, WnA16
from quant_kernels_cpu.library import ISAS, library, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")
SCALES = {**RESOLVED_SPECS, **RESOLVED_TABLE_SPECS, **TABLE_SPECS}
K = 352


def made(name: str, n: int = 70, k: int = K, seed: int = 0) -> LayerTensors:
    return make_layer(SCALES[name], n, k, seed)


def byte_value(code: int, bits: int, exponent_bits: int, bias: int) -> float:
    """A small float by its definition: sign, exponent, fraction."""
    fraction_bits = bits - 1 - exponent_bits
    sign = -1.0 if code >> bits - 1 else 1.0
    e = code >> fraction_bits & (1 << exponent_bits) - 1
    f = (code & (1 << fraction_bits) - 1) / (1 << fraction_bits)
    return sign * (2.0 ** (1 - bias) * f if e == 0 else 2.0 ** (e - bias) * (1 + f))


# OCP MX 1.0: all codes of 6 bits are numbers
# OFP8 1.0: e4m3 has NaN at S.1111.111, e5m2 infinity and NaN above S.11110.11; fnuz: NaN at 0x80
FORMS = {
    "fp8_e4m3": (4, 7, 0x7E),
    "fp8_e5m2": (5, 15, 0x7B),
    "fp8_e4m3_fnuz": (4, 8, 0x7F),
    "fp8_e5m2_fnuz": (5, 16, 0x7F),
    "fp6_e2m3": (2, 1, 0x1F),
    "fp6_e3m2": (3, 3, 0x1F),
}


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def _subnormals(request):
    """As they are, and with a processor told to take those of float32 for zero."""
    if not torch.set_flush_denormal(request.param) and request.param:
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_subnormals")
@pytest.mark.parametrize("element", FORMS)
@pytest.mark.parametrize("m", [1, 4, 9])
def test_every_finite_byte_has_exactly_its_value(isa, element, m):
    exponent_bits, bias, last = FORMS[element]
    bits = int(element[2])
    half = 1 << bits - 1
    codes = torch.tensor([*range(last + 1), *range(half + 1, half + 1 + last)], dtype=torch.uint8)
    n = codes.numel()
    spec = QuantSpec(
        element=Element(name=element, bits=bits, kind="float"),
        scales=(Scale(element="f32", grain=CHANNEL),),
    )
    weight = torch.zeros(n, 32, dtype=torch.uint8)
    for column in range(4):  # all four bytes of a word
        weight[:, 4 + 5 * column] = codes
    packed = pack(weight, bits, CANONICAL)
    qt = QuantizedTensor(spec=spec, shape=(n, 32), codes=packed, scales=(torch.ones(n, 1),))
    lt = LayerTensors(operands={"weight": qt})
    run = bind(lt, make_op("linear", lt, 32))
    want = torch.tensor([byte_value(c, bits, exponent_bits, bias) for c in codes.tolist()])
    for column in range(4):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.zeros(m, 32, dtype=dtype)
            x[:, 4 + 5 * column] = 1
            assert torch.equal(run(x).float(), want.expand(m, n)), (column, dtype)


@pytest.mark.parametrize("name", SCALES)
def test_linear_is_as_exact_as_float32_sums(isa, name):
    lt = made(name)
    w, run = dense_weight(lt.weight, K), bind(lt, make_op("linear", lt, K))
    g = torch.Generator().manual_seed(1)
    for m in (1, 2, 7, 8, 33, 100):
        for dtype in HALF_ULP:
            x = torch.randn(m, K, generator=g).to(dtype)
            assert excess(run(x), x, w) <= 1, (m, dtype)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("tensor", ["codes", "scales_0", "scales_1", "scales_2", "codebook"])
def test_error_measure_notices_one_broken_tensor(isa, name, tensor):
    lt = made(name)
    tensors = lt.weight.tensors()
    broken = [n for n in tensors if n.startswith(tensor)]
    if not broken:
        pytest.skip("the layer has no such tensor")
    w = dense_weight(lt.weight, K)
    for one in broken:
        value = tensors[one]
        moved = value ^ 0x11 if value.dtype == torch.uint8 else value * 1.5 + 0.25
        lt.operands["weight"] = lt.weight.with_tensors({**tensors, one: moved})
        x = torch.randn(2, K).bfloat16()
        assert not excess(bind(lt, make_op("linear", lt, K))(x), x, w) <= 10, one


@pytest.mark.parametrize("name", SCALES)
def test_operators_of_torch_give_the_same_bits(isa, name):
    """The ones in C find the product of the scales and the table among the buffers too."""
    lt = made(name)
    op, kernel = make_op("linear", lt, K), WnA16()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    values, text = list(buffers.values()), kernel._bound(op).text()
    for m in (1, 9):
        x = torch.randn(m, K).bfloat16()
        want = kernel.bind(op)(values, x)
        assert torch.equal(torch.ops.quant_cpu.linear(x, values, text), want)
        if m == 1:  # two layers of one x: a row of y each
            both = torch.ops.quant_cpu.linear_shared(x, values + values, [text, text])
            assert torch.equal(both.view(2, -1), want.expand(2, -1))


@pytest.mark.parametrize("name", SCALES)
def test_embedding_rows_equal_the_oracle_bit_for_bit(isa, name):
    lt = made(name)
    op = make_op("embedding", lt, K)
    ids = torch.tensor([[0, 69, 31], [32, 1, 33]])
    got = bind(lt, op)(ids)
    assert torch.equal(got, dense_weight(lt.weight)[ids])


@pytest.mark.parametrize("name", SCALES)
def test_every_bit_comes_back_from_parts_and_experts(isa, name):
    step = 64
    whole = made(name, 2 * step)
    op, kernel = make_op("linear", whole, K), WnA16()
    buffers = kernel.allocate(op)
    qt, tensors = whole.weight, whole.weight.tensors()
    rows = {f"scales_{i}": s.grain[0] for i, s in enumerate(qt.spec.scales)}
    if any(r > step for r in rows.values()):
        parts = [(0, 2 * step)]
    else:
        parts = [(step, 2 * step), (0, step)]
    for start, stop in parts:
        cut = {}
        for key, t in tensors.items():
            r = rows.get(key, 1)
            shared = r == 0 or key.startswith("codebook")
            cut[key] = t if shared else t[start // r : -(-stop // r)]
        part = LayerTensors(operands={"weight": qt.with_tensors(cut, shape=(stop - start, K))})
        kernel.load_(buffers, op, part, {"row": start})
    back = kernel.restore(buffers, op).weight.tensors()
    assert set(back) == set(tensors)
    assert all(
        torch.equal(back[key], t) and back[key].dtype == t.dtype for key, t in tensors.items()
    )
    x = torch.randn(3, K)
    assert torch.equal(kernel.bind(op)(list(buffers.values()), x), bind(whole, op)(x))

    other = made(name, 2 * step, seed=5)
    other.operands["weight"] = replace(other.weight, codebook=qt.codebook)
    stack = make_op("grouped_linear", whole, K, experts=2)
    held = kernel.allocate(stack)
    for e, lt in enumerate((whole, other)):
        kernel.load_(held, stack, lt, {"row": 0, "expert": e})
    got = kernel.bind(stack)(list(held.values()), x, torch.tensor([1, 0, 1]))
    assert torch.equal(got[1:2], bind(whole, op)(x[1:2]))
    assert torch.equal(got[[0, 2]], bind(other, op)(x[[0, 2]]))
    again = kernel.restore(held, stack).weight.tensors()
    for key, t in tensors.items():
        pair = t if key.startswith("codebook") else torch.stack([t, other.weight.tensors()[key]])
        assert torch.equal(again[key], pair), key


def test_part_inside_a_rectangle_of_scales_is_refused(isa):
    lt = made("fp8 block f32", 32)
    op = make_op("linear", made("fp8 block f32", 64), K)
    kernel = WnA16()
    with pytest.raises(LayoutError) as e:
        kernel.load_(kernel.allocate(op), op, lt, {"row": 16})
    assert e.value.code == "Q-LAYOUT-FUSED"


def test_table_of_another_layer_changes_the_result(isa):
    lt = made("nf4 g64 f32")
    op, x = make_op("linear", lt, K), torch.randn(1, K)
    first = bind(lt, op)(x)
    lt.operands["weight"] = replace(lt.weight, codebook=(lt.weight.codebook[0].flip(0),))
    assert not torch.equal(bind(lt, op)(x), first)


def test_table_of_short_numbers_runs_on_bfloat16_products(isa):
    """Whole numbers are exact there; the same sums as with wider numbers, then."""
    lt = made("nf4 g64 f32")
    table = torch.arange(16.0) - 8
    lt.operands["weight"] = replace(lt.weight, codebook=(table,))
    w, run = dense_weight(lt.weight), bind(lt, make_op("linear", lt, K))
    for m in (1, 33):
        x = torch.randn(m, K).bfloat16()
        assert excess(run(x), x, w) <= 1


@pytest.mark.parametrize("name", ["uint4 g64 f16 float zero", "uint8 g32 bf16 float zero"])
def test_float_zero_is_not_rounded_to_a_code(isa, name):
    lt = make_layer(SPECS[name], 40, 96)
    run = bind(lt, make_op("linear", lt, 96))
    rounded = dense_weight(replace(lt.weight, zeros=lt.weight.zeros.round()), 96)
    for m in (1, 9, 33):
        x = torch.randn(m, 96)
        assert excess(run(x), x, rounded) > 10


def test_rounding_kernel_leaves_float_zeros_alone():
    lt = make_layer(SPECS["uint4 g64 f16 float zero"], 40, 96)
    answer = W4A8().accepts(make_op("linear", lt, 96))
    assert isinstance(answer, Rejected)
    if library().vnni and library().isa >= ISAS.index("avx512"):
        assert answer.axis == "zero"


def test_bytes_of_the_smallest_and_largest_values(isa):
    """The reading above against the float16 that has the same bits seven places lower."""
    values = {0x01: 2.0**-9, 0x07: 7 * 2.0**-9, 0x08: 2.0**-6, 0x7E: 448.0, 0xFE: -448.0}
    for code, value in values.items():
        half = struct.unpack("<e", struct.pack("<H", (code & 0x80) << 8 | (code & 0x7F) << 7))[0]
        assert half * 256 == value
        assert byte_value(code, 8, 4, 7) == value


@pytest.mark.parametrize("m", [1, 9])
def test_every_exponent_is_its_power_of_two(isa, m):
    """OCP MX 1.0: 2**(e - 127) from 2**-127, a subnormal, to 2**127; 255 is not a number."""
    spec = SPECS["fp8 g32 e8m0"]
    qt = QuantizedTensor(
        spec=spec,
        shape=(256, 32),
        codes=torch.full((256, 32), 0x38, dtype=torch.uint8),  # 1.0
        scales=(torch.arange(256, dtype=torch.uint8).view(256, 1),),
    )
    lt = LayerTensors(operands={"weight": qt})
    run = bind(lt, make_op("linear", lt, 32))
    for power in (-20, 20):  # every result is normal once
        x = torch.zeros(m, 32)
        x[:, 3] = 2.0**power
        got = run(x)
        assert got[:, 255].isnan().all()
        for e in range(255):
            if -126 <= e - 127 + power <= 127:
                assert (got[:, e] == 2.0 ** (e - 127 + power)).all(), e
