"""``cpu_stored``: the kernel whose buffers are what files hold, pages of a mapped file among them.

Its arithmetic is that of ``cpu_wna16``. With AVX-512 and up to 16 tokens codes are used where they
lie (csrc/kernel_stored.c); other calls make blocks of them, a few rows at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.errors import LayoutError
from quant_core.kernels.base import Accepted, Rejected
from quant_core.row_order import stored_rows
from quant_core.spec import OpSpec, Packing
from quant_kernels_cpu.descriptor import c_op
from quant_kernels_cpu.kernel import WnA16
from quant_kernels_cpu.library import ISAS, library, unavailable
from quant_kernels_cpu.stored import stored_layout, stored_shapes
from quant_kernels_cpu.support import ZERO_CODE, Layout
from quant_kernels_cpu.w8a8 import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["STORED", "Stored"]

# Times what packed weights take where those are there already (docs/performance.md, "Loading"), by
# order: steps of a model on Zen 5; on a Xeon without AVX512-BF16 (Ice Lake) the same of rows and
# fields, layers of the others; layers on one with AMX; 2 to 12 where calls make blocks first.
_SLOWER = {"rows": 1.08, "words": 1.07, "across": 1.1, "fields": 1.06}
_SLOWER_AVX512 = {"rows": 1.16, "words": 1.14, "across": 1.12, "fields": 1.12}
_SLOWER_AVX512_EIGHT = 1.12  # codes of 8 bits
_SLOWER_AMX = {"rows": 1.15, "words": 1.13, "across": 1.2, "fields": 1.35}
_UNMEASURED = 1.5  # float32 products where bfloat16 ones are to be had
_BY_BLOCKS = 4.0
_GRIDS = ("scales_0", "zeros", "offset_0")


class Stored(WnA16):
    """Float activations times codes in the order of the checkpoint; see csrc/stored.h."""

    name = "cpu_stored"
    OPS = ("linear", "embedding")

    def _layout(self, op: OpSpec) -> Layout | Rejected:
        if op.device[0] != "cpu":
            return Rejected(axis="device", have=op.device[0], need="cpu")
        if reason := unavailable():
            return Rejected(axis="library", have=f"none ({reason})", need="a compiled library")
        return stored_layout(op, ops=self.OPS)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        import torch

        from quant_kernels_cpu.descriptor import DTYPES

        answer = super().accepts(op)
        if isinstance(answer, Rejected):
            return answer
        layout, lib = self._bound(op), library()
        note = f"{ISAS[lib.isa]}, {layout.order} as they are stored"
        at = ctypes.addressof(c_op(layout))
        unit = ISAS[lib.c.qk_in_place(at, lib.isa, DTYPES[getattr(torch, op.act_dtype)])]
        note += "" if unit != "none" else ", made blocks of in every call"
        slower = _slower(ISAS[lib.isa], unit, layout)
        return replace(answer, cost=slower * answer.cost, note=note)

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        from quant_core.memory import poisoned

        shapes = stored_shapes(self._bound(op))
        return {name: poisoned(shape, dtype, device) for name, (shape, dtype) in shapes.items()}

    def reads(self, op: OpSpec, packing: Packing) -> bool:
        return packing == op.packing

    def adopt(self, op: OpSpec, part: LayerTensors) -> dict[str, Tensor] | None:
        """See ``quant_core.kernels.base``. Scales that lie in another order are copied."""
        layout = self._bound(op)
        if part.weight.packing != op.packing:
            return None
        tensors = _checked(op, layout, part, layout.n)
        if layout.order == "fields" and not all(
            _same_values(blocks, values) for blocks, values in _halves(layout, tensors)
        ):
            return None  # scales other than those of the blocks
        shapes = stored_shapes(layout)
        return {name: _stored(name, tensors[name], layout).contiguous() for name in shapes}

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        layout = self._bound(op)
        row, rows = at.get("row", 0), part.weight.shape[0]
        tensors = _checked(op, layout, part, rows)
        check_range("rows", row, row + rows, layout.n)
        if layout.order == "across" and (row % 8 or rows % 8):
            raise LayoutError(
                f"part holds rows {row} to {row + rows}, expected multiples of 8, which share "
                "words. Join the parts first.",
                code="Q-LAYOUT-FUSED",
                tensor="codes",
                expected=8,
                actual=(row, rows),
            )
        if layout.order == "fields":
            codes = _stored("codes", tensors["codes"], layout).clone()
            for blocks, values in _halves(layout, {**tensors, "codes": codes}):
                blocks.copy_(values)
            if layout.head:
                buffers["codes"][stored_rows(layout.n, layout.head)[row : row + rows]] = codes
            else:
                buffers["codes"][row : row + rows].copy_(codes)
        for name, target in buffers.items():
            if layout.order == "fields" and name == "codes":
                continue
            axis = 1 if layout.order in ("words", "across") and name != "bias" else 0
            per = Fraction(target.shape[axis], layout.n)  # bytes or values of a row
            first, size = int(row * per), int(rows * per)
            target.narrow(axis, first, size).copy_(_stored(name, tensors[name], layout))

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        from quant_core.packing import WORD_DTYPES
        from quant_core.tensors import LayerTensors, QuantizedTensor

        layout = self._bound(op)
        grids = {n: _stored(n, buffers[n], layout).clone() for n in _GRIDS if n in buffers}
        codes = buffers["codes"]
        codes = codes[stored_rows(layout.n, layout.head)] if layout.head else codes.clone()
        if layout.order == "fields":
            halves = _blocks(layout, codes)
            grids["scales_0"] = halves[..., 0].clone()
            grids |= {"offset_0": halves[..., 1].clone()} if layout.offsets else {}
        weight = QuantizedTensor(
            spec=op.weight,
            shape=(layout.n, layout.k),
            codes=codes.view(WORD_DTYPES[op.packing.word]),
            packing=op.packing,
            scales=(grids["scales_0"].contiguous(),),
            zeros=grids["zeros"].contiguous() if "zeros" in grids else None,
            offset=(grids["offset_0"].contiguous(),) if layout.offsets else (),
        )
        bias = buffers["bias"].clone() if "bias" in buffers else None
        return LayerTensors(operands={"weight": weight}, bias=bias)


def _slower(isa: str, unit: str, layout: Layout) -> float:
    """Times what packed weights take, where ``unit`` uses codes in place and ``isa`` is there."""
    if unit == "none":
        return _BY_BLOCKS
    if unit == "avx512" and isa != "avx512":
        return _UNMEASURED
    if unit == "avx512":
        return _SLOWER_AVX512[layout.order] if layout.width == 4 else _SLOWER_AVX512_EIGHT
    return (_SLOWER_AMX if isa == "amx" else _SLOWER)[layout.order]


def _checked(op: OpSpec, layout: Layout, part: LayerTensors, rows: int) -> dict[str, Tensor]:
    """The part's tensors, which have the operation's spec, names, shapes and dtypes."""
    import torch

    from quant_core.numerics import scale_dtype
    from quant_core.packing import WORD_DTYPES, packed_shape

    qt = part.weight
    grid = (rows, -(-layout.k // layout.scales[0].group))
    codes = packed_shape((rows, layout.k), layout.bits, op.packing)
    expected = {
        "codes": (codes, WORD_DTYPES[op.packing.word]),
        "scales_0": (grid, scale_dtype(layout.scales[0].element)),
    }
    if layout.zero == ZERO_CODE:
        expected["zeros"] = (grid, torch.uint8)
    if layout.offsets:
        expected["offset_0"] = (grid, scale_dtype(layout.offsets[0].element))
    if layout.bias_dtype:
        expected["bias"] = ((rows,), getattr(torch, layout.bias_dtype))
    tensors = dict(qt.tensors()) | ({} if part.bias is None else {"bias": part.bias})
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if qt.spec != op.weight or qt.packing != op.packing or found != expected:
        raise LayoutError(
            f"part is {qt.spec.label} in {qt.packing} with {found}, expected {op.weight.label} in "
            f"{op.packing} with {expected}. The part belongs to another layer.",
            code="Q-LAYOUT-FUSED",
            expected=sorted(expected),
            actual=sorted(found),
        )
    return tensors


def _stored(name: str, value: Tensor, layout: Layout) -> Tensor:
    """A tensor of the canonical form as the buffer has it, or the other way round; a view."""
    import torch

    if name == "codes":
        return value.reshape(-1).view(torch.uint8).view(value.shape[0], -1)
    return value.t() if name in _GRIDS and layout.order in ("words", "across") else value


def _blocks(layout: Layout, codes: Tensor) -> Tensor:
    """The float16 values at the beginning of the blocks: [rows, G, values], in place."""
    import torch

    blocks = codes.view(codes.shape[0], -1, layout.block)
    return blocks[..., : layout.at].view(torch.float16)


def _halves(layout: Layout, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Where the blocks hold scales and offsets, and the tensors that are to lie there."""
    held = _blocks(layout, tensors["codes"])
    names = ("scales_0", "offset_0")[: held.shape[-1]]
    return [(held[..., i], tensors[name]) for i, name in enumerate(names)]


def _same_values(there: Tensor, values: Tensor) -> bool:
    """Whether both are the same bits; the same memory is not read."""
    import torch

    where = (there.data_ptr(), there.stride())
    if where == (values.data_ptr(), values.stride()):
        return True
    return torch.equal(there.view(torch.int16), values.view(torch.int16))


STORED = Stored()
