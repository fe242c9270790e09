"""The checks of ``gpu_accuracy.py`` but products, one function per part; a row for each kernel.

What a row counts is said in gpu_accuracy.py; products are those of gpu_accuracy_products.py.
"""

from __future__ import annotations

import math
import time

import torch
from gpu_accuracy_cases import INPUTS, WEIGHTS, make_layer, make_op
from gpu_accuracy_common import (
    ACTS,
    BOUND,
    BOUND_8,
    EXPERTS,
    GRAPHS,
    HERE,
    LOOSE,
    TOKENS,
    UNORDERED,
    Cell,
    Send,
    candidates,
    device,
    error,
    replayed,
    same,
)
from gpu_accuracy_products import Layer, products

from quant_core.kernels.activations import fake_quantize

__all__ = ["WORK", "work"]


def experts(cell: Cell, send: Send) -> None:
    """Stacks of five experts; -1 and 5 are experts of another rank, whose tokens get zeros."""
    count, (n, k) = EXPERTS, cell.sizes[0]
    inputs = INPUTS[cell.inputs] if cell.inputs else None
    op = make_op(WEIGHTS[cell.weight], n, k, kind="grouped_linear", act=cell.act, inputs=inputs,
                 device=device(), experts=count)  # fmt: skip
    each = [make_layer(op, seed=i) for i in range(count)]
    exact = torch.stack([t.dequantize() for t in each]).to(HERE.device)
    biases = torch.stack([t.bias for t in each]).double().to(HERE.device)
    for kernel, as_run, answer in candidates(op, cell.kernels):
        row = {"part": "experts", "kernel": kernel.name, "weight": cell.weight, "act": cell.act,
               "inputs": cell.inputs, "cases": 0, "worst": 0.0, "likewise": 0.0, "over": 0,
               "bad": []}  # fmt: skip
        bound = BOUND_8 if cell.inputs else LOOSE[cell.act]
        try:
            buffers = kernel.allocate(as_run, HERE.device)
            for i, part in enumerate(each):
                kernel.load_(buffers, as_run, part, {"row": 0, "expert": i})
            run, values = kernel.bind(as_run), list(buffers.values())
            for t in TOKENS:
                if t and math.isinf(answer.cost_at(t)):
                    continue
                x = torch.randn(t, k, device=HERE.device).to(ACTS[cell.act])
                index = torch.randint(-1, count + 1, (t,), device=HERE.device)
                here = (index >= 0) & (index < count)
                y = run(values, x, index)
                if y.shape != (t, n) or y[~here].any():
                    row["bad"].append(f"T={t}: tokens of no expert")
                later = [run(values, x.clone(), index.clone()) for _ in range(4)]
                ordered = kernel.name not in UNORDERED
                if ordered and not all(same(y, z) for z in later):
                    row["bad"].append(f"T={t}: another result later")
                if not here.any():
                    continue
                xr = x.float() if inputs is None else fake_quantize(x.float(), inputs)
                want = torch.zeros(t, n, dtype=torch.float64, device=HERE.device)
                for i in range(count):
                    of = index == i
                    want[of] = xr[of].double() @ exact[i].double().T + biases[i]
                e = error(y[here], want[here]) / (1 + 2 / math.sqrt(int(here.sum()) * n))
                row["cases"] += 1
                row["worst"] = max(row["worst"], e)
                row["over"] += e > (BOUND_8 if cell.inputs else BOUND[cell.act])
                if not e <= bound:
                    row["bad"].append(f"T={t}: error {e:.2e}")
                if GRAPHS and HERE.device == "cuda":
                    z = replayed(lambda v=values, x=x, i=index, run=run: [run(v, x, i)])
                    if ordered and not same(y, z[0]):
                        row["bad"].append(f"T={t}: a graph gives another result")
        except Exception as err:
            row["bad"].append(f"{type(err).__name__}: {str(err)[:400]}")
            if "CUDA error" in str(err):
                send(row)
                raise
        send(row)


