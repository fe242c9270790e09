"""The humming-kernels library as a kernel of quant-core: hook implementations only."""

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
        id="kernels_humming", api=(0, 1), summary="the humming-kernels library, where installed"
    )


@hookimpl
def apply(op: OpSpec) -> Iterable[Kernel]:
    from quant_kernels_humming.kernel import KERNELS

    return KERNELS
