"""Runs the kernels in Triton's interpreter, in a process that starts with it switched on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = sorted(p.name for p in (HERE / "interpreted").glob("check_*.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name, tmp_path):
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "--basetemp", str(tmp_path), str(HERE / "interpreted" / name)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 5
