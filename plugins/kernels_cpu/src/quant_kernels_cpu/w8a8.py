"""The int8 kernel behind core's contract: weights and activations as the codes a layer names.

It rounds x exactly as ``quant_core.kernels.activations`` does and sums in integers, so that it
differs from the reference by the last rounding only; csrc/int8.h has the maths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from quant_core.errors import LayoutError
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.storage import misused
from quant_core.spec import OpSpec, Packing
from quant_kernels_cpu.library import ISAS, library, unavailable
from quant_kernels_cpu.loading import source_for
from quant_kernels_cpu.support_int8 import Int8Layout, describe_int8

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["W8A8", "check_part", "check_range", "code_sums", "tensors_of"]

_BYTES_PER_US = 15e3  # 15 GB/s: codes read by two cores of a server
_SIDE = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
_WHOLE = ("input_scale", "input_zero")  # not cut into rows


class W8A8:
    """int8 activations, of a token or under a stored scale, times codes of at most 8 bits."""

    name = "cpu_w8a8"
    OPS = ("linear", "grouped_linear")
    strided = True

    def _layout(self, op: OpSpec) -> Int8Layout | Rejected:
        if op.device[0] != "cpu":
            return Rejected(axis="device", have=op.device[0], need="cpu")
        if reason := unavailable():
            return Rejected(axis="library", have=f"none ({reason})", need="a compiled library")
        return describe_int8(op, ops=self.OPS)

    def _bound(self, op: OpSpec) -> Int8Layout:
        layout = self._layout(op)
        if isinstance(layout, Rejected):
            raise misused(self.name, layout)
        return layout

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        layout = self._layout(op)
        if isinstance(layout, Rejected):
            return layout
        kept = "" if layout.bits == 8 else ", kept in 8 bits a code"
        units = " and amx" if ISAS[library().isa] == "amx" else ""
        isa = f"avx512-vnni{units}" if library().vnni else "avx2"
        # narrow codes kept in 8 bits take 1.4 times as long for one row as they would behind a
        # rounding of x in their own width, and half as long from eight rows on: one number for all
        stored = layout.weight_bytes * layout.bits / 8
        return Accepted(cost=5.0 + stored / _BYTES_PER_US, note=f"{isa}{kept}")

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        from quant_core.memory import poisoned
        from quant_kernels_cpu.blocks import clear_padding_, int8_buffer_shapes

        layout = self._bound(op)
        lead = (layout.experts,) if layout.experts else ()
        out = {}
        for name, (shape, dtype) in int8_buffer_shapes(layout).items():
            out[name] = poisoned((*lead, *shape), dtype, device)
            clear_padding_(name, out[name], layout)
        return out

    def reads(self, op: OpSpec, packing: Packing) -> bool:
        """Whether ``load_`` takes codes in ``packing`` as they are stored."""
        return source_for(packing, self._bound(op)) is not None

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        from quant_kernels_cpu.blocks import write_codes_, write_grid_

        layout = self._bound(op)
        tensors = tensors_of(part)
        check_part(op, layout, part, tensors, {name: t.dtype for name, t in buffers.items()})
        row, rows = at.get("row", 0), part.weight.shape[0]
        check_range("rows", row, row + rows, layout.n)
        held = {n: t[at["expert"]] if "expert" in at else t for n, t in buffers.items()}
        for name, value in tensors.items():
            if name == "codes":
                write_codes_(held[name], row, value, part.weight.packing, layout)
            elif name == "scales_0" and not layout.single:
                write_grid_(held[name], row, value)
            elif name in (*_WHOLE, "scales_0"):
                held[name].copy_(value)
            else:
                held[name][row : row + rows].copy_(value)
        if layout.sums:
            write_grid_(held["sums"], row, code_sums(part, layout))

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        import torch

        from quant_core.tensors import LayerTensors, QuantizedTensor
        from quant_kernels_cpu.blocks import read_codes, read_grid

        layout = self._bound(op)
        n, k, e = layout.n, layout.k, layout.experts
        codes, scales = buffers["codes"], buffers["scales_0"]
        stacked = [read_codes(c, layout) for c in codes] if e else [read_codes(codes, layout)]
        qt = QuantizedTensor(
            spec=op.weight,
            shape=(e, n, k) if e else (n, k),
            codes=torch.stack(stacked) if e else stacked[0],
            packing=op.packing,
            scales=(scales.clone() if layout.single else read_grid(scales, n),),
        )
        side = {name: buffers[name].clone() for name in _SIDE if name in buffers}
        return LayerTensors(operands={"weight": qt}, **side)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_cpu.ops import run_grouped_w8a8, run_linear_w8a8

        layout = self._bound(op)
        run = run_grouped_w8a8 if layout.op == "grouped_linear" else run_linear_w8a8
        return functools.partial(run, layout.text(), layout.k)

    def bind_shared(self, ops: Sequence[OpSpec]) -> Callable[..., list[Tensor]] | None:
        """See ``quant_core.kernels.base``. Outputs are those of the single calls, bit for bit."""
        from quant_kernels_cpu.ops import run_shared_w8a8

        if any(op.op != "linear" for op in ops):
            return None
        layouts = [self._bound(op) for op in ops]
        return functools.partial(run_shared_w8a8, tuple(x.text() for x in layouts), layouts[0].k)


def code_sums(part: LayerTensors, layout: Int8Layout) -> Tensor:
    """int32 (rows, groups): sum of code less zero over each group of columns."""
    import torch

    from quant_core.dequantize import unpack_codes

    rows, k = part.weight.shape
    groups = -(-k // layout.group)
    out = torch.empty(rows, groups, dtype=torch.int32)
    kept = unpack_codes(part.weight)
    for g in range(groups):  # what is kept is a byte of c + 128
        some = kept[:, g * layout.group : (g + 1) * layout.group]
        out[:, g] = (some - layout.bias).sum(1, dtype=torch.int32) - 128 * some.shape[1]
    return out


def tensors_of(part: LayerTensors) -> dict[str, Tensor]:
    """All tensors of a part, as the buffers of this kernel are named."""
    side = {name: t for name in _SIDE if (t := getattr(part, name)) is not None}
    return {**dict(part.weight.tensors()), **side}


def check_part(
    op: OpSpec,
    layout: Int8Layout,
    part: LayerTensors,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """The part has the operation's spec, and the names, dtypes and row lengths of the buffers."""
    from quant_core.packing import WORD_DTYPES, packed_shape

    qt, names = part.weight, set(dtypes) - {"sums"}
    if qt.spec != op.weight or set(tensors) != names:
        raise LayoutError(
            f"part is {qt.spec.label} with {sorted(tensors)}, the operation {op.weight.label} with "
            f"{sorted(names)}; expected the same. The part belongs to another layer.",
            code="Q-LAYOUT-FUSED",
            expected=sorted(names),
            actual=sorted(tensors),
        )
    rows, groups = qt.shape[0], -(-layout.k // layout.group)
    expected: dict[str, tuple[int, ...]] = {
        "codes": packed_shape((rows, layout.k), layout.bits, qt.packing),
        "scales_0": (1, 1) if layout.single else (rows, groups),
        **dict.fromkeys(_WHOLE, (1,)),
    }
    for name, value in tensors.items():
        shape = expected.get(name, (rows,))
        dtype = WORD_DTYPES[qt.packing.word] if name == "codes" else dtypes[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise LayoutError(
                f"{name} has shape {tuple(value.shape)} {value.dtype}, expected {shape} "
                f"{dtype}. The parts of one layer differ in layout.",
                code="Q-LAYOUT-SHAPE",
                tensor=name,
                expected=shape,
                actual=tuple(value.shape),
            )


def check_range(what: str, start: int, stop: int, size: int) -> None:
    """Raise ``LayoutError`` unless [start, stop) lies within [0, size)."""
    if start < 0 or stop > size:
        raise LayoutError(
            f"{what} of the part reach from {start} to {stop}, expected 0 to {size}. The part is "
            "larger than the layer.",
            code="Q-LAYOUT-SHAPE",
            tensor=what,
            expected=size,
            actual=(start, stop),
        )
