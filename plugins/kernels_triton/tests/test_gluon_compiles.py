"""The Gluon kernels compile for sm_90 without a GPU, and as meant: codes stay in registers.

What the numbers are is checked on a device by benchmarks/gpu_kernels_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from quant_core.kernels.base import Accepted, Rejected
from quant_kernels_triton.gluon_plan import (
    GluonPlan,
    Ring,
    Specialized,
    config,
    plan,
    specialized,
)
from quant_kernels_triton.gluon_stack import expected_blocks, stack_config, stack_us
from quant_kernels_triton.recipe import Recipe, describe
from quant_kernels_triton.wna16 import GluonTiles, gluon_missing
from triton_made import SPECS, make_op

PROGRAM = """
import sys
from triton_compiled import compile_ring, compile_specialized, compile_stack
if sys.argv[1] == "stack":
    for rows in map(int, sys.argv[4:]):
        compile_stack(sys.argv[2], sys.argv[3], rows)
    sys.exit()
if not sys.argv[1].startswith(("uint2", "uint3")):
    compile_ring(sys.argv[1], sys.argv[2])
for rows in map(int, sys.argv[3:]):
    compile_specialized(sys.argv[1], sys.argv[2], rows)
"""
DEVICE = ("cuda", "9.0")


@pytest.mark.parametrize(
    ("name", "act", "rows"),
    [
        ("uint4 g16 f32 code", "bfloat16", [128]),
        ("uint4 g128 f16", "bfloat16", [64, 96]),  # three consumers; two tiles, sums scaled
        ("nvfp4", "float16", [4096]),
        ("int8 channel", "bfloat16", [128, 4096]),
        ("uint3 g128", "bfloat16", [64]),
        ("uint2 g64 code", "bfloat16", [256]),
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
    ring = [] if name[:5] in ("uint2", "uint3") else ["ring", "ok"]
    assert done.stdout.split() == [*ring, *["specialized", "ok"] * len(rows)]


@pytest.mark.parametrize(
    ("name", "act", "rows"),
    [
        ("uint4 g128 f16", "bfloat16", [100, 5000]),  # rows gathered, sums scaled; two tiles
        ("mxfp4", "bfloat16", [60, 400]),  # by mma.sync; by wgmma
        ("fp8 block", "float16", [400]),
    ],
)
def test_stacks_compile_without_spills_or_layout_changes(name, act, rows, tmp_path):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM, "stack", name, act, *map(str, rows)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split() == ["stack", "ok"] * len(rows)


def stacked(name: str, n: int, k: int, experts: int) -> Recipe:
    op = make_op(SPECS[name], n, k, op="grouped_linear", act="bfloat16", experts=experts,
                 device=DEVICE)  # fmt: skip
    recipe = describe(op, ops=("grouped_linear",))
    assert not isinstance(recipe, Rejected), recipe
    return recipe


STACKS = {  # microseconds on H100s, int4 in groups of 128: (experts, a token's, k, n), tokens
    (128, 8, 2048, 1536): {4: 28.9, 16: 62.0, 64: 90.6, 256: 107, 1024: 167, 4096: 479},
    (8, 2, 4096, 14336): {4: 69.8, 16: 96.2, 64: 110, 256: 169, 1024: 420, 4096: 1536},
}


@pytest.mark.parametrize("shape", STACKS, ids=str)
def test_the_model_of_stacks_says_what_was_measured(shape):
    experts, top, k, n = shape
    recipe = stacked("uint4 g128 bf16", n, k, experts)
    p = plan(recipe)
    assert isinstance(p, GluonPlan)
    for tokens, us in STACKS[shape].items():
        assert stack_us(p, recipe, tokens * top) == pytest.approx(us, rel=0.08)


@pytest.mark.parametrize(("mean", "bm"), [(0.5, 16), (16, 16), (64, 96), (250, 256)])
def test_expected_blocks_are_those_of_rows_thrown_at_random(mean, bm):
    experts = 512
    rows = int(mean * experts)
    torch.manual_seed(0)
    counts = torch.stack([
        torch.bincount(torch.randint(experts, (rows,)), minlength=experts) for _ in range(40)
    ])  # fmt: skip
    blocks = (-(-counts // bm)).sum(1).double().mean().item()
    met = (counts > 0).sum(1).double().mean().item()
    assert expected_blocks(rows, experts, bm) == pytest.approx((blocks, met), rel=0.02)


@pytest.mark.parametrize("name", ["uint4 g128 bf16", "mxfp4", "fp8 block", "nvfp4"])
def test_stages_of_stacks_fit_into_shared_memory(name):
    recipe = stacked(name, 1536, 2048, 64)
    p = plan(recipe)
    assert isinstance(p, GluonPlan)
    for rows in (1, 64, 500, 2000, 6000, 20000, 100000):
        c = stack_config(p, recipe, rows)
        codes = c.consumers * (4096 if p.bytes else 2048)
        assert c.stages >= 3
        assert c.stages * c.halves * (c.bm * 128 + codes) <= 200 * 1024
        assert not c.acc or p.spg == 1


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
    assert refused(spec=SPECS["fp6_e2m3 g32"]).axis == "element"
    assert refused(spec=SPECS["table of 16"]).axis == "element"
    assert refused(op="embedding").axis == "op"


def test_what_gluon_lacks_is_read_from_its_files(monkeypatch, tmp_path):
    """As the imported package says it, and of packages that lack something."""
    language = pytest.importorskip("triton.experimental.gluon.language")
    assert gluon_missing() == ""
    assert all(hasattr(language, n) for n in ("warp_specialize", "inline_asm_elementwise", "join"))
    package = tmp_path / "triton"
    listed = package / "experimental/gluon/language/__init__.py"
    listed.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.syspath_prepend(str(tmp_path))

    def missing() -> str:
        gluon_missing.cache_clear()
        return gluon_missing()

    assert missing() == "no triton.experimental.gluon"
    listed.write_text("from ._core import (\n    join,\n    barrier,\n)\n")
    assert missing() == "no triton.experimental.gluon"
    (listed.parent / "nvidia/hopper").mkdir(parents=True)
    assert missing() == "Gluon without warp_specialize, inline_asm_elementwise"
    listed.write_text("from ._core import (\n    join,\n    warp_specialize,\n"
                      "    inline_asm_elementwise,\n)\n")  # fmt: skip
    assert missing() == "Gluon without barrier"
    monkeypatch.undo()
    gluon_missing.cache_clear()


def test_accepted_costs_cover_all_rows():
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    op = make_op(SPECS["uint4 g128 bf16"], 4096, 4096, act="bfloat16", device=DEVICE)
    answer = GluonTiles().accepts(op)
    assert isinstance(answer, Accepted)
    bounds = [bound for bound, _ in answer.costs]
    assert bounds == sorted(set(bounds))
    assert all(cost > 0 for _, cost in answer.costs)


@pytest.mark.parametrize("n", [64, 200, 4096, 28672])
@pytest.mark.parametrize("name", ["uint4 g128 bf16", "int8 channel", "nvfp4", "uint3 g128"])
def test_block_sizes_fit_shared_memory_and_k(name, n):
    recipe = describe(make_op(SPECS[name], n, 544, act="bfloat16", device=DEVICE), ops=("linear",))
    p = planned(name, n=n, k=544)
    for rows in (0, 1, 16, 17, 33, 64, 65, 128, 129, 256, 257, 1000, 5000):
        c = config(p, recipe, rows)
        if isinstance(c, Ring):
            stage = c.bm * 128 * 2 + c.warps * 16 * 128 * (1 if p.bytes else 0.5)
            assert c.stages * stage + 1024 <= 227 * 1024  # bytes of shared memory of a block
            assert c.split == 1 or recipe.groups // c.split >= 2
        else:
            assert isinstance(c, Specialized)
            stage = (c.bm * 128 + c.outputs * 8 * p.bits) * c.per  # x and codes
            assert c.stages * c.per >= 4
            assert recipe.groups % c.unroll == 0
            assert c.stages * stage + 4096 <= 227 * 1024
            assert c.bm % 8 == 0
            assert c.b1 & (c.b1 - 1) == 0 == c.b2 & (c.b2 - 1)  # Triton's tiles are powers of 2


@pytest.mark.parametrize(
    ("rows", "bm"), [(64, 64), (96, 96), (192, 192), (256, 256), (512, 256), (4096, 256)]
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
    ("uint4 g128 bf16", 4096, 28672, 64): 36.8,
    ("uint4 g128 bf16", 4096, 28672, 96): 45.9,
    ("uint4 g128 bf16", 4096, 28672, 128): 52.2,
    ("uint4 g128 bf16", 4096, 28672, 192): 71.8,
    ("uint4 g128 bf16", 4096, 28672, 256): 89.7,
    ("uint4 g128 bf16", 4096, 28672, 512): 163.5,
    ("uint4 g128 bf16", 4096, 28672, 1024): 312.6,
    ("uint4 g128 bf16", 4096, 4096, 32): 9.3,
    ("uint4 g128 bf16", 4096, 4096, 64): 11.5,
    ("uint4 g128 bf16", 4096, 4096, 96): 13.4,
    ("uint4 g128 bf16", 4096, 4096, 1024): 46.6,
    ("uint4 g128 bf16", 4096, 4096, 4096): 179.9,
    ("uint4 g128 bf16", 14336, 4096, 32): 18.4,
    ("uint4 g128 bf16", 14336, 4096, 64): 22.3,
    ("uint4 g128 bf16", 14336, 4096, 96): 27.3,
    ("uint4 g128 bf16", 14336, 4096, 128): 30.9,
    ("uint4 g128 bf16", 14336, 4096, 192): 39.7,
    ("uint4 g128 bf16", 14336, 4096, 256): 49.2,
    ("uint4 g128 bf16", 14336, 4096, 4096): 605.5,
    ("uint4 g128 bf16", 3584, 18944, 64): 24.2,
    ("uint4 g128 bf16", 3584, 18944, 128): 34.1,
    ("uint4 g128 bf16", 3584, 18944, 192): 44.0,
    ("uint4 g128 bf16", 3584, 18944, 256): 55.2,
    ("uint4 g128 bf16", 3584, 18944, 4096): 718.4,
    ("uint4 g128 bf16", 5120, 13824, 96): 31.9,
    ("uint4 g128 bf16", 5120, 13824, 128): 35.6,
    ("uint4 g128 bf16", 5120, 13824, 192): 46.7,
    ("uint4 g128 bf16", 5120, 13824, 256): 55.7,
    ("uint4 g128 bf16", 5120, 13824, 1024): 197.6,
    ("uint4 g128 bf16", 5120, 13824, 4096): 747.0,
    ("nvfp4", 4096, 28672, 256): 93.6,
    ("nvfp4", 4096, 28672, 4096): 1275.9,
    ("mxfp4", 4096, 28672, 64): 43.4,
    ("mxfp4", 4096, 28672, 256): 89.3,
    ("mxfp4", 4096, 28672, 4096): 1231.9,
    ("int8 channel", 14336, 4096, 256): 50.4,
    ("int8 channel", 14336, 4096, 1024): 152.4,
    ("int8 channel", 4096, 28672, 4096): 1317.6,
    ("fp8 channel", 14336, 4096, 256): 50.4,
    ("fp8 channel", 4096, 28672, 4096): 1243.1,
    ("uint3 g128", 4096, 28672, 64): 44.6,
}


@pytest.mark.parametrize(("name", "k", "n", "rows"), list(MEASURED))
def test_model_of_tiles_says_about_what_was_measured(name, k, n, rows):
    p, recipe = planned(name, n=n, k=k), described(name, n, k)
    assert isinstance(p, GluonPlan)
    _, us = specialized(p, recipe, rows)
    assert us == pytest.approx(MEASURED[name, k, n, rows], rel=0.06)
