"""Replayed calls do what the watched call did, on the memory of their own; a stub of the driver."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from quant_kernels_triton import direct, gluon_counters, launch, replay
from quant_kernels_triton.direct import Direct
from quant_kernels_triton.launch import Build
from quant_kernels_triton.replay import kind_of, replayed

ADD = ("*fp32", "*fp32", "*fp32", "i32", "fp32")  # a, b, to, count, factor
COUNT = ("tensordesc<fp32[4,4],L>", "*i32", "*fp32", "i32", None)  # x, counters, to, count


def floats(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


class Card:
    """Runs the two "kernels" above on the memory that it is given addresses of."""

    def __init__(self) -> None:
        self.launches, self.encoded = [], []

    def cuTensorMapEncodeTiled(self, at, kind, rank, address, sizes, pitches, *rest):
        self.encoded.append((address.value, list(sizes)))
        ctypes.memmove(at.value, struct.pack("<QQ", address.value, len(self.encoded)), 16)
        return 0

    def start(self, config, function, params, extra):
        self.launches.append((function, struct.unpack("@7IQQI4x", ctypes.string_at(config, 56))))
        slots = [ctypes.c_void_p.from_address(params + 8 * i).value for i in range(9)]

        def read(i, form):
            return struct.unpack(form, ctypes.string_at(slots[i], struct.calcsize(form)))[0]

        if function == 1:
            count = read(3, "@i")
            to = floats(read(2, "@Q"), count)
            to[:] = read(4, "@f") * floats(read(0, "@Q"), count) + floats(read(1, "@Q"), count)
        else:  # sizes 1, 2 and strides 3, 4 of the descriptor; counters are left at zero
            count = read(7, "@i")
            counters = (ctypes.c_int32 * 4).from_address(read(5, "@Q"))
            assert list(counters) == [0] * 4
            x = floats(struct.unpack("<Q", ctypes.string_at(slots[0], 8))[0], count)
            floats(read(6, "@Q"), count)[:] = x + read(1, "@i") * 100
        return 0


@pytest.fixture
def card(monkeypatch):
    card = Card()

    def made(kinds, function, maps=()):
        held = [direct._Maps(card, "fp32", [4, 4], 3) for _ in maps]
        return Direct(kinds, held, function, 128, 0, False, card.start, lambda r: None)

    supply = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(gluon_counters, "_counters", lambda device, count: supply)
    monkeypatch.setattr(launch, "_compiled", {
        ("add", None): made(ADD, 1), ("count", None): made(COUNT, 2, [1]),
    })  # fmt: skip
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(replay, "_replays", {})
    monkeypatch.setattr(replay, "_failed", {})
    return card


def build() -> Build:
    raise AssertionError("everything is compiled")


TABLE, OTHER = torch.full((64,), 0.5), torch.zeros(64)


def run(x, tensors, name):
    """2 * (x + 100 * rows + table) + w, in three launches, with memory between them."""
    flat = x.reshape(-1, 4)
    y = torch.empty(x.shape[0], 4)
    first, second = torch.empty(2, x.numel()).split(1)
    desc = launch_desc(flat)
    counters = gluon_counters.counters(0, 4)
    launch.launch(
        None, "count", (2, 1), (desc, counters, first[0], x.numel(), "fixed"), None, build
    )
    launch.launch(None, "add", (1, 1), (first, TABLE, second, x.numel(), 1.0), None, build)
    launch.launch(None, "add", (1, 3), (second, tensors[1], y, x.numel(), 2.0), None, build)
    return y.view(x.shape)


def launch_desc(x):
    class Desc:
        base, shape, strides = x, list(x.shape), [x.shape[1], 1]

    return Desc


def wanted(x, w):
    return 2 * (x + 100 * x.shape[0] + 0.5) + w[: x.numel()].view(x.shape)


def test_replays_are_the_watched_call_on_other_memory(card):
    w = torch.randn(64)
    for rows in (3, 5, 3, 3, 5, 3):
        x, w = torch.randn(rows, 4), torch.randn(64)
        y = replayed(run, ("layer",), [torch.zeros(1), w], x, x.shape[-1])
        assert torch.equal(y, wanted(x, w))
    assert len(replay._replays) == 2
    kinds = [function for function, _ in card.launches]
    assert kinds == [2, 1, 1] * 6
    grids = [(head[0], head[1], head[7]) for _, head in card.launches]
    assert grids == [(2, 1, 77), (1, 1, 77), (1, 3, 77)] * 6


def test_results_of_replays_are_memory_of_their_own(card):
    w, x = torch.randn(64), torch.randn(3, 4)
    held = [replayed(run, ("layer",), [OTHER, w], x, x.shape[-1]) for _ in range(4)]
    assert len({y.data_ptr() for y in held}) == 4
    assert all(torch.equal(y, held[0]) for y in held)


def test_other_shapes_dtypes_layers_and_functions_are_watched_on_their_own(card):
    w = torch.randn(64)
    replayed(run, ("layer",), [OTHER, w], torch.randn(3, 4), 4)
    replayed(run, ("other",), [OTHER, w], torch.randn(3, 4), 4)
    replayed(run, ("layer",), [OTHER, w], torch.randn(3, 2, 2), 2)
    replayed(
        lambda x, tensors, name: run(x, tensors, name), ("layer",), [OTHER, w], torch.randn(3, 4), 4
    )
    assert len(replay._replays) == 4


def test_x_that_is_not_as_the_kernels_want_it_is_not_replayed(card):
    w, asked = torch.randn(64), []

    def noted(x, tensors, name):
        asked.append(x)
        return run(x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(), tensors, name)

    replayed(noted, ("layer",), [OTHER, w], torch.randn(4, 4), 4)
    crossed = torch.randn(4, 4).t()
    shifted = torch.randn(17)[1:].view(4, 4)
    for x in (crossed, shifted):
        assert torch.equal(replayed(noted, ("layer",), [OTHER, w], x, x.shape[-1]), wanted(x, w))
    assert len(asked) == 3


@pytest.mark.parametrize(
    "more",
    [
        lambda x, y: y.add_(1),  # a torch operation
        lambda x, y: y + 0,
        lambda x, y: torch.cat([y, y])[: y.shape[0]],
        lambda x, y: x,  # not memory of its own
        lambda x, y: y[:2],
        lambda x, y: y.double(),
    ],
)
def test_a_call_that_does_more_is_run_each_time(card, more):
    w, calls = torch.randn(64), []

    def odd(x, tensors, name):
        calls.append(x)
        return more(x, run(x, tensors, name))

    for _ in range(5):
        x = torch.randn(3, 4)
        got = replayed(odd, ("layer",), [OTHER, w], x, x.shape[-1])
        assert torch.equal(got, more(x, wanted(x, w)))
    assert len(calls) == 5
    assert not replay._replays


def test_what_lies_within_a_buffer_or_in_two_places_is_run_each_time(card):
    """The address would be another layer's, or one of two that another layer has apart."""
    held, w = torch.randn(2, 64), torch.randn(64)

    def inner(x, tensors, name):
        return run(x, [OTHER, tensors[1][1]], name)

    for _ in range(3):
        x, held = torch.randn(3, 4), torch.randn(2, 64)
        assert torch.equal(replayed(inner, ("layer",), [OTHER, held], x, 4), wanted(x, held[1]))
    assert torch.equal(replayed(run, ("tied",), [w, w], x, 4), wanted(x, w))
    assert torch.equal(replayed(run, ("tied",), [OTHER, w], x, 4), wanted(x, w))
    assert list(replay._replays) == [(run, ("tied",), x.shape, x.dtype, -1)]
    assert torch.equal(replayed(run, ("tied",), [w, OTHER], x, 4), wanted(x, OTHER))


