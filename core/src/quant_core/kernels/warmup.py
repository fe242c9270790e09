"""Run every bound kernel of a model once, so that no request pays for a compilation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quant_core.kernels.ahead import compile_ahead
from quant_core.kernels.base import ANY_ROWS
from quant_core.kernels.family import Family
from quant_core.nn import QuantEmbedding, QuantGrouped, QuantLinear, QuantModule
from quant_core.spec_json import to_text

__all__ = ["ROWS", "Warmed", "warmup"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
"""Numbers of rows that are run unless others are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """One distinct operation: who ran, for which rows, and how long the first calls took."""

    module: str
    kernel: str
    rows: tuple[int, ...]
    seconds: float


def _rows_for(module: QuantModule, rows: Sequence[int], most: int) -> tuple[int, ...]:
    """The rows asked for, and one number inside every bucket of the module's family."""
    found = set(rows)
    if isinstance(module.kernel, Family):
        low = 1
        for bucket in module.kernel.table:
            found.add(low)
            if bucket.rows < ANY_ROWS:
                found.add(bucket.rows)
                low = bucket.rows + 1
    return tuple(sorted(m for m in found if m <= most))


def _run(module: QuantModule, rows: int, device: torch.device) -> None:
    dtype: torch.dtype = getattr(torch, module.op.act_dtype)
    if isinstance(module, QuantEmbedding):
        module(torch.zeros(rows, dtype=torch.long, device=device))
        return
    x = torch.zeros(rows, module.op.size("k"), dtype=dtype, device=device)
    if isinstance(module, QuantGrouped):
        module(x, torch.arange(rows, device=device) % module.op.size("experts"))
    else:
        module(x)


def warmup(model: nn.Module, *, rows: Sequence[int] = ROWS, most: int = 4096) -> tuple[Warmed, ...]:
    """Run each distinct operation of ``model`` for each number of rows.

    Kernels that are compiled on first use are compiled now, some at a time where their package
    can (``kernels.ahead``). Layers of equal shape and type share one run. Buckets of a family are
    all visited.

    Args:
        rows: numbers of rows to run besides those that select another kernel.
        most: the largest number of rows.
    """
    distinct: dict[str, tuple[str, QuantModule]] = {}
    for name, module in _modules(model):
        key = f"{type(module).__name__}|{module.kernel.name}|{to_text(module.op)}"
        distinct.setdefault(key, (name, module))
    for _, module in distinct.values():
        compile_ahead(module.kernel, module.op, _rows_for(module, rows, most))
    out = []
    for name, module in distinct.values():
        device = next(iter(module.tensors.values())).device
        wanted = _rows_for(module, rows, most)
        start = time.perf_counter()
        with torch.no_grad():
            for m in wanted:
                _run(module, m, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        out.append(Warmed(module=name, kernel=module.kernel.name, rows=wanted, seconds=seconds))
    return tuple(out)


def _modules(model: nn.Module) -> Iterable[tuple[str, QuantModule]]:
    for name, module in model.named_modules():
        known = isinstance(module, QuantLinear | QuantEmbedding | QuantGrouped)
        if known and module.owns_buffers:  # type: ignore[union-attr]
            yield name, module  # type: ignore[misc]
