"""Products of ``gpu_accuracy.py``: layers with float or rounded activations, all kernels of each.

A layer's random tensors, its float64 products and its buffers are made once for all kernels that
read one storage order. For every kernel: errors, later calls and the replay of one CUDA graph of
all numbers of rows; then the rules: non-finite rows, weights of zero, no rows, ``restore``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_accuracy_cases import INPUTS, WEIGHTS, make_layer, make_op
from gpu_accuracy_common import (
    BOUND,
    BOUND_8,
    GRAPHS,
    HERE,
    LOOSE,
    UNORDERED,
    Cell,
    Send,
    candidates,
    device,
    error,
    errors,
    replayed,
    rule_rows,
    same,
)
from torch import Tensor

from quant_core.dequantize import dense_weight
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.family import layout_of
from quant_core.spec import TENSOR, OpSpec
from quant_core.tensors import LayerTensors

__all__ = ["Layer", "products"]

_LATER = 4  # calls beside the first


class Layer:
    """Random tensors of an operation, what they should give, and buffers by storage order."""

    def __init__(self, op: OpSpec) -> None:
        self.op, self.dtype = op, getattr(torch, op.act_dtype)
        self._made: dict[str, LayerTensors] = {}
        self._buffers: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._weights: tuple[Tensor, Tensor, Tensor | float] | None = None
        self._wanted: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def tensors(self, zero: str = "") -> LayerTensors:
        """The canonical tensors; ``zero`` as in ``make_layer``."""
        if zero not in self._made:
            self._made[zero] = make_layer(self.op, zero=zero)
        return self._made[zero]

    def buffers(self, kernel: Any, op: OpSpec, zero: str = "") -> dict[str, Tensor]:
        """What ``kernel`` and those of its storage order read."""
        key = (layout_of(kernel) or kernel.name, op, zero)
        if key not in self._buffers:
            made = kernel.allocate(op, HERE.device)
            kernel.load_(made, op, self.tensors(zero), {"row": 0})
            self._buffers[key] = made
        return self._buffers[key]

    def bound(self, kernel: Any, op: OpSpec) -> Callable[[Tensor], Tensor]:
        """``kernel`` on this layer: x -> y."""
        return functools.partial(kernel.bind(op), list(self.buffers(kernel, op).values()))

    def weights(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """Exact weights, weights rounded to the type of x, bias: float64."""
        if self._weights is None:
            lt = self.tensors()
            w = dense_weight(lt.weight, self.op.size("k")).to(HERE.device)
            bias = 0.0 if lt.bias is None else lt.bias.to(HERE.device).double()
            self._weights = w.double(), w.to(self.dtype).double(), bias
        return self._weights

    def wanted(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """m rows of x; y of exact weights and of rounded ones, float64."""
        if m not in self._wanted:
            exact, likewise, bias = self.weights()
            x = torch.randn(m, self.op.size("k"), device=HERE.device).to(self.dtype)
            xr = self._rounded(x)
            y = xr.double() @ exact.T + bias
            self._wanted[m] = x, y, xr.to(self.dtype).double() @ likewise.T + bias
        return self._wanted[m]

    def _rounded(self, x: Tensor) -> Tensor:
        """x as quantized activations represent it, float32."""
        acts, lt = self.op.operand("input"), self.tensors()
        if acts is None:
            return x.float()
        stored = (lt.input_scale, lt.input_zero)
        held = (None if t is None else t.to(HERE.device) for t in stored)
        return fake_quantize(x.float(), acts, *held)


def _numbers(layer: Layer, call: Any, rows: list[int], ordered: bool) -> dict[str, Any]:
    """Errors, repetition and graphs for all numbers of rows."""
    eight = layer.op.operand("input") is not None
    bound = BOUND_8 if eight else BOUND[layer.op.act_dtype]
    loose = bound if eight else LOOSE[layer.op.act_dtype]
    allowed = bound if ordered else loose
    xs = [layer.wanted(m)[0] for m in rows]
    ys = [call(x) for x in xs]
    # some calls are watched and then replayed: later ones take another way, and other addresses
    again = [[call(x) for x in (xs if i else [x.clone() for x in xs])] for i in range(_LATER)]
    graph = None
    if GRAPHS and HERE.device == "cuda" and rows:
        graph = replayed(lambda: [call(x) for x in xs])
    exact = errors([(y, layer.wanted(m)[1]) for m, y in zip(rows, ys, strict=True)])
    rounded = errors([(y, layer.wanted(m)[2]) for m, y in zip(rows, ys, strict=True)])
    found: dict[str, Any] = {"cases": 0, "worst": 0.0, "likewise": 0.0, "over": 0, "bad": []}
    for i, (m, y, e, r) in enumerate(zip(rows, ys, exact, rounded, strict=True)):
        noise = 1 + 2 / math.sqrt(y.numel())  # of a norm over few outputs
        found["cases"] += 1
        found["worst"] = max(found["worst"], e / noise)
        found["likewise"] = max(found["likewise"], min(r, e) / noise)
        found["over"] += e > bound * noise
        if not (min(e, r) <= allowed * noise and e <= loose * noise):
            found["bad"].append(f"M={m}: error {e:.2e}, {r:.2e} with rounded weights")
        if ordered and not all(same(y, later[i]) for later in again):
            found["bad"].append(f"M={m}: another result later")
        if ordered and graph is not None and not same(y, graph[i]):
            found["bad"].append(f"M={m}: a graph gives another result")
    return found


def _column(layer: Layer) -> int:
    """A column of x that some weight reads."""
    gather = layer.tensors().weight.gather
    return 5 if gather is None else int(gather[gather >= 0][5])


def _zeros(op: OpSpec) -> list[str]:
    """Which tensors set to zero must give the bias exactly."""
    spec, kinds = op.weight, []
    floating = spec.zero is not None and (spec.zero.kind == "offset" or spec.zero.element == "f16")
    if spec.element.kind != "lut" and not floating:
        kinds.append("codes")
    if spec.scales[0].element in ("f32", "f16", "bf16", "fp8_e4m3") and not spec.scales[0].inverse:
        kinds.append("scales")
    return kinds


def _rules(layer: Layer, kernel: Any, op: OpSpec, run: Any, m: int) -> list[str]:
    """What is wrong with non-finite rows, odd addresses, weights of zero, no rows, ``restore``."""
    bad, held = [], layer.buffers(kernel, op)
    values = list(held.values())
    acts = op.operand("input")
    whole = acts is not None and any(s.grain == TENSOR and not s.static for s in acts.scales)
    x = torch.randn(m, op.size("k"), device=HERE.device).to(layer.dtype)
    clean, column, ordered = run(values, x), _column(layer), kernel.name not in UNORDERED
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[1, column] = value
        y = run(values, broken)
        if y[1].isfinite().any():
            bad.append(f"{value} does not reach {int(y[1].isfinite().sum())} outputs")
        others = torch.arange(len(y), device=y.device) != 1
        kept = same(y[others], clean[others]) if ordered else bool(y[others].isfinite().all())
        if not whole and not kept:
            bad.append(f"{value} reaches other rows")
    odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x)
    if (e := error(run(values, odd), clean.double())) > BOUND_8:  # cuBLAS may add in another order
        bad.append(f"x at an address that is no multiple of 16 bytes: {e:.2e} from another place's")
    if run(values, x[:0]).shape != (0, op.size("n")):
        bad.append("no rows")
    for zero in _zeros(op):
        y = run(list(layer.buffers(kernel, op, zero).values()), x)
        bias = layer.tensors(zero).bias
        assert bias is not None, "layers here have one"
        want = bias.to(HERE.device).to(layer.dtype).expand_as(y)
        if not torch.equal(y, want):
            bad.append(f"zero {zero}: off by {float((y - want).abs().max()):.2e}")
    back, lt = kernel.restore(held, op), layer.tensors()
    for name, t in lt.weight.tensors().items():
        if not same(back.weight.tensors()[name].cpu(), t):
            bad.append(f"restore: {name}")
    for name in ("bias", "input_scale"):
        t = getattr(lt, name)
        if t is not None and not same(getattr(back, name).cpu(), t):
            bad.append(f"restore: {name}")
    return bad


def _one(cell: Cell, size: tuple[int, int], gather: bool, send: Send) -> None:
    inputs = INPUTS[cell.inputs] if cell.inputs else None
    weight = replace(WEIGHTS[cell.weight], gather=gather)
    op = make_op(weight, *size, act=cell.act, device=device(), inputs=inputs)
    layer = Layer(op)
    for kernel, as_run, answer in candidates(op, cell.kernels):
        rows = [m for m in cell.rows if math.isfinite(answer.cost_at(m))]
        row = {"part": cell.part, "kernel": kernel.name, "weight": cell.weight,
               "inputs": cell.inputs, "act": cell.act, "sizes": size, "gather": gather,
               "rows": rows, "refused": [m for m in cell.rows if m not in rows]}  # fmt: skip
        try:
            ordered = kernel.name not in UNORDERED
            row |= _numbers(layer, layer.bound(kernel, as_run), rows, ordered)
            few = rule_rows(cell.rows, answer.cost_at)
            row["bad"] += _rules(layer, kernel, as_run, kernel.bind(as_run), few)
        except Exception as err:
            row["bad"] = [*row.get("bad", []), f"{type(err).__name__}: {str(err)[:400]}"]
            send(row)
            if "CUDA error" in str(err) or "Accelerator" in type(err).__name__:
                raise
            continue
        send(row)


def products(cell: Cell, send: Send) -> None:
    """All kernels on all sizes of one kind, columns in order and reordered."""
    for size in cell.sizes:
        for gather in (False, True):
            _one(cell, size, gather, send)
