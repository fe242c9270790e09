"""``humming``: layers and experts run by humming-kernels, over the reference kernel's buffers.

The canonical tensors stay as they are, so nothing is lost on saving. The library's own copy is made
when the layer first runs, and again after its weights were written anew (the version counter of the
codes tells). It goes when the buffers go.

Where the library cuts K into parts, it adds them to y by atomics of 16 bits, in any order: results
differ between calls, by up to 4.1e-3 of y in bfloat16 and 4.9e-4 in float16 from the exact product.
Source: humming-kernels 0.1.19 ``include/humming/epilogue/gmem_writer.cuh``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.storage import Rows
from quant_core.spec import OpSpec
from quant_core.spec_json import to_text
from quant_kernels_humming.layout import configs

__all__ = ["KERNELS", "Humming"]

_BEHIND = 1e5  # more than any kernel that shares its weights costs


def _unavailable() -> str:
    """Why humming-kernels cannot be used; "" if it can."""
    from importlib import metadata

    try:
        version = metadata.version("humming-kernels")
    except metadata.PackageNotFoundError:
        return "not installed"
    numbers = tuple(int(p) for p in version.split(".")[:2] if p.isdigit())
    return "" if numbers == (0, 1) else f"version {version}"


class Humming(Rows):
    """See the module's docstring."""

    name = "humming"
    layout = ""  # its buffers hold what is restored; what runs is the library's own copy

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.device[0] != "cuda":
            return Rejected(axis="device", have=op.device[0], need="cuda")
        if reason := _unavailable():
            return Rejected(axis="library", have=reason, need="humming-kernels 0.1")
        made = configs(op)
        if isinstance(made, Rejected):
            return made
        nbytes = op.size("n") * op.size("k") * op.weight.element.bits // 8
        nbytes *= max(op.size("experts", 0), 1)
        note = "compiles for seconds when it first runs, keeps a second copy of the weights; "
        return Accepted(
            cost=_BEHIND + nbytes / 2.4e6,
            workspace_bytes=nbytes,
            note=note + "runs only when named or measured",
        )

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        from quant_kernels_humming.ops import run_grouped, run_linear

        run = run_grouped if op.op == "grouped_linear" else run_linear
        return functools.partial(run, to_text(op))


KERNELS: tuple[Kernel, ...] = (Humming(),)
