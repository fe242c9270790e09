"""The kernels of this package behind core's contract; torch is imported where it is needed.

cpu_wna16   codes of 2 to 8 bits, float activations, exact products, float32 sums
cpu_w4a8    the 2 to 4 bit ones with activations rounded to int8, only where it is named
cpu_w8a8    layers that quantize their activations to int8 (w8a8.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core.errors import LayoutError
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.storage import misused
from quant_core.spec import OpSpec, Packing
from quant_kernels_cpu.library import ISAS, library, unavailable
from quant_kernels_cpu.loading import source_for
from quant_kernels_cpu.support import ZERO_FLOAT, Layout, describe
from quant_kernels_cpu.w8a8 import W8A8, check_range

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.kernels.between import Block
    from quant_core.tensors import LayerTensors

__all__ = ["KERNELS", "W4A8", "WnA16"]

_BEHIND = 1e5  # more than any exact kernel of this package costs, less than the reference
_BYTES_PER_US = 15e3  # 15 GB/s: codes read by two cores of a server
_MOST_BOUND = 1024

_bound: dict[tuple[str, int], tuple[OpSpec, Layout]] = {}
"""(kernel, identity of an operation) -> it, and its layout: layers of one kind share the object,
and to hash one takes longer than to ask it all."""


class WnA16:
    """Float activations times packed codes, as exact as float32 sums are; see csrc/kernel.h."""

    name = "cpu_wna16"
    OPS: tuple[str, ...] = ("linear", "grouped_linear", "embedding")
    int8 = False  # activations rounded
    strided = True

    def _layout(self, op: OpSpec) -> Layout | Rejected:
        if op.device[0] != "cpu":  # says more than a missing library does
            return Rejected(axis="device", have=op.device[0], need="cpu")
        if reason := unavailable():
            return Rejected(axis="library", have=f"none ({reason})", need="a compiled library")
        return describe(op, ops=self.OPS)

    def _bound(self, op: OpSpec) -> Layout:
        """The layout of an operation that was accepted, looked up once per object."""
        known = _bound.get((self.name, id(op)))
        if known is not None and known[0] is op:
            return known[1]
        layout = self._layout(op)
        if isinstance(layout, Rejected):
            raise misused(self.name, layout)
        if len(_bound) >= _MOST_BOUND:
            _bound.clear()
        _bound[self.name, id(op)] = op, layout
        return layout

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        layout = self._layout(op)
        if isinstance(layout, Rejected):
            return layout
        kept = "" if layout.bits == layout.width else f", kept in {layout.width} bits a code"
        return Accepted(
            cost=5.0 + layout.weight_bytes / _BYTES_PER_US,
            note=f"{ISAS[library().isa]}{kept}",
        )

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        from quant_core.memory import poisoned
        from quant_kernels_cpu.blocks import buffer_shapes, clear_padding_

        layout = self._bound(op)
        lead = (layout.experts,) if layout.experts else ()
        out = {}
        for name, (shape, dtype) in buffer_shapes(layout).items():
            shared = name.startswith("codebook")  # by all experts
            out[name] = poisoned(shape if shared else (*lead, *shape), dtype, device)
            clear_padding_(name, out[name], layout)
        return out

    def reads(self, op: OpSpec, packing: Packing) -> bool:
        """Whether ``load_`` takes codes in ``packing`` as they are stored."""
        layout = self._bound(op)
        return source_for(packing, layout) is not None

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        from quant_kernels_cpu.blocks import factor_grid, write_codes_, write_grid_

        layout = self._bound(op)
        tensors = dict(part.weight.tensors())
        if part.bias is not None:
            tensors["bias"] = part.bias
        _check_part(op, layout, part, tensors, buffers)
        row = at.get("row", 0)
        check_range("rows", row, row + part.weight.shape[0], layout.n)
        rows = {f"scales_{i}": s.rows for i, s in enumerate(layout.stored)}
        if layout.stored:
            _check_start(row, rows)
            tensors["factors"] = factor_grid(part.weight, layout.scales[0].group)
        for name, value in tensors.items():
            mine = "expert" in at and not name.startswith("codebook")
            target = buffers[name][at["expert"]] if mine else buffers[name]
            if name == "codes":
                write_codes_(target, row, value, part.weight.packing, layout)
            elif name in rows:
                start = row // rows[name] if rows[name] else 0
                target[start : start + value.shape[0]].copy_(value)
            elif name == "bias":
                target[row : row + value.shape[0]].copy_(value)
            elif target.dim() == 3:
                write_grid_(target, row, value)
            else:  # gather, one scale per tensor, tables
                target.copy_(value)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        import torch

        from quant_core.tensors import LayerTensors, QuantizedTensor
        from quant_kernels_cpu.blocks import read_codes, read_grid

        layout = self._bound(op)
        n, k, e = layout.n, layout.k, layout.experts

        def grids(prefix: str, count: int) -> tuple[Tensor, ...]:
            held = (buffers[f"{prefix}_{i}"] for i in range(count))
            return tuple(t.clone() if t.shape[-2:] == (1, 1) else read_grid(t, n) for t in held)

        codes = buffers["codes"]
        stacked = [read_codes(c, layout) for c in codes] if e else [read_codes(codes, layout)]
        qt = QuantizedTensor(
            spec=op.weight,
            shape=(e, n, k) if e else (n, k),
            codes=torch.stack(stacked) if e else stacked[0],
            packing=op.packing,
            scales=tuple(buffers[f"scales_{i}"].clone() for i in range(len(layout.stored)))
            or grids("scales", len(layout.scales)),
            zeros=read_grid(buffers["zeros"], n) if "zeros" in buffers else None,
            offset=grids("offset", len(layout.offsets)),
            gather=buffers["gather"].clone() if "gather" in buffers else None,
            codebook=tuple(buffers[f"codebook_{i}"].clone() for i in range(len(layout.codebooks))),
        )
        bias = buffers["bias"].clone() if "bias" in buffers else None
        return LayerTensors(operands={"weight": qt}, bias=bias)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_cpu import ops

        layout = self._bound(op)
        int8 = self.int8
        runs: dict[str, Callable[..., Tensor]] = {
            "linear": ops.run_linear_int8 if int8 else ops.run_linear,
            "grouped_linear": ops.run_grouped_int8 if int8 else ops.run_grouped,
            "embedding": ops.run_embedding,
        }
        return functools.partial(runs[op.op], layout.text(), layout.k_in)

    def bind_shared(self, ops: Sequence[OpSpec]) -> Callable[..., list[Tensor]] | None:
        """See ``quant_core.kernels.base``. Sums are those of the single calls, bit for bit."""
        from quant_kernels_cpu.ops import run_shared

        if self.int8 or any(op.op != "linear" for op in ops):
            return None
        layouts = [self._bound(op) for op in ops]
        return functools.partial(run_shared, tuple(x.text() for x in layouts), layouts[0].k_in)

    def bind_gated(
        self, ops: Sequence[OpSpec], activation: str, up_first: bool = False
    ) -> Callable[..., Any] | None:
        """See ``quant_core.kernels.base``."""
        from quant_kernels_cpu.block import GatedRun

        if self.int8 or any(op.op != "linear" for op in ops):
            return None
        texts = [self._bound(op).text() for op in ops]
        return GatedRun(texts, ops[0].size("k"), ops[-1].size("n"), activation, up_first)

    def bind_block(self, block: Block) -> Callable[..., Any] | None:
        """See ``quant_core.kernels.base``."""
        from quant_kernels_cpu.block import bind_block

        if self.int8 or any(op.op != "linear" for op in block.linears):
            return None
        return bind_block([self._bound(op).text() for op in block.linears], block)


class W4A8(WnA16):
    """Activations rounded to int8, one scale per group of columns; see csrc/kernel_w4a8.c.

    Its cost puts it behind ``cpu_wna16``, which runs everything it runs: it changes results by
    about a percent, so it runs only where ``kernels=`` or ``QUANT_KERNELS`` names it.
    """

    name = "cpu_w4a8"
    OPS = ("linear", "grouped_linear")
    int8 = True

    def _layout(self, op: OpSpec) -> Layout | Rejected:
        layout = super()._layout(op)
        if isinstance(layout, Rejected):
            return layout
        if not library().vnni:
            return Rejected(axis="processor", have="no VNNI", need="AVX512-VNNI")
        if layout.width != 4 or not layout.element.startswith("uint"):
            return Rejected(axis="element", have=layout.element, need="uint2 to uint4")
        if layout.zero == ZERO_FLOAT:
            return Rejected(axis="zero", have=layout.zero_element, need="unsigned zero codes")
        group = layout.scales[0].group
        if group > 128 and group % 128 and group < layout.k:
            return Rejected(axis="group", have=str(group), need="at most 128, or a multiple")
        return layout

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        answer = super().accepts(op)
        if isinstance(answer, Rejected):
            return answer
        note = "rounds activations to int8 per group; runs only when named"
        return Accepted(exact=False, cost=_BEHIND + answer.cost, note=note)


def _check_start(row: int, rows: Mapping[str, int]) -> None:
    """A part begins where a rectangle of every stored scale does."""
    for name, size in rows.items():
        if size and row % size:
            raise LayoutError(
                f"part begins at row {row}, expected a multiple of {size}, the rows that share one "
                f"value of {name}. Give scales of fewer rows, or join the parts first.",
                code="Q-LAYOUT-FUSED",
                tensor=name,
                expected=size,
                actual=row,
            )


def _check_part(
    op: OpSpec,
    layout: Layout,
    part: LayerTensors,
    tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> None:
    """The part has the operation's spec, names, dtypes and row lengths."""
    from quant_core.packing import WORD_DTYPES, packed_shape

    qt = part.weight
    if qt.spec != op.weight or set(tensors) != set(buffers) - {"factors"}:
        raise LayoutError(
            f"part is {qt.spec.label} with {sorted(tensors)}, the operation {op.weight.label} with "
            f"{sorted(buffers)}; expected the same. The part belongs to another layer.",
            code="Q-LAYOUT-FUSED",
            expected=sorted(buffers),
            actual=sorted(tensors),
        )
    rows = qt.shape[0]
    expected: dict[str, tuple[int, ...]] = {
        "codes": packed_shape((rows, layout.k), layout.bits, qt.packing),
        "gather": (layout.k,),
        "bias": (rows,),
        "zeros": (rows, -(-layout.k // layout.scales[0].group)),
    }
    for prefix, factors in (("scales", layout.scales), ("offset", layout.offsets)):
        for i, f in enumerate(factors):
            shape = (1, 1) if f.single else (rows, -(-layout.k // f.group))
            expected[f"{prefix}_{i}"] = shape
    for i, s in enumerate(layout.stored):
        columns = -(-layout.k // s.columns) if s.columns else 1
        expected[f"scales_{i}"] = (-(-rows // s.rows) if s.rows else 1, columns)
    expected |= {f"codebook_{i}": (size,) for i, size in enumerate(layout.codebooks)}
    for name, value in tensors.items():
        dtype = WORD_DTYPES[qt.packing.word] if name == "codes" else buffers[name].dtype
        if tuple(value.shape) != expected[name] or value.dtype != dtype:
            raise LayoutError(
                f"{name} has shape {tuple(value.shape)} {value.dtype}, expected {expected[name]} "
                f"{dtype}. The parts of one layer differ in layout.",
                code="Q-LAYOUT-SHAPE",
                tensor=name,
                expected=expected[name],
                actual=tuple(value.shape),
            )

    if "gather" in tensors and layout.k:
        low, high = (int(v) for v in tensors["gather"].aminmax())
        check_range("gather", low + 1, high + 1, layout.k_in)  # -1 is padding


KERNELS: tuple[Kernel, ...] = (WnA16(), W4A8(), W8A8())
"""Of layers with weights."""
