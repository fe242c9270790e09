"""What calls will compile is asked for on tensors without memory, and nothing depends on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quant_core import build
from quant_core.kernels import ahead, rounded
from quant_core.kernels.ahead import compile_ahead, jobs_of
from quant_core.kernels.base import ANY_ROWS, Accepted
from quant_core.kernels.calls import planned, unobserved
from quant_core.kernels.choose import Choice
from quant_core.kernels.family import Family
from quant_core.kernels.reference import ReferenceKernel
from quant_core.spec import CANONICAL, CHANNEL, Element, OpSpec, QuantSpec, Scale

SPEC = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))
OP = OpSpec(
    op="linear", operands=(("weight", SPEC),), packing=CANONICAL, act_dtype="bfloat16",
    sizes=(("n", 8), ("k", 64), ("k_stored", 64)), device=("cuda", "9.0"),
)  # fmt: skip


class Told(ReferenceKernel):
    """Notes what it is run with, and what begins to compile."""

    layout = "told"

    def __init__(self, name: str = "told", most: int = ANY_ROWS) -> None:
        self.name, self.most, self.begun, self.seen = name, most, [], []

    def accepts(self, op):
        return Accepted(cost=1.0, costs=((self.most, 1.0),))

    def allocate(self, op, device="cpu"):
        return {"codes": torch.empty(8, 64, dtype=torch.int8, device=device)}

    def bind(self, op):
        def run(values, x):
            assert unobserved(x)
            assert planned.jobs is not None
            self.seen.append((values[0].device.type, x.device.type, x.dtype, planned.capability))
            if x.shape[0] == 3:
                raise ValueError("no three rows")
            planned.jobs.append(lambda: self.begun.append(x.shape[0]))
            return x.new_empty(x.shape[0], 8)

        return run


def test_jobs_are_found_on_tensors_without_memory_and_begun_later():
    kernel = Told()
    jobs = jobs_of(kernel, OP, (1, 64))
    assert kernel.seen == [("meta", "meta", torch.bfloat16, 90)] * 2
    assert kernel.begun == []
    for job in jobs:
        job()
    assert kernel.begun == [1, 64]
    assert planned.jobs is None
    assert not unobserved(torch.zeros(1))


def test_members_of_a_family_are_asked_for_their_rows():
    few, many = Told("few", 16), Told("many")
    many.accepts = lambda op: Accepted(cost=9.0, costs=((16, 9.0), (ANY_ROWS, 1.0)))
    compile_ahead(Family("told", (few, many), OP), OP, (1, 16, 17, 512))
    assert few.begun == [1, 16]
    assert many.begun == [17, 512]


def test_a_call_that_cannot_be_followed_leaves_the_others(caplog):
    kernel = Told()
    with caplog.at_level("DEBUG", logger="quant_core"):
        compile_ahead(kernel, OP, (1, 3, 5))
    assert kernel.begun == [1, 5]
    assert "told with 3 rows is not compiled ahead: ValueError('no three rows')" in caplog.text
    assert planned.jobs is None


@pytest.mark.parametrize(
    "op",
    [replace(OP, device=("cpu", "")), replace(OP, device=("cuda", "")), replace(OP, op="rotary")],
)
def test_nothing_is_asked_where_nothing_is_compiled(op):
    assert jobs_of(Told(), op, (1,)) == []


def test_a_loader_asks_once_for_each_large_operation(monkeypatch):
    asked = []

    def choose(op, registry, *, memo, **rest):
        return memo.setdefault(op, Choice(kernel=Told(), op=op, trace=()))

    monkeypatch.setattr(build, "choose", choose)
    monkeypatch.setattr(build, "compile_ahead", lambda kernel, op: asked.append(op.size("n")))
    builder = build.Builder(plan=SimpleNamespace(registry=None))
    sizes = [(64, 64), (4096, 4096), (1024, 4096), (4096, 4096), (64, 64)]
    for n, k in sizes:
        builder._chosen("layer", replace(OP, sizes=(("n", n), ("k", k), ("k_stored", k))))
    assert asked == [4096, 1024]
    assert len(builder.choices) == len(sizes)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("QUANT_AHEAD", "off")
    monkeypatch.setattr(ahead, "jobs_of", None)  # must not be asked
    compile_ahead(Told(), OP)


@pytest.fixture
def idle(monkeypatch):
    """Compilers that stand idle, and a GPU that is not there."""
    made = ahead.Standby()
    made.idle = True
    monkeypatch.setattr(ahead, "standby", made)
    monkeypatch.setattr(ahead, "unobserved", lambda x: isinstance(x, OnGpu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return made


class OnGpu:
    """What a planning looks at of an input on a GPU."""

    dtype, device = torch.bfloat16, torch.device("cuda", 0)

    def __init__(self, rows):
        self.shape = torch.Size((rows, 64))

    def to(self, device):
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def test_a_first_call_begins_all_its_compilations_once(idle):
    kernel = Told()
    values = list(kernel.allocate(OP).values())
    for rows in (5, 5, 7):
        ahead.begin("key", kernel.bind(OP), values, OnGpu(rows))
    assert kernel.seen == [("meta", "meta", torch.bfloat16, 90)] * 2
    assert kernel.begun == [5, 7]
    assert planned.jobs is None


def test_a_first_call_that_cannot_be_planned_is_left_alone(idle, caplog):
    kernel = Told()
    with caplog.at_level("DEBUG", logger="quant_core"):
        ahead.begin("key", kernel.bind(OP), [torch.empty(8, 64)], OnGpu(3))
        ahead.begin("key", kernel.bind(OP), [torch.empty(8, 64)], torch.empty(5, 64))
    assert kernel.begun == []
    assert "no three rows" in caplog.text
    assert planned.jobs is None


def test_rounded_inputs_begin_what_comes_behind_the_rounding(idle, monkeypatch):
    monkeypatch.setattr(rounded, "standby", idle)
    order = []
    monkeypatch.setattr(rounded, "begin", lambda key, run, values, x: order.append(values))
    x, kept = torch.ones(2, 64), [torch.ones(1), torch.ones(2)]

    def call():
        return rounded._run(
            lambda values, x: x, lambda values, x, *stored: x, ("input_scale",), kept, x
        )

    assert call() is x
    idle.idle = False
    assert call() is x
    assert order == [kept[:1]]


def test_compiled_code_never_begins_anything(idle, monkeypatch):
    monkeypatch.setattr(rounded, "standby", idle)
    monkeypatch.setattr(rounded, "begin", None)  # must not be asked

    def call(x):
        return rounded._run(lambda values, x: 2 * x, lambda values, x: x + 1, (), [], x)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 4.0))
