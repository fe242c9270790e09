"""Fixtures of all test suites, and last lines saying which checkpoints they used and the counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checkpoint_sets import FIXTURES, SHARED, checkpoints_root, has_shared

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.checkpoint.base import Checkpoint


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder of real checkpoints: the full set where present, else tests/fixtures."""
    return checkpoints_root()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The full set of checkpoints; tests that ask for it are skipped where it is absent."""
    if not has_shared():
        pytest.skip("needs the full set of checkpoints beside the repository")
    return SHARED


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Write a checkpoint folder and open it.

    ``write(tensors, config)``: one safetensors file, and a config.json of a Llama with ``config``
    as its ``quantization_config`` (None = without one). ``files``: further JSON files by name;
    ``metadata``: of the safetensors header; more keywords: further keys of config.json.
    """
    from safetensors.torch import save_file

    from quant_core.checkpoint.open import open_checkpoint

    def make(
        tensors: Mapping[str, Tensor],
        config: Any = None,
        *,
        files: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        **keys: Any,
    ) -> Checkpoint:
        data = {name: t.clone().contiguous() for name, t in tensors.items()}
        save_file(data, tmp_path / "model.safetensors", metadata=metadata and dict(metadata))
        block = {} if config is None else {"quantization_config": config}
        model = {"model_type": "llama", **block, **keys}
        for name, content in {"config.json": model, **(files or {})}.items():
            (tmp_path / name).write_text(json.dumps(content))
        return open_checkpoint(tmp_path)

    return make


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
