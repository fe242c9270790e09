"""The Gluon kernels compile for sm_90 without a GPU, and as meant: codes stay in registers.

What the numbers are is checked on a device by benchmarks/gpu_kernels_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quant_core.kernels.base import Accepted, Rejected
from quant_kernels_triton.gluon_plan import (
    GluonPlan,
    Ring,
    Specialized,
    config,
    plan,
    specialized,
)
from quant_kernels_triton.recipe import Recipe, describe
from quant_kernels_triton.wna16 import GluonTiles
from triton_made import SPECS, make_op

PROGRAM = """
import sys
from triton_compiled import compile_ring, compile_specialized
compile_ring(sys.argv[1], sys.argv[2])
for rows in map(int, sys.argv[3:]):
    compile_specialized(sys.argv[1], sys.argv[2], rows)
"""
DEVICE = ("cuda", "9.0")


@pytest.mark.parametrize(
    ("name", "act", "rows"),
    [
        ("uint4 g16 f32 code", "bfloat16", [128]),
        ("uint4 g128 f16", "bfloat16", [128, 160]),  # three consumers; two tiles, sums scaled
        ("nvfp4", "float16", [4096]),
        ("int8 channel", "bfloat16", [4096]),
    ],
)
def test_kernels_compile_without_spills_or_layout_changes(name, act, rows, tmp_path):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM, name, act, *map(str, rows)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split() == ["ring", "ok", *["specialized", "ok"] * len(rows)]


def described(name: str, n: int, k: int, act: str = "bfloat16") -> Recipe:
    recipe = describe(make_op(SPECS[name], n, k, act=act, device=DEVICE), ops=("linear",))
    assert not isinstance(recipe, Rejected), recipe
    return recipe


def planned(name: str, act: str = "bfloat16", n: int = 4096, k: int = 4096) -> GluonPlan | Rejected:
    return plan(described(name, n, k, act))


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
            assert c.bm % 8 == 0
            assert c.b1 & (c.b1 - 1) == 0 == c.b2 & (c.b2 - 1)  # Triton's tiles are powers of 2


@pytest.mark.parametrize(
    ("rows", "bm"), [(96, 96), (160, 160), (192, 192), (256, 256), (512, 256), (4096, 256)]
)
def test_blocks_of_rows_leave_few_rows_empty(rows, bm):
    n, k = 28672, 4096
    p, recipe = planned("uint4 g128 bf16", n=n, k=k), described("uint4 g128 bf16", n, k)
    assert isinstance(p, GluonPlan)
    c = config(p, recipe, rows)
    assert isinstance(c, Specialized)
    assert c.bm == bm


# microseconds on an H100: the model has to tell what is quicker where no table says so
MEASURED = {
    ("uint4 g128 bf16", 4096, 28672, 96): 47.5,
    ("uint4 g128 bf16", 4096, 28672, 128): 52.8,
    ("uint4 g128 bf16", 4096, 28672, 192): 71.7,
    ("uint4 g128 bf16", 4096, 28672, 256): 86.9,
    ("uint4 g128 bf16", 4096, 28672, 512): 166.4,
    ("uint4 g128 bf16", 4096, 28672, 1024): 338.4,
    ("uint4 g128 bf16", 4096, 4096, 64): 11.9,
    ("uint4 g128 bf16", 4096, 4096, 128): 15.2,
    ("uint4 g128 bf16", 4096, 4096, 1024): 44.3,
    ("uint4 g128 bf16", 14336, 4096, 256): 48.9,
    ("uint4 g128 bf16", 3584, 18944, 128): 33.2,
    ("uint4 g128 bf16", 3584, 18944, 256): 54.4,
    ("int8 channel", 4096, 28672, 128): 65.5,
    ("int8 channel", 4096, 28672, 256): 91.4,
    ("nvfp4", 4096, 28672, 96): 64.8,
    ("mxfp4", 4096, 28672, 256): 89.9,
}


@pytest.mark.parametrize(("name", "k", "n", "rows"), list(MEASURED))
def test_model_of_tiles_says_about_what_was_measured(name, k, n, rows):
    p, recipe = planned(name, n=n, k=k), described(name, n, k)
    assert isinstance(p, GluonPlan)
    _, us = specialized(p, recipe, rows)
    assert us == pytest.approx(MEASURED[name, k, n, rows], rel=0.06)
