"""The Gluon kernels compile for sm_90 without a GPU, and as meant: codes stay in registers.

What the numbers are is checked on a device by benchmarks/gpu_kernels_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quant_core.kernels.base import Accepted, Rejected
from quant_kernels_triton.gluon_plan import GluonPlan, Ring, Specialized, config, plan
from quant_kernels_triton.recipe import describe
from quant_kernels_triton.wna16 import GluonTiles
from triton_made import SPECS, make_op

PROGRAM = """
import sys
from triton_compiled import compile_ring, compile_specialized
compile_ring(sys.argv[1], sys.argv[2])
compile_specialized(sys.argv[1], sys.argv[2])
"""
DEVICE = ("cuda", "9.0")


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("uint4 two-level offset", "bfloat16"),
        ("nvfp4", "float16"),
        ("int8 channel", "bfloat16"),
    ],
)
def test_kernels_compile_without_spills_or_layout_changes(name, act, tmp_path):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM, name, act]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split() == ["ring", "ok", "specialized", "ok"]


def planned(name: str, act: str = "bfloat16", n: int = 4096, k: int = 4096) -> GluonPlan | Rejected:
    recipe = describe(make_op(SPECS[name], n, k, act=act, device=DEVICE), ops=("linear",))
    assert not isinstance(recipe, Rejected), recipe
    return plan(recipe)


@pytest.mark.parametrize(
    ("name", "act", "mode", "spg"),
    [
        ("uint4 g128 bf16", "bfloat16", 1, 1),  # a bf16 scale is exact in bf16
        ("uint4 g128 f16", "bfloat16", 2, 1),  # a fp16 one is not: its rest is added
        ("uint4 g128 f16", "float16", 1, 1),
        ("uint4 g32 bf16 code", "bfloat16", 1, 4),
        ("uint4 two-level offset", "bfloat16", 3, 4),
        ("nvfp4", "bfloat16", 1, 8),
        ("int8 channel", "bfloat16", 0, 1),
    ],
)
def test_plan_says_how_scales_are_applied(name, act, mode, spg):
    p = planned(name, act)
    assert isinstance(p, GluonPlan)
    assert (p.mode, p.spg) == (mode, spg)


def test_refusals_name_the_axis():
    kernel = GluonTiles()
    spec = SPECS["uint4 g128 bf16"]

    def refused(**changes: object) -> Rejected:
        args = {"act": "bfloat16", "device": DEVICE} | changes
        answer = kernel.accepts(make_op(args.pop("spec", spec), 256, 256, **args))
        assert isinstance(answer, Rejected)
        return answer

    assert refused(device=("cpu", "")).axis == "device"
    assert refused(device=("cuda", "8.0")).axis == "compute capability"
    assert refused(act="float32").axis == "act_dtype"
    assert refused(spec=SPECS["uint3 g128"]).axis == "element"
    assert refused(spec=SPECS["table of 16"]).axis == "element"
    assert refused(op="embedding").axis == "op"


def test_accepted_costs_cover_all_rows():
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    op = make_op(SPECS["uint4 g128 bf16"], 4096, 4096, act="bfloat16", device=DEVICE)
    answer = GluonTiles().accepts(op)
    assert isinstance(answer, Accepted)
    bounds = [bound for bound, _ in answer.costs]
    assert bounds == sorted(set(bounds))
    assert all(cost > 0 for _, cost in answer.costs)


@pytest.mark.parametrize("n", [64, 200, 4096, 28672])
@pytest.mark.parametrize("name", ["uint4 g128 bf16", "int8 channel", "nvfp4"])
def test_block_sizes_fit_shared_memory_and_k(name, n):
    recipe = describe(make_op(SPECS[name], n, 544, act="bfloat16", device=DEVICE), ops=("linear",))
    p = planned(name, n=n, k=544)
    for rows in (1, 16, 17, 33, 64, 65, 128, 129, 256, 257, 1000, 5000):
        c = config(p, recipe, rows)
        if isinstance(c, Ring):
            stage = c.bm * 128 * 2 + c.warps * 16 * 128 * (1 if p.bytes else 0.5)
            assert c.stages * stage + 1024 <= 227 * 1024  # bytes of shared memory of a block
            assert c.split == 1 or recipe.groups // c.split >= 2
        else:
            assert isinstance(c, Specialized)
            assert c.stages * c.bm * 64 * 2 + 32768 <= 227 * 1024
