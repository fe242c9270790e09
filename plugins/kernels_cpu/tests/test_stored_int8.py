"""int8 rows in the order of files: the exact sums, the bits of packed weights, nothing copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpu_made_int8 import CASES, TOKEN, acts, exact, make, make_op, weight
from quant_core.errors import LayoutError
from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, Element, Packing, Zero
from quant_kernels_cpu.stored_int8 import STORED_INT8
from quant_kernels_cpu.w8a8 import W8A8

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
UNSIGNED = replace(weight(), element=Element.uint(8), zero=Zero(kind="const", value=128))
RUN = {name: case for name, case in CASES.items() if case[0].element.bits == 8} | {
    "uint8 less 128": (UNSIGNED, TOKEN, False)
}


@pytest.fixture(params=("avx2", "avx512", "amx"))
def isa(request, limit):
    """AVX2, vectors of 512 bits, matrix units."""
    return limit(request.param)


@pytest.fixture(params=RUN)
def case(request):
    return RUN[request.param]


def _runner(kernel, buffers, op):
    run, values = kernel.bind(op), list(buffers.values())
    return lambda x: run(values, x)


def _packed(lt, op):
    kernel = W8A8()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    return _runner(kernel, buffers, op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (40, 1104), (163, 96), (35, 4112), (72, 1152)])
def test_result_is_the_exact_sum_and_the_bits_of_packed_weights(isa, case, n, k, dtype):
    lt = make(case, n, k)
    op = make_op(lt, case[1])
    run, packed = _runner(STORED_INT8, STORED_INT8.adopt(op, lt), op), _packed(lt, op)
    g = torch.Generator().manual_seed(n)
    for m in (1, 2, 3, 12, 13, 33, 260):
        x = torch.randn(m, k, generator=g).to(dtype)
        got = run(x)
        assert torch.equal(got, packed(x)), m
        want = exact(x, lt, case[1])
        assert ((got.double() - want).abs() <= EPS[dtype] * want.abs() + 1e-7).all(), m


def test_another_byte_gives_another_result(isa, case):
    lt = make(case, 40, 1104)
    op = make_op(lt, case[1])
    run, x = _runner(STORED_INT8, STORED_INT8.adopt(op, lt), op), torch.ones(2, 1104)
    before = run(x), run(x[:1])
    lt.weight.codes[33, 1103] ^= 0x40
    after = run(x), run(x[:1])
    for a, b in zip(before, after, strict=True):
        assert (a != b).any(0).nonzero().flatten().tolist() == [33]


@pytest.mark.parametrize("bias", [None, torch.bfloat16])
def test_layers_of_one_input_give_the_bits_of_their_own_calls(isa, case, bias):
    made = [make(case, n, 1040, seed, bias=bias) for seed, n in enumerate((33, 64, 7))]
    ops = [make_op(lt, case[1]) for lt in made]
    held = [STORED_INT8.adopt(op, lt) for op, lt in zip(ops, made, strict=True)]
    run = STORED_INT8.bind_shared(ops)
    for m in (1, 5, 40):
        x = torch.randn(m, 1040, generator=torch.Generator().manual_seed(m))
        got = run([list(b.values()) for b in held], x)
        for y, op, buffers in zip(got, ops, held, strict=True):
            assert torch.equal(y, _runner(STORED_INT8, buffers, op)(x))


def test_adopted_tensors_are_those_given(case):
    lt = make(case, 40, 96)
    buffers = STORED_INT8.adopt(make_op(lt, case[1]), lt)
    assert buffers["codes"].data_ptr() == lt.weight.codes.data_ptr()
    assert buffers["scales_0"].data_ptr() == lt.weight.scales[0].data_ptr()


def test_loaded_in_parts_is_what_is_adopted_and_restored(case):
    lt = make(case, 40, 96, bias=torch.float32)
    op = make_op(lt, case[1])
    buffers = STORED_INT8.allocate(op)
    for row, rows in ((0, 13), (13, 27)):
        qt, cut = lt.weight, slice(row, row + rows)
        single = qt.scales[0].shape == (1, 1)
        some = replace(
            qt,
            shape=(rows, 96),
            codes=qt.codes[cut],
            scales=(qt.scales[0] if single else qt.scales[0][cut],),
        )
        side = {n: getattr(lt, n) for n in ("bias", "acc_bias", "out_scale")}
        part = replace(
            lt,
            operands={"weight": some},
            **{n: None if t is None else t[cut] for n, t in side.items()},
        )
        STORED_INT8.load_(buffers, op, part, {"row": row})
    adopted = STORED_INT8.adopt(op, lt)
    assert list(adopted) == list(buffers)
    assert all(torch.equal(adopted[name], value) for name, value in buffers.items())
    back = STORED_INT8.restore(buffers, op)
    assert torch.equal(back.weight.codes, lt.weight.codes)
    assert torch.equal(back.weight.scales[0], lt.weight.scales[0])
    assert back.weight.codes.data_ptr() != buffers["codes"].data_ptr()
    for name in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero"):
        want, got = getattr(lt, name), getattr(back, name)
        assert (want is None and got is None) or torch.equal(want, got), name


@pytest.mark.parametrize(
    ("made", "axis"),
    [
        (CASES["4 bits, channel, 4-bit token"], "element"),
        ((replace(UNSIGNED, zero=Zero(kind="const", value=100)), acts(), False), "element"),
    ],
    ids=["4 bits", "uint8 less 100"],
)
def test_what_rows_do_not_hold_is_rejected(made, axis):
    answer = STORED_INT8.accepts(make_op(make(made, 40, 96), made[1]))
    assert isinstance(answer, Rejected)
    assert answer.axis == axis


def test_a_layer_of_other_size_is_not_adopted(case):
    lt = make(case, 40, 96)
    op = make_op(lt, case[1])
    assert STORED_INT8.adopt(op, make(case, 39, 96)) is None
    with pytest.raises(LayoutError):
        STORED_INT8.adopt(op, make(case, 40, 80))


def test_rows_beyond_the_layer_are_refused(case):
    lt = make(case, 40, 96)
    op = make_op(lt, case[1])
    with pytest.raises(LayoutError):
        STORED_INT8.load_(STORED_INT8.allocate(op), op, lt, {"row": 1})


def test_only_stored_order_is_read():
    lt = make(RUN["uint8 less 128"], 40, 96)
    op = make_op(lt, TOKEN)
    assert STORED_INT8.reads(op, CANONICAL)
    assert not STORED_INT8.reads(op, Packing(word="int32"))
