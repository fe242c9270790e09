"""A repeated call of few rows starts the kernel that the first did, with its arguments; a stub."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

from quant_kernels_triton import gluon_run, launch
from quant_kernels_triton.gluon_plan import Ring
from quant_kernels_triton.recipe import describe
from triton_made import SPECS, make_op


class Started:
    """Stands for every compiled kernel; notes its launches."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, grid, stream, args):
        desc, *rest = args
        self.calls.append((grid, stream, desc.base.data_ptr(), desc.shape, desc.strides, rest))


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
    monkeypatch.setattr(gluon_run, "counters", lambda device, count: counter)
    monkeypatch.setattr(gluon_run, "_ready", {})
    return held


def held_tensors(recipe):
    return [torch.zeros(16) for _ in recipe.buffers]


@pytest.mark.parametrize("rows", [1, 7, 12, 16])
@pytest.mark.parametrize("spec", ["uint4 g128 bf16", "uint4 two-level offset", "int8 channel"])
def test_a_kept_call_hands_over_what_the_first_did(stub, spec, rows, monkeypatch):
    op = make_op(SPECS[spec], 4096, 4096, act="bfloat16", device=("cuda", "9.0"))
    r = describe(op, ops=("linear",))
    layer = gluon_run._layer(r)
    assert isinstance(layer.config(rows), Ring)
    # fixed addresses, so that the launches can be compared
    y, part = torch.empty(rows, 4096, dtype=torch.bfloat16), torch.empty(16)
    monkeypatch.setattr(gluon_run.torch, "empty", lambda *a, **k: part)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a: y)
    x, tensors = torch.zeros(rows, 4096, dtype=torch.bfloat16), held_tensors(r)
    for _ in range(3):
        assert gluon_run.run_gluon(r, x, tensors) is y
    assert len(gluon_run._ready) == 1
    (started,) = [s for s in stub.values() if s.calls]
    first, *later = started.calls
    assert len(later) == 2
    assert later == [first, first]
    assert first[1] == 77
    assert first[3] == [rows, 4096]
    other = held_tensors(r)
    gluon_run.run_gluon(r, x, other)
    moved = started.calls[-1][-1]
    assert moved[0] == other[r.buffers.index("codes")].data_ptr()
    assert moved != first[-1]
