"""Compiling ``grouped_a8`` for sm_90 where there is no GPU; run in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quant_core.spec_json import op_from_text
from quant_kernels_triton.gluon_experts_a8 import grouped_a8
from quant_kernels_triton.gluon_stack_a8 import StackA8, ways
from quant_kernels_triton.mixed_plan import MixedPlan, describe_mixed
from quant_kernels_triton.mixed_run import _layer

_STORED = {0: "*fp32", 1: "*bf16", 2: "*fp16"}  # by element of a factor; others are bytes


def _compile(p: MixedPlan, c: StackA8) -> None:
    name, element = ("i8", gl.int8) if p.integer else ("fp8e4nv", gl.float8e4nv)
    act = "bf16" if p.recipe.act_dtype == "bfloat16" else "fp16"
    types = {"Y": f"*{act}"}
    for at, rows in (("xd", c.pieces * c.rows), ("xe", c.rest or c.pieces * c.rows)):
        layout = gl.NVMMASharedLayout.get_default_for([rows, 128], element)
        types[at] = f"tensordesc<{name}[{rows},128],{layout!r}>"
    words = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    types["wd"] = f"tensordesc<i32[{4 * c.consumers},256],{words!r}>"
    for at, factor in zip(("S0", "S1", "ROW0", "ROW1"), (*p.factors, *p.rows), strict=True):
        types[at] = _STORED.get(factor >> 3 & 7, "*u8")
    types |= dict.fromkeys(("BIAS", "SX", "PART"), "*fp32")
    tables = ("COUNT", "ORDER", "COUNTS", "BLOCKS", "EXPERT", "BOUNDS")
    types |= dict.fromkeys(tables, "*i32")
    types |= dict.fromkeys(("T", "N", "NP", "G", "E"), "i32")
    held = {"NH": c.pieces, "BT": c.rows, "B2": c.rest, "ST": c.stages, "NC": c.consumers}
    held |= {"GN": 64, "TURNS": c.turns, "SORTED": False, "KEEP": c.registers}
    held |= {n: v for n, v in _layer(p).constants.items() if n not in ("GROUPED", "SUB")}
    names = grouped_a8.arg_names
    signature = {n: "constexpr" if n in held else types[n] for n in names}
    constants = {(i,): held[n] for i, n in enumerate(names) if n in held}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("N", "NP")}  # fmt: skip
    source = GluonASTSource(fn=grouped_a8, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    assert re.search(r"wgmma.mma_async.*(e4m3.e4m3|s8.s8)", ptx)
    assert ptx.count("st.shared") <= 12, ptx.count("st.shared")  # as in triton_compiled
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= 64, said  # a few addresses, as in mixed_compiled
    assert "C75" not in said, said  # wgmma serialized


def compile_stack_a8(text: str, *which: int) -> None:
    """Compile the kernel with these of ``ways`` for an operation, and say so."""
    p = describe_mixed(op_from_text(text))
    assert isinstance(p, MixedPlan), p
    for way in which:
        _compile(p, ways()[way][0].fitted(p))
        print("ok")
