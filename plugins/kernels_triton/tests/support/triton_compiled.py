"""Compiling the Gluon kernels for sm_90 where there is no GPU; run in a process of its own."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quant_kernels_triton.asm import constraints, dequant
from quant_kernels_triton.gluon_experts import grouped
from quant_kernels_triton.gluon_plan import GluonPlan, Ring, Specialized, config, plan
from quant_kernels_triton.gluon_ring import ring
from quant_kernels_triton.gluon_stack import Stack, stack_config
from quant_kernels_triton.gluon_ws import specialized
from quant_kernels_triton.recipe import GROUP, Recipe, describe
from triton_made import SPECS, make_op

_PAIRS = {0: "*i64", 1: "*i32", 2: "*i32"}  # by element of the factor; others are bytes


def _compile(
    fn: Any, boxes: dict[str, list[int]], p: GluonPlan, r: Recipe, warps: int, mode: int, more: dict
) -> None:
    bf16 = r.act_dtype == "bfloat16"
    act = "bf16" if bf16 else "fp16"
    types = {"W": "*i16", "X": f"*{act}", "Y": f"*{act}"}
    for name, box in boxes.items():
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if bf16 else gl.float16)
        types[name] = f"tensordesc<{act}[{box[0]},{box[1]}],{layout!r}>"
    for name, c in zip(("S0", "S1", "Z", "O0", "O1"), p.factors):
        types[name] = _PAIRS.get(c >> 3 & 7, "*i16") if c & 7 == GROUP else "*fp32"
    types |= dict.fromkeys(("ROW0", "ROW1", "BIAS", "PART"), "*fp32")
    tables = ("COUNT", "ORDER", "COUNTS", "BLOCKS", "EXPERT", "BOUNDS")
    types |= dict.fromkeys(tables, "*i32")
    types |= dict.fromkeys(("M", "T", "N", "NP", "K", "G", "E", "KX", "TOP"), "i32")
    types["HIGH"] = "*i16"
    words = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    width = 256 if p.bytes or more.get("H") == 2 else 128
    codes = [4 if more.get("NC") == 3 else 4 * more.get("NC", 1), width]
    types["wd"] = f"tensordesc<i32[{codes[0]},{codes[1]}],{words!r}>"
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
        "GN": 8,
        "ASM": dequant(p.element, act, mode, p.zero_value),
        "REGS": constraints({4: 4, 8: 2}.get(p.bits, 8)),
        **more,
    }
    names = fn.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    held = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("N", "NP", "K", "KX")}  # fmt: skip
    source = GluonASTSource(fn=fn, signature=signature, constexprs=held, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "launch_pdl": True})
    ptx = made.asm["ptx"]
    assert ("mma.sync" if more.get("FEW") else "wgmma.mma_async") in ptx
    # what a warp group is started with, and the epilogue: no code passes through shared memory
    assert ptx.count("st.shared") <= 12, ptx.count("st.shared")
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # three consumers take more uniform registers than there are: a few words, stored once
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= (16 if more.get("NC") == 3 else 0), said
    assert "C75" not in said, said  # wgmma serialized


def _held(name: str, act: str) -> tuple[Recipe, GluonPlan]:
    op = make_op(SPECS[name], 28672, 4096, act=act, device=("cuda", "9.0"))
    recipe = describe(op, ops=("linear",))
    assert isinstance(recipe, Recipe)
    p = plan(recipe)
    assert isinstance(p, GluonPlan)
    return recipe, p


def compile_ring(name: str, act: str) -> None:
    """Compile ``ring`` for 64 rows, and say so."""
    r, p = _held(name, act)
    c = Ring(64, 8, 4, 4, p.spg == 1 and p.mode in (1, 2))
    more = {"BM": c.bm, "NW": c.warps, "ST": c.stages, "SPLIT": c.split, "ACC": c.acc}
    _compile(ring, {"xd": [c.bm, 128]}, p, r, c.warps, 0 if c.acc else p.mode, more)
    print("ring ok")


def compile_specialized(name: str, act: str, rows: int) -> None:
    """Compile ``specialized`` as ``rows`` rows would, and say so."""
    r, p = _held(name, act)
    c = config(p, r, rows)
    assert isinstance(c, Specialized)
    more = {"B1": c.b1, "B2": c.b2, "NC": c.consumers, "R": c.wide, "ST": c.stages, "ACC": c.acc}
    more |= {"PER": c.per, "U": c.unroll, "EARLY": p.early and c.wide == 1, "BITS": p.bits}
    boxes = {"xd": [c.b1, 64], "xe": [c.b2 or c.b1, 64]}
    _compile(specialized, boxes, p, r, 4, 0 if c.acc else p.mode, more)
    print("specialized ok")


def compile_stack(name: str, act: str, rows: int) -> None:
    """Compile ``grouped`` as ``rows`` rows of 16 experts would, and say so."""
    r, p = _held(name, act)
    c = stack_config(p, replace(r, experts=16), rows)
    assert isinstance(c, Stack)
    more = {"B1": c.b1, "B2": c.b2, "NC": c.consumers, "ST": c.stages, "ACC": c.acc, "GN": 64}
    more |= {"GATHER": c.gather, "SORTED": False, "H": c.halves, "FEW": c.few}
    more |= dict(zip(("KEEP", "FETCH"), c.registers, strict=True))
    boxes = {"xd": [c.b1, 64], "xe": [c.b2 or c.b1, 64]}
    _compile(grouped, boxes, p, r, 4, 0 if c.acc else p.mode, more)
    print("stack ok")
