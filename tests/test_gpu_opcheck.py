"""Every registered operator has a case in benchmarks/gpu_opcheck.py, which needs a GPU to run."""

from __future__ import annotations

import subprocess
import sys

from checkpoint_sets import REPO

PROGRAM = """
import sys
sys.path.insert(0, "benchmarks")
import gpu_opcheck
import torch

print(*gpu_opcheck.operators(), sep="\\n")
without, unknown = gpu_opcheck.missing()
assert not without, f"operators without a case: {without}"
assert not unknown, f"cases without an operator: {unknown}"
assert all(gpu_opcheck.CASES.values()), "a case is a call at least"
held = torch.library.Library("quant_triton", "FRAGMENT")  # control: one more operator is seen
held.define("not_checked(Tensor x) -> Tensor")
assert gpu_opcheck.missing() == (["quant_triton::not_checked"], [])
row = gpu_opcheck.check("quant_torch::int4_cpu", 0)  # the one that needs no GPU
assert not row["wrong"], row
"""


def test_every_operator_has_an_opcheck_case_and_the_one_of_the_cpu_passes() -> None:
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"quant_cuda::linear", "quant_core::rows_linear"} <= set(done.stdout.split())
