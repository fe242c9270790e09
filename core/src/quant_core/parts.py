"""From canonical tensors to a kernel's buffers: part by part, in an order that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from quant_core.kernels.choose import Choice
from quant_core.kernels.failed import asked
from quant_core.packing import repack
from quant_core.shared import weights_changed
from quant_core.spec import Packing
from quant_core.tensors import LayerTensors

__all__ = ["load_part_", "matrices", "with_packing"]


def _dense(lt: LayerTensors) -> LayerTensors:
    """``lt`` with scales, zeros and offsets whose values follow each other in memory."""
    qt = lt.weight
    tensors = qt.tensors()
    if all(t.is_contiguous() for t in tensors.values()):
        return lt
    made = qt.with_tensors({name: t.contiguous() for name, t in tensors.items()})
    return replace(lt, operands={**lt.operands, "weight": made})


def with_packing(lt: LayerTensors, packing: Packing) -> LayerTensors:
    """``lt`` with its codes in another physical order, and all tensors contiguous; bit-exact."""
    lt = _dense(lt)
    qt = lt.weight
    if qt.spec.blocks or qt.packing == packing:
        return lt
    n, k = qt.shape
    codes = repack(qt.codes, qt.spec.element.bits, (n, k), qt.packing, packing)
    return replace(
        lt, operands={**lt.operands, "weight": replace(qt, codes=codes, packing=packing)}
    )


def load_part_(
    choice: Choice,
    buffers: dict[str, Tensor],
    part: LayerTensors,
    at: Mapping[str, int],
    layer: str = "",
) -> None:
    """Write ``part`` into a kernel's buffers, its codes in an order that the kernel reads.

    Args:
        layer: whose it is, for messages.

    Raises:
        KernelError: ``Q-KERNEL-FAILED`` if the kernel raises by mistake.
    """
    reads = getattr(choice.kernel, "reads", None)
    if reads is None or not reads(choice.op, part.weight.packing):
        part = with_packing(part, choice.op.packing)
    elif not getattr(choice.kernel, "strided", False):
        part = _dense(part)
    with asked("load_", choice.kernel, choice.op, layer, choice.trace):
        choice.kernel.load_(buffers, choice.op, part, at)
    weights_changed()


def matrices(lt: LayerTensors, experts: int) -> Iterable[tuple[int | None, LayerTensors]]:
    """The matrices of a stack of ``experts``, one by one; of a plain layer (0), itself."""
    if not experts:
        yield None, lt
        return
    qt = lt.weight
    for e in range(experts):
        tensors = {k: v if k.startswith("codebook") else v[e] for k, v in qt.tensors().items()}
        one = qt.with_tensors(tensors, shape=qt.shape[1:])
        names = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
        side = {n: None if (t := getattr(lt, n)) is None else t[e] for n in names}
        transforms = tuple((t, tuple(v[e] for v in values)) for t, values in lt.transforms)
        yield e, LayerTensors(operands={"weight": one}, transforms=transforms, **side)  # type: ignore[arg-type]
