"""Faulty kernels under the checks of benchmarks/gpu_accuracy.py, on the CPU; prints what was found.

A program of its own, because the benchmarks put the sources on the path. ``test_gpu_accuracy.py``
runs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_accuracy_products as products
import torch
from gpu_accuracy_common import HERE, Cell
from torch import Tensor

from quant_core.dequantize import dense_weight
from quant_core.kernels.base import Accepted
from quant_core.kernels.reference import ReferenceKernel


class Exact(ReferenceKernel):
    """float64 products of the oracle's weights, rounded once, with one fault."""

    name = "exact"

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def restore(self, buffers: Any, op: Any) -> Any:
        back = super().restore(buffers, op)
        if self.fault == "restore":
            codes = back.weight.codes.clone()
            codes[0, 0] ^= 1
            held = back.weight.with_tensors(back.weight.tensors() | {"codes": codes})
            return replace(back, operands={"weight": held})
        return back

    def bind(self, op: Any) -> Callable[..., Tensor]:
        def run(values: list[Tensor], x: Tensor) -> Tensor:
            self.calls += 1
            names = ReferenceKernel().allocate(op)
            lt = ReferenceKernel().restore(dict(zip(names, values, strict=True)), op)
            w = dense_weight(lt.weight, op.size("k")).double()
            if self.fault == "one weight":
                w[3, 7] = -w[3].abs().max()
            if self.fault == "shifted":
                w += 1e-5
            if self.fault == "nan":
                x = x.nan_to_num()
            y = x.double() @ w.T + lt.bias.double()
            if self.fault == "neighbours" and len(y):
                y = y + 0 * y.sum()
            if self.fault == "second" and self.calls % 2:
                y = y * (1 + 2**-8)
            if self.fault == "no rows" and not len(y):
                y = y.new_zeros(1, y.shape[1])
            if self.fault == "odd address" and x.data_ptr() % 16:
                y = y * 1.01
            return y.to(x.dtype)

        return run


def found(fault: str) -> list[str]:
    """What the checks say of a kernel with ``fault``."""
    torch.manual_seed(0)
    kernel, rows = Exact(fault), []
    products.candidates = lambda op, only: [(kernel, op, Accepted(cost=1.0))]
    cell = Cell("float", "uint4 g64 code", rows=(1, 17, 100))
    products.products(cell, rows.append)
    return sorted({b for row in rows for b in row["bad"]})


if __name__ == "__main__":
    HERE.device = "cpu"
    print(json.dumps({fault: found(fault) for fault in sys.argv[1:]}))
