"""Rounding and Hadamard kernels compile for sm_90 without a GPU, their tiles in registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def _said(tmp_path, *command: str) -> str:
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", *command], env=env, capture_output=True, text=True, cwd=here
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "act"), [("int8 token", "bfloat16"), ("mx fp4_e2m1 even", "float16")]
)
def test_rounding_compiles_without_spills(name, act, tmp_path):
    said = _said(tmp_path, "rounding_compiled", name, act, "4096")
    assert said.count("round ok") == 2
    assert "extremes ok" in said


@pytest.mark.parametrize(("n", "m"), [(128, 1), (14336, 28)])
def test_hadamard_compiles_without_spills(n, m, tmp_path):
    said = _said(tmp_path, "hadamard_compiled", str(n), str(m))
    assert said.count(" ok ") == 2
