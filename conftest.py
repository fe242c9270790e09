"""Fixtures of all test suites, and last lines saying which checkpoints they used and the counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_sets import FIXTURES, checkpoints_root, has_shared


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder of real checkpoints: the full set where present, else tests/fixtures."""
    return checkpoints_root()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The checkpoints shipped in this repository, wherever the tests run."""
    return FIXTURES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_shared():
        return
    skip = pytest.mark.skip(reason="needs the full set of checkpoints beside the repository")
    for item in items:
        if item.get_closest_marker("shared") is not None:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    used = "the full set" if has_shared() else "the shipped set only"
    count = sum((d / "expected.json").is_file() for d in checkpoints_root().iterdir())
    terminalreporter.write_line(f"checkpoints: {used}, {count} with a producer's expected values")
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        if reports := terminalreporter.stats.get(outcome):
            terminalreporter.write_line(f"{outcome}: {len(reports)}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random inputs are the same in every run, in whatever order tests come."""
    import torch

    torch.manual_seed(0)
