"""Files are read into the page cache before somebody asks, where that is of use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from quant_core.checkpoint import ahead

SIZE = 3 * ahead._STEP + 12345


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which nothing is in the page cache."""
    monkeypatch.setattr(ahead, "_LEAST", 0)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    evict(path)
    if cached(path):
        pytest.skip("this file system keeps files in memory")
    return path


def evict(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> int:
    with path.open("rb") as f:
        return 4 - len(ahead._missing(f.fileno(), SIZE))


def test_whole_file_is_in_the_cache_soon(file: Path) -> None:
    assert ahead.start_reading([(str(file), 0, SIZE)]) is not None
    end = time.monotonic() + 60
    while cached(file) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert cached(file) == 4
    assert ahead.start_reading([(str(file), 0, SIZE)]) is None, "nothing is left to read"


def test_nothing_is_read_that_would_not_fit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "available_bytes", lambda: SIZE)
    assert ahead.start_reading([(str(file), 0, SIZE)]) is None
    assert cached(file) == 0


def test_little_is_left_to_who_needs_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LEAST", 1 << 30)
    assert ahead.start_reading([(str(file), 0, SIZE)]) is None


def test_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert ahead.start_reading([(str(tmp_path / "none"), 0, 1)]) is None


def test_reading_ends_with_the_context(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the context no descriptor of the file stays open."""

    def opened() -> list[str]:
        names = [os.path.join("/proc/self/fd", n) for n in os.listdir("/proc/self/fd")]
        return [n for n in names if os.path.exists(n) and os.path.samefile(n, file)]

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs Linux")
    with ahead.reading_ahead([(str(file), 0, SIZE)]):
        pass
    end = time.monotonic() + 60
    while opened() and time.monotonic() < end:
        time.sleep(0.01)
    assert opened() == []


def test_free_memory_is_known_here() -> None:
    assert ahead.available_bytes() > 1 << 20
