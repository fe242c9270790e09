"""An emulated torch_npu for the tests of this package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def npu(monkeypatch):
    """``import torch_npu`` gives the emulation."""
    import fake_torch_npu

    from quant_kernels_npu.device import check_words

    monkeypatch.setitem(sys.modules, "torch_npu", fake_torch_npu)
    fake_torch_npu.calls.clear()
    check_words.cache_clear()
    yield fake_torch_npu
    check_words.cache_clear()
