"""int4 on the CPU through PyTorch's own op, for machines on which nothing could be compiled.

    quant_torch::int4_cpu(x, tensors, op)

    up to 4 rows   aten._weight_int4pack_mm_for_cpu:  w = (code - 8) * scale + (8 - zero) * scale
    more           W in the dtype of x, then F.linear: the op is 5 to 13 times slower than a bf16
                   product from 64 rows on (measured, torch 2.13)

Its packed order depends on the processor and has no inverse in torch, so the canonical tensors are
kept beside it: 9 bits a weight in place of 4.5.

Source: torch 2.13 ``aten/src/ATen/native/LinearAlgebra.cpp`` (_weight_int4pack_mm_cpu).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.dequantize import unpack_codes
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.spec import CANONICAL, OpSpec
from quant_core.spec_json import op_from_text, to_text

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["Int4Cpu"]

MOST_ROWS = 4
_WIDE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_GROUPS = (32, 64, 128, 256)

_lib = torch.library.Library("quant_torch", "FRAGMENT")
_lib.define("int4_cpu(Tensor x, Tensor[] tensors, str op) -> Tensor")


class Int4Cpu:
    """See the module's docstring."""

    name = "torch_int4_cpu"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "linear":
            return Rejected(axis="op", have=op.op, need="linear")
        spec, n, k = op.weight, op.size("n"), op.size("k")
        if op.device[0] != "cpu":
            return Rejected(axis="device", have=op.device[0], need="cpu")
        if [r for r, _ in op.operands] != ["weight"] or spec.gather or spec.blocks:
            return Rejected(axis="operands", have=spec.label, need="a weight, columns in order")
        if extra := sorted(f for f in op.features if f.partition(":")[0] not in ("bias", "tied")):
            return Rejected(axis="features", have=", ".join(extra), need="bias")
        if spec.element.name != "uint4" or spec.zero is None or spec.zero.kind == "offset":
            return Rejected(axis="element", have=spec.label, need="uint4 with a zero")
        if len(spec.scales) != 1 or spec.scales[0].inverse or spec.scales[0].grain[0] != 1:
            return Rejected(axis="scales", have=spec.label, need="one multiplier per group")
        s = spec.scales[0]
        if s.grain[1] not in _GROUPS or k % s.grain[1]:
            need = f"one of {_GROUPS} that divides in_features"
            return Rejected(axis="group", have=str(s.grain[1]), need=need)
        if n % 16 or not n:
            return Rejected(axis="out_features", have=str(n), need="a multiple of 16")
        if op.packing != CANONICAL:
            return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
        dtype = getattr(torch, op.act_dtype)
        centred = spec.zero.kind == "const" and spec.zero.value == 8
        if _WIDE.get(s.element) != dtype and not (dtype == torch.float32 and s.element in _WIDE):
            need = "scales in the dtype of x, or float32 x"
            return Rejected(axis="scales", have=f"{s.element} under {op.act_dtype}", need=need)
        if not centred and dtype != torch.float32:
            need = "a constant zero of 8, or float32 x: others would be rounded"
            return Rejected(axis="zero", have=spec.label, need=need)
        return Accepted(
            cost=20.0 + n * k / 2 / 8e3,  # 8 GB/s of codes
            workspace_bytes=n * k * dtype.itemsize,
            note="a second copy of the weights, 9 bits a weight in all",
        )

    def _names(self, op: OpSpec) -> tuple[str, ...]:
        return tuple(ReferenceKernel().allocate(op, "meta"))

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        n, k, group = op.size("n"), op.size("k"), op.weight.scales[0].grain[1]
        out = ReferenceKernel().allocate(op, device)
        packed = torch.empty(n, k // 2, dtype=torch.uint8, device=device)
        dtype: torch.dtype = getattr(torch, op.act_dtype)
        grid = torch.empty(k // group, n, 2, dtype=dtype, device=device)
        return {**out, "packed": packed.fill_(255), "grid": grid.fill_(float("nan"))}

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        held = {name: buffers[name] for name in self._names(op)}
        ReferenceKernel().load_(held, op, part, at)
        if at.get("row", 0) + part.weight.shape[0] < op.size("n"):
            return  # packed once, with the last rows
        qt = ReferenceKernel().restore(held, op).weight
        codes = unpack_codes(qt).int()
        buffers["packed"].copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        dtype = buffers["grid"].dtype
        s = qt.scales[0].to(dtype)
        z = torch.zeros_like(s)
        if qt.zeros is not None:
            z = (8 - qt.zeros.to(dtype)) * s
        elif op.weight.zero is not None and op.weight.zero.value != 8:
            z = (8 - op.weight.zero.value) * s
        buffers["grid"].copy_(torch.stack((s.t(), z.t()), dim=-1))

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        return ReferenceKernel().restore({n: buffers[n] for n in self._names(op)}, op)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return functools.partial(_run, to_text(op))


@functools.lru_cache(maxsize=4096)
def _order(text: str) -> dict[str, int]:
    op = op_from_text(text)
    names = [*Int4Cpu()._names(op), "packed", "grid"]
    return {name: i for i, name in enumerate(names)}


def _int4_cpu(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    spec, at = op_from_text(op), _order(op)
    n, flat = spec.size("n"), x.reshape(-1, spec.size("k"))
    if 0 < flat.shape[0] <= MOST_ROWS:
        packed, grid = tensors[at["packed"]], tensors[at["grid"]]
        group = spec.weight.scales[0].grain[1]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.contiguous(), packed, group, grid)
    else:
        held = {name: tensors[i] for name, i in at.items() if name not in ("packed", "grid")}
        w = ReferenceKernel().restore(held, spec).weight.dequantize()
        y = F.linear(flat, w.to(x.dtype))
    if "bias" in at:
        y = y + tensors[at["bias"]].to(y.dtype)
    return y.view(*x.shape[:-1], n)


def _fake(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], op_from_text(op).size("n"))


_lib.impl("int4_cpu", _int4_cpu, "CompositeExplicitAutograd")
torch.library.register_fake("quant_torch::int4_cpu", _fake, lib=_lib)


def _run(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.ops.quant_torch.int4_cpu(x, tensors, text)
    return result
