"""The kernels: one for each way the operators run a layer.

    npu_int8         int8 or int4 weights times int8 activations (run-time or stored scales)
    npu_int4         int4 times int4
    npu_weight_only  int8 or int4 weights times float activations
    npu_mxfp8        fp8 times fp8 in blocks of 32

Costs are ranks, not measurements: no NPU was at hand. A kernel whose results differ from the
reference by more than rounding order ranks behind it, and runs when it is named (QUANT_KERNELS).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.spec import OpSpec
from quant_kernels_npu.device import check_words, unavailable
from quant_kernels_npu.support import Form, describe

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["KERNELS", "NpuKernel"]

_RANK = 100.0
_BEHIND = 2e6  # the reference kernel's rank is 1e6


class NpuKernel:
    """A kernel for the forms with certain activations.

    Attributes:
        name: as in traces and QUANT_KERNELS.
        acts: values of ``Form.acts`` that it runs.
        operators: of torch_npu, that must be there.
    """

    def __init__(self, name: str, acts: tuple[str, ...], operators: tuple[str, ...]) -> None:
        self.name, self.acts, self.operators = name, acts, operators

    def __reduce__(self) -> tuple[object, ...]:
        return _by_name, (self.name,)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        """Whether this kernel can run ``op``; torch_npu is imported only for an NPU."""
        operators = self.operators
        if op.op == "grouped_linear":
            operators = ("npu_dynamic_quant", "npu_grouped_matmul")
        if op.device[0] != "npu":
            return Rejected(axis="device", have=op.device[0], need="npu")
        form = describe(op)
        if isinstance(form, Rejected):
            return form
        if form.acts not in self.acts:
            have = form.acts or "float"
            return Rejected(
                axis="input", have=have, need=" or ".join(a or "float" for a in self.acts)
            )
        problem = unavailable(op, operators)
        if problem is not None:
            return problem
        note = form.differs and f"{form.differs}; name {self.name} to use it"
        cost = _BEHIND + _RANK if form.differs else _RANK
        return Accepted(exact=not form.differs, cost=cost, note=note)

    def _form(self, op: OpSpec) -> Form:
        form = describe(op)
        assert isinstance(form, Form), "accepts was asked before"
        return form

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        """Final buffers; see ``store``."""
        from quant_kernels_npu.store import allocate

        return allocate(self._form(op), op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        """Write one part into ``buffers``.

        Raises:
            KernelError: ``Q-KERNEL-WORDS``, see ``check_words``.
            LayoutError: the part is of another layout.
        """
        from quant_kernels_npu.store import load_

        form = self._form(op)
        if form.weight == "int4":
            check_words(str(buffers["weight"].device))
        load_(form, buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        """The canonical tensors back, bit for bit."""
        from quant_kernels_npu.store import restore

        return restore(self._form(op), buffers, op)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        """The function that runs ``op``."""
        from quant_kernels_npu import run
        from quant_kernels_npu.store import allocate

        form = self._form(op)
        names = tuple(allocate(form, op, "meta"))
        runner = run.run_grouped if form.experts else run.run_linear
        return functools.partial(runner, form, names)


def _by_name(name: str) -> NpuKernel:
    return next(k for k in _ALL if k.name == name)


_ALL = (
    NpuKernel(
        "npu_int8",
        ("int8", "static"),
        ("npu_dynamic_quant", "npu_quantize", "npu_quant_matmul"),
    ),
    NpuKernel(
        "npu_int4",
        ("int4",),
        ("npu_dynamic_quant", "npu_quant_matmul", "npu_convert_weight_to_int4pack"),
    ),
    NpuKernel(
        "npu_weight_only",
        ("",),
        ("npu_weight_quant_batchmatmul", "npu_convert_weight_to_int4pack"),
    ),
    NpuKernel(
        "npu_mxfp8", ("mxfp8",), ("npu_dynamic_mx_quant", "npu_quant_matmul", "float8_e8m0fnu")
    ),
)
KERNELS: tuple[Kernel, ...] = _ALL
