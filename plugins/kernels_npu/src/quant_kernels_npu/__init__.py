"""Ascend NPU kernels for quant-core: hook implementations only."""

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
        id="kernels_npu",
        api=(0, 1),
        summary="Ascend NPU kernels: integers and MXFP8 by torch_npu's operators",
    )


@hookimpl
def apply(op: OpSpec) -> Iterable[Kernel]:
    from quant_kernels_npu.kernel import KERNELS

    return KERNELS
