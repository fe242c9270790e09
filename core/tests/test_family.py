"""Kernels of one layout as one: who runs how many rows, and which layout is chosen."""

from __future__ import annotations

import functools
import logging
import math
import pickle
from dataclasses import replace

import pytest
import torch

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.errors import ConfigError, KernelError
from quant_core.kernels import family as family_module
from quant_core.kernels.base import ANY_ROWS, Accepted, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.family import Family, binder, buckets, uncovered
from quant_core.kernels.reference import ReferenceKernel
from quant_core.nn import QuantEmbedding, QuantLinear

N, K = 40, 96


def _shifted(run, mark, values, *inputs):
    return run(values, *inputs) + mark


class Marked(ReferenceKernel):
    """The reference on the reference's buffers; adds a number that tells who ran."""

    def __init__(self, name, mark, costs, layout="rows", ops=("linear", "grouped_linear")):
        self.name, self.mark, self.layout = name, mark, layout
        self.answer = Accepted(costs=costs) if isinstance(costs, tuple) else Accepted(cost=costs)
        self.ops = ops

    def accepts(self, op):
        if op.op not in self.ops:
            return Rejected(axis="op", have=op.op, need=" or ".join(self.ops))
        return self.answer

    def bind(self, op):
        return functools.partial(_shifted, super().bind(op), self.mark)


DECODE = Marked("decode", 1000.0, ((16, 5.0),))
RING = Marked("ring", 2000.0, ((16, 7.0), (255, 9.0), (ANY_ROWS, 90.0)))
DENSE = Marked("dense", 3000.0, ((255, math.inf), (ANY_ROWS, 80.0)))
ALONE = Marked("alone", 4000.0, ((16, 6.0), (ANY_ROWS, 60.0)), layout="")


def _registry(*kernels):
    return toy.toy_registry(toy.toy_module(apply=lambda op: list(kernels)))


def _layer(kind="linear", **kw):
    lt = make_layer(SPECS["uint4_code"])
    return lt, make_op(kind, lt, **kw)


def _module(choice, lt, cls=QuantLinear):
    buffers = choice.kernel.allocate(choice.op)
    choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
    return cls(choice, buffers)


def _who(y):
    """The mark nearest to what came out."""
    return round(float(y.double().mean()) / 1000)


def test_rows_pick_the_cheapest_member_on_one_copy_of_the_weights():
    lt, op = _layer()
    choice = choose(op, _registry(DECODE, RING, DENSE))
    module = _module(choice, lt)
    rows = {1: 1, 16: 1, 17: 2, 255: 2, 256: 3, 1000: 3, 0: None}
    for m, who in rows.items():
        y = module(torch.randn(m, K))
        assert y.shape == (m, N)
        assert who is None or _who(y) == who
    assert _who(module(torch.randn(4, 5, K))) == 2  # twenty rows, whatever their shape
    assert choice.kernel.name == "decode+ring+dense"
    assert sum(t.numel() for t in module.tensors.values()) == sum(
        t.numel() for t in ReferenceKernel().allocate(op).values()
    )


def test_family_gives_the_canonical_tensors_back():
    lt, op = _layer()
    module = _module(choose(op, _registry(DECODE, RING, DENSE)), lt)
    for name, value in module.restore().weight.tensors().items():
        assert torch.equal(value, lt.weight.tensors()[name])


def test_trace_says_who_runs_how_many_rows_and_who_came_second():
    _, op = _layer()
    choice = choose(op, _registry(DECODE, RING, DENSE))
    assert [(b.rows, b.kernel, b.runner_up) for b in choice.buckets] == [
        (16, "decode", "ring"),
        (255, "ring", ""),
        (ANY_ROWS, "dense", "ring"),
    ]
    assert "-> rows <=16: decode 5, then ring 7" in choice.table
    assert "layout rows" in choice.table
    assert "<=16: 5" in choice.table


