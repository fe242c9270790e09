"""int8 weights times int8 activations: the codes of the reference, sums exact, rounded once."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import pytest
import torch

from cpu_made_int8 import ASYM, CASES, TOKEN, acts, exact, make, make_op, weight
from quant_core.errors import KernelError, LayoutError
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.reference import ReferenceKernel
from quant_core.registry import registry
from quant_core.spec import CANONICAL, CHANNEL, Element, Packing, QuantSpec, Scale, Zero, group
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_cpu.library import library, unavailable
from quant_kernels_cpu.support_int8 import describe_int8, int8_layout_from_text
from quant_kernels_cpu.w8a8 import W8A8

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(params=("avx2", "avx512", "amx"))
def isa(request, limit):
    """AVX2, vectors of 512 bits, matrix units."""
    return limit(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def load(lt, op, kernel=None):
    kernel = kernel or W8A8()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    return kernel, buffers


def runner(lt, op, kernel=None):
    kernel, buffers = load(lt, op, kernel)
    run, values = kernel.bind(op), list(buffers.values())
    return lambda *inputs: run(values, *inputs)


def identity(k: int, x: QuantSpec, **side: torch.Tensor) -> LayerTensors:
    """A layer whose weights are 1 on the diagonal: y shows what x became."""
    qt = QuantizedTensor(
        spec=weight(),
        shape=(k, k),
        codes=torch.eye(k, dtype=torch.uint8),
        scales=(torch.ones(k, 1),),
    )
    return LayerTensors(operands={"weight": qt}, **side)


# ---------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (40, 1104), (163, 96), (72, 1152)])
def test_result_is_the_exact_sum_rounded_once(isa, case, n, k, dtype):
    lt = make(case, n, k)
    run = runner(lt, make_op(lt, case[1]))
    g = torch.Generator().manual_seed(n)
    for m in (1, 2, 3, 4, 7, 12, 13, 33):
        x = torch.randn(m, k, generator=g).to(dtype)
        want = exact(x, lt, case[1])
        got = run(x)
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= EPS[dtype] * want.abs() + 1e-7).all(), m


@pytest.mark.parametrize("m", [252, 253, 600])
def test_many_tokens_give_the_rows_of_few(isa, case, m):
    """Slabs of tokens and chunks of columns: integer sums do not care how they are cut."""
    lt = make(case, 140, {252: 1040, 253: 2064, 600: 1152}[m])
    run = runner(lt, make_op(lt, case[1]))
    x = torch.randn(m, lt.weight.shape[1], generator=torch.Generator().manual_seed(m))
    got = run(x)
    for rows in (slice(0, 1), slice(11, 14), slice(m - 5, m)):
        assert torch.equal(got[rows], run(x[rows]))


def test_bits_depend_on_neither_instruction_set_nor_threads(case, monkeypatch, threads):
    if unavailable():
        pytest.skip(unavailable())
    lt = make(case, 200, 1088, bias=torch.bfloat16)
    run, x = runner(lt, make_op(lt, case[1])), torch.randn(30, 1088).bfloat16()
    seen = []
    for isa in ("avx2", "avx512", ""):
        for count in (1, 2):
            monkeypatch.setenv("QUANT_CPU_ISA", isa)
            library.cache_clear()
            threads(count)
            seen += [run(x), run(x[:1])]
    assert all(torch.equal(a, b) for a, b in zip(seen, seen[2:]))


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
def test_bias_is_added_in_float32(isa, case, bias):
    lt = make(case, 40, 96, bias=bias)
    x = torch.randn(5, 96)
    want = exact(x, lt, case[1]) + lt.bias.double()
    got = runner(lt, make_op(lt, case[1]))(x).double()
    assert ((got - want).abs() <= 2.0**-22 * (want.abs() + lt.bias.double().abs()) + 1e-7).all()


def test_reference_kernel_computes_the_same(isa, case):
    lt = make(case, 40, 288, bias=torch.float32)
    op = make_op(lt, case[1])
    x = torch.randn(6, 2, 288)
    got, want = runner(lt, op)(x), runner(lt, op, ReferenceKernel())(x)
    assert got.shape == (6, 2, 40)
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 1e-6  # the reference rounds weights and activations to float32, and its sums
    moved = x.clone()
    moved[0, 0, :8] *= -1  # negative control: other codes, another sum
    assert (runner(lt, op)(moved)[0, 0] - want[0, 0]).norm() > 1e-3 * want[0, 0].norm()


def test_codes_round_half_to_even_and_saturate(isa):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 500.0, -500.0, 1e30, -1e30,
                       126.5, -127.5, -128.5, 0.49999997, 3.4e38, 0.0]])  # fmt: skip
    lt = identity(16, acts(static="f32"), input_scale=torch.ones(1))
    want = [0, 2, 2, 0, -2, 127, 127, -128, 127, -128, 126, -128, -128, 0, 127, 0]
    assert runner(lt, make_op(lt, acts(static="f32")))(x)[0].tolist() == want


def test_peak_is_honoured_exactly(isa):
    """max|x| = 127.5 is code 127 under both; -127.5 is code -128 only where peak is 127.5."""
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([127.5, -127.5, 63.5, 1.0])
    lt = identity(16, TOKEN)
    half = runner(lt, make_op(lt, TOKEN))(x)[0, :4]
    assert half.tolist() == [127.0, -128.0, 64.0, 1.0]
    whole = runner(lt, make_op(lt, acts()))(x)[0, :4]
    s = torch.tensor(127.5) / 127
    assert torch.equal(whole, torch.tensor([127.0, -127.0, 63.0, 1.0]) * s)


@pytest.mark.parametrize("zero", [127, -128])
def test_largest_sums_are_exact(isa, zero):
    """65536 columns of 255 * 128: one more column would leave 32 bits."""
    k = 65536
    lt = make((weight(), ASYM, False), 3, k)
    lt.operands["weight"] = lt.weight.with_tensors(
        {"codes": torch.full((3, k), 0x80, dtype=torch.uint8), "scales_0": torch.ones(3, 1)}
    )
    lt.input_scale = torch.ones(1)
    lt.input_zero = torch.tensor([zero], dtype=torch.int8).view(torch.uint8)
    sign = -1.0 if zero > 0 else 1.0
    got = runner(lt, make_op(lt, ASYM))(torch.full((1, k), sign * 1000))
    assert (got == torch.tensor(-sign * 255 * 128 * k)).all()
    op = make_op(lt, ASYM)
    wider = replace(op, sizes=(("n", 3), ("k", k + 16), ("k_stored", k + 16)))
    assert W8A8().accepts(wider).axis == "in_features"


def test_zero_tokens_give_exact_zeros(isa, case):
    lt = make(case, 40, 96)
    x = torch.randn(3, 96)
    x[1] = 0
    got = runner(lt, make_op(lt, case[1]))(x)
    if lt.out_scale is None:
        assert (got[1] == 0).all()
    else:
        assert torch.equal(got[1].double(), exact(x, lt, case[1])[1].float().double())
    assert (got[[0, 2]] != 0).any()
    assert runner(lt, make_op(lt, case[1]))(x[:0]).shape == (0, 40)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_show_where_the_reference_shows_them(isa, case, bad):
    lt = make(case, 40, 96)
    op = make_op(lt, case[1])
    x = torch.randn(3, 96)
    x[1, 50] = bad
    got, want = runner(lt, op)(x), runner(lt, op, ReferenceKernel())(x)
    assert torch.equal(got.isnan(), want.isnan())
    assert got[[0, 2]].isfinite().all()
    if bad != bad or lt.out_scale is None:
        assert got[1].isnan().all()


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_broken_stored_scale_shows_where_the_reference_shows_it(isa, scale):
    lt = make(CASES["channel f32, static bf16"], 40, 96)
    lt.input_scale = torch.tensor([scale]).bfloat16()
    op = make_op(lt, acts(static="bf16"))
    x = torch.randn(2, 96)
    x[1, 3] = 0
    got, want = runner(lt, op)(x), runner(lt, op, ReferenceKernel())(x)
    assert torch.equal(got.isnan(), want.isnan())


# ------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(("tokens", "k"), [(1, 96), (9, 96), (60, 96), (90, 128)])
def test_grouped_linear_equals_each_experts_own_linear(isa, case, tokens, k):
    parts = [make(case, 40, k, seed=s, bias=torch.float16) for s in range(3)]
    op = make_op(parts[0], case[1], kind="grouped_linear", experts=3)
    kernel = W8A8()
    buffers = kernel.allocate(op)
    for e, lt in enumerate(parts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e})
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=g).bfloat16()
    index = torch.randint(-1, 4, (tokens,), generator=g)  # -1 and 3: no expert here
    got = kernel.bind(op)(list(buffers.values()), x, index)
    assert (got[(index < 0) | (index > 2)] == 0).all()
    for e, lt in enumerate(parts):
        own = runner(lt, make_op(lt, case[1]))(x[index == e])
        assert torch.equal(got[index == e], own)
    back = kernel.restore(buffers, op)
    for e, lt in enumerate(parts):
        for name, value in lt.weight.tensors().items():
            assert torch.equal(back.weight.tensors()[name][e], value), name
        for name in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero"):
            if getattr(lt, name) is not None:
                assert torch.equal(getattr(back, name)[e], getattr(lt, name)), name


@pytest.mark.parametrize("cuts", [(0, 70), (0, 1, 33, 70), (0, 32, 64, 70)])
def test_restore_gives_every_bit_back(case, cuts):
    if unavailable():
        pytest.skip(unavailable())
    if case[0].scales[0].grain == (0, 0):
        cuts = (0, 70)  # one scale for the matrix: one part
    whole = make(case, 70, 96, bias=torch.bfloat16)
    op, kernel = make_op(whole, case[1]), W8A8()
    buffers = kernel.allocate(op)
    for start, stop in reversed(list(itertools.pairwise(cuts))):
        tensors = {
            name: t if t.shape[0] == 1 else t[start:stop]
            for name, t in whole.weight.tensors().items()
        }
        rows = ("bias", "acc_bias", "out_scale")
        side = {n: getattr(whole, n) for n in (*rows, "input_scale", "input_zero")}
        side |= {n: side[n][start:stop] for n in rows if side[n] is not None}
        part = whole.weight.with_tensors(tensors, shape=(stop - start, 96))
        kernel.load_(buffers, op, LayerTensors(operands={"weight": part}, **side), {"row": start})
    back = kernel.restore(buffers, op)
    assert back.weight.spec == whole.weight.spec
    for name, value in whole.weight.tensors().items():
        held = back.weight.tensors()[name]
        assert (held.dtype, held.shape) == (value.dtype, value.shape)
        assert torch.equal(held, value), name
    for name in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero"):
        held, value = getattr(back, name), getattr(whole, name)
        assert (held is None) == (value is None)
        assert held is None or (held.dtype == value.dtype and torch.equal(held, value)), name
    x = torch.randn(4, 96)
    values = list(buffers.values())
    assert torch.equal(kernel.bind(op)(values, x), runner(whole, op)(x))


def test_reload_keeps_addresses_and_takes_the_new_values(isa, case):
    op = make_op(make(case, 40, 96), case[1])
    kernel, buffers = load(make(case, 40, 96), op)
    before = {name: t.data_ptr() for name, t in buffers.items()}
    other, x = make(case, 40, 96, seed=1), torch.randn(2, 96)
    kernel.load_(buffers, op, other, {"row": 0})
    assert {name: t.data_ptr() for name, t in buffers.items()} == before
    assert torch.equal(kernel.bind(op)(list(buffers.values()), x), runner(other, op)(x))


def test_forgotten_rows_cannot_go_unnoticed(isa):
    lt = make(CASES["channel f32, static asymmetric"], 64, 96)
    op, kernel = make_op(lt, ASYM), W8A8()
    buffers = kernel.allocate(op)
    assert kernel.bind(op)(list(buffers.values()), torch.ones(1, 96)).isnan().all()
    tensors = {name: t[:32] for name, t in lt.weight.tensors().items()}
    part = replace(lt, operands={"weight": lt.weight.with_tensors(tensors, shape=(32, 96))})
    kernel.load_(buffers, op, part, {"row": 0})
    y = kernel.bind(op)(list(buffers.values()), torch.ones(1, 96))
    assert y[0, :32].isfinite().all()
    assert y[0, 32:].isnan().all()


@pytest.mark.parametrize("bad", ["shape", "dtype", "names", "spec", "rows", "zero"])
def test_part_of_another_layout_is_refused(isa, bad):
    case = CASES["channel f32, static asymmetric"]
    op = make_op(make(case, 40, 96), ASYM)
    kernel, buffers = load(make(case, 40, 96), op)
    part, at = make(case, 40, 96, seed=1), {"row": 0}
    before = {name: t.clone() for name, t in buffers.items()}
    if bad == "shape":
        part.weight.scales = (part.weight.scales[0][:1],)  # would broadcast
    elif bad == "dtype":
        part.weight.scales = (part.weight.scales[0].half(),)
    elif bad == "names":
        part.bias = torch.zeros(40)
    elif bad == "spec":
        part.weight.spec = weight(grain=group(96))
    elif bad == "zero":
        part.input_zero = part.input_zero.repeat(2)
    else:
        at = {"row": 8}
    with pytest.raises(LayoutError):
        kernel.load_(buffers, op, part, at)
    assert all(torch.equal(before[name], t) for name, t in buffers.items())  # nothing half-loaded


def test_wrong_input_is_refused(isa):
    lt = make(CASES["channel f32, token 127.5"], 40, 96)
    run = runner(lt, make_op(lt, TOKEN))
    for x in (torch.randn(2, 80), torch.zeros(2, 96).double(), torch.zeros(2, 96).int()):
        with pytest.raises(LayoutError) as e:
            run(x)
        assert e.value.code == "Q-LAYOUT-INPUT"


def test_non_contiguous_input_is_read_by_its_strides(isa):
    lt = make(CASES["channel f32, token 127.5"], 40, 96)
    run, x = runner(lt, make_op(lt, TOKEN)), torch.randn(96, 14)
    assert torch.equal(run(x.t()), run(x.t().contiguous()))


def test_bound_function_pickles_compiles_and_has_a_schema(isa):
    lt = make(CASES["channel f32, static asymmetric"], 40, 96, bias=torch.float16)
    op = make_op(lt, ASYM)
    kernel, buffers = load(lt, op)
    run, values, x = kernel.bind(op), list(buffers.values()), torch.randn(3, 96)
    assert torch.equal(pickle.loads(pickle.dumps(run))(values, x), run(values, x))
    text = W8A8()._bound(op).text()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.quant_cpu.linear_w8a8.default, (x, values, text),
                          test_utils=checks)  # fmt: skip
    grouped = make_op(lt, ASYM, kind="grouped_linear", experts=1)
    stack = [t[None].contiguous() for t in values]
    torch.library.opcheck(
        torch.ops.quant_cpu.grouped_linear_w8a8.default,
        (x, torch.zeros(3, dtype=torch.int64), stack, W8A8()._bound(grouped).text()),
        test_utils=checks,
    )

    def step(x):
        return torch.relu(run(values, x * 2))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), step(x))
    assert torch.equal(compiled(torch.cat([x, x])), step(torch.cat([x, x])))


# ----------------------------------------------------------------------------------- choice


def test_kernel_is_chosen_before_the_reference(isa, case):
    op = make_op(make(case, 40, 96), case[1])
    choice = choose(op, registry())
    assert choice.kernel.name == "cpu_w8a8"
    answer = W8A8().accepts(op)
    assert isinstance(answer, Accepted)
    assert answer.exact
    assert answer.cost < 1e4
    assert answer.note.startswith("avx512-vnni" if library().vnni else "avx2")


def test_other_packing_is_repacked_by_core(isa):
    case = CASES["4 bits, group 32, token"]
    op = replace(make_op(make(case, 40, 96), case[1]), packing=Packing(word="int32"))
    choice = choose(op, registry())
    assert (choice.kernel.name, choice.op.packing) == ("cpu_w8a8", CANONICAL)


OP = make_op(make((weight(), TOKEN, False), 40, 96), TOKEN)


def _weight(**kw):
    return replace(OP, operands=(("weight", replace(weight(), **kw)), ("input", TOKEN)))


def _input(spec=TOKEN, **kw):
    return replace(OP, operands=(("weight", weight()), ("input", replace(spec, **kw))))


def _scale(**kw):
    return (Scale(**{"element": "f32", "grain": CHANNEL, "static": False, **kw}),)


FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
REFUSED = {
    "op": replace(OP, op="embedding"),
    "device": replace(OP, device=("cuda", "90")),
    "operands": replace(OP, operands=(("weight", weight()),)),
    "element, float": _weight(element=FP8),
    "element, unsigned without a zero": _weight(element=Element.uint(8)),
    "element, zero codes": _weight(zero=Zero(kind="code")),
    "gather": _weight(gather=True),
    "scales, divisor": _weight(scales=(Scale(element="f32", grain=CHANNEL, inverse=True),)),
    "scales, two": _weight(scales=weight().scales * 2),
    "scales, blocks": _weight(scales=(Scale(element="f32", grain=(16, 32)),)),
    "group": _weight(scales=(Scale(element="f32", grain=group(24)),)),
    "input, float": _input(element=FP8),
    "input, unsigned": _input(element=Element.uint(8)),
    "input, groups": _input(scales=_scale(grain=group(32))),
    "input, tensor at run time": _input(scales=_scale(grain=(0, 0))),
    "input, two scales": _input(scales=_scale() * 2),
    "input, ties": _input(ties="away"),
    "input, zero at run time": _input(zero=Zero(kind="code", element="int8")),
    "features, unknown": replace(OP, features=frozenset({"swiglu"})),
    "features, no stored scale": _input(acts(static="f32")),
    "features, acc_bias alone": replace(OP, features=frozenset({"acc_bias"})),
    "features, out_scale": replace(OP, features=frozenset({"out_scale"})),
    "in_features": replace(OP, sizes=(("n", 40), ("k", 100))),
    "out_features": replace(OP, sizes=(("n", 0), ("k", 96))),
    "packing": replace(OP, packing=Packing(word="int32")),
    "act_dtype": replace(OP, act_dtype="float64"),
    "bias": replace(OP, features=frozenset({"bias", "bias:float64"})),
}


@pytest.mark.parametrize("why", REFUSED)
def test_unsupported_operation_is_refused_with_its_axis(isa, why):
    answer = W8A8().accepts(REFUSED[why])
    assert isinstance(answer, Rejected)
    assert answer.axis == why.partition(",")[0]
    with pytest.raises(KernelError):
        W8A8().allocate(REFUSED[why])


def test_layout_survives_its_text_form(case):
    layout = describe_int8(make_op(make(case, 40, 96), case[1]), ops=("linear",))
    assert int8_layout_from_text(layout.text()) == layout


def test_kernel_is_a_kernel_of_the_contract():
    assert isinstance(W8A8(), Kernel)
    assert isinstance(W8A8().accepts(OP), Rejected) == bool(unavailable())
