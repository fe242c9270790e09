"""Weights in the order of files: the float32 oracle, every instruction set, nothing copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpu_made import HALF_ULP, excess, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.errors import LayoutError
from quant_core.kernels.base import Rejected
from quant_core.packing import repack
from quant_core.row_order import row_pairs
from quant_core.spec import CHANNEL, Element, Field, Packing, QuantSpec, Scale, Zero, group
from quant_core.tensors import LayerTensors
from quant_kernels_cpu.kernel import KERNELS
from quant_kernels_cpu.stored_kernel import STORED

ROWS = Packing(word="int32")
WORDS = Packing(word="int32", k_major=True)
ACROSS = Packing(word="int32", axis="out", order=(0, 4, 1, 5, 2, 6, 3, 7), k_major=True)
HALF = {
    "18 bytes": Packing(fields=(Field(2, 16, 4, 16),), block=18),
    "20 bytes": Packing(fields=(Field(4, 16, 4, 16),), block=20),
    "34 bytes": Packing(fields=(Field(2, 32, 8, 1),), block=34),
}
EIGHT, CODE = Zero(kind="const", value=8), Zero(kind="code")


def _spec(bits, element, grain, zero=None, kind=Element.uint):
    return QuantSpec(element=kind(bits), scales=(Scale(element=element, grain=grain),), zero=zero)


def _offset(grain):
    return Zero(kind="offset", levels=(Scale(element="f16", grain=grain),))


CASES = {
    "rows g128 bf16 const": (ROWS, _spec(4, "bf16", group(128), EIGHT)),
    "rows g64 f16 codes": (ROWS, _spec(4, "f16", group(64), CODE)),
    "rows g32 f32 offset": (ROWS, _spec(4, "f32", group(32), _offset(group(32)))),
    "rows g48 f16 codes": (ROWS, _spec(4, "f16", group(48), CODE)),
    "rows g256 f16 codes": (ROWS, _spec(4, "f16", group(256), CODE)),
    "rows channel f32 none": (Packing(), _spec(4, "f32", CHANNEL)),
    "words g128 f16 const": (WORDS, _spec(4, "f16", group(128), EIGHT)),
    "words g32 bf16 codes": (WORDS, _spec(4, "bf16", group(32), CODE)),
    "words g256 f32 codes": (WORDS, _spec(4, "f32", group(256), CODE)),
    "words channel f16 codes": (WORDS, _spec(4, "f16", CHANNEL, CODE)),
    "across g128 f16 codes": (ACROSS, _spec(4, "f16", group(128), CODE)),
    "across g32 f16 const": (ACROSS, _spec(4, "f16", group(32), EIGHT)),
    "across channel f32 codes": (ACROSS, _spec(4, "f32", CHANNEL, CODE)),
    "18 bytes": (HALF["18 bytes"], _spec(4, "f16", group(32), EIGHT)),
    "20 bytes": (HALF["20 bytes"], _spec(4, "f16", group(32), _offset(group(32)))),
    "34 bytes": (HALF["34 bytes"], _spec(8, "f16", group(32), None, Element.int)),
    "int8 rows channel": (Packing(), _spec(8, "bf16", CHANNEL, None, Element.int)),
    "int8 rows g64": (Packing(), _spec(8, "f16", group(64), None, Element.int)),
    "uint8 rows g128 128": (ROWS, _spec(8, "f16", group(128), Zero(kind="const", value=128))),
    "uint8 rows g32 codes": (ROWS, _spec(8, "f16", group(32), Zero(kind="code", element="uint8"))),
    "uint8 rows g16 100": (ROWS, _spec(8, "f32", group(16), Zero(kind="const", value=100))),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def _stored(packing: Packing, spec: QuantSpec, n: int, k: int, **kw) -> LayerTensors:
    """A random layer as a file of that order gives it, in memory of its own."""
    lt = make_layer(spec, n, k, **kw)
    qt = lt.weight
    codes = repack(qt.codes, spec.element.bits, (n, k), qt.packing, packing)
    if packing.fields:
        blocks = codes.view(n, -1, packing.block)
        for i, values in enumerate((*qt.scales, *qt.offset)):
            blocks[..., 2 * i : 2 * i + 2] = values.unsqueeze(-1).view(torch.uint8)
    weight = replace(qt, codes=codes, packing=packing)
    return LayerTensors(operands={"weight": weight}, bias=lt.bias)


def _op(lt: LayerTensors, kind: str = "linear", act_dtype: str = "bfloat16"):
    op = make_op(kind, lt, lt.weight.shape[1])
    return replace(op, packing=lt.weight.packing, act_dtype=act_dtype)


def _loaded(lt: LayerTensors):
    op = _op(lt)
    buffers = STORED.allocate(op)
    STORED.load_(buffers, op, lt, {"row": 0})
    return op, buffers


def _runs(lt: LayerTensors):
    op = _op(lt)
    buffers = STORED.adopt(op, lt)
    assert buffers is not None
    run = STORED.bind(op)
    return lambda x: run(list(buffers.values()), x)


@pytest.mark.parametrize(("n", "k"), [(8, 96), (200, 1088), (328, 608), (1032, 256)])
def test_products_are_as_exact_as_float32_sums(isa, case, n, k):
    lt = _stored(*case, n, k, bias=torch.float16 if n == 200 else None)
    w, run = dense_weight(lt.weight, k), _runs(lt)
    g = torch.Generator().manual_seed(1)
    for m in (1, 2, 3, 4, 5, 7, 8, 33, 100):
        for dtype in HALF_ULP:
            x = torch.randn(m, k, generator=g).to(dtype)
            assert excess(run(x), x, w, lt.bias) <= 1, (m, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_codes_are_used_where_they_lie_from_avx512_on(isa, case, dtype):
    """Without that, every other test here would pass on blocks that each call makes."""
    answer = STORED.accepts(_op(_stored(*case, 64, 768), act_dtype=dtype))
    fits = case[0].k_major or case[1].scales[0].grain not in (group(48), group(16))
    assert ("made blocks" in answer.note) == (isa == "avx2" or not fits), answer.note


def test_rows_need_no_multiple_of_anything(isa):
    for name in ("rows g128 bf16 const", "words g128 f16 const", "20 bytes", "int8 rows channel"):
        for n in (1, 7, 33, 131):
            lt = _stored(*CASES[name], n, 416)
            w, run = dense_weight(lt.weight, 416), _runs(lt)
            for m in (1, 4, 9):
                x = torch.randn(m, 416).bfloat16()
                assert excess(run(x), x, w) <= 1, (name, n, m)


def test_buffers_are_the_memory_of_the_file(case):
    lt = _stored(*case, 64, 512)
    buffers = STORED.adopt(_op(lt), lt)
    assert buffers is not None
    assert buffers["codes"].data_ptr() == lt.weight.codes.data_ptr()
    if case[0] in (ROWS, Packing()):
        assert buffers["scales_0"].data_ptr() == lt.weight.scales[0].data_ptr()


def test_scales_by_group_are_not_copied_where_the_file_has_them_so():
    lt = _stored(*CASES["words g128 f16 const"], 64, 512)
    held = lt.weight.scales[0].t().contiguous()
    lt.operands["weight"] = replace(lt.weight, scales=(held.t(),))
    buffers = STORED.adopt(_op(lt), lt)
    assert buffers is not None
    assert buffers["scales_0"].data_ptr() == held.data_ptr()


def test_restore_gives_back_what_was_stored(case):
    lt = _stored(*case, 72, 544, bias=torch.bfloat16)
    op, loaded = _loaded(lt)
    for buffers in (loaded, STORED.adopt(op, lt)):
        assert buffers is not None
        back = STORED.restore(buffers, op)
        assert back.weight.packing == lt.weight.packing
        found, expected = back.weight.tensors(), lt.weight.tensors()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert back.bias is not None
        assert torch.equal(back.bias, lt.bias)
        assert back.weight.codes.data_ptr() != buffers["codes"].data_ptr()


def test_parts_of_rows_make_the_whole(case):
    lt = _stored(*case, 64, 512, bias=torch.float32)
    op, whole = _loaded(lt)
    buffers, qt = STORED.allocate(op), lt.weight
    axis = 1 if qt.packing.k_major else 0
    for first, rows in ((24, 40), (0, 24)):
        per = qt.codes.shape[axis] / 64
        codes = qt.codes.narrow(axis, int(first * per), int(rows * per)).contiguous()
        cut = {n: v if n == "codes" else v[first : first + rows] for n, v in qt.tensors().items()}
        part = qt.with_tensors(cut | {"codes": codes}, shape=(rows, 512))
        assert lt.bias is not None
        bias = lt.bias[first : first + rows]
        STORED.load_(
            buffers, op, LayerTensors(operands={"weight": part}, bias=bias), {"row": first}
        )
    for name, value in whole.items():
        assert torch.equal(buffers[name], value), name


def test_scales_that_differ_from_the_blocks_are_not_overlooked():
    lt = _stored(*CASES["20 bytes"], 64, 512)
    lt.operands["weight"] = replace(lt.weight, scales=(lt.weight.scales[0] * 2,))
    op = _op(lt)
    assert STORED.adopt(op, lt) is None
    before = lt.weight.codes.clone()
    buffers = _loaded(lt)[1]
    assert torch.equal(STORED.restore(buffers, op).weight.scales[0], lt.weight.scales[0])
    assert torch.equal(lt.weight.codes, before)


@pytest.mark.parametrize("broken", ["codes", "scales_0", "zeros"])
def test_error_measure_notices_one_broken_tensor(isa, broken):
    for name in ("rows g64 f16 codes", "words g32 bf16 codes", "across g128 f16 codes"):
        lt = _stored(*CASES[name], 64, 512)
        w, tensors = dense_weight(lt.weight, 512), lt.weight.tensors()
        value = tensors[broken]
        value = value.roll(1, 0) if broken == "codes" else value.roll(1, -1)
        lt.operands["weight"] = lt.weight.with_tensors({**tensors, broken: value})
        x = torch.randn(2, 512).bfloat16()
        assert excess(_runs(lt)(x), x, w) > 10


def test_rows_of_an_embedding_are_the_oracle_bit_for_bit(isa, case):
    lt = _stored(*case, 40, 544)
    op = _op(lt, "embedding", "float32")
    answer = STORED.accepts(op)
    if case[0].k_major:
        assert isinstance(answer, Rejected)
        return
    buffers = STORED.adopt(op, lt)
    assert buffers is not None
    ids = torch.tensor([[3, 39, 0], [3, 17, 31]])
    got = STORED.bind(op)(list(buffers.values()), ids)
    assert torch.equal(got, dense_weight(lt.weight, 544)[ids])


@pytest.mark.parametrize("m", [1, 4, 9])
def test_bits_do_not_depend_on_the_number_of_threads(case, m, threads):
    lt = _stored(*case, 520, 1056)
    run, x = _runs(lt), torch.randn(m, 1056).bfloat16()
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(x))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_layers_of_one_input_in_one_call_give_the_same_bits(case):
    parts = [_stored(*case, n, 544) for n in (264, 40, 136)]
    ops = [_op(lt) for lt in parts]
    buffers = [list((STORED.adopt(op, lt) or {}).values()) for op, lt in zip(ops, parts)]
    run = STORED.bind_shared(ops)
    assert run is not None
    for m in (1, 3, 6):
        x = torch.randn(m, 544).bfloat16()
        for got, op, held in zip(run(buffers, x), ops, buffers, strict=True):
            assert torch.equal(got, STORED.bind(op)(held, x))


BY_COLUMNS = ("words g128 f16 const", "words g256 f32 codes", "across g128 f16 codes")


@pytest.mark.parametrize("name", [*BY_COLUMNS, "across channel f32 codes"])
def test_pieces_of_columns_are_added_up_alike_by_any_number_of_threads(isa, name, threads):
    n, k = 520, 3232
    lt = _stored(*CASES[name], n, k, bias=torch.float16)
    w, run = dense_weight(lt.weight, k), _runs(lt)
    for m in (1, 2, 3, 4):
        x, found = torch.randn(m, k).bfloat16(), []
        for count in (1, 2, 3, 5):
            threads(count)
            found.append(run(x))
        assert excess(found[0], x, w, lt.bias) <= 1, m
        assert all(torch.equal(found[0], other) for other in found[1:]), m


@pytest.mark.parametrize("name", BY_COLUMNS)
@pytest.mark.parametrize("offset", [2, 8, 36, 60])
def test_bits_do_not_depend_on_where_codes_lie(isa, name, offset):
    """Files align tensors to 8 bytes, or to none; vectors begin where lines of the cache do."""
    for n in (128, 136, 640):
        lt = _stored(*CASES[name], n, 544)
        op, buffers = _loaded(lt)
        codes = buffers["codes"]
        room = torch.empty(codes.numel() + 192, dtype=torch.uint8)
        first = -room.data_ptr() % 64
        run, x = STORED.bind(op), torch.randn(2, 544).bfloat16()
        found = []
        for at in (first, first + offset):
            moved = room[at : at + codes.numel()].view(codes.shape)
            moved.copy_(codes)
            found.append(run(list({**buffers, "codes": moved}.values()), x))
        assert torch.equal(found[0], found[1]), n
        assert excess(found[0], x, dense_weight(lt.weight, 544)) <= 1


@pytest.mark.parametrize(
    ("packing", "spec", "axis"),
    [
        (replace(WORDS, order=(1, 0)), CASES["words g128 f16 const"][1], "packing"),
        (replace(ACROSS, order=None), CASES["across g128 f16 codes"][1], "packing"),
        (HALF["18 bytes"], CASES["20 bytes"][1], "packing"),
        (ROWS, _spec(4, "f16", group(32), kind=Element.int), "element"),
        (ROWS, _spec(3, "f16", group(32)), "packing"),
        (ROWS, _spec(4, "uint8", group(32), CODE), "scales"),
        (ROWS, _spec(4, "f16", group(32), Zero(kind="code", element="f16")), "zero"),
    ],
)
def test_what_it_cannot_run_is_said(packing, spec, axis):
    lt = make_layer(spec, 64, 512)
    answer = STORED.accepts(replace(make_op("linear", lt, 512), packing=packing))
    assert isinstance(answer, Rejected)
    assert answer.axis == axis


def test_parts_of_another_layer_are_refused():
    lt = _stored(*CASES["rows g64 f16 codes"], 64, 512)
    op, buffers = _loaded(lt)
    other = _stored(*CASES["rows g64 f16 codes"], 64, 256)
    with pytest.raises(LayoutError) as err:
        STORED.load_(buffers, op, other, {"row": 0})
    assert err.value.code == "Q-LAYOUT-FUSED"
    across = CASES["across g128 f16 codes"]
    op, buffers = _loaded(_stored(*across, 64, 512))
    with pytest.raises(LayoutError, match="multiples of 8"):
        STORED.load_(buffers, op, _stored(*across, 8, 512), {"row": 4})


def _in_heads(lt: LayerTensors, head: int) -> LayerTensors:
    """The layer as a file has it that keeps row i of each half of a head at 2 i and 2 i + 1."""
    n, half = lt.weight.shape[0], head // 2
    at = [
        h + i + half * second for h in range(0, n, head) for i in range(half) for second in (0, 1)
    ]
    t = {name: value[at] for name, value in lt.weight.tensors().items()}
    return replace(lt, operands={"weight": lt.weight.with_tensors(t)})


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize(("n", "head"), [(64, 64), (96, 32), (240, 6), (200, 40), (2, 2)])
def test_rows_of_heads_stay_where_they_are_and_results_are_in_order(isa, name, n, head):
    lt = _stored(*CASES[name], n, 416, bias=torch.float16)
    op = replace(_op(lt), features=_op(lt).features | {row_pairs(head)})
    stored = _in_heads(lt, head)
    buffers = STORED.adopt(op, stored)
    assert buffers is not None
    assert buffers["codes"].data_ptr() == stored.weight.codes.data_ptr()
    w, run = dense_weight(lt.weight, 416), STORED.bind(op)
    for m in (1, 2, 4, 5, 9, 100):
        for dtype in HALF_ULP:
            x = torch.randn(m, 416).to(dtype)
            y = run(list(buffers.values()), x)
            assert excess(y, x, w, lt.bias) <= 1, (m, dtype)
            plain = STORED.bind(_op(lt))(list(STORED.adopt(_op(lt), lt).values()), x)
            assert torch.equal(y, plain), (m, dtype)
            if head > 2:  # two rows are in order either way
                wrong = STORED.bind(_op(lt))(list(buffers.values()), x)
                assert excess(wrong, x, w, lt.bias) > 1, "the order of rows has no effect"
    for tensors in (buffers, STORED.allocate(op)):
        STORED.load_(tensors, op, lt, {"row": 0})
        assert all(torch.equal(tensors[k], buffers[k]) for k in buffers)
        back = STORED.restore(tensors, op)
        assert all(torch.equal(v, back.weight.tensors()[k]) for k, v in lt.weight.tensors().items())
        assert torch.equal(back.bias, lt.bias)


def test_rows_of_heads_are_taken_by_no_other_kernel_and_no_other_order():
    lt = _stored(*CASES["20 bytes"], 64, 416)
    for head, fits in ((64, True), (32, True), (48, False), (7, False)):
        op = replace(_op(lt), features=frozenset({row_pairs(head)}))
        assert isinstance(STORED.accepts(op), Rejected) != fits, head
        assert all(isinstance(k.accepts(op), Rejected) for k in KERNELS)
    other = _op(_stored(*CASES["rows g128 bf16 const"], 64, 416))
    assert isinstance(STORED.accepts(replace(other, features=frozenset({row_pairs(64)}))), Rejected)
