"""The reference kernels: dequantize row blocks in float32, then torch's own matmul.

    y = x[..., gather] @ W^T (+ bias),   W = dequantize(codes, scales, zeros)

A layer with a combined output scale is summed in integers (``quant_core.kernels.integer``).
Transforms of the input come first (``quant_core.kernels.transforms``), those of the output last.
Where the operation has an "input" operand, the transformed x is rounded to its codes and back
(``quant_core.kernels.activations``), before any gather.

They run every spec on every device, keep the weights packed, and are what each fast kernel is
compared with. One torch op per operation (``quant_core::linear_ref`` ...), so that torch.compile
and CUDA graphs see one opaque node; the spec travels as JSON text, a constant of the graph.

Buffers are the canonical tensors themselves under the names of ``QuantizedTensor.tensors()``, in a
row-major packing along K, so rows can be written, cut and looked up without unpacking.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.dequantize import dequantize
from quant_core.errors import LayoutError
from quant_core.kernels.activations import fake_quantize, static_shape, unsupported_input
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.calls import (
    check_input,
    copy_exactly_,
    fake_embedding,
    fake_grouped,
    fake_linear,
)
from quant_core.kernels.integer import combined, input_codes, unsupported_sum, without_scales
from quant_core.kernels.transforms import (
    apply_transforms,
    held_transforms,
    transform_buffers,
    transform_shapes,
    unsupported_transform,
)
from quant_core.memory import poisoned
from quant_core.numerics import scale_dtype
from quant_core.packing import WORD_DTYPES, packed_shape
from quant_core.registry import registry
from quant_core.spec import OpSpec, QuantSpec, Scale
from quant_core.spec_json import op_from_text, to_text
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["ReferenceKernel"]

_BLOCK_ELEMENTS = 4 << 20  # weights dequantized at once: 16 MiB of float32
_SIDE = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
_WHOLE = ("gather", "input_scale", "input_zero")  # not cut into rows

_lib = torch.library.Library("quant_core", "DEF")


# ----------------------------------------------------------------------------- buffers <-> tensors


def _grid(scale: Scale, n: int, k: int) -> tuple[int, int]:
    r, c = scale.grain
    return (-(-n // r) if r else 1, -(-k // c) if c else 1)


def _shapes(op: OpSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Buffer name -> (shape without the expert axis, dtype) of the weight operand."""
    spec, n = op.weight, op.size("n")
    k = op.size("k_stored", op.size("k"))
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if spec.blocks:
        t = registry().block_type(spec.blocks)
        out["codes"] = ((n, k // t.weights * t.bytes), torch.uint8)
        return out
    words = packed_shape((n, k), spec.element.bits, op.packing)
    out["codes"] = (words, WORD_DTYPES[op.packing.word])
    for i, s in enumerate(spec.scales):
        out[f"scales_{i}"] = (_grid(s, n, k), scale_dtype(s.element))
    if spec.zero is not None and spec.zero.kind == "code":
        out["zeros"] = (_grid(spec.scales[0], n, k), scale_dtype(spec.zero.element))
    if spec.zero is not None and spec.zero.kind == "offset":
        for i, s in enumerate(spec.zero.levels):
            out[f"offset_{i}"] = (_grid(s, n, k), scale_dtype(s.element))
    if spec.gather:
        out["gather"] = ((k,), torch.int32)
    tables = [1 << spec.element.bits] if spec.element.kind == "lut" else []
    tables += [256] * any(s.element == "lut8" for s in spec.scales)
    out |= {f"codebook_{i}": ((size,), torch.float32) for i, size in enumerate(tables)}
    return out


def _tensor(
    op: OpSpec, buffers: Mapping[str, Tensor], expert: int | None = None
) -> QuantizedTensor:
    """The weight held by ``buffers``; with ``expert``, that expert's matrix."""
    spec: QuantSpec = op.weight
    n, k = op.size("n"), op.size("k_stored", op.size("k"))
    experts = op.size("experts", 0)
    pick = (lambda t: t) if expert is None or not experts else (lambda t: t[expert])
    codebook = tuple(t for name, t in buffers.items() if name.startswith("codebook_"))
    levels = spec.zero.levels if spec.zero is not None else ()
    return QuantizedTensor(
        spec=spec,
        shape=(experts, n, k) if experts and expert is None else (n, k),
        codes=pick(buffers["codes"]),
        packing=op.packing,
        scales=tuple(pick(buffers[f"scales_{i}"]) for i in range(len(spec.scales))),
        zeros=pick(buffers["zeros"]) if "zeros" in buffers else None,
        offset=tuple(pick(buffers[f"offset_{i}"]) for i in range(len(levels))),
        gather=pick(buffers["gather"]) if "gather" in buffers else None,
        codebook=codebook,
    )


def _row_block(qt: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows [start, stop) of a row-major matrix; ``start`` a multiple of every row grain."""

    def cut(t: Tensor, scale: Scale) -> Tensor:
        r = scale.grain[0]
        return t[start // r : -(-stop // r)] if r else t

    levels = qt.spec.zero.levels if qt.spec.zero is not None else ()
    return replace(
        qt,
        shape=(stop - start, qt.shape[1]),
        codes=qt.codes[start:stop],
        scales=tuple(cut(t, s) for t, s in zip(qt.scales, qt.spec.scales)),
        zeros=None if qt.zeros is None else cut(qt.zeros, qt.spec.scales[0]),
        offset=tuple(cut(t, s) for t, s in zip(qt.offset, levels)),
    )


def _row_step(qt: QuantizedTensor) -> int:
    levels = qt.spec.scales + (qt.spec.zero.levels if qt.spec.zero is not None else ())
    align = max([1, *(s.grain[0] for s in levels)])
    return max(align, _BLOCK_ELEMENTS // max(qt.shape[1], 1) // align * align)


# ------------------------------------------------------------------------------------ arithmetic


def _matmul(x: Tensor, qt: QuantizedTensor) -> Tensor:
    """x [T, K] @ W^T in the dtype of x, W dequantized block by block."""
    if qt.gather is not None:  # -1 picks the appended zero column
        x = F.pad(x, (0, 1))[:, qt.gather.long()]
    n, step = qt.shape[0], _row_step(qt)
    if n <= step:
        return F.linear(x, dequantize(qt).to(x.dtype))
    out = x.new_empty(x.shape[0], n)
    for start in range(0, n, step):
        stop = min(n, start + step)
        out[:, start:stop] = F.linear(x, dequantize(_row_block(qt, start, stop)).to(x.dtype))
    return out


_lib.define("linear_ref(Tensor x, Tensor[] tensors, str op) -> Tensor")
_lib.define("grouped_linear_ref(Tensor x, Tensor experts, Tensor[] tensors, str op) -> Tensor")
_lib.define("embedding_ref(Tensor ids, Tensor[] tensors, str op) -> Tensor")


def _names(op: OpSpec) -> list[str]:
    return [*_shapes(op), *(s for s in _SIDE if s in op.features), *transform_shapes(op)]


def _named(op: OpSpec, tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_names(op), tensors, strict=True))


def _rounded(
    x: Tensor, op: OpSpec, buffers: Mapping[str, Tensor], expert: int | None = None
) -> Tensor:
    """x [T, K] transformed, and as the "input" operand represents it where there is one."""
    x = apply_transforms(x, held_transforms(op, buffers, expert), "input")
    spec = op.operand("input")
    if spec is None:
        return x
    scale, zero = buffers.get("input_scale"), buffers.get("input_zero")
    if expert is not None:
        scale = None if scale is None else scale[expert]
        zero = None if zero is None else zero[expert]
    return fake_quantize(x, spec, scale, zero)


def _prepare(
    x: Tensor, op: OpSpec, buffers: Mapping[str, Tensor], expert: int | None = None
) -> Tensor:
    """x [T, K] as it is multiplied: transformed and rounded, or codes under a combined scale."""
    spec = op.operand("input")
    if spec is None or "out_scale" not in op.features:
        return _rounded(x, op, buffers, expert)
    side = {n: buffers[n] if expert is None else buffers[n][expert] for n in _SIDE if n in buffers}
    moved = apply_transforms(x, held_transforms(op, buffers, expert), "input")
    return input_codes(moved, spec, side["input_scale"], side.get("input_zero"))


def _multiply(
    ready: Tensor,
    dtype: torch.dtype,
    op: OpSpec,
    buffers: Mapping[str, Tensor],
    expert: int | None = None,
) -> Tensor:
    """What ``_prepare`` made, times W^T, as the operands mean it, before any float bias."""
    qt = _tensor(op, buffers, expert)
    if op.operand("input") is None or "out_scale" not in op.features:
        return _matmul(ready, qt)
    side = {n: buffers[n] if expert is None else buffers[n][expert] for n in _SIDE if n in buffers}
    sums = _matmul(ready, without_scales(qt))
    return combined(sums, side.get("acc_bias"), side["out_scale"]).to(dtype)


def _product(
    x: Tensor, op: OpSpec, buffers: Mapping[str, Tensor], expert: int | None = None
) -> Tensor:
    return _multiply(_prepare(x, op, buffers, expert), x.dtype, op, buffers, expert)


def _finish(y: Tensor, op: OpSpec, buffers: Mapping[str, Tensor]) -> Tensor:
    if "bias" in buffers:
        y = y + buffers["bias"].to(y.dtype)
    return apply_transforms(y, held_transforms(op, buffers), "output")


def _linear(x: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op = op_from_text(op_text)
    buffers = _named(op, tensors)
    y = _finish(_product(x.reshape(-1, x.shape[-1]), op, buffers), op, buffers)
    return y.view(*x.shape[:-1], op.size("n"))


def _grouped_linear(x: Tensor, experts: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op = op_from_text(op_text)
    buffers = _named(op, tensors)
    out = x.new_zeros(x.shape[0], op.size("n"))
    for expert in experts.unique().tolist():
        if not 0 <= expert < op.size("experts"):
            continue  # a sentinel for "no expert here": contributes nothing
        rows = torch.where(experts == expert)[0]
        y = _product(x[rows], op, buffers, expert)
        if "bias" in buffers:
            y = y + buffers["bias"][expert].to(y.dtype)
        out[rows] = apply_transforms(y, held_transforms(op, buffers, expert), "output")
    return out


def _embedding(ids: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op = op_from_text(op_text)
    qt = _tensor(op, _named(op, tensors))
    flat = ids.reshape(-1).long()
    dtype: torch.dtype = getattr(torch, op.act_dtype)

    def rows(t: Tensor, scale: Scale) -> Tensor:
        r = scale.grain[0]
        return t[flat // r] if r else t

    def fine(scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
        return tuple(replace(s, grain=(min(s.grain[0], 1), s.grain[1])) for s in scales)

    zero = qt.spec.zero
    levels = zero.levels if zero is not None else ()
    spec = replace(
        qt.spec,
        scales=fine(qt.spec.scales),
        zero=None if zero is None else replace(zero, levels=fine(levels)),
    )
    picked = replace(
        qt,
        spec=spec,
        shape=(flat.numel(), qt.shape[1]),
        codes=qt.codes[flat],
        scales=tuple(rows(t, s) for t, s in zip(qt.scales, qt.spec.scales)),
        zeros=None if qt.zeros is None else rows(qt.zeros, qt.spec.scales[0]),
        offset=tuple(rows(t, s) for t, s in zip(qt.offset, levels)),
    )
    if flat.numel() == 0:
        return torch.empty(*ids.shape, qt.shape[1], dtype=dtype, device=ids.device)
    return dequantize(picked).to(dtype).view(*ids.shape, qt.shape[1])


for _name, _impl, _fake in (
    ("linear_ref", _linear, fake_linear),
    ("grouped_linear_ref", _grouped_linear, fake_grouped),
    ("embedding_ref", _embedding, fake_embedding),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_core::{_name}", _fake, lib=_lib)


# ---------------------------------------------------------------------------------------- kernel


class ReferenceKernel:
    """Runs linear, grouped_linear and embedding for every weight spec, slowly and exactly.

    Activations may be quantized as ``quant_core.kernels.activations`` describes.
    """

    name = "torch_ref"
    OPS = ("linear", "grouped_linear", "embedding")
    TRANSFORMS = True

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op not in self.OPS:
            return Rejected(axis="op", have=op.op, need=" or ".join(self.OPS))
        roles = {role for role, _ in op.operands}
        allowed = {"weight"} if op.op == "embedding" else {"weight", "input"}
        if not {"weight"} <= roles <= allowed:
            return Rejected(
                axis="operands", have=str(sorted(roles)), need=" and ".join(sorted(allowed))
            )
        odd = unsupported_input(op) or unsupported_transform(op) or unsupported_sum(op)
        if odd is not None:
            return odd
        spec = op.weight
        if spec.element.kind == "vector":
            return Rejected(axis="element", have=spec.element.name, need="a scalar element")
        if op.packing.k_major or op.packing.axis != "in":
            return Rejected(axis="packing", have="k-major or along N", need="row-major along K")
        if op.packing.order is not None or op.packing.fields:  # would be put in order on every call
            return Rejected(axis="packing", have="reordered codes", need="codes in order")
        if op.op == "embedding" and spec.gather:
            return Rejected(axis="gather", have="reordered columns", need="columns in order")
        block = min(op.size("n") * op.size("k_stored", op.size("k")), _BLOCK_ELEMENTS)
        return Accepted(workspace_bytes=8 * block, cost=1e6, note="dequantizes on every call")

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        experts = op.size("experts", 0)
        lead = (experts,) if experts else ()
        out = {}
        for name, (shape, dtype) in _shapes(op).items():
            full = shape if name.startswith("codebook") else (*lead, *shape)
            out[name] = poisoned(full, dtype, device)
        n = op.size("n")
        side: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "bias": ((n,), torch.float32),
            "acc_bias": ((n,), torch.int32),
            "out_scale": ((n,), torch.float32),
            **static_shape(op),
        }
        for name in _SIDE:
            if name in op.features:
                shape, dtype = side[name]
                if name == "bias" and "bias:" in " ".join(op.features):
                    text = next(f for f in op.features if f.startswith("bias:"))
                    dtype = getattr(torch, text.partition(":")[2])
                out[name] = poisoned((*lead, *shape), dtype, device)
        for name, (shape, dtype) in transform_shapes(op).items():
            out[name] = poisoned((*lead, *shape), dtype, device)
        return out

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        qt, row = part.weight, at.get("row", 0)
        levels = qt.spec.zero.levels if qt.spec.zero is not None else ()
        grains = {f"scales_{i}": s.grain[0] for i, s in enumerate(qt.spec.scales)}
        grains |= {f"offset_{i}": s.grain[0] for i, s in enumerate(levels)}
        if qt.spec.scales:
            grains["zeros"] = qt.spec.scales[0].grain[0]
        tensors = dict(qt.tensors())
        for name in _SIDE:
            value = getattr(part, name)
            if value is not None:
                tensors[name] = value
        tensors |= transform_buffers(part.transforms)
        if set(tensors) != set(buffers):
            raise LayoutError(
                f"part carries {sorted(tensors)}, buffers hold {sorted(buffers)}; expected the "
                "same names. The part has another spec than the operation.",
                code="Q-LAYOUT-FUSED",
                expected=sorted(buffers),
                actual=sorted(tensors),
            )
        for name, value in tensors.items():
            target = buffers[name]
            if "expert" in at and not name.startswith("codebook"):
                target = target[at["expert"]]
            if name in _WHOLE or name.startswith(("codebook", "transform")):
                copy_exactly_(name, target, value)
                continue
            grain = grains.get(name, 1)
            start = row // grain if grain else 0
            copy_exactly_(name, target[start : start + value.shape[0]], value)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        side = {name: buffers.get(name) for name in _SIDE}
        weight = {"weight": _tensor(op, buffers)}
        return LayerTensors(operands=weight, transforms=held_transforms(op, buffers), **side)  # type: ignore[arg-type]

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        runners: dict[str, Callable[..., Tensor]] = {
            "linear": _run_linear,
            "grouped_linear": _run_grouped,
            "embedding": _run_embedding,
        }
        return functools.partial(runners[op.op], to_text(op), op.size("k"))

    def bind_shared(self, ops: Sequence[OpSpec]) -> Callable[..., list[Tensor]] | None:
        """See ``quant_core.kernels.reference_shared``."""
        from quant_core.kernels.reference_shared import bind_shared

        return bind_shared(ops)


def _run_linear(text: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    check_input(x, k)
    return torch.ops.quant_core.linear_ref(x, tensors, text)  # type: ignore[no-any-return]


def _run_grouped(text: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    check_input(x, k)
    return torch.ops.quant_core.grouped_linear_ref(x, experts, tensors, text)  # type: ignore[no-any-return]


def _run_embedding(text: str, k: int, tensors: list[Tensor], ids: Tensor) -> Tensor:
    return torch.ops.quant_core.embedding_ref(ids, tensors, text)  # type: ignore[no-any-return]
