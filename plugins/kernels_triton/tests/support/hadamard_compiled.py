"""Compiling the Hadamard kernel for sm_90 where there is no GPU: python -m hadamard_compiled N M"""

from __future__ import annotations

import sys

from quant_kernels_triton.hadamard import hadamard
from quant_kernels_triton.hadamard_kernel import tile, warps
from rounding_compiled import compiled


def compile_hadamard(n: int, m: int, act: str) -> str:
    """Registers that the kernel takes; fails where it spills."""
    sizes = tile(n, m)
    assert sizes is not None
    runs, mp, a, b = sizes
    types = {"X": f"*{act}", "Y": f"*{act}", "ROOT": "*fp32", "RUNS": "i32"}
    types |= dict.fromkeys(("ROWS", "CORE", "COLS"), "*i8")
    constants = {"N": n, "M": m, "HAS_ROOT": True, "EXACT": act == "bf16", "R": runs, "MP": mp,
                 "A": a, "B": b, "INTERPRET": False, "PDL": True}  # fmt: skip
    return compiled(hadamard, types, constants, warps(runs * mp * a * b))


if __name__ == "__main__":
    for act in ("bf16", "fp32"):
        print(act, "ok", compile_hadamard(int(sys.argv[1]), int(sys.argv[2]), act))
