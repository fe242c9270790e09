"""Whose kernel failed, at which layer, in which step: in place of the bare cause.

Kernels come from packages that core knows nothing of. What they raise while they allocate, load,
restore, bind or run becomes ``Q-KERNEL-FAILED``, with the cause chained. Errors of this project
pass through: they are a kernel's considered answer. So do a lack of memory, and types of torch's
own, on which its tracing and callers who try again with less rely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_core.answers import no_memory
from quant_core.errors import KernelError, LayoutError, QuantError, printable
from quant_core.registry import owner_of

if TYPE_CHECKING:
    from quant_core.kernels.base import Kernel
    from quant_core.kernels.choose import Decision
    from quant_core.spec import OpSpec

__all__ = ["Whose", "allocated", "asked", "check_output", "name_failure"]


def _provider(kernel: Kernel, trace: Iterable[Decision], err: Exception | None) -> str:
    """Id of the plugin: whose code was the last to run, else who offered the kernel."""
    if err is not None and (plugin := owner_of(err)) is not None:
        return plugin.id
    names = {name.partition("@")[0] for name in kernel.name.split("+")} | {kernel.name}
    given = {d.provider: None for d in trace if d.kernel in names}
    return "+".join(given)


def _error(
    step: str,
    kernel: Kernel,
    op: OpSpec,
    layer: str,
    trace: Iterable[Decision],
    found: str,
    err: Exception | None = None,
) -> KernelError:
    trace = tuple(trace)
    plugin = _provider(kernel, trace, err)
    sizes = " x ".join(str(op.size(s)) for s in ("experts", "n", "k") if op.size(s, 0))
    what = f"{op.op} of {op.operands[0][1].label} {sizes}" if op.operands else op.op
    return KernelError(
        f"{printable(layer) or op.op}: {step} of kernel {kernel.name!r} "
        f"(plugin {plugin or 'unknown'!r}) {found}; asked for {what} on {op.device[0]}. This is a "
        "bug of the plugin; report it there. QUANT_KERNELS names the kernels allowed: "
        "QUANT_KERNELS=torch_ref runs without it.",
        code="Q-KERNEL-FAILED",
        tensor=layer or None,
        plugin=plugin or None,
        actual=found,
        trace=trace,
    )


def _passes(err: Exception) -> bool:
    of_torch = type(err).__module__.partition(".")[0] == "torch"
    return isinstance(err, QuantError | MemoryError) or of_torch or no_memory(err)


@contextmanager
def asked(
    step: str, kernel: Kernel, op: OpSpec, layer: str = "", trace: Iterable[Decision] = ()
) -> Iterator[None]:
    """Around a call of a kernel's method ``step`` for ``layer``.

    Raises:
        KernelError: ``Q-KERNEL-FAILED`` for what the kernel raised by mistake.
    """
    try:
        yield
    except Exception as err:
        if _passes(err):
            raise
        found = f"raised {type(err).__name__}: {printable(err)}"
        raise _error(step, kernel, op, layer, trace, found, err) from err


def allocated(
    kernel: Kernel, op: OpSpec, device: str, layer: str = "", trace: Sequence[Decision] = ()
) -> dict[str, Tensor]:
    """The buffers of ``kernel.allocate``.

    Raises:
        KernelError: ``Q-KERNEL-FAILED`` if it raises, or gives anything but tensors by name.
    """
    with asked("allocate", kernel, op, layer, trace):
        buffers: Any = kernel.allocate(op, device)
    good = isinstance(buffers, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in buffers.items()
    )
    if not good:
        found = f"returned {printable(repr(buffers))}, expected tensors by name"
        raise _error("allocate", kernel, op, layer, trace, found)
    return dict(buffers)


def name_failure(
    err: Exception,
    kernel: Kernel,
    op: OpSpec,
    layer: str,
    trace: Iterable[Decision],
    values: Sequence[Tensor],
    x: Any,
    step: str = "a call",
) -> None:
    """Raise what names an error of a call with ``x``; return if ``err`` is fit to be seen.

    Args:
        step: of whom ``x`` is the input: a call of what ``bind`` gave, or of another method's run.

    Raises:
        KernelError: ``Q-KERNEL-FAILED``.
        LayoutError: ``Q-LAYOUT-INPUT`` if ``x`` is no input of the layer: the caller's mistake.
    """
    if _passes(err):
        return
    of = op.operands[0][1].label if op.operands else ""
    wrong = ""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        wrong, want = f"x of {getattr(x, 'layout', type(x).__name__)}", "a dense tensor"
    elif values and x.device != values[0].device:
        wrong, want = f"x on {x.device}", f"on {values[0].device}, where the weights are"
    elif op.op != "embedding" and op.size("k", 0) not in (0, *x.shape[-1:]):
        wrong, want = f"x of shape {tuple(x.shape)}", f"{op.size('k')} features"
    elif x.is_floating_point() == (op.op == "embedding"):
        wrong = f"x of {str(x.dtype).removeprefix('torch.')}"
        want = "integer ids" if op.op == "embedding" else "floats"
    if wrong:
        raise LayoutError(
            f"{printable(layer) or op.op}: found {wrong}, expected {want}, for {op.op} of {of}. "
            "Pass the layer's own input.",
            code="Q-LAYOUT-INPUT",
            tensor=layer or None,
            expected=want,
            actual=wrong,
        ) from err
    found = (
        f"raised {type(err).__name__}: {printable(err)} "
        f"(x {list(x.shape)} {str(x.dtype).removeprefix('torch.')})"
    )
    raise _error(step, kernel, op, layer, trace, found, err) from err


@dataclass(frozen=True, slots=True, kw_only=True)
class Whose:
    """Who runs what for which layer, where no module holds the kernel: all that an error names.

    Attributes:
        layer: name of the module, "" where one kernel serves all.
        trace: how the kernel was chosen.
        method: by which it was bound.
    """

    kernel: Kernel
    op: OpSpec
    layer: str = ""
    trace: tuple[Decision, ...] = ()
    method: str = "bind"

    def bound(self) -> AbstractContextManager[None]:
        """Around the call of ``method``; see ``asked``."""
        return asked(self.method, self.kernel, self.op, self.layer, self.trace)

    def failed(self, err: Exception, x: Any) -> None:
        """After an error of a call of what was bound; see ``name_failure``."""
        step = "a call" if self.method == "bind" else f"a call of {self.method}"
        name_failure(err, self.kernel, self.op, self.layer, self.trace, (), x, step)


def check_output(
    y: Any, x: Tensor, kernel: Kernel, op: OpSpec, layer: str, trace: Iterable[Decision]
) -> None:
    """``y`` is what ``Kernel.bind`` promises for ``x``.

    Raises:
        KernelError: ``Q-KERNEL-FAILED`` if shape, dtype or device differ.
    """
    if op.op == "embedding":
        shape, dtype = (*x.shape, op.size("k")), getattr(torch, op.act_dtype)
    else:
        shape, dtype = (*x.shape[:-1], op.size("n")), x.dtype
    found = type(y).__name__
    if isinstance(y, Tensor):
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = y.dtype  # the products inside of it round as it says
        found = f"{list(y.shape)} {y.dtype} on {y.device}"
    expected = f"{list(shape)} {dtype} on {x.device}"
    if found != expected:
        told = f"returned {found}, expected {expected}"
        raise _error("a call", kernel, op, layer, trace, told)
