"""Life of a kernel: accepted, loaded part by part, restored, run, compiled, chosen."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_made import SPECS, TABLE_SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.errors import KernelError, LayoutError
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.choose import choose
from quant_core.packing import pack
from quant_core.registry import registry
from quant_core.spec import CANONICAL, CHANNEL, Element, Packing, Scale, Zero, group
from quant_core.tensors import LayerTensors
from quant_kernels_cpu import library as library_module
from quant_kernels_cpu.blocks import write_codes_
from quant_kernels_cpu.kernel import KERNELS, WnA16
from quant_kernels_cpu.library import unavailable
from quant_kernels_cpu.support import Layout, describe, layout_from_text

CODE4 = SPECS["uint4 g32 f16 code"]


def load(lt, op):
    kernel = WnA16()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    return kernel, buffers


def rows(lt, start, stop):
    """Rows [start, stop) of a layer with a row in every grid."""
    qt = lt.weight
    tensors = {name: t if name == "gather" else t[start:stop] for name, t in qt.tensors().items()}
    part = qt.with_tensors(tensors, shape=(stop - start, qt.shape[1]))
    bias = None if lt.bias is None else lt.bias[start:stop]
    return LayerTensors(operands={"weight": part}, bias=bias)


def assert_same(got, want):
    assert got.weight.spec == want.weight.spec
    assert tuple(got.weight.shape) == tuple(want.weight.shape)
    tensors = got.weight.tensors()
    assert set(tensors) == set(want.weight.tensors())
    for name, value in want.weight.tensors().items():
        assert tensors[name].dtype == value.dtype, name
        assert torch.equal(tensors[name], value), name
    assert (got.bias is None) == (want.bias is None)
    assert got.bias is None or torch.equal(got.bias, want.bias)


# --------------------------------------------------------------------------------- layout


def test_nibbles_lie_as_the_header_draws_them(isa):
    """Row 0 holds codes 0 1 2 .. 7: even columns in the low half, odd ones in the high half."""
    lt = make_layer(SPECS["uint4 channel f32 none"], 32, 16)
    op = make_op("linear", lt, 16)
    layout = WnA16()._bound(op)
    codes = torch.zeros(32, 16, dtype=torch.uint8)
    codes[0, :8] = torch.arange(8)
    codes[31, 8:] = 15 - torch.arange(8)
    target = torch.zeros(1, 2, 32, 4, dtype=torch.uint8)
    write_codes_(target, 0, pack(codes, 4, CANONICAL), CANONICAL, layout)
    assert target[0, 0, 0].tolist() == [0x20, 0x64, 0x31, 0x75]
    assert target[0, 1, 31].tolist() == [0xDF, 0x9B, 0xCE, 0x8A]
    assert int(target.count_nonzero()) == 8


@pytest.mark.parametrize("spec", [*SPECS.values(), *TABLE_SPECS.values()], ids=str)
def test_restore_gives_every_bit_back(spec):
    if unavailable():
        pytest.skip(unavailable())
    lt = make_layer(spec, 40, 288, bias=torch.bfloat16)
    op = make_op("linear", lt, 288)
    kernel, buffers = load(lt, op)
    assert_same(kernel.restore(buffers, op), lt)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([n for n in SPECS if "gather" not in n]),
    n=st.integers(1, 100),
    k=st.integers(1, 20),
    cuts=st.sets(st.integers(1, 99), max_size=4),
    seed=st.integers(0, 9),
)
def test_members_loaded_at_any_row_restore_as_one_layer(name, n, k, cuts, seed):
    if unavailable():
        pytest.skip(unavailable())
    whole = make_layer(SPECS[name], n, 16 * k, seed, bias=torch.float32)
    op = make_op("linear", whole, 16 * k)
    kernel = WnA16()
    buffers = kernel.allocate(op)
    edges = [0, *sorted(c for c in cuts if c < n), n]
    for start, stop in reversed(list(itertools.pairwise(edges))):
        kernel.load_(buffers, op, rows(whole, start, stop), {"row": start})
    assert_same(kernel.restore(buffers, op), whole)


def test_reload_keeps_addresses(isa):
    lt = make_layer(CODE4, 40, 96)
    op = make_op("linear", lt, 96)
    kernel, buffers = load(lt, op)
    before = {name: t.data_ptr() for name, t in buffers.items()}
    other = make_layer(CODE4, 40, 96, seed=5)
    kernel.load_(buffers, op, other, {"row": 0})
    assert {name: t.data_ptr() for name, t in buffers.items()} == before
    assert_same(kernel.restore(buffers, op), other)


def test_forgotten_part_cannot_go_unnoticed(isa, spec):
    lt = make_layer(spec, 64, 96)
    op = make_op("linear", lt, 96)
    kernel = WnA16()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, rows(lt, 0, 32), {"row": 0})
    y = kernel.bind(op)(list(buffers.values()), torch.ones(1, 96))
    assert y[0, :32].isfinite().all()
    assert not y[0, 32:].isfinite().any()


@pytest.mark.parametrize("bad", ["shape", "dtype", "names", "spec", "rows", "gather"])
def test_part_of_another_layout_is_refused(isa, bad):
    lt = make_layer(SPECS["uint4 g32 code gather"], 40, 96)
    op = make_op("linear", lt, 96)
    kernel, buffers = load(lt, op)
    part, at = make_layer(SPECS["uint4 g32 code gather"], 40, 96, seed=1), {"row": 0}
    before = {name: t.clone() for name, t in buffers.items()}
    qt = part.weight
    if bad == "shape":
        qt.scales = (qt.scales[0][:, :1],)  # would broadcast
    elif bad == "dtype":
        qt.scales = (qt.scales[0].float(),)
    elif bad == "names":
        part.bias = torch.zeros(40)
    elif bad == "spec":
        qt.spec = replace(qt.spec, zero=Zero(kind="code", element="uint8"))
    elif bad == "rows":
        at = {"row": 8}
    else:
        qt.gather = torch.full_like(qt.gather, 96)
    with pytest.raises(LayoutError):
        kernel.load_(buffers, op, part, at)
    assert all(torch.equal(before[name], t) for name, t in buffers.items())  # nothing half-loaded


# ------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embedding_rows_equal_the_oracle_bit_for_bit(isa, spec, dtype):
    if spec.gather:
        spec = replace(spec, gather=False)
    lt = make_layer(spec, 70, 288)
    op = make_op("embedding", lt, 288, dtype)
    kernel, buffers = load(lt, op)
    ids = torch.tensor([[0, 69, 33], [33, 1, 0]])
    run, values = kernel.bind(op), list(buffers.values())
    assert torch.equal(run(values, ids), dense_weight(lt.weight)[ids].to(getattr(torch, dtype)))
    assert torch.equal(run(values, ids.int()), run(values, ids))
    assert run(values, ids[:0]).shape == (0, 3, 288)
    for outside in (70, -1):
        with pytest.raises(IndexError):
            run(values, torch.tensor([0, outside]))
    native, text = torch.ops.quant_cpu.embedding.default, WnA16()._bound(op).text()
    for some in (ids, ids.int(), ids.T, ids[0, 0], ids[:0]):  # as a graph calls it
        assert torch.equal(native(some, values, text), run(values, some))
    for some in (torch.tensor([70]), torch.tensor([0, -1], dtype=torch.int32)):
        with pytest.raises((RuntimeError, IndexError), match="outside the table"):
            native(some, values, text)
    with pytest.raises((RuntimeError, IndexError)):
        native(ids, values[:1], text)


def test_tied_head_reads_the_embeddings_buffers(isa, spec):
    if spec.gather:
        spec = replace(spec, gather=False)
    lt = make_layer(spec, 70, 288)
    embedding, linear = make_op("embedding", lt, 288), make_op("linear", lt, 288)
    kernel, buffers = load(lt, embedding)
    _, own = load(lt, linear)
    x = torch.randn(3, 288)
    got = kernel.bind(linear)(list(buffers.values()), x)
    assert torch.equal(got, kernel.bind(linear)(list(own.values()), x))


@pytest.mark.parametrize("bias", [None, torch.float16])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_grouped_linear_equals_each_experts_own_linear(isa, spec, bias, tokens):
    experts = [make_layer(spec, 40, 96, seed=s, bias=bias) for s in range(3)]
    op = make_op("grouped_linear", experts[0], 96, experts=3)
    kernel = WnA16()
    buffers = kernel.allocate(op)
    for e, lt in enumerate(experts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e})
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 96, generator=g).bfloat16()
    index = torch.randint(-1, 4, (tokens,), generator=g)  # -1 and 3: no expert here
    got = kernel.bind(op)(list(buffers.values()), x, index)
    for e, lt in enumerate(experts):
        mine = index == e
        single, own = load(lt, make_op("linear", lt, 96))
        want = single.bind(make_op("linear", lt, 96))(list(own.values()), x[mine])
        assert torch.allclose(got[mine].float(), want.float(), rtol=2**-7, atol=1e-5)
    assert (got[(index < 0) | (index > 2)] == 0).all()
    restored = kernel.restore(buffers, op)
    assert torch.equal(restored.weight.codes, torch.stack([e.weight.codes for e in experts]))


def test_bound_kernel_pickles_and_its_ops_pass_opcheck(isa):
    lt = make_layer(CODE4, 40, 96, bias=torch.float16)
    op = make_op("linear", lt, 96)
    kernel, buffers = load(lt, op)
    run, values, x = kernel.bind(op), list(buffers.values()), torch.randn(3, 96)
    assert torch.equal(pickle.loads(pickle.dumps(run))(values, x), run(values, x))
    text = WnA16()._bound(op).text()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.quant_cpu
    torch.library.opcheck(ops.linear.default, (x, values, text), test_utils=checks)
    ids = torch.tensor([1, 2])
    plain = make_layer(CODE4, 40, 96)
    emb = make_op("embedding", plain, 96)
    _, held = load(plain, emb)
    args = (ids, list(held.values()), WnA16()._bound(emb).text())
    torch.library.opcheck(ops.embedding.default, args, test_utils=checks)


def test_compiled_graph_has_no_breaks_and_the_same_bits(isa):
    lt = make_layer(CODE4, 40, 96)
    op = make_op("linear", lt, 96)
    kernel, buffers = load(lt, op)
    run, values = kernel.bind(op), list(buffers.values())

    def step(x):
        return torch.relu(run(values, x * 2))

    x = torch.randn(2, 96).bfloat16()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), step(x))
    assert torch.equal(compiled(torch.cat([x, x])), step(torch.cat([x, x])))


# ------------------------------------------------------------------------------------- choice


def test_kernel_is_chosen_before_the_reference_where_it_runs(isa):
    lt = make_layer(CODE4, 40, 96)
    choice = choose(make_op("linear", lt, 96), registry())
    assert choice.kernel.name == "cpu_wna16"
    assert isa in choice.table
    assert "torch_ref" in choice.table


def test_other_packing_is_repacked_by_core(isa):
    op = replace(make_op("linear", make_layer(CODE4, 40, 96), 96), packing=Packing(word="int32"))
    assert str(WnA16().accepts(op)).startswith("packing")
    choice = choose(op, registry())
    assert (choice.kernel.name, choice.op.packing) == ("cpu_wna16", CANONICAL)


def _changed(**spec):
    lt = make_layer(CODE4, 40, 96)
    op = make_op("linear", lt, 96)
    return replace(op, operands=(("weight", replace(CODE4, **spec)),))


def _scale(**kw):
    return {"scales": (Scale(**{"element": "f16", "grain": group(32), **kw}),)}


REFUSED = {
    "op": replace(_changed(), op="moe"),
    "device": replace(_changed(), device=("cuda", "90")),
    "operands": replace(_changed(), operands=(("weight", CODE4), ("input", CODE4))),
    "blocks": _changed(blocks="iq3_s"),
    "element": _changed(element=Element(name="e8m0", bits=8, kind="float")),
    "element ": _changed(element=Element(name="e8p", bits=16, kind="vector")),
    "scales": _changed(**_scale(inverse=True)),
    "scales     ": _changed(
        zero=None,
        scales=(
            Scale(element="f32", grain=CHANNEL),
            Scale(element="f32", grain=CHANNEL, inverse=True),
            Scale(element="f32", grain=(0, 0), static=False),
        ),
    ),
    "scales      ": _changed(zero=None, **_scale(element="f32", grain=(0, 0), inverse=True)),
    "zero ": _changed(zero=Zero(kind="code", element="int4")),
    "zero  ": _changed(
        element=Element(name="fp8_e4m3", bits=8, kind="float"), zero=Zero(kind="const", value=8)
    ),
    "element  ": _changed(element=Element(name="nf4", bits=8, kind="lut")),
    "scales ": _changed(**_scale(grain=(16, 32))),
    "scales  ": _changed(scales=()),
    "scales   ": _changed(**_scale(add=True)),
    "scales    ": _changed(**_scale(element="lut8")),
    "group": _changed(**_scale(grain=group(24))),
    "in_features": replace(_changed(), sizes=(("n", 40), ("k", 100))),
    "zero": _changed(zero=Zero(kind="const", value=200)),
    "offset": _changed(zero=Zero(kind="offset", levels=(Scale(element="f16", grain=CHANNEL),))),
    "packing": replace(_changed(), packing=Packing(word="int32", k_major=True)),
    "features": replace(_changed(), features=frozenset({"acc_bias"})),
    "features ": replace(_changed(), features=frozenset({"transform_0_0:float32:96"})),
    "act_dtype": replace(_changed(), act_dtype="float64"),
    "gather": replace(_changed(gather=True), op="embedding"),
}


@pytest.mark.parametrize("axis", REFUSED)
def test_unsupported_operation_is_refused_with_its_axis(isa, axis):
    answer = WnA16().accepts(REFUSED[axis])
    assert isinstance(answer, Rejected)
    assert answer.axis == axis.strip()
    with pytest.raises(KernelError):
        WnA16().allocate(REFUSED[axis])


def test_layout_survives_its_text_form(isa, spec):
    layout = describe(make_op("linear", make_layer(spec, 40, 96), 96), ops=("linear",))
    assert isinstance(layout, Layout)
    assert layout_from_text(layout.text()) == layout


def test_every_kernel_is_a_kernel_of_the_contract():
    assert all(isinstance(k, Kernel) for k in KERNELS)
    assert len({k.name for k in KERNELS}) == len(KERNELS)


def test_missing_library_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(library_module, "_FILE", tmp_path / "none.so")
    for cached in (library_module._load, library_module._limited):
        cached.cache_clear()
    try:
        op = make_op("linear", make_layer(CODE4, 40, 96), 96)
        assert "no" in str(WnA16().accepts(op))
        assert WnA16().accepts(op).axis == "library"
        choice = choose(op, registry())
        assert choice.kernel.name == "torch_ref"
        assert "without a C compiler" in choice.table
        (tmp_path / "none.so").write_bytes(b"not a library")
        library_module._load.cache_clear()
        library_module._limited.cache_clear()
        assert "does not load" in unavailable()
        with pytest.raises(KernelError) as e:
            library_module.library()
        assert e.value.code == "Q-KERNEL-NONE"
    finally:
        monkeypatch.undo()
        library_module._load.cache_clear()
        library_module._limited.cache_clear()


def test_unknown_instruction_set_is_an_error(monkeypatch):
    if unavailable():
        pytest.skip(unavailable())
    monkeypatch.setenv("QUANT_CPU_ISA", "sse2")
    with pytest.raises(KernelError) as e:
        unavailable()
    assert e.value.code == "Q-KERNEL-NONE"


def test_accepted_costs_less_than_the_reference(isa):
    answer = WnA16().accepts(make_op("linear", make_layer(CODE4, 40, 96), 96))
    assert isinstance(answer, Accepted)
    assert answer.exact
    assert answer.cost < 1e4