def test_a_launch_past_the_watch_is_not_left_out(card):
    w = torch.randn(64)
    held = launch._compiled["add", None]

    def hidden(x, tensors, name):
        y = run(x, tensors, name)
        held((1, 1), 77, (y.data_ptr(), w.data_ptr(), y.data_ptr(), y.numel(), 1.0))
        return y

    for _ in range(5):
        x = torch.randn(3, 4)
        want = wanted(x, w) + w[:12].view(3, 4)
        assert torch.equal(replayed(hidden, ("layer",), [OTHER, w], x, x.shape[-1]), want)
    assert not replay._replays


def test_a_kernel_that_triton_launches_is_run_each_time(card):
    w, real = torch.randn(64), launch._compiled["add", None]
    launch._compiled["add", None] = lambda *args: real(*args)
    for _ in range(5):
        x = torch.randn(3, 4)
        assert torch.equal(replayed(run, ("layer",), [OTHER, w], x, x.shape[-1]), wanted(x, w))
    assert not replay._replays


def test_a_table_made_by_the_first_call_does_not_stop_later_ones(card):
    w, made = torch.randn(64), []

    def with_table(x, tensors, name):
        if not made:
            made.append(torch.full((64,), 2.0))
        y = run(x, tensors, name)
        z = torch.empty_like(y)
        launch.launch(None, "add", (1, 1), (y, made[0], z, y.numel(), 1.0), None, build)
        return z

    for _ in range(4):
        x = torch.randn(3, 4)
        got = replayed(with_table, ("layer",), [OTHER, w], x, x.shape[-1])
        assert torch.equal(got, wanted(x, w) + 2.0)
    assert len(replay._replays) == 1


