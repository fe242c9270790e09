"""CPU kernels for quant-core: hook implementations only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quant_core import hookimpl
from quant_core.spec import PluginInfo

if TYPE_CHECKING:
    from quant_core.kernels.base import Kernel
    from quant_core.spec import OpSpec


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        id="kernels_cpu",
        api=(0, 1),
        summary="CPU kernels: packed 2 to 8 bit weights on AVX2, AVX-512 and VNNI",
    )


@hookimpl
def apply(op: OpSpec) -> Iterable[Kernel]:
    from quant_kernels_cpu.kernel import KERNELS
    from quant_kernels_cpu.stored_int8 import STORED_INT8
    from quant_kernels_cpu.stored_kernel import STORED

    if op.op == "attention":
        from quant_kernels_cpu.attention import AttentionStep

        return (AttentionStep(),)
    if op.op in ("rms_norm", "rotary", "gated"):
        from quant_kernels_cpu.between import BETWEEN

        return (BETWEEN[op.op],)
    if op.op == "quantize":
        from quant_kernels_cpu.rounding import ROUND

        return (ROUND,)
    if op.op == "finite":
        from quant_kernels_cpu.finite import FINITE

        return (FINITE,)
    if op.op == "unpack":
        from quant_kernels_cpu.unpack import UNPACK

        return (UNPACK,)
    return (*KERNELS, STORED, STORED_INT8)
