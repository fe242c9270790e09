"""Opaque ops around a ``HummingLayer`` made on the first call.

    quant_humming::linear(x, tensors, op)                    x [..., K] -> [..., N]
    quant_humming::grouped_linear(x, experts, tensors, op)   x [T, K], experts [T] -> [T, N]

Left to itself the library compiles the kernels of all numbers of rows of x at the first call, some
thirty a layer. Here each call names the one configuration that the library's own table has for its
rows, so a kernel is compiled when it first runs. Rows of experts are sorted by torch's own ops,
in blocks of one expert that the library's "indexed" product takes: it gathers and scatters them.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quant_core.kernels.base import Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.kernels.storage import misused
from quant_core.parts import matrices
from quant_core.spec_json import op_from_text
from quant_kernels_humming.layout import configs, tensors_of

__all__ = ["blocks_of", "run_grouped", "run_linear"]

_INDEXED = {"gemm_type": "indexed"}


@dataclass(frozen=True, slots=True)
class _Made:
    """The library's layer for one version of the weights."""

    version: int
    layer: Any
    bounds: tuple[int, ...]  # largest number of rows of each configuration, ascending
    configs: tuple[str, ...]
    blocks: tuple[int, ...]  # rows of a block of each

    def _at(self, x: Tensor) -> int:
        return min(bisect_left(self.bounds, x.shape[0]), len(self.bounds) - 1)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, tuning_config=self.configs[self._at(x)])
        return y

    def grouped(self, x: Tensor, index: Tensor, experts: int, n: int) -> Tensor:
        """Row t of x through expert ``index[t]``; zeros where that is no expert."""
        at, y = self._at(x), x.new_zeros(x.shape[0], n)
        rows, owners, count = blocks_of(index, experts, self.blocks[at])
        self.layer(
            x, outputs=y, sorted_ids=rows, expert_ids=owners, num_tokens_padded=count,
            compute_config=_INDEXED, tuning_config=self.configs[at],
        )  # fmt: skip
        return y


def blocks_of(index: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of each expert in blocks of ``size``; nothing waits for the device.

    Shapes:  index [T] -> rows int32 [B * size], T where a block has no more; experts int32 [B] of
             the blocks, as many as there may be at most; how many rows of them are used, int32 [1]
    """
    t, device = index.shape[0], index.device
    known = torch.where((index >= 0) & (index < experts), index, experts)
    ids, order = known.sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    padded = (counts + (size - 1)) // size * size
    last = padded.cumsum(0)
    most = min(t, -(-t // size) + experts)
    rows = torch.full((most * size + 1,), t, dtype=torch.int32, device=device)
    first = torch.cat([last - padded - (ends - counts), last.new_zeros(1)])  # less rows before
    place = torch.arange(t, device=device) + first[ids]
    rows[torch.where(ids < experts, place, most * size)] = order.int()  # of none: one place more
    starts = torch.arange(most, device=device) * size
    owners = torch.searchsorted(last, starts, right=True).clamp_(max=experts - 1)
    return rows[:-1], owners.int(), last[-1:].int()


_made = WeakTensorKeyDictionary()  # codes -> {operation: _Made}

_lib = torch.library.Library("quant_humming", "DEF")
_lib.define("linear(Tensor x, Tensor[] tensors, str op) -> Tensor")
_lib.define("grouped_linear(Tensor x, Tensor experts, Tensor[] tensors, str op) -> Tensor")


def _make(tensors: list[Tensor], text: str) -> _Made:
    from humming.layer import HummingLayer, HummingLayerMethod

    op = op_from_text(text)
    made = configs(op)
    if isinstance(made, Rejected):
        raise misused("humming", made)
    weight, acts = made
    names = ReferenceKernel().allocate(op, "meta")
    held = ReferenceKernel().restore(dict(zip(names, tensors, strict=True)), op)
    dtype: torch.dtype = getattr(torch, op.act_dtype)
    experts = op.size("experts", 0)
    parts = [tensors_of(lt.weight, lt.bias) for _, lt in matrices(held, experts)]
    given = {n: torch.stack([p[n] for p in parts]) if experts else t for n, t in parts[0].items()}
    if experts and "weight_scale_2" in given:
        given["weight_scale_2"] = given["weight_scale_2"].view(experts)  # one value of a matrix
    kind = _INDEXED if experts else {}
    with torch.cuda.device(tensors[0].device):
        layer = HummingLayer(
            shape_n=op.size("n"),
            shape_k=op.size("k"),
            weight_config=dict(weight),
            input_config=None if acts is None else dict(acts),
            has_bias=held.bias is not None,
            torch_dtype=dtype,
            **({"num_experts": experts} if experts else {}),
        ).to(tensors[0].device)
        layer.load_from_tensors(given)
        layer.transform()
        table = HummingLayerMethod.get_default_tuning_configs(layer, **kind)
    return _Made(
        version=tensors[0]._version,
        layer=layer,
        bounds=tuple(most for _, most, _ in table),
        configs=tuple(json.dumps(config) for _, _, config in table),
        blocks=tuple(config["block_shape"][0] if experts else 0 for _, _, config in table),
    )


def _held(tensors: list[Tensor], op: str) -> _Made:
    codes = tensors[0]
    every: dict[str, _Made] = _made.setdefault(codes, {})
    if any(made.version != codes._version for made in every.values()):
        every.clear()
    if op not in every:
        every[op] = _make(tensors, op)
    return every[op]


def _aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and at a multiple of 16 bytes, which the library asks for."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _linear(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    made = _held(tensors, op)
    spec = op_from_text(op)
    flat = _aligned(x.reshape(-1, spec.size("k")))
    shape = (*x.shape[:-1], spec.size("n"))
    if not flat.shape[0]:
        return x.new_empty(shape)
    return made(flat).reshape(shape)


def _grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    spec = op_from_text(op)
    if not x.shape[0]:
        return x.new_empty(0, spec.size("n"))
    made = _held(tensors, op)
    return made.grouped(_aligned(x), experts, spec.size("experts"), spec.size("n"))


def _fake(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], op_from_text(op).size("n"))


def _fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    return x.new_empty(x.shape[0], op_from_text(op).size("n"))


for _name, _impl, _shape in (
    ("linear", _linear, _fake),
    ("grouped_linear", _grouped, _fake_grouped),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_humming::{_name}", _shape, lib=_lib)


def run_linear(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.ops.quant_humming.linear(x, tensors, text)
    return result


def run_grouped(text: str, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    result: Tensor = torch.ops.quant_humming.grouped_linear(x, experts, tensors, text)
    return result