def test_counters_that_cannot_be_had_leave_the_call_to_be_run(card, monkeypatch):
    w, x = torch.randn(64), torch.randn(3, 4)
    calls = []

    def noted(x, tensors, name):
        calls.append(x)
        return run(x, tensors, name)

    replayed(noted, ("layer",), [OTHER, w], x, x.shape[-1])
    replayed(noted, ("layer",), [OTHER, w], x, x.shape[-1])
    assert len(calls) == 1
    supply = gluon_counters._counters(0, 4)
    monkeypatch.setattr(
        gluon_counters, "_counters", lambda d, c: supply if len(calls) == 2 else None
    )
    assert torch.equal(replayed(noted, ("layer",), [OTHER, w], x, x.shape[-1]), wanted(x, w))
    assert len(calls) == 2


def test_calls_are_not_watched_while_a_graph_is_captured(card, monkeypatch):
    w, x = torch.randn(64), torch.randn(3, 4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(replayed(run, ("layer",), [OTHER, w], x, x.shape[-1]), wanted(x, w))
    assert not replay._replays
    assert not replay._failed


def test_other_inputs_are_taken_as_they_lie_or_watched_again(card):
    """An input besides x that has to be copied is not what the replay of one that has not takes."""
    held = torch.randn(2, 65)
    plain, shifted, spread = held[0, :64].clone(), held[0, 1:], torch.randn(64, 2)[:, 0]
    assert len({kind_of(t) for t in (plain, shifted, spread)}) == 2
    assert kind_of(plain) != kind_of(plain.double())

    def copies(x, tensors, name, *kind):
        w = tensors[1].contiguous()
        return run(x, [OTHER, w if w.data_ptr() % 16 == 0 else w.clone()], name)

    for w in (plain, shifted, spread, plain, shifted, spread):
        x = torch.randn(3, 4)
        y = replayed(copies, ("layer", *kind_of(w)), [OTHER, w], x, 4)
        assert torch.equal(y, wanted(x, w))


def test_an_op_replays_what_its_calls_did_unless_somebody_watches_them(card, monkeypatch):
    w, calls, seen = torch.randn(64), [], [True]

    def noted(x, tensors, name):
        calls.append(name)
        return run(x, tensors, name)

    monkeypatch.setattr(replay, "unobserved", lambda x: seen[0])
    op = replay.replayable(noted)
    for seen[0] in (True, True, False, True):
        x = torch.randn(3, 4)
        assert torch.equal(op(x, [OTHER, w], "layer"), wanted(x, w))
    assert len(calls) == 2


def test_calls_run_with_the_device_of_x_as_the_current_one(card, monkeypatch):
    w, x, current = torch.randn(64), torch.randn(3, 4), [5]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    def noted(x, tensors, name):
        assert current == [2]
        return run(x, tensors, name)

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 2)
    for _ in range(3):
        assert torch.equal(replayed(noted, ("layer",), [OTHER, w], x, 4), wanted(x, w))
        assert current == [5]
    assert len(replay._replays) == 1


def test_watching_a_call_does_not_import_torchs_compiler():
    """It takes five seconds, most of a first result."""
    program = """
import sys, torch
from quant_kernels_triton.replay import _Watch
with _Watch() as watch:
    y = torch.empty(4).view(2, 2)
assert len(watch.made) == 1 and not watch.lost
with watch:
    y + 1
assert watch.lost
print([name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
