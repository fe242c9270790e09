"""``cpu_stored_w8a8``: int8 activations times rows of bytes where a mapped file has them.

Its arithmetic is that of ``cpu_w8a8``, bit for bit. One token reads the rows where they lie; for
more, a chunk of 32 rows at a time is put into the order of csrc/qk.h (csrc/kernel_int8.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.spec import OpSpec, Packing
from quant_kernels_cpu.library import library
from quant_kernels_cpu.support_int8 import SIGNED_ROWS, UNSIGNED_ROWS, Int8Layout
from quant_kernels_cpu.w8a8 import W8A8, check_part, check_range, code_sums, tensors_of

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["STORED_INT8", "StoredW8A8"]

# times what packed weights take where those are there already: steps of a model, and layers
_SLOWER, _SLOWER_AVX2 = 1.06, 1.3
_ORDERS = {128: SIGNED_ROWS, 0: UNSIGNED_ROWS}  # by what is taken from a code to keep it
_WHOLE = ("input_scale", "input_zero")


class StoredW8A8(W8A8):
    """int8 activations times codes of 8 bits in rows, as files store them."""

    name = "cpu_stored_w8a8"
    OPS = ("linear",)

    def _layout(self, op: OpSpec) -> Int8Layout | Rejected:
        found = super()._layout(op)
        if isinstance(found, Rejected):
            return found
        if found.bits != 8 or found.bias not in _ORDERS:
            have = f"{found.bits} bits, {op.weight.label}"
            return Rejected(axis="element", have=have, need="int8, or uint8 less 128")
        return replace(found, stored=_ORDERS[found.bias])

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        answer = super().accepts(op)
        if isinstance(answer, Rejected):
            return answer
        note = f"{answer.note}, rows as they are stored"
        slower = _SLOWER if library().vnni else _SLOWER_AVX2
        return replace(answer, cost=slower * answer.cost, note=note)

    def reads(self, op: OpSpec, packing: Packing) -> bool:
        return packing == op.packing

    def adopt(self, op: OpSpec, part: LayerTensors) -> dict[str, Tensor] | None:
        """See ``quant_core.kernels.base``. A zero point of x takes one look at all codes."""
        from quant_kernels_cpu.blocks import int8_buffer_shapes

        layout, tensors = self._bound(op), tensors_of(part)
        if (part.weight.packing, part.weight.shape[0]) != (op.packing, layout.n):
            return None
        dtypes = {name: dtype for name, (_, dtype) in int8_buffer_shapes(layout).items()}
        check_part(op, layout, part, tensors, dtypes)
        if layout.sums:
            tensors["sums"] = code_sums(part, layout)
        return {name: tensors[name].contiguous() for name in dtypes}

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        from quant_core.packing import repack

        layout, tensors = self._bound(op), tensors_of(part)
        check_part(op, layout, part, tensors, {name: t.dtype for name, t in buffers.items()})
        row, (rows, k) = at.get("row", 0), part.weight.shape
        check_range("rows", row, row + rows, layout.n)
        if layout.sums:
            tensors["sums"] = code_sums(part, layout)
        for name, value in tensors.items():
            if name == "codes" and part.weight.packing != op.packing:
                value = repack(value, layout.bits, (rows, k), part.weight.packing, op.packing)
            if name in _WHOLE or (name == "scales_0" and layout.single):
                buffers[name].copy_(value)
            else:
                buffers[name][row : row + rows].copy_(value)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        from quant_core.tensors import LayerTensors, QuantizedTensor

        layout = self._bound(op)
        held = {name: value.clone() for name, value in buffers.items() if name != "sums"}
        weight = QuantizedTensor(
            spec=op.weight,
            shape=(layout.n, layout.k),
            codes=held.pop("codes"),
            packing=op.packing,
            scales=(held.pop("scales_0"),),
        )
        return LayerTensors(operands={"weight": weight}, **held)


STORED_INT8 = StoredW8A8()
