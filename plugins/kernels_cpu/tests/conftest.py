"""The instruction sets to run the kernels with, one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import matrix_units
from cpu_made import SPECS
from quant_core.spec import QuantSpec
from quant_kernels_cpu.library import ISAS, library, unavailable

if other := os.environ.get("QUANT_CPU_TEST_LIBRARY"):  # test_matrix_units.py
    matrix_units.use(Path(other))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = unavailable()
    for item in items:
        if reason and "isa" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=f"no CPU kernels: {reason}"))


@pytest.fixture(autouse=True)
def _limit_read_again() -> Iterator[None]:
    """The limit is read once a process; here each test may set its own."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Limits the library to an instruction set for one test, or skips it."""

    def to(isa: str) -> str:
        monkeypatch.delenv("QUANT_CPU_ISA", raising=False)
        library.cache_clear()
        if ISAS.index(isa) > library().isa:
            pytest.skip(f"this processor has {ISAS[library().isa]} at most")
        monkeypatch.setenv("QUANT_CPU_ISA", isa)
        library.cache_clear()
        return isa

    return to


@pytest.fixture(params=ISAS[1:])
def isa(request: pytest.FixtureRequest, limit: Callable[[str], str]) -> str:
    """Each instruction set of this processor in turn."""
    return limit(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of tiny layers only wait for each other where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Callable[[int], None]:
    """``torch.set_num_threads`` for one test; the number is put back after each."""
    return torch.set_num_threads


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    return SPECS[request.param]