def embedding(cell: Cell, send: Send) -> None:
    """Rows of the oracle's weights, rounded once: every bit, but for products that a kernel adds to
    without rounding them first (offsets), which may tip a few."""
    op = make_op(WEIGHTS[cell.weight], *cell.sizes[0], kind="embedding", act=cell.act,
                 device=device())  # fmt: skip
    layer = Layer(op)
    for kernel, as_run, _ in candidates(op, cell.kernels):
        row = {"part": "embedding", "kernel": kernel.name, "weight": cell.weight, "act": cell.act,
               "cases": 0, "worst": 0.0, "likewise": 0.0, "over": 0, "bad": []}  # fmt: skip
        try:
            run = layer.bound(kernel, as_run)
            exact = layer.weights()[0].to(layer.dtype)
            for shape in ((1,), (2, 7), (300,), (0,)):
                ids = torch.randint(0, cell.sizes[0][0], shape, device=HERE.device)
                row["cases"] += 1
                y = run(ids)
                e = error(y, exact[ids].double()) if ids.numel() else 0.0
                row["worst"] = max(row["worst"], e)
                fused = as_run.weight.zero is not None and as_run.weight.zero.kind == "offset"
                if e > (1e-4 if fused else 0.0) or y.shape != exact[ids].shape:
                    row["bad"].append(f"{shape}: {int((y != exact[ids]).sum())} differ, {e:.2e}")
        except Exception as err:
            row["bad"].append(f"{type(err).__name__}: {str(err)[:400]}")
        send(row)


def weightless(cell: Cell, send: Send) -> None:
    """The checks of gpu_rounding.py and gpu_step.py, one of each kind in ``index``."""
    import gpu_rounding
    import gpu_step

    row = {"part": "weightless", "kernel": cell.weight, "act": cell.act, "cases": 1, "worst": 0.0,
           "likewise": 0.0, "over": 0, "bad": []}  # fmt: skip
    if cell.weight == "triton_round":
        name, k = cell.inputs, cell.sizes[0][1]
        row["weight"] = name
        got = gpu_rounding.check((name, cell.act, k))
        row["bad"] = [f"{k}: {v}" for k, v in got.items() if k not in ("spec", "act", "k") and v]
        send(row)
    elif cell.weight == "triton_hadamard":
        got = gpu_rounding.check_hadamard(gpu_rounding.ORDERS[cell.index])
        row |= {"weight": got["order"], "cases": len(got) - 2, "act": "all"}
        for key, e in got.items():
            limit = {"bfloat16": 2.2e-3, "float16": 4.5e-4, "float32": 5e-6}.get(key.split()[0], 0)
            if key not in ("order", "k") and not (isinstance(e, float) and e <= limit):
                row["bad"].append(f"{key}: {e}")
        send(row)
    else:
        for name, (run, bound) in list(gpu_step.cases().items())[cell.index :: 8]:
            kind = f"triton_{name.split()[0]}"
            one = row | {"kernel": kind, "weight": name, "act": name.split()[-1], "bad": []}
            try:
                one["worst"] = e = gpu_step.error(*run())
                if not e <= bound:
                    one["bad"].append(f"error {e:.3g}, allowed {bound:.3g}")
            except Exception as err:
                one["bad"].append(f"{type(err).__name__}: {str(err)[:400]}")
                if "CUDA error" in str(err):
                    raise
            send(one)


WORK = {"float": products, "rounded": products, "experts": experts, "embedding": embedding,
        "weightless": weightless}  # fmt: skip


def work(cell: Cell, send: Send) -> None:
    """One cell; a row for each kernel."""
    torch.manual_seed(0)
    begin = time.monotonic()
    WORK[cell.part](cell, send)
    send({"part": cell.part, "done": str(cell), "seconds": time.monotonic() - begin})
