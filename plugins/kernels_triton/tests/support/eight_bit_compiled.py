"""Compiling scaled_ring and the quantizers for sm_90 without a GPU; run in its own process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quant_kernels_triton.codes_gluon import group_codes, token_codes
from quant_kernels_triton.scaled_plan import ScaledPlan
from quant_kernels_triton.scaled_ring import scaled_ring
from quant_kernels_triton.scaled_ring_plan import WideSizes, ring_sizes
from quant_kernels_triton.scaled_ws import scaled_specialized


def _compile(fn: Any, types: dict[str, str], held: dict[str, Any], warps: int) -> str:
    """PTX; asserts that ptxas neither spills nor serializes wgmma."""
    names = fn.arg_names
    signature = {n: "constexpr" if n in held else types[n] for n in names}
    constants = {(i,): held[n] for i, n in enumerate(names) if n in held}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("N", "K", "KIN")}  # fmt: skip
    source = GluonASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx: str = made.asm["ptx"]
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said
    assert "C75" not in said, said
    return ptx


def compile_ring(kind: str, rows: int) -> None:
    """The product of ``rows`` tokens by 4096 x 4096 weights."""
    p = ScaledPlan(
        kind=kind, n=4096, k=4096, single=False, static=False, peak=448.0, least=0.0, most=0.0,
        bias=True, act_dtype="bfloat16", buffers=("codes", "scales_0", "bias"), types=("f32",),
    )  # fmt: skip
    c, integer = ring_sizes(p, rows), kind == "int8"
    dtype, name = (gl.int8, "i8") if integer else (gl.float8e4nv, "fp8e4nv")
    outputs = c.outputs if isinstance(c, WideSizes) else 16 * c.warps
    types = {"Y": "*bf16", "COUNT": "*i32"} | dict.fromkeys("MNG", "i32")
    types |= dict.fromkeys(("SW", "SX", "BIAS", "PART"), "*fp32")
    for at, size in (("wd", outputs), ("xd", c.bm)):
        layout = gl.NVMMASharedLayout.get_default_for([size, 128], dtype)
        types[at] = f"tensordesc<{name}[{size},128],{layout!r}>"
    held = {"PDL": True, "SINGLE": False, "HAS_BIAS": True, "ST": c.stages}
    held |= {"INT": integer, "BLOCKED": kind == "block"}
    if isinstance(c, WideSizes):
        held |= {"BT": c.bm, "GN": c.together, "PAIR": c.pair}
        ptx = _compile(scaled_specialized, types, held, 4)
    else:
        held |= {"BM": c.bm, "NW": c.warps, "KS": c.groups, "SPLIT": c.split, "GN": 8}
        ptx = _compile(scaled_ring, types, held, c.warps)
    assert re.search(r"wgmma.mma_async.*(e4m3.e4m3|s8.s8)", ptx)
    print("ok")


def compile_codes(order: str, k: int) -> None:
    """The quantizers of ``k`` columns; whole runs of 16 codes are stored."""
    types = {"X": "*bf16", "Q": "*u8"} | dict.fromkeys(("ROWS", "GATHER"), "*i32")
    types |= dict.fromkeys(("SCALE", "S"), "*fp32") | dict.fromkeys(("K", "KIN", "T"), "i32")
    types |= dict.fromkeys(("peak", "least", "most"), "fp32")
    warps = min(8, max(4, k // 512))
    held = {"FP8": True, "BOUNDED": False, "STATIC": False, "HAS_ROWS": False, "HAS_GATHER": False}
    held |= {"ORDER": int(order), "BK": k, "BI": k, "NW": warps}
    ptx = [_compile(token_codes, types, held, warps)]
    ptx.append(_compile(group_codes, types, {"BOUNDED": False, "NW": 4}, 4))
    for text in ptx:
        assert "cvt.rn.satfinite.e4m3x2.f32" in text
        assert "st.global.v4.b32" in text
        assert text.count("st.shared") <= 2, text.count("st.shared")  # nothing is rearranged there
    print("ok")


if __name__ == "__main__":
    what, detail, size = sys.argv[1:]
    {"ring": compile_ring, "codes": compile_codes}[what](detail, int(size))
