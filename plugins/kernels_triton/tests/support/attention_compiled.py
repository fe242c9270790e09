"""Compiling the kernels without weights for sm_90, without a GPU; run in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant_kernels_triton.attention import attend, combine
from quant_kernels_triton.between import gated, rms_norm, rotary

_TYPES = {"MASK": "*u8", "AT": "*i64", "PART": "*fp32", "scale": "fp32", "eps": "fp32"}
_POINTERS = ("Q", "K", "V", "COS", "SIN", "Y", "X", "W", "R", "SUM", "YQ", "YK", "G", "U")


def compile_for_hopper(
    fn: Any, constants: dict[str, Any], warps: int, stages: int, **more: Any
) -> tuple[str, str]:
    """(PTX, what ptxas said) of a kernel whose unnamed pointers are bf16."""
    names = fn.arg_names
    types = {n: _TYPES.get(n, "*bf16" if n in _POINTERS else "i32") for n in names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    held = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*")}  # fmt: skip
    source = ASTSource(fn=fn, signature=signature, constexprs=held, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": True, **more}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(made.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = int(re.findall(r"(\d+) bytes spill stores", said)[0])
    assert spilled <= 16, said
    assert "griddepcontrol.wait" in made.asm["ptx"]
    return made.asm["ptx"], said


def _attend(**changes: Any) -> None:
    constants = {
        "G": 4, "D": 128, "DV": 128, "R": 128, "BG": 16, "BD": 128, "BDV": 128, "BN": 32, "KIND": 0,
        "PER_HEAD": False, "STEP": 0, "SPLIT": True, "PDL": True, **changes,
    }  # fmt: skip
    ptx, _ = compile_for_hopper(attend, constants, 4, 3 if constants["D"] <= 128 else 2)
    assert re.search(r"cp\.async\.cg\.shared\.global [^;]*0x10", ptx), "keys not fetched ahead"


if __name__ == "__main__":
    _attend(STEP=2)
    print("step ok")
    _attend(KIND=1)
    print("masked ok")
    _attend(D=256, DV=256, BD=256, BDV=256, BN=64, SPLIT=False)
    print("wide ok")
    fixed = {"DV": 128, "BDV": 128, "BS": 16, "PDL": True}
    compile_for_hopper(combine, fixed, 4, 2)
    print("combine ok")
    fixed = {"K": 4096, "BK": 4096, "BR": 1, "ADD": True, "LAST": False, "UNIT": False, "PDL": True}
    compile_for_hopper(rms_norm, fixed, 8, 1)
    print("norm ok")
    fixed = {"D": 128, "R": 128, "BD": 128, "BH": 8, "PDL": True}
    ptx, _ = compile_for_hopper(rotary, fixed, 4, 1, enable_fp_fusion=False)
    assert "fma.rn.bf16" not in ptx, "a rounding between product and sum was left out"
    print("rotary ok")
    fixed = {"K": 14336, "BK": 1024, "GELU": False, "PDL": True}
    compile_for_hopper(gated, fixed, 4, 1)
    print("gated ok")
