from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.errors import KernelError, LayoutError
from quant_core.kernels import measured, reference
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.reference import ReferenceKernel
from quant_core.spec import (
    CANONICAL,
    Packing,
)
from quant_core.spec_json import from_text, to_text


@pytest.fixture(params=SPECS, ids=str)
def spec(request):
    return SPECS[request.param]


@pytest.mark.parametrize("m", [0, 1, 7, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_matmul_with_the_dequantized_weight(spec, m, bias, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 16 * 96)  # several row blocks
    lt = make_layer(spec, bias=bias)
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    x = torch.randn(2, m, 96)
    got = kernel.bind(op)(list(buffers.values()), x)
    b = lt.bias.float() if bias else None
    want = F.linear(x, dense_weight(lt.weight, 96), b)
    assert got.shape == (2, m, 40)
    # same float32 products, summed in another order over K=96
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * 96**0.5)


def test_restore_gives_every_bit_back(spec):
    lt = make_layer(spec, bias=True)
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    back = kernel.restore(buffers, op)
    assert back.weight.spec == spec
    for name, value in lt.weight.tensors().items():
        got = back.weight.tensors()[name]
        assert got.dtype == value.dtype
        assert torch.equal(got, value), name
    assert torch.equal(back.bias, lt.bias)


def test_members_loaded_at_rows_equal_one_layer(spec):
    whole = make_layer(spec, n=64)
    if spec.gather:
        parts = [make_layer(spec, n=32, seed=0), make_layer(spec, n=32, seed=0)]
    else:
        parts = [make_layer(spec, n=32, seed=s) for s in (1, 2)]
    kernel, op = ReferenceKernel(), make_op("linear", whole)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, parts[0], {"row": 0})
    kernel.load_(buffers, op, parts[1], {"row": 32})
    got = kernel.restore(buffers, op).dequantize()
    want = torch.cat([dense_weight(p.weight, 96) for p in parts])
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", [n for n in SPECS if n != "uint4_gather"])
def test_embedding_returns_the_dequantized_rows(name):
    lt = make_layer(SPECS[name])
    kernel, op = ReferenceKernel(), make_op("embedding", lt)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    ids = torch.tensor([[0, 39, 17], [17, 1, 0]])
    got = kernel.bind(op)(list(buffers.values()), ids)
    assert torch.equal(got, dense_weight(lt.weight)[ids])
    assert kernel.bind(op)(list(buffers.values()), ids[:0]).shape == (0, 3, 96)


def test_grouped_linear_picks_each_tokens_expert(spec):
    experts = [make_layer(spec, seed=s) for s in range(3)]
    kernel, op = ReferenceKernel(), make_op("grouped_linear", experts[0], experts=3)
    buffers = kernel.allocate(op)
    for e, lt in enumerate(experts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e})
    x, index = torch.randn(6, 96), torch.tensor([2, 0, 2, 3, 1, 0])  # 3: no expert here
    got = kernel.bind(op)(list(buffers.values()), x, index)
    for t, e in enumerate(index.tolist()):
        want = torch.zeros(40) if e == 3 else dense_weight(experts[e].weight, 96) @ x[t]
        assert torch.allclose(got[t], want, rtol=1e-5, atol=1e-4)


def test_forgotten_part_cannot_go_unnoticed(spec):
    lt = make_layer(spec)
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    y = kernel.bind(op)(list(buffers.values()), torch.ones(1, 96)) if not spec.gather else None
    assert y is None or not torch.isfinite(y).all()


@pytest.mark.parametrize("bad", ["shape", "dtype", "names"])
def test_part_of_another_layout_is_refused(bad):
    lt = make_layer(SPECS["uint4_code"])
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    part = copy.deepcopy(lt)
    if bad == "shape":
        part.weight.scales = (part.weight.scales[0][:, :1],)  # would broadcast in copy_
    elif bad == "dtype":
        part.weight.scales = (part.weight.scales[0].float(),)
    else:
        part.bias = torch.zeros(40)
    with pytest.raises(LayoutError):
        kernel.load_(buffers, op, part, {"row": 0})


