"""Launches in CUDA graphs never share counters; eager calls of one stream do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

from quant_kernels_triton import gluon_counters as module
from quant_kernels_triton.gluon_counters import MOST, counters


@pytest.fixture
def machine(monkeypatch):
    """A device whose memory is the host's; set ``capturing`` and ``stream``."""
    state = {"capturing": False, "stream": 1}
    for name in ("_streams", "_supplies", "_used"):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(module, "_SUPPLY", 1024)
    zeros = torch.zeros
    monkeypatch.setattr(module.torch, "zeros", lambda n, *, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda _device: state["stream"], raising=False
    )
    return state


def span(t):
    return range(t.data_ptr(), t.data_ptr() + t.numel() * 4)


def test_captured_launches_have_counters_of_their_own(machine):
    eager = counters(0, 100)
    machine["capturing"] = True
    held = [counters(0, n) for n in (100, 1, 33, 256)]
    assert all(t.numel() >= n and not t.any() for t, n in zip(held, (100, 1, 33, 256)))
    assert all(t.data_ptr() % 128 == held[0].data_ptr() % 128 for t in held), "one alignment"
    spans = [span(t) for t in (eager, *held)]
    for i, one in enumerate(spans):
        for other in spans[:i]:
            assert one.stop <= other.start or other.stop <= one.start


def test_eager_calls_share_those_of_their_stream(machine):
    first = counters(0, 8)
    assert counters(0, 500) is first
    machine["stream"] = 2
    assert counters(0, 8) is not first


def test_a_used_up_supply_begins_again(machine):
    counters(0, 1)
    machine["capturing"] = True
    first = counters(0, 512)
    counters(0, 512)
    assert counters(0, 512).data_ptr() == first.data_ptr()


def test_without_an_eager_call_or_with_too_many_there_are_none(machine):
    assert counters(0, MOST + 1) is None
    machine["capturing"] = True
    assert counters(0, 8) is None
