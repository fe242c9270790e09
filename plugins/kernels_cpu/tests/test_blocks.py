"""Decoder layers in one parallel region: the same bits as call by call, whatever the threads."""

from __future__ import annotations

import pytest
import torch

from cpu_layer import HOW, Made, near
from quant_kernels_cpu.library import library, unavailable

if unavailable():
    pytest.skip(f"no CPU kernels: {unavailable()}", allow_module_level=True)

# more than one thread does alone; 19 blocks of rows, which threads do not share evenly
SIZES = {"hidden": 192, "wide": 608}


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(made: Made) -> tuple[torch.Tensor, ...]:
    keys, values = made.keys.clone(), made.values.clone()
    inputs = (made.buffers, made.norms, made.x, made.cos, made.sin)
    y = made.run(*inputs, keys, values, made.mask, made.scale, made.eps, made.at)
    return y, keys, values


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("how", list(HOW))
def test_threads_share_a_layer_without_changing_a_bit(isa, how, batch, monkeypatch):
    made = Made(batch, **HOW[how], **SIZES)
    torch.set_num_threads(1)
    want = run(made)
    assert near(want[0], made.plain(made.mask)[0])
    c = library().c
    with monkeypatch.context() as patch:  # call by call
        patch.setattr(c, "qk_decoder_block", lambda packed: c.qk_decoder_chain(packed, 1))
        assert all(torch.equal(a, b) for a, b in zip(run(made), want, strict=True))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(run(made), want, strict=True))


@pytest.mark.usefixtures("_threads")
def test_halves_that_share_a_block_go_call_by_call(isa):
    """``up`` begins in the middle of a block of 32 rows."""
    torch.set_num_threads(2)
    made = Made(2, sides=1, hidden=192, wide=624)
    assert near(run(made)[0], made.plain(made.mask)[0])