def test_input_of_wrong_size_or_type_is_refused():
    lt = make_layer(SPECS["uint4_code"])
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    run = kernel.bind(op)
    for x in (torch.randn(1, 95), torch.ones(1, 96, dtype=torch.long)):
        with pytest.raises(LayoutError) as e:
            run(list(buffers.values()), x)
        assert e.value.code == "Q-LAYOUT-INPUT"


def test_bound_kernel_pickles_and_ops_pass_opcheck():
    lt = make_layer(SPECS["uint4_code"], bias=True)
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    run = pickle.loads(pickle.dumps(kernel.bind(op)))
    x = torch.randn(3, 96)
    values = list(buffers.values())
    assert torch.equal(run(values, x), kernel.bind(op)(values, x))
    torch.library.opcheck(
        torch.ops.quant_core.linear_ref.default,
        (x, values, to_text(op)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_non_contiguous_input_gives_the_same_result():
    lt = make_layer(SPECS["uint4_code"])
    kernel, op = ReferenceKernel(), make_op("linear", lt)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    run, x = kernel.bind(op), torch.randn(96, 5)
    assert torch.equal(
        run(list(buffers.values()), x.t()), run(list(buffers.values()), x.t().clone())
    )


def test_op_spec_survives_its_text_form(spec):
    op = make_op("linear", make_layer(spec))
    assert from_text(to_text(op)) == op
    assert hash(from_text(to_text(op))) == hash(op)


# ------------------------------------------------------------------------------------- choice


class _Fast:
    name = "fast"

    def __init__(self, answer):
        self.answer = answer

    def accepts(self, op):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(op) if callable(self.answer) else self.answer


def _op():
    return make_op("linear", make_layer(SPECS["uint4_code"]))


def _registry(answer):
    return toy.toy_registry(toy.toy_module(apply=lambda op: [_Fast(answer)]))


def test_cheapest_kernel_wins_and_the_trace_tells_all():
    choice = choose(_op(), _registry(Accepted(cost=5.0)))
    assert choice.kernel.name == "fast"
    assert [d.kernel for d in choice.trace] == ["torch_ref", "fast"]


def test_rejected_kernel_leaves_the_reference_with_the_reason():
    choice = choose(_op(), _registry(Rejected(axis="device", have="cpu", need="cuda")))
    assert choice.kernel.name == "torch_ref"
    assert "fast" in choice.table
    assert "device: needs cuda, found cpu" in choice.table


@pytest.mark.parametrize("answer", [KeyError("inside"), None, 3.0], ids=repr)
def test_kernel_that_fails_to_answer_is_left_out_with_a_warning(answer, caplog, monkeypatch):
    measured._warn_of.cache_clear()
    caplog.set_level("WARNING", "quant_core")
    for _ in range(2):
        choice = choose(_op(), _registry(answer))
    assert choice.kernel.name == "torch_ref"
    what = "KeyError: 'inside'" if isinstance(answer, Exception) else type(answer).__name__
    (said,) = [d for d in choice.trace if d.kernel == "fast"]
    assert isinstance(said.answer, Rejected)
    assert what in str(said)
    (record,) = caplog.records
    assert "'fast'" in record.getMessage()
    assert what in record.getMessage()


def test_kernel_that_cannot_read_the_packing_gets_the_canonical_one():
    from dataclasses import replace

    op = replace(_op(), packing=Packing(word="int32", k_major=True))
    choice = choose(op, toy.toy_registry())
    assert choice.op.packing == CANONICAL


def test_forced_kernel_that_cannot_run_is_an_error_with_its_reason(monkeypatch):
    reg = _registry(Rejected(axis="device", have="cpu", need="cuda"))
    monkeypatch.setenv("QUANT_KERNELS", "fast")
    with pytest.raises(KernelError) as e:
        choose(_op(), reg)
    assert e.value.code == "Q-KERNEL-NONE"
    assert "needs cuda" in str(e.value)
    assert "torch_ref" in str(e.value)
    assert len(e.value.trace) == 2


def test_unknown_kernel_name_is_named():
    with pytest.raises(KernelError, match="nonsense"):
        choose(_op(), toy.toy_registry(), kernels="nonsense")


def test_reference_is_a_kernel_of_the_contract():
    assert isinstance(ReferenceKernel(), Kernel)