@pytest.mark.parametrize(
    ("prefer", "winner"), [("decode", "family"), ("prefill", "alone"), ("balanced", "family")]
)
def test_layouts_compete_by_what_is_preferred(monkeypatch, prefer, winner):
    _, op = _layer()
    reg = _registry(DECODE, Marked("ring", 2000.0, ((255, 9.0), (ANY_ROWS, 70.0))), ALONE)
    # middle rows cost the lone kernel 60, the family 9
    names = {"family": "decode+ring", "alone": "alone"}
    assert choose(op, reg, prefer=prefer).kernel.name == names[winner]
    monkeypatch.setenv("QUANT_PREFER", prefer)
    assert choose(op, reg).kernel.name == names[winner]


def test_unknown_preference_is_an_error(monkeypatch):
    _, op = _layer()
    monkeypatch.setenv("QUANT_PREFER", "speed")
    with pytest.raises(ConfigError, match="'speed'") as e:
        choose(op, _registry())
    assert e.value.code == "Q-KERNEL-PREFER"


def test_override_restricts_members_by_name_and_by_layout():
    _, op = _layer()
    reg = _registry(DECODE, RING, DENSE, ALONE)
    assert choose(op, reg, kernels="ring").kernel.name == "ring"
    assert choose(op, reg, kernels="rows").kernel.name == "decode+ring+dense"
    assert choose(op, reg, kernels=["ring", "dense"]).kernel.name == "ring+dense"
    assert choose(op, reg, kernels="alone").kernel.name == "alone"


def test_override_by_operation_and_by_module():
    _, op = _layer()
    reg = _registry(DECODE, RING, DENSE, ALONE)
    assert choose(op, reg, kernels="embedding=torch_ref").kernel.name == "decode+ring+dense"
    assert choose(op, reg, kernels="linear=alone").kernel.name == "alone"
    text = "*.lm_head=ring,linear=alone"
    assert choose(op, reg, kernels="*.head=ring", module="x.head").kernel.name == "ring"
    assert choose(op, reg, kernels=text, module="x.q_proj").kernel.name == "alone"


def test_rows_that_no_member_runs_go_to_the_reference_with_one_warning(caplog):
    lt, op = _layer()
    family_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "quant_core"):
        choice = choose(op, _registry(DECODE))
        module = _module(choice, lt)
        choose(op, _registry(DECODE))
    assert sum("above 16" in r.getMessage() for r in caplog.records) == 1
    assert choice.kernel.name == "decode+torch_ref"
    x = torch.randn(33, K)
    plain = ReferenceKernel()
    buffers = plain.allocate(op)
    plain.load_(buffers, op, lt, {"row": 0})
    assert torch.equal(module(x), plain.bind(op)(list(buffers.values()), x))
    assert _who(module(x[:16])) == 1


def test_rows_left_out_below_go_to_the_reference_too():
    lt, op = _layer()
    module = _module(choose(op, _registry(DENSE), kernels="dense"), lt)
    assert _who(module(torch.randn(256, K))) == 3
    assert _who(module(torch.randn(8, K))) == 0


def test_kernel_that_cannot_be_completed_is_not_chosen(monkeypatch):
    _, op = _layer()
    monkeypatch.setattr(
        family_module.RestoredReference,
        "accepts",
        lambda self, op: Rejected(axis="element", have="x", need="y"),
    )
    assert choose(op, _registry(DECODE)).kernel.name == "torch_ref"
    with pytest.raises(KernelError):
        choose(op, _registry(DECODE), kernels="decode")


def test_grouped_rows_are_tokens():
    lts = [make_layer(SPECS["uint4_code"], seed=s) for s in range(3)]
    op = make_op("grouped_linear", lts[0], experts=3)
    choice = choose(op, _registry(DECODE, RING))
    buffers = choice.kernel.allocate(choice.op)
    for e, lt in enumerate(lts):
        choice.kernel.load_(buffers, choice.op, lt, {"row": 0, "expert": e})
    run, values = choice.kernel.bind(choice.op), list(buffers.values())
    for m, who in ((16, 1), (17, 2)):
        index = torch.arange(m) % 3
        assert _who(run(values, torch.randn(m, K), index)) == who


