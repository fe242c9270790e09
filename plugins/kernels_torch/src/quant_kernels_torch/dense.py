"""Dequantize once, then a plain matrix product: any weight in the order "tiles16".

    W [N, K] in the dtype of x  <-  tiles, a block of rows at a time; the workspace
    y = x @ W^T                     cuBLAS; stacks of experts: grouped_mm over sorted tokens

It shares its buffers with the kernels that read tiles directly and takes the rows they are slow
at. An "input" operand is emulated: x is rounded to its codes and back first. Dequantization is the
oracle's own arithmetic in float32, rounded once to the dtype of x.

    quant_torch::tiles_linear(x, tensors, op)
    quant_torch::tiles_grouped(x, experts, tensors, op)
    quant_torch::tiles_embedding(ids, tensors, op)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.dequantize import dequantize_codes
from quant_core.kernels import tiles
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.calls import fake_embedding, fake_grouped, fake_linear
from quant_core.spec import OpSpec
from quant_core.spec_json import op_from_text
from quant_core.tensors import QuantizedTensor
from quant_kernels_torch.products import by_expert

__all__ = [
    "BLOCK_WEIGHTS",
    "EXPERT_BYTES",
    "dense_rows",
    "run_tiles_embedding",
    "run_tiles_grouped",
    "run_tiles_linear",
]

BLOCK_WEIGHTS = 16 << 20  # dequantized in float32 at once
EXPERT_BYTES = 1 << 30  # dequantized experts held at once

_lib = torch.library.Library("quant_torch", "FRAGMENT")
_lib.define("tiles_linear(Tensor x, Tensor[] tensors, str op) -> Tensor")
_lib.define("tiles_grouped(Tensor x, Tensor experts, Tensor[] tensors, str op) -> Tensor")
_lib.define("tiles_embedding(Tensor ids, Tensor[] tensors, str op) -> Tensor")


@functools.lru_cache(maxsize=4096)
def _names(text: str) -> tuple[str, ...]:
    return tuple(tiles.buffer_shapes(op_from_text(text)))


def _named(text: str, tensors: list[Tensor]) -> tuple[OpSpec, dict[str, Tensor]]:
    return op_from_text(text), dict(zip(_names(text), tensors, strict=True))


def _step(op: OpSpec, k: int) -> int:
    """Rows dequantized at once: whole tiles, and whole blocks of every scale."""
    align = math.lcm(tiles.TILE, *(max(s.grain[0], 1) for s in tiles.factor_grids(op).values()))
    return max(align, BLOCK_WEIGHTS // k // align * align)


def _rows(held: Mapping[str, Tensor], op: OpSpec, start: int, stop: int) -> Tensor:
    """float32 weights [stop - start, k_stored] of one matrix; ``start`` a multiple of a step."""
    k = op.size("k_stored", op.size("k"))
    first, last = start // tiles.TILE, -(-stop // tiles.TILE)
    rows = (last - first) * tiles.TILE
    planes = tuple(held[n][first:last] for n in ("codes", "codes_high") if n in held)
    codes = tiles.untile_codes(planes, tiles.stored_bits(op.weight.element.bits))
    grids = {}
    for name, s in tiles.factor_grids(op).items():
        r, c = s.grain
        kind, value = tiles.grain_kind(s.grain, k), held[name]
        if kind == "group":
            grids[name] = tiles.untile_grid(value[first:last])[:, : -(-k // c)]
        elif kind == "channel":
            grids[name] = value[start : start + rows].view(-1, 1)
        elif kind == "tensor":
            grids[name] = value.view(1, 1)
        else:
            grids[name] = value[start // r : -(-stop // r)] if r else value
    spec = op.weight
    shape = (stop - start, k)
    uncut = {n: g if g.shape[0] != rows else g[: stop - start] for n, g in grids.items()}
    qt = QuantizedTensor(
        spec=spec,
        shape=shape,
        codes=codes,
        scales=tuple(uncut[f"scales_{i}"] for i in range(len(spec.scales))),
        zeros=uncut.get("zeros"),
        offset=tuple(t for n, t in uncut.items() if n.startswith("offset")),
        codebook=tuple(t for n, t in held.items() if n.startswith("codebook")),
    )
    return dequantize_codes(codes[: stop - start, :k].contiguous(), qt)


def dense_rows(held: Mapping[str, Tensor], op: OpSpec, out: Tensor) -> Tensor:
    """The whole weight of one matrix written into ``out`` [N, k_stored], and returned."""
    n, step = op.size("n"), _step(op, out.shape[1])
    for start in range(0, n, step):
        stop = min(n, start + step)
        out[start:stop] = _rows(held, op, start, stop)
    return out


def _gathered(x: Tensor, gather: Tensor | None, k: int) -> Tensor:
    if gather is None:
        return x
    return F.pad(x, (0, 1))[:, gather[:k].long()]  # -1 picks the appended zero column


def _rounded(x: Tensor, op: OpSpec) -> Tensor:
    spec = op.operand("input")
    return x if spec is None else fake_quantize(x, spec)


def _tiles_linear(x: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    n, k = op.size("n"), op.size("k_stored", op.size("k"))
    flat = x.reshape(-1, op.size("k"))
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], n)
    w = dense_rows(held, op, x.new_empty(n, k))
    bias = held["bias"].to(x.dtype) if "bias" in held else None  # added before y is rounded
    y = F.linear(_gathered(_rounded(flat, op), held.get("gather"), k), w, bias)
    return y.view(*x.shape[:-1], n)


def _one(held: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
    return {n: t if n.startswith("codebook") else t[expert] for n, t in held.items()}


def _tiles_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    n, k = op.size("n"), op.size("k_stored", op.size("k"))
    count = op.size("experts")
    out = x.new_zeros(x.shape[0], n)
    if not x.shape[0]:
        return out
    order, ends, here = by_expert(experts, count)
    rounded = _rounded(x, op)[order]
    ids = experts[order]
    at_once = max(1, min(count, EXPERT_BYTES // (n * k * x.element_size())))
    for first in range(0, count, at_once):
        last = min(count, first + at_once)
        w = x.new_empty(last - first, n, k)
        for e in range(first, last):
            dense_rows(_one(held, e), op, w[e - first])
        # tokens before this chunk count to its first expert and are masked below
        y = F.grouped_mm(rounded, w.transpose(1, 2), offs=ends[first:last])
        if "bias" in held:
            y = y + held["bias"].to(y.dtype)[ids.clamp(0, count - 1)]
        mine = (here[order] & (ids >= first) & (ids < last)).unsqueeze(1)
        out[order] = torch.where(mine, y, out[order])
    return out


def _tiles_embedding(ids: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    k, flat = op.size("k"), ids.reshape(-1).long()
    dtype: torch.dtype = getattr(torch, op.act_dtype)
    if not flat.numel():
        return torch.empty(*ids.shape, k, dtype=dtype, device=ids.device)
    tile, within = flat // tiles.TILE, flat % tiles.TILE
    some = dict(held)
    for name in ("codes", "codes_high"):
        if name in held:
            some[name] = held[name][tile]
    for name, s in tiles.factor_grids(op).items():
        kind = tiles.grain_kind(s.grain, k)
        if kind == "group":
            some[name] = held[name][tile]
        elif kind == "channel":
            some[name] = held[name].view(-1, tiles.TILE)[tile].reshape(-1)
    rows = flat.numel() * tiles.TILE
    whole = _rows(some, op, 0, rows).view(-1, tiles.TILE, k)
    picked = whole[torch.arange(flat.numel(), device=ids.device), within]
    return picked.to(dtype).view(*ids.shape, k)


for _name, _impl, _fake in (
    ("tiles_linear", _tiles_linear, fake_linear),
    ("tiles_grouped", _tiles_grouped, fake_grouped),
    ("tiles_embedding", _tiles_embedding, fake_embedding),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_torch::{_name}", _fake, lib=_lib)


def run_tiles_linear(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    return torch.ops.quant_torch.tiles_linear(x, tensors, text)


def run_tiles_grouped(text: str, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    return torch.ops.quant_torch.tiles_grouped(x, experts, tensors, text)


def run_tiles_embedding(text: str, tensors: list[Tensor], ids: Tensor) -> Tensor:
    return torch.ops.quant_torch.tiles_embedding(ids, tensors, text)
