"""CUDA kernels for quant-core: hook implementations only."""

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
        id="kernels_cuda",
        api=(0, 1),
        summary="CUDA kernels: decoding from packed 2 to 8 bit weights, up to 16 rows",
    )


@hookimpl
def apply(op: OpSpec) -> Iterable[Kernel]:
    from quant_kernels_cuda.kernel import KERNELS

    return KERNELS
