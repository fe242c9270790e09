"""Compiling the Gluon kernels for sm_90 where there is no GPU; run in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quant_kernels_triton.asm import constraints, dequant
from quant_kernels_triton.gluon_plan import GluonPlan, config, plan
from quant_kernels_triton.gluon_ring import ring
from quant_kernels_triton.gluon_ws import specialized
from quant_kernels_triton.recipe import GROUP, Recipe, describe
from triton_made import SPECS, make_op

_PAIRS = {0: "*i64", 1: "*i32", 2: "*i32"}  # by element of the factor; others are bytes


def _compile(fn: Any, box: list[int], p: GluonPlan, r: Recipe, warps: int, more: dict) -> None:
    bf16 = r.act_dtype == "bfloat16"
    act = "bf16" if bf16 else "fp16"
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if bf16 else gl.float16)
    types = {"xd": f"tensordesc<{act}[{box[0]},{box[1]}],{layout!r}>", "W": "*i16", "Y": f"*{act}"}
    for name, c in zip(("S0", "S1", "Z", "O0", "O1"), p.factors):
        types[name] = _PAIRS.get(c >> 3 & 7, "*i16") if c & 7 == GROUP else "*fp32"
    types |= dict.fromkeys(("ROW0", "ROW1", "BIAS", "PART"), "*fp32")
    types |= dict.fromkeys(("COUNT", "ORDER", "EXPERT", "BOUNDS"), "*i32")
    types |= dict.fromkeys(("M", "N", "NP", "K", "G"), "i32")
    constants = {
        **{f"C{i}": c for i, c in enumerate(p.factors)},
        **{f"R{i}": c for i, c in enumerate(p.rows)},
        "BYTES": p.bytes,
        "BF16": bf16,
        "HAS_BIAS": r.bias,
        "ZERO": p.zero,
        "MODE": p.mode,
        "SPG": p.spg,
        "PDL": True,
        "GROUPED": True,
        "GN": 8,
        "BM": box[0],
        "ASM": dequant(p.element, act, p.mode, p.zero_value),
        "REGS": constraints(2 if p.bytes else 4),
        **more,
    }
    names = fn.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    held = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("N", "NP", "K")}  # fmt: skip
    source = GluonASTSource(fn=fn, signature=signature, constexprs=held, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "launch_pdl": True})
    ptx = made.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    # what a warp group is started with, and the epilogue: no code passes through shared memory
    assert ptx.count("st.shared") <= 8, ptx.count("st.shared")
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said
    assert "C75" not in said, said  # wgmma serialized


def _held(name: str, act: str) -> tuple[Recipe, GluonPlan]:
    op = make_op(SPECS[name], 4096, 4096, act=act, device=("cuda", "9.0"))
    recipe = describe(op, ops=("linear",))
    assert isinstance(recipe, Recipe)
    p = plan(recipe)
    assert isinstance(p, GluonPlan)
    return recipe, p


def compile_ring(name: str, act: str) -> None:
    """Compile ``ring`` as 64 rows would, and say so."""
    r, p = _held(name, act)
    c = config(p, r, 64)
    more = {"NW": c.warps, "ST": c.stages, "SPLIT": c.split, "ACC": c.acc}
    _compile(ring, [c.bm, 128], p, r, c.warps, more)
    print("ring ok")


def compile_specialized(name: str, act: str) -> None:
    """Compile ``specialized`` as many rows would, and say so."""
    r, p = _held(name, act)
    c = config(p, r, 4096)
    _compile(specialized, [c.bm, 64], p, r, 4, {"ST": c.stages})
    print("specialized ok")
