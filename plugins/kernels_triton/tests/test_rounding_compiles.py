"""The rounding kernels compile for sm_90 without a GPU and keep their tile in registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("act", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int8 token", "mx fp4_e2m1 even", "nvfp4 stored inverse"])
def test_rounding_compiles_without_spills(name, act, tmp_path):
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "rounding_compiled", name, act, "4096"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "round ok" in done.stdout
    assert "extremes ok" in done.stdout
