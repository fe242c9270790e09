"""PyTorch's own matrix products as kernels of quant-core: hook implementations only."""

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
        id="kernels_torch",
        api=(0, 1),
        summary="PyTorch's own matrix products: fp8, int8, grouped, int4, and dequantize once",
    )


@hookimpl
def apply(op: OpSpec) -> Iterable[Kernel]:
    from quant_kernels_torch.int4_cpu import Int4Cpu
    from quant_kernels_torch.kernels import KERNELS

    return (*KERNELS, Int4Cpu())