def test_tied_output_layer_is_run_by_members_that_reject_the_embedding():
    lt, op = _layer("embedding")
    table = Marked("table", 1000.0, 5.0, ops=("embedding",))
    choice = choose(op, _registry(table, RING))
    module = _module(choice, lt, QuantEmbedding)
    head = QuantLinear.tied(module)
    assert _who(module(torch.tensor([1, 2, 3]))) == 1
    assert _who(head(torch.randn(20, K))) == 2


def test_bound_family_pickles_and_runs_in_a_process_that_has_not_seen_it():
    lt, op = _layer()
    module = _module(choose(op, _registry(DECODE, RING, DENSE)), lt)
    data, x = pickle.dumps(module._run), torch.randn(20, K)
    family_module._bound.clear()
    run = pickle.loads(data)
    assert torch.equal(run(module._values(), x), module(x))
    assert torch.equal(torch.ops.quant_core.rows_linear(x, module._values(), N, run.key), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_compiled_code_without_its_table_is_an_error():
    with pytest.raises(KernelError, match="Build the model") as e:
        torch.ops.quant_core.rows_linear(torch.randn(1, K), [], N, "nobody")
    assert e.value.code == "Q-KERNEL-TABLE"


def test_one_compiled_graph_picks_on_every_call():
    lt, op = _layer()
    module = _module(choose(op, _registry(DECODE, RING, DENSE)), lt)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for m, who in ((5, 1), (20, 2), (300, 3), (16, 1)):  # 3 is the number of groups
        x = torch.randn(m, K)
        y = compiled(x)
        assert _who(y) == who
        assert torch.equal(y, module(x))
    assert len(graphs) == 1


def test_opcheck_of_the_row_ops():
    lt, op = _layer()
    module = _module(choose(op, _registry(DECODE, RING, DENSE)), lt)
    args = (torch.randn(3, K), module._values(), N, module._run.key)
    torch.library.opcheck(torch.ops.quant_core.rows_linear, args)


def test_single_kernel_of_a_layout_runs_without_a_detour():
    _, op = _layer()
    choice = choose(op, _registry(RING))
    assert choice.kernel.name == "ring"
    assert not isinstance(choice.kernel.bind(op), family_module.RowsBound)


def test_buckets_join_equal_neighbours_and_leave_out_what_nobody_runs():
    a = Accepted(costs=((4, 1.0), (16, 1.0), (64, math.inf), (256, 3.0)))
    made = buckets([("a", a)])
    assert [(b.rows, b.cost) for b in made] == [(16, 1.0), (256, 3.0)]
    assert uncovered([a]) == "17 to 64, above 256"
    assert uncovered([a, Accepted(cost=5.0)]) == ""
    assert [a.cost_at(m) for m in (1, 16, 17, 256, 257)] == [1.0, 1.0, math.inf, 3.0, math.inf]


def test_family_of_an_unsupported_operation_names_the_rows():
    _, op = _layer()
    fam = Family("rows", (DECODE, RING), op)
    broken = type(op)(op="attention", operands=op.operands, sizes=op.sizes)
    with pytest.raises(KernelError, match="above 0 rows"):
        fam.bind(broken)


class ForNarrow(Marked):
    """Takes part in the table of narrow layers only."""

    def accepts(self, op):
        cheap = op.size("n") < 64
        return Accepted(costs=((255, math.inf), (ANY_ROWS, 1.0 if cheap else 1e5)))


def test_families_of_one_kind_of_buffers_bind_alike_whoever_their_tables_name():
    members = (RING, ForNarrow("narrow", 0.0, 1.0))
    _, op = _layer()
    wide = replace(op, sizes=tuple((k, 64 if k == "n" else v) for k, v in op.sizes))
    narrow = replace(op, sizes=tuple((k, 32 if k == "n" else v) for k, v in op.sizes))
    one, other = Family("rows", members, wide), Family("rows", members, narrow)
    assert one.name != other.name
    assert binder(one) == binder(other)
    assert binder(one) != binder(Family("rows", (RING,), wide))
    assert binder(RING) == "ring" != binder(DENSE)
