"""Memory for reading: on the cpu, writable, given back, and refused with a reason."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from quant_core.checkpoint.buffer import BufferPool
from quant_core.errors import LimitError

FILE = Path("model.safetensors")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 256 << 10, (1 << 20) + 3])
def test_lease_is_writable_cpu_memory_of_that_size(nbytes: int) -> None:
    with torch.device("meta"):
        buffer = BufferPool().lease(nbytes, path=FILE, tensor="w")
    assert (buffer.device.type, buffer.dtype, buffer.shape) == ("cpu", torch.uint8, (nbytes,))
    buffer.numpy().data[:] = bytes(nbytes)
    assert int(buffer.sum()) == 0


def test_lease_views_keep_the_memory_alive() -> None:
    view = BufferPool().lease(1 << 20, path=FILE, tensor="w").fill_(7).view(torch.int32)[5:]
    gc.collect()
    assert torch.equal(view, torch.full_like(view, 0x07070707))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux /proc")
def test_lease_returns_large_memory_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    buffer = BufferPool().lease(64 << 20, path=FILE, tensor="w").fill_(1)
    assert resident() - before > 60 << 20
    del buffer
    assert resident() - before < 4 << 20


def test_lease_impossible_size_is_a_limit_error() -> None:
    with pytest.raises(LimitError, match=r"model\.safetensors: tensor 'w' needs \d+ bytes") as err:
        BufferPool().lease(1 << 62, path=FILE, tensor="w")
    assert (err.value.code, err.value.tensor, err.value.expected) == (
        "Q-LIMIT-MEMORY",
        "w",
        1 << 62,
    )


def test_memory_of_a_dead_tensor_is_leased_again_and_live_memory_never() -> None:
    pool = BufferPool()
    first = pool.lease(1 << 20, path=FILE, tensor="a")
    address = first.data_ptr()
    second = pool.lease(1 << 20, path=FILE, tensor="b").fill_(2)
    view = first.fill_(1).view(torch.int32)[:5]
    assert second.data_ptr() != address
    del first
    third = pool.lease(1 << 20, path=FILE, tensor="c").fill_(3)
    assert third.data_ptr() != address  # a view still lives there
    assert torch.equal(view, torch.full_like(view, 0x01010101))
    del view
    gc.collect()
    fourth = pool.lease(300 << 10, path=FILE, tensor="d")
    assert fourth.data_ptr() == address
    assert fourth.shape == (300 << 10,)
    assert int(second[0]) == 2


def test_pool_keeps_no_more_than_its_largest_lease() -> None:
    pool = BufferPool()
    leases = [pool.lease(1 << 20, path=FILE, tensor=str(i)) for i in range(6)]
    del leases
    gc.collect()
    assert sum(map(len, pool._free)) <= 1 << 20
    pool.clear()
    assert pool._free == []


def test_tensor_outlives_its_pool() -> None:
    pool = BufferPool()
    tensor = pool.lease(1 << 20, path=FILE, tensor="a").fill_(9)
    del pool
    gc.collect()
    assert int(tensor.sum()) == 9 << 20
