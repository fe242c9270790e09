"""A repeated call starts the kernel that the first did, with its arguments; a stub."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

from quant_kernels_triton import gluon_run, launch, ops, replay
from quant_kernels_triton.direct import Direct, here
from quant_kernels_triton.gluon_plan import Ring, Specialized
from quant_kernels_triton.recipe import describe
from triton_made import SPECS, make_op


class Started(Direct):
    """Stands for every compiled kernel; notes its launches."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.flat_calls = 0

    @property
    def kinds(self):
        return ["tensordesc<bf16[1,1],L>"] * self.descriptors + ["*i8"] * self.rest

    def __call__(self, grid, stream, args):
        here.watch.started += 1
        descs = [a for a in args if hasattr(a, "base")]
        self.descriptors, self.rest = len(descs), len(args) - len(descs)
        told = [(d.base.data_ptr(), tuple(d.shape), tuple(d.strides)) for d in descs]
        self.calls.append((grid, stream, told, list(args[len(descs) :])))

    def flat(self, grid, stream, values, maps, bases):
        self.flat_calls += 1
        told = [(bases[at], shape, strides) for at, shape, strides in maps]
        assert list(values[: 4 * len(maps)]) == [v for _, *two in told for t in two for v in t]
        self.calls.append((grid, stream, told, list(values[4 * len(maps) :])))


class Compiled(dict):
    """Every kernel is compiled: one ``Started`` for each key."""

    def get(self, key, default=None):
        return self.setdefault(key, Started())

    def __contains__(self, key):
        return True


@pytest.fixture
def stub(monkeypatch):
    held, counter = Compiled(), torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr(launch, "_compiled", held)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    monkeypatch.setattr(replay.gluon_counters, "_counters", lambda device, count: counter)
    monkeypatch.setattr(replay, "_replays", {})
    monkeypatch.setattr(replay, "_failed", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return held


def held_tensors(recipe):
    return [torch.zeros(16) for _ in recipe.buffers]


def roles(call, x, y, tensors) -> tuple:
    """A launch with addresses named by what they are of."""
    grid, stream, descs, args = call
    (count,) = {replay.gluon_counters._counters(0, 1).data_ptr()}
    names = {t.data_ptr(): f"buffer {i}" for i, t in enumerate(tensors)}
    names |= {x.data_ptr(): "x", y.data_ptr(): "y", count: "counters"}
    told = [names.get(a, "memory" if a > 1 << 32 else a) for a in args]
    return grid, stream, [(names[at], *sizes) for at, *sizes in descs], told


@pytest.mark.parametrize(("rows", "kind"), [(1, Ring), (12, Ring), (16, Ring), (40, Specialized),
                                            (200, Specialized), (300, Specialized)])  # fmt: skip
@pytest.mark.parametrize("spec", ["uint4 g128 bf16", "uint4 two-level offset", "int8 channel"])
def test_a_replayed_call_hands_over_what_the_first_did(stub, spec, rows, kind):
    op = make_op(SPECS[spec], 4096, 4096, act="bfloat16", device=("cuda", "9.0"))
    r = describe(op, ops=("linear",))
    assert isinstance(gluon_run._layer(r).config(rows), kind)
    seen = []
    for _ in range(3):
        x, tensors = torch.zeros(rows, 4096, dtype=torch.bfloat16), held_tensors(r)
        y = replay.replayed(ops._linear, (r.text(), "gluon"), tensors, x, 4096)
        assert y.shape == (rows, 4096)
        (started,) = [s for s in stub.values() if s.calls]
        seen.append(roles(started.calls[-1], x, y, tensors))
    assert started.flat_calls == 2
    assert seen[1:] == [seen[0]] * 2
    assert seen[0][1] == 77
    assert seen[0][2][0] == ("x", (rows, 4096), (4096, 1))
    assert "y" in seen[0][3]
    assert f"buffer {r.buffers.index('codes')}" in seen[0][3]
