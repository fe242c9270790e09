"""Buffers: where they lie, and that what is not written shows."""

from __future__ import annotations

import gc
import itertools
import mmap
import pickle
import platform
from pathlib import Path

import pytest
import torch

from quant_core.memory import (
    MAPPED_BYTES,
    empty,
    give_back,
    map_bytes,
    poisoned,
    written_whole,
)

LARGE = (3, MAPPED_BYTES)
DTYPES = [torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), LARGE, (0, 4)], ids=str)
def test_poisoned_shows_in_every_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = poisoned(shape, dtype)
    assert (out.shape, out.dtype) == (shape, dtype)
    if dtype.is_floating_point:
        assert bool(out.isnan().all())
    else:
        assert bool((out == (-1 if dtype.is_signed else 255)).all())


def test_written_whole_keeps_the_poison_of_small_buffers() -> None:
    with written_whole():
        assert bool(poisoned((64,), torch.float32).isnan().all())
        assert not bool((poisoned(LARGE, torch.uint8) == 255).all())
    assert bool((poisoned(LARGE, torch.uint8) == 255).all())


def test_written_whole_ends_with_an_error() -> None:
    with pytest.raises(KeyError), written_whole():
        raise KeyError
    assert bool((poisoned(LARGE, torch.uint8) == 255).all())


def test_empty_large_outlives_its_maker_and_copies_like_any_tensor() -> None:
    value = empty(LARGE, torch.int32)
    value.copy_(torch.arange(value.numel(), dtype=torch.int32).view(LARGE))
    view = value[1, 5:9]
    del value
    expected = torch.arange(MAPPED_BYTES + 5, MAPPED_BYTES + 9, dtype=torch.int32)
    assert torch.equal(view, expected)
    assert torch.equal(pickle.loads(pickle.dumps(view.clone())), expected)


def test_smaller_buffers_share_a_mapping_but_no_byte() -> None:
    made = [poisoned((100, 333), torch.uint8) for _ in range(600)]  # more than two mappings
    for i, one in enumerate(made):
        one.fill_(i % 251)
    assert all(bool((one == i % 251).all()) for i, one in enumerate(made))
    assert all(one.data_ptr() % 64 == 0 for one in made)
    steps = [b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(made)]
    assert steps.count(33344) > 590  # side by side, in lines of 64 bytes
    assert {one.untyped_storage().nbytes() for one in made} == {33300}
    kept = made[300].clone()
    last = made[300]
    del made, one
    assert torch.equal(last, kept)
    assert torch.equal(pickle.loads(pickle.dumps(last)), kept)


def test_memory_of_buffers_that_are_gone_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    made = [poisoned((200_000,), torch.uint8) for _ in range(500)]
    assert resident() - before > 90_000_000
    del made
    gc.collect()
    assert resident() - before < 40_000_000


def test_empty_is_on_the_device_asked_for_under_another_default() -> None:
    with torch.device("meta"):
        assert empty(LARGE, torch.uint8, "cpu").device.type == "cpu"
        assert empty((3,), torch.uint8, "cpu").device.type == "cpu"
    assert empty(LARGE, torch.uint8, "meta").device.type == "meta"


@pytest.mark.parametrize("size", [1, 5000, MAPPED_BYTES, MAPPED_BYTES + 5, 3 * MAPPED_BYTES - 1])
def test_a_mapping_is_as_long_as_asked_for_and_zero_to_its_end(size: int) -> None:
    mapping = map_bytes(size)
    assert len(mapping) == size
    assert (mapping[0], mapping[size - 1]) == (0, 0)
    mapping[size - 1] = 7
    assert mapping[size - 1] == 7


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="holes of glibc's heap")
def test_give_back_returns_the_holes_between_blocks_in_use() -> None:
    small = 64 << 10  # below glibc's threshold for mappings
    made = [torch.ones(small, dtype=torch.uint8) for _ in range(1024)]
    kept = made[::64]
    before = _resident()
    del made
    give_back()
    assert before - _resident() > 32 << 20  # of 63 MiB given up
    assert all(bool((one == 1).all()) for one in kept)


def test_give_back_without_glibc_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_core.memory.ctypes.pythonapi", object())
    give_back()
