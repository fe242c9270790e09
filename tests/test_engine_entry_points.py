"""Engines load our entry points in each of their processes, whether or not we are asked for."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec

import pytest

from checkpoint_sets import REPO

PROJECT = tomllib.loads((REPO / "core" / "pyproject.toml").read_text("utf-8"))["project"]
TARGETS = {
    group: entries["quant_core"]
    for group, entries in PROJECT["entry-points"].items()
    if group != "quant_core"
}
MISSING = [g for g in TARGETS if find_spec(g.partition(".")[0]) is None]


def run(script: str) -> str:
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout + out.stderr


def test_every_serving_engine_has_an_entry_point() -> None:
    assert sorted(TARGETS) == ["sglang.srt.plugins", "vllm.general_plugins"]


@pytest.mark.parametrize("group", sorted(TARGETS))
def test_entry_point_imports_neither_torch_nor_plugins(group: str) -> None:
    module, _, name = TARGETS[group].partition(":")
    script = (
        f"import sys, {module} as m; assert callable(m.{name})\n"
        "print(sorted({n.split('.')[0] for n in sys.modules}))"
    )
    found = run(script)
    assert "'quant_core'" in found
    for heavy in ("torch", "triton", "numpy", "pluggy", "quant_plugin", "quant_kernels"):
        assert f"'{heavy}" not in found


@pytest.mark.parametrize("group", sorted(MISSING))
def test_entry_point_beside_another_version_logs_and_returns(group: str) -> None:
    """Here the engine is not installed, so that everything it would offer is missing."""
    module, _, name = TARGETS[group].partition(":")
    found = run(f"import logging; logging.basicConfig()\nfrom {module} import {name}\n{name}()")
    assert "ERROR" in found
    assert "quant_core is not available" in found
    assert "tested: >=" in found
