"""Memory for reading: on the cpu, writable, given back, and refused with a reason."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from quant_core.checkpoint.buffer import read_buffer
from quant_core.errors import LimitError

FILE = Path("model.safetensors")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 256 << 10, (1 << 20) + 3])
def test_read_buffer_is_writable_cpu_memory_of_that_size(nbytes: int) -> None:
    with torch.device("meta"):
        buffer = read_buffer(nbytes, path=FILE, tensor="w")
    assert (buffer.device.type, buffer.dtype, buffer.shape) == ("cpu", torch.uint8, (nbytes,))
    buffer.numpy().data[:] = bytes(nbytes)
    assert int(buffer.sum()) == 0


def test_read_buffer_views_keep_the_memory_alive() -> None:
    view = read_buffer(1 << 20, path=FILE, tensor="w").fill_(7).view(torch.int32)[5:]
    gc.collect()
    assert torch.equal(view, torch.full_like(view, 0x07070707))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux /proc")
def test_read_buffer_returns_large_memory_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    buffer = read_buffer(64 << 20, path=FILE, tensor="w").fill_(1)
    assert resident() - before > 60 << 20
    del buffer
    assert resident() - before < 4 << 20


def test_read_buffer_impossible_size_is_a_limit_error() -> None:
    with pytest.raises(LimitError, match=r"model\.safetensors: tensor 'w' needs \d+ bytes") as err:
        read_buffer(1 << 62, path=FILE, tensor="w")
    assert (err.value.code, err.value.tensor, err.value.expected) == (
        "Q-LIMIT-MEMORY",
        "w",
        1 << 62,
    )
