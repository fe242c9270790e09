"""Compiling the mixed kernels for sm_90 where there is no GPU; run in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from quant_core.spec_json import op_from_text
from quant_kernels_triton.mixed_asm import ASM, POWER
from quant_kernels_triton.mixed_pair import mixed_pair
from quant_kernels_triton.mixed_plan import (
    MixedPair,
    MixedPlan,
    MixedRing,
    MixedWide,
    config,
    describe_mixed,
)
from quant_kernels_triton.mixed_ring import mixed_ring
from quant_kernels_triton.mixed_turns import mixed_turns
from quant_kernels_triton.mixed_ws import mixed_specialized

_STORED = {0: "*fp32", 1: "*bf16", 2: "*fp16"}  # by element of a factor; others are bytes


def _order(ptx: str) -> str:
    """Stores to shared memory (S), loads (L), barriers of a group (B), arrivals (A), waits (W)."""
    kinds = {"st.shared": "S", "stmatrix": "S", "ld.shared": "L", "ldmatrix": "L", "bar.sync": "B"}
    kinds |= {"mbarrier.arrive.shared": "A", "mbarrier.try_wait": "W"}
    found = re.findall(r"(?m)^\s*(?:@%p\d+ )?(st\.shared|stmatrix|ld\.shared|ldmatrix|bar\.sync|"
                       r"mbarrier\.arrive\.shared|mbarrier\.try_wait)", ptx)  # fmt: skip
    return "".join(kinds[f] for f in found)


def _compile(p: MixedPlan, c: MixedPair | MixedRing | MixedWide) -> None:
    fn = {MixedPair: mixed_pair, MixedRing: mixed_ring, MixedWide: mixed_specialized}[type(c)]
    stay = isinstance(c, MixedWide) and c.stay
    fn = mixed_turns if stay else fn
    tokens = c.bt if isinstance(c, MixedWide) else c.bm
    warps = c.warps if isinstance(c, MixedRing) else 4
    box, name = [tokens, 128], "i8" if p.integer else "fp8e4nv"
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.int8 if p.integer else gl.float8e4nv)
    act = "bf16" if p.recipe.act_dtype == "bfloat16" else "fp16"
    types = {"xd": f"tensordesc<{name}[{box[0]},{box[1]}],{layout!r}>", "W": "*i8", "Y": f"*{act}"}
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    types["wd"] = f"tensordesc<i32[8,256],{plain!r}>"
    for at, factor in zip(("S0", "S1", "ROW0", "ROW1"), (*p.factors, *p.rows), strict=True):
        types[at] = _STORED.get(factor >> 3 & 7, "*u8")
    types |= dict.fromkeys(("BIAS", "SX", "PART"), "*fp32")
    types |= dict.fromkeys(("COUNT", "ORDER", "EXPERT", "BOUNDS"), "*i32")
    types |= dict.fromkeys(("M", "N", "NP", "G"), "i32")
    held = {"ST": c.stages, "GN": 8, "GROUPED": True, "PDL": True, "SUB": p.sub}
    held |= {"BYTES": p.bytes, "INT": p.integer, "C0": p.factors[0], "C1": p.factors[1]}
    held |= {"R0": p.rows[0], "R1": p.rows[1], "HAS_BIAS": False}
    held |= {"ASM": ASM[p.operand], "POWER": POWER[p.operand]}
    if isinstance(c, MixedWide):
        held |= {"BT": c.bt, "NH": c.halves, "WST": 4, "PARTIAL": c.partial, "SPLIT": c.split}
    elif isinstance(c, MixedPair):
        held |= {"BT": c.bm, "WST": 4, "SPLIT": c.split}
    else:
        held |= {"BM": c.bm, "NW": c.warps, "SPLIT": c.split}
    names = fn.arg_names
    signature = {n: "constexpr" if n in held else types[n] for n in names}
    constants = {(i,): held[n] for i, n in enumerate(names) if n in held}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("N", "NP")}  # fmt: skip
    source = GluonASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    assert re.search(r"wgmma.mma_async.*(e4m3.e4m3|s8.s8)", ptx)
    # codes pass from their stage to the operand without being taken apart
    assert ptx.count("prmt") in ((0,), (16, 32, 64))[p.bytes], ptx.count("prmt")
    most = 72 if isinstance(c, MixedPair) else 8  # a pair's second sums pass through there
    assert ptx.count("st.shared") <= most, ptx.count("st.shared")
    if isinstance(c, MixedPair):  # sums are handed over in order: racecheck does not see that
        order = _order(ptx)
        assert re.search("S{4,}BA", order), f"an arrival before all have stored: {order}"
        assert re.search("WL{4,}", order), f"a load before the wait: {order}"
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # a few addresses may be kept outside the loop; an accumulator in it is 128 bytes and more
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= 64, said
    assert "C75" not in said, said  # wgmma serialized


def compile_mixed(text: str) -> None:
    """Compile the kernels as so many tokens of an operation would, and say so."""
    p = describe_mixed(op_from_text(text))
    assert isinstance(p, MixedPlan), p
    for rows in (16, 64, 512, 4096, 4200):
        _compile(p, config(p, rows))
        print("ok")
