"""Layers of one input as one matrix, with a kernel that multiplies the restored weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.kernels import tiles
from quant_core.kernels.base import Accepted
from quant_core.kernels.choose import Choice
from quant_core.kernels.family import Family
from quant_core.kernels.joined import JoinedRun, adjacent, joined_op, place_together_
from quant_core.nn import QuantLinear
from quant_core.numerics import scale_dtype
from quant_core.shared import joined, share_inputs
from quant_core.spec import Element, OpSpec, QuantSpec, Scale, Zero, block, group
from quant_core.tensors import LayerTensors, QuantizedTensor

K = 256
INT4 = QuantSpec(
    element=Element.uint(4),
    scales=(Scale(element="f16", grain=group(128)),),
    zero=Zero(kind="const", value=8),
)
calls: list[int] = []


def _multiply(op: OpSpec, names: tuple[str, ...], values: list[Tensor], x: Tensor) -> Tensor:
    calls.append(op.size("n"))
    held = tiles.restore(dict(zip(names, values, strict=True)), op)
    return x.double() @ held.weight.dequantize().double().T


class Plain:
    """Restores and multiplies in float64."""

    name, layout = "plain", "tiles16"

    def accepts(self, op: OpSpec) -> Accepted:
        return Accepted(costs=((1 << 31, 1.0),))

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        return tiles.allocate(op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        tiles.load_(buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        return tiles.restore(buffers, op)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return functools.partial(_multiply, op, tuple(self.allocate(op, "meta")))


def op_of(n: int, spec: QuantSpec = INT4, **more: Any) -> OpSpec:
    sizes = (("n", n), ("k", K), ("k_stored", K))
    return OpSpec(
        op="linear", operands=(("weight", spec),), sizes=sizes, act_dtype="float64", **more
    )


def part_of(n: int) -> LayerTensors:
    weight = QuantizedTensor(
        spec=INT4,
        shape=(n, K),
        codes=torch.randint(0, 256, (n, K // 2), dtype=torch.uint8),
        scales=(torch.rand(n, K // 128).add(0.1).to(scale_dtype("f16")),),
    )
    return LayerTensors(operands={"weight": weight})


def layer(n: int) -> QuantLinear:
    op = op_of(n)
    kernel = Family("tiles16", (Plain(),), op)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, part_of(n), {"row": 0})
    return QuantLinear(Choice(kernel=kernel, op=op, trace=()), buffers)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = layer(128), layer(64), layer(64), layer(64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return torch.cat([y, self.o(x + 1)], -1)


def _stored(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    calls.clear()
    return model(x), list(calls)


@torch.no_grad()
def test_layers_of_one_input_are_one_call_and_the_others_are_not() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, K, dtype=torch.float64)
    want, before = _run(model, x)
    stored = _stored(model)
    share_inputs(model, place=True)
    assert _run(model, x)[1] == before == [128, 64, 64, 64]  # the first pass learns
    got, ran = _run(model, x)
    assert ran == [256, 64]
    assert torch.equal(got, want)
    assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items())
    assert all(y.is_contiguous() for y in model.q._shared[0]._run([
        m._values() for m in (model.q, model.k, model.v)], x))  # fmt: skip


@torch.no_grad()
def test_new_weights_are_seen() -> None:
    torch.manual_seed(0)
    model, other, x = Block(), Block(), torch.randn(1, K, dtype=torch.float64)
    share_inputs(model, place=True)
    for _ in range(2):
        model(x)
    model.load_state_dict(other.state_dict())
    got, ran = _run(model, x)
    assert ran == [256, 64]
    assert torch.equal(got, other(x))


@torch.no_grad()
def test_layers_that_no_longer_lie_together_run_alone() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(1, K, dtype=torch.float64)
    share_inputs(model, place=True)
    want = model(x), model(x)
    for m in (model.q, model.k, model.v):
        for name, value in m.tensors.items():
            m._buffers[name] = value.clone()
    got, ran = _run(model, x)
    assert ran == [128, 64, 64, 64]
    assert torch.equal(got, want[0])


@torch.no_grad()
def test_a_copy_of_the_model_joins_its_own_buffers() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(1, K, dtype=torch.float64)
    share_inputs(model, place=True)
    twin = copy.deepcopy(model)
    share_inputs(twin, place=True)
    for t in model.state_dict().values():
        t.zero_()
    want = twin(x)
    got, ran = _run(twin, x)
    assert ran == [256, 64]
    assert torch.equal(got, want)
    assert want.abs().sum() > 0


@torch.no_grad()
def test_nothing_moves_where_that_is_not_allowed() -> None:
    model = Block()
    places = [t.data_ptr() for t in model.state_dict().values()]
    share_inputs(model)  # on a CPU
    assert [t.data_ptr() for t in model.state_dict().values()] == places
    assert model.q._siblings is None


@torch.no_grad()
def test_joined_layer_is_the_layers_behind_each_other() -> None:
    torch.manual_seed(0)
    parts, x = [layer(64), layer(128)], torch.randn(2, K, dtype=torch.float64)
    want = torch.cat([p(x) for p in parts], -1)
    one = joined(parts)
    assert one is not None
    assert torch.equal(one(x), want)
    assert one.tensors["codes"].data_ptr() == parts[0].tensors["codes"].data_ptr()
    weights = [p.restore().weight.dequantize() for p in parts]
    assert torch.equal(one.restore().weight.dequantize(), torch.cat(weights))


def test_placing_twice_copies_once() -> None:
    parts = [layer(64), layer(64)]
    place_together_(parts)
    at = parts[0].tensors["codes"].data_ptr()
    place_together_(parts)
    assert parts[0].tensors["codes"].data_ptr() == at


def _with(**changes: Any) -> QuantSpec:
    return replace(INT4, **changes)


@pytest.mark.parametrize(
    "spec",
    [
        _with(gather=True),
        _with(scales=(Scale(element="f32", grain=(0, 0)),)),
        _with(scales=(*INT4.scales, Scale(element="f32", grain=(0, 0)))),
        _with(scales=(Scale(element="f32", grain=block(128, 128)),)),  # 64 is no multiple of 128
        _with(element=Element(name="nf4", bits=4, kind="lut"), zero=None),
    ],
)
def test_what_belongs_to_a_whole_matrix_is_not_joined(spec: QuantSpec) -> None:
    assert joined_op([op_of(128, spec), op_of(64, spec)]) is None


def test_unlike_layers_are_not_joined() -> None:
    assert joined_op([op_of(128), op_of(64)]) == op_of(192)
    assert joined_op([op_of(128), op_of(96)]) is None  # padding would lie between them
    bias = frozenset({"bias", "bias:float32"})
    assert joined_op([op_of(128), op_of(64, features=bias)]) is None
    other = _with(zero=Zero(kind="const", value=7))
    assert joined_op([op_of(128), op_of(64, other)]) is None


def test_adjacent_wants_order_and_no_gap() -> None:
    whole = torch.arange(24).view(6, 4)
    found = adjacent([whole[:2], whole[2:5]])
    assert found is not None
    assert torch.equal(found, whole[:5])
    assert adjacent([whole[2:5], whole[:2]]) is None
    assert adjacent([whole[:2], whole[3:]]) is None
    assert adjacent([whole[:2], whole[2:].clone()]) is None
    assert adjacent([whole[:2], whole.view(torch.int32)[4:8]]) is None


def test_bind_shared_of_a_family_is_a_joined_run() -> None:
    run = layer(64).kernel.bind_shared([op_of(64), op_of(128)])  # type: ignore[attr-defined]
    assert isinstance(run, JoinedRun)
    assert run.rows == [64, 128]
    other = Family("elsewhere", (Plain(),), op_of(64))
    assert other.bind_shared([op_of(64), op_of(128)]) is None
