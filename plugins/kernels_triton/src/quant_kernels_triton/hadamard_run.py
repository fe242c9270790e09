"""Running the Hadamard kernel, and its torch op.

quant_triton::hadamard(x, rows, core, cols, root) -> y        x [..., K], K a multiple of n
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels_triton.arguments import dependent, options
from quant_kernels_triton.hadamard_kernel import tile, warps
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.jitted import Jits
from quant_kernels_triton.launch import Build, aligned, launch

__all__ = ["bound_hadamard"]

kernels = Jits("hadamard")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _op(x: Tensor, rows: Tensor, core: Tensor, cols: Tensor, root: Tensor | None) -> Tensor:
    x = aligned(x)
    n, m = rows.shape[0], core.shape[0]
    y, device = torch.empty_like(x), x.device.index
    if not x.numel():
        return y
    sizes = tile(n, m)
    assert sizes is not None, "accepted before it was bound"
    runs, mp, a, b = sizes
    pdl = dependent(device)

    def build() -> Build:
        constants = {
            "N": n, "M": m, "HAS_ROOT": root is not None, "EXACT": x.dtype == torch.bfloat16,
            "R": runs, "MP": mp, "A": a, "B": b, "INTERPRET": interpreting(), "PDL": pdl,
        }  # fmt: skip
        held = runs * mp * a * b
        return Build(constants=constants, options=options(pdl, warps(held), 1))

    total = x.numel() // n
    key = ("hadamard", n, m, x.dtype, None if root is None else root.dtype)
    args = (x, y, rows, core, cols, rows if root is None else root, total)
    launch(kernels.hadamard, key, (-(-total // runs), 1), args, device, build)
    return y


def _fake(x: Tensor, rows: Tensor, core: Tensor, cols: Tensor, root: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_lib = torch.library.Library("quant_triton", "FRAGMENT")
_lib.define("hadamard(Tensor x, Tensor rows, Tensor core, Tensor cols, Tensor? root) -> Tensor")
_lib.impl("hadamard", _op, "CompositeExplicitAutograd")
torch.library.register_fake("quant_triton::hadamard", _fake, lib=_lib)


def bound_hadamard(
    k: int, buffers: list[Tensor], x: Tensor, rows: Tensor, core: Tensor, cols: Tensor,
    root: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What ``bind`` gives for a "hadamard" operation, with the number of features fixed."""
    from quant_core.kernels.calls import check_input, unobserved

    check_input(x, k)
    if x.dtype not in _DTYPES:  # float64, which no layer has, but a test may
        return torch.ops.quant_core.hadamard(x, rows, core, cols, root)  # type: ignore[no-any-return]
    if unobserved(x):
        return _op(x, rows, core, cols, root)
    return torch.ops.quant_triton.hadamard(x, rows, core, cols, root)  # type: ignore[no-any-return]
