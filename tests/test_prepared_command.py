"""``quant cache``: what prepared weights there are, how large, and their end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from checkpoint_sets import FIXTURES
from quant_core import load_model
from quant_core.cli.main import main
from quant_core.prepared import folder

ONE = FIXTURES / "gptqmodel-awq-gemm-g128"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with one entry."""
    monkeypatch.setattr(folder, "_SPARE", 0)
    monkeypatch.delenv("QUANT_PREPARED", raising=False)
    load_model(ONE, prepared=tmp_path / "cache")
    return tmp_path / "cache"


def only_entry(cache: Path) -> Path:
    (found,) = folder.entries(cache)
    return found.path / folder.BUFFERS


def run_cli(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["cache", *words, "--json"]) == 0
    printed: dict[str, object] = json.loads(capsys.readouterr().out)
    return printed


def test_cache_command_lists_measures_and_clears(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--folder", str(cache))
    capsys.readouterr()
    listed = run_cli(capsys, "list", *at)
    (one,) = listed["entries"]  # type: ignore[misc]
    assert one["checkpoint"] == str(next(ONE.glob("model*.safetensors")))
    size = only_entry(cache).stat().st_size
    assert one["bytes"] == run_cli(capsys, "size", *at)["total_bytes"] == size
    foreign = cache / "notes.txt"
    foreign.write_text("mine")
    assert run_cli(capsys, "clear", *at)["count"] == 1
    assert folder.entries(cache) == []
    assert foreign.read_text() == "mine"
    assert run_cli(capsys, *at)["count"] == 0


def test_cache_command_says_what_is_unusable(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(only_entry(cache), 64)
    capsys.readouterr()
    assert main(["cache", "--folder", str(cache)]) == 0
    assert "unusable" in capsys.readouterr().out


def test_clear_leaves_folders_with_files_of_others(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = only_entry(cache).parent / "mine.txt"
    own.write_text("x")
    run_cli(capsys, "clear", "--folder", str(cache))
    assert own.read_text() == "x"
