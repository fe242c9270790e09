"""Compiling the rounding kernels for sm_90 where there is no GPU; run in a process of its own.

python rounding_compiled.py NAME ACT K
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant_core.numerics import scale_dtype
from quant_kernels_triton import rounding
from quant_kernels_triton.rounding_plan import _plan
from quant_kernels_triton.rounding_run import _tile, own_columns
from triton_rounded import SPECS

_TYPES = {"bfloat16": "*i16", "float16": "*fp16", "float32": "*fp32"}
_SCALES = {
    "torch.float32": "*fp32",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.uint8": "*u8",
}


def compiled(fn: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """What ptxas says of the kernel: registers and spills."""
    names = fn.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    held = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("K", "GS")}  # fmt: skip
    source = ASTSource(fn=fn, signature=signature, constexprs=held, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = Path(made.metadata_group[next(iter(made.metadata_group))]).parent / "again.ptx"
    path.write_text(made.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said
    return " ".join(re.findall(r"Used \d+ registers", said))


def compile_rounding(name: str, act: str, k: int, tokens: int) -> str:
    """Compile the kernel of a spec as ``tokens`` of ``k`` features take it."""
    spec = SPECS[name]
    p = _plan(spec, False)
    *_, fixed, warps = _tile(p, k, False)
    p = replace(p, early=tokens == 1)
    own = own_columns(p, k, tokens)
    types = {"X": _TYPES[act], "Y": _TYPES[act], "SCALE": "*fp32", "ZERO": "*fp32"}
    fine = next((s for s in spec.scales if s.static), None)
    if fine is not None:
        types["SCALE"] = _SCALES[str(scale_dtype(fine.element))]
        if spec.zero is not None:
            types["ZERO"] = _SCALES[str(scale_dtype(spec.zero.element))]
    types |= {"STEPS": "*fp32" if fixed["STORED"] == 1 else "*i32", "PART": "*i32"}
    types |= {"EXPERT": "*i64"} | dict.fromkeys(("T", "K", "G", "GS", "E"), "i32")
    constants = fixed | {"HALF": act == "bfloat16", "PARTS": 256, "PDL": True}
    constants |= {"BO": own, "EARLY": p.early}
    return compiled(rounding.round_groups, types, constants, 8 if own else warps)


def compile_extremes(act: str) -> str:
    """The same for the pass over the whole tensor."""
    types = {"X": _TYPES[act], "PART": "*i32", "SIZE": "i32", "CHUNK": "i32"}
    constants = {"HALF": act == "bfloat16", "PARTS": 256, "BLOCK": 1024, "PDL": True}
    return compiled(rounding.extremes, types, constants, 4)


if __name__ == "__main__":
    for tokens in (1, 4096):
        print("round ok", compile_rounding(sys.argv[1], sys.argv[2], int(sys.argv[3]), tokens))
    print("extremes ok", compile_extremes(sys.argv[2]))
