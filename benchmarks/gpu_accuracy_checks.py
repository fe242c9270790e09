"""The checks of ``gpu_accuracy.py``, one function per part; a row of findings for each kernel.

Runs in workers that ``gpu_watch`` watches. What a row counts is said in gpu_accuracy.py.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from source_tree import REPO, use

use()
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "plugins/kernels_triton/tests/support")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402
from gpu_accuracy_cases import INPUTS, PAIRS, WEIGHTS, WIDE, make_layer, make_op  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from quant_core.dequantize import dense_weight  # noqa: E402
from quant_core.kernels.activations import fake_quantize  # noqa: E402
from quant_core.kernels.choose import accepting, choose  # noqa: E402
from quant_core.registry import registry  # noqa: E402
from quant_core.spec import TENSOR, OpSpec  # noqa: E402

__all__ = [
    "ACTS",
    "EVEN",
    "LARGE",
    "NARROW",
    "PAIRS",
    "SMALL",
    "WEIGHTS",
    "WIDE",
    "WORK",
    "Cell",
    "work",
]

ROWS = (1, 2, 7, 16, 17, 33, 64, 100, 256, 1000)
SMALL, LARGE, EVEN = (200, 544), (2104, 1312), (256, 640)  # N, K; torch's products want EVEN
NARROW = (72, 96)  # one group of columns, and not all of it
ACTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BOUND = {"bfloat16": 2.2e-3, "float16": 4.5e-4}  # A16
BOUND_8 = 5e-3
# against exact weights, where a kernel rounds them: half a unit of each, beside the rounding of y
LOOSE = {"bfloat16": 4.3e-3, "float16": 5.4e-4}
DEVICE = "cuda"
FEWER = {"cuda_decode": (1, 7, 16), "gluon_wna16": (16, 256)}  # a block size of each kind
EIGHT_BIT = ("gluon_a8", "gluon_a8_stored", "gluon_scaled", "triton_scaled", "torch_scaled_mm",
             "torch_scaled_mm_block", "torch_int_mm")  # fmt: skip
NOT_HERE = ("torch_ref",)  # the oracle itself
# a graph's memory comes from torch's cache, which sanitizers want switched off
GRAPHS = not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")

Send = Callable[[Any], None]


@dataclass(frozen=True)
class Cell:
    """What one worker does at a time: all kernels, or those named, on one kind of layer."""

    part: str
    weight: str = ""
    inputs: str = ""
    act: str = "bfloat16"
    sizes: tuple[int, int] = SMALL
    rows: tuple[int, ...] = ROWS  # (): a few of each kernel
    kernels: tuple[str, ...] = ()
    index: int = 0


def error(y: Tensor, want: Tensor) -> float:
    """Relative Frobenius norm; infinity where y has NaN."""
    e = ((y.double() - want).norm() / want.norm()).item()
    return e if math.isfinite(e) else math.inf


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """What the replay of a CUDA graph of one call writes into a poisoned output."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return y


def same(a: Tensor, b: Tensor) -> bool:
    flat = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and bool(torch.equal(*flat))


class Layer:
    """A layer loaded into one kernel's buffers, and what it should compute."""

    def __init__(self, kernel: Any, op: OpSpec, zero: str = "", layer: Any = None) -> None:
        self.kernel, self.op = kernel, op
        self.lt = make_layer(op, zero=zero) if layer is None else layer
        self.buffers = kernel.allocate(op, DEVICE)
        kernel.load_(self.buffers, op, self.lt, {"row": 0})
        self.values, self.call = list(self.buffers.values()), kernel.bind(op)
        self.dtype = getattr(torch, op.act_dtype)

    def run(self, x: Tensor) -> Tensor:
        return self.call(self.values, x)

    def weights(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """Exact weights, weights rounded to the type of x, bias: float64."""
        w = dense_weight(self.lt.weight, self.op.size("k")).to(DEVICE)
        bias = 0.0 if self.lt.bias is None else self.lt.bias.to(DEVICE).double()
        return w.double(), w.to(self.dtype).double(), bias

    def rounded(self, x: Tensor) -> Tensor:
        """x as quantized activations represent it, float32."""
        acts = self.op.operand("input")
        if acts is None:
            return x.float()
        stored = (self.lt.input_scale, self.lt.input_zero)
        return fake_quantize(
            x.float(), acts, *(None if t is None else t.to(DEVICE) for t in stored)
        )


def numbers(held: Layer, rows: tuple[int, ...], cost_at: Callable[[int], float]) -> dict[str, Any]:
    """Errors, repetition and graphs for all numbers of rows."""
    exact, likewise, bias = held.weights()
    eight = held.op.operand("input") is not None
    bound = BOUND_8 if eight else BOUND[held.op.act_dtype]
    found: dict[str, Any] = {"cases": 0, "worst": 0.0, "likewise": 0.0, "over": 0, "bad": []}
    for m in rows:
        if math.isinf(cost_at(m)):
            continue
        x = torch.randn(m, held.op.size("k"), device=DEVICE).to(held.dtype)
        xr = held.rounded(x)
        y = held.run(x)
        e = error(y, xr.double() @ exact.T + bias)
        r = error(y, xr.to(held.dtype).double() @ likewise.T + bias)
        noise = 1 + 2 / math.sqrt(y.numel())  # of a norm over few outputs
        found["cases"] += 1
        found["worst"] = max(found["worst"], e / noise)
        found["likewise"] = max(found["likewise"], min(r, e) / noise)
        found["over"] += e > bound * noise
        loose = bound if eight else LOOSE[held.op.act_dtype]
        if not (min(e, r) <= bound * noise and e <= loose * noise):
            found["bad"].append(f"M={m}: error {e:.2e}, {r:.2e} with rounded weights")
        if not same(y, held.run(x)):
            found["bad"].append(f"M={m}: another result the second time")
        if GRAPHS and DEVICE == "cuda" and not same(y, replayed(lambda x=x: held.run(x))):
            found["bad"].append(f"M={m}: a graph gives another result")
    return found


def _column(held: Layer) -> int:
    """A column of x that some weight reads."""
    gather = held.lt.weight.gather
    return 5 if gather is None else int(gather[gather >= 0][5])


def rules(held: Layer, kernel: Any, m: int) -> list[str]:
    """What is wrong with non-finite rows, weights of zero, no rows, and ``restore``."""
    bad, op = [], held.op
    acts = op.operand("input")
    whole = acts is not None and any(s.grain == TENSOR and not s.static for s in acts.scales)
    x = torch.randn(max(m, 3), op.size("k"), device=DEVICE).to(held.dtype)
    clean = held.run(x)
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[1, _column(held)] = value
        y = held.run(broken)
        if y[1].isfinite().any():
            bad.append(f"{value} does not reach {int(y[1].isfinite().sum())} outputs")
        if not whole and not (same(y[0], clean[0]) and same(y[2:], clean[2:])):
            bad.append(f"{value} reaches other rows")
    if held.run(x[:0]).shape != (0, op.size("n")):
        bad.append("no rows")
    spec, kinds = op.weight, []
    floating = spec.zero is not None and (spec.zero.kind == "offset" or spec.zero.element == "f16")
    if spec.element.kind != "lut" and not floating:
        kinds.append("codes")
    if spec.scales[0].element in ("f32", "f16", "bf16", "fp8_e4m3") and not spec.scales[0].inverse:
        kinds.append("scales")
    for zero in kinds:
        y = Layer(kernel, op, zero).run(x)
        want = held.lt.bias.to(DEVICE).to(held.dtype).expand_as(y)
        if not torch.equal(y, want):
            bad.append(f"zero {zero}: off by {float((y - want).abs().max()):.2e}")
    back = kernel.restore(held.buffers, op)
    for name, t in held.lt.weight.tensors().items():
        if not same(back.weight.tensors()[name].cpu(), t):
            bad.append(f"restore: {name}")
    for name in ("bias", "input_scale"):
        t = getattr(held.lt, name)
        if t is not None and not same(getattr(back, name).cpu(), t):
            bad.append(f"restore: {name}")
    return bad


def candidates(op: OpSpec, only: tuple[str, ...]) -> list[tuple[Any, OpSpec, Any]]:
    """Kernels that accept, the operation as they run it, their answers."""
    every = accepting(op, registry())
    return [c for c in every if c[0].name not in NOT_HERE and (not only or c[0].name in only)]


def _device() -> tuple[str, str]:
    if DEVICE != "cuda":
        return DEVICE, ""
    return "cuda", "{}.{}".format(*torch.cuda.get_device_capability())


def linear(cell: Cell, send: Send) -> None:
    for gather in (False, True):
        weight = replace(WEIGHTS[cell.weight], gather=gather)
        inputs = INPUTS[cell.inputs] if cell.inputs else None
        op = make_op(weight, *cell.sizes, act=cell.act, device=_device(), inputs=inputs)
        for kernel, as_run, answer in candidates(op, cell.kernels):
            row = {"part": cell.part, "kernel": kernel.name, "weight": cell.weight,
                   "inputs": cell.inputs, "act": cell.act, "sizes": cell.sizes,
                   "gather": gather}  # fmt: skip
            try:
                held = Layer(kernel, as_run)
                few = FEWER.get(kernel.name, (33, 256))
                row |= numbers(held, cell.rows or few, answer.cost_at)
                m = next((r for r in (7, 16, 1, 100) if math.isfinite(answer.cost_at(r))), 256)
                row["bad"] += rules(held, kernel, m)
            except Exception as err:
                row["bad"] = [*row.get("bad", []), f"{type(err).__name__}: {str(err)[:400]}"]
                send(row)
                if "CUDA error" in str(err) or "Accelerator" in type(err).__name__:
                    raise
                continue
            send(row)


def experts(cell: Cell, send: Send) -> None:
    """Stacks of five experts; -1 and 5 are experts of another rank, whose tokens get zeros."""
    count, (n, k) = 5, cell.sizes
    inputs = INPUTS[cell.inputs] if cell.inputs else None
    op = make_op(WEIGHTS[cell.weight], n, k, kind="grouped_linear", act=cell.act, inputs=inputs,
                 device=_device(), experts=count)  # fmt: skip
    each = [make_layer(op, seed=i) for i in range(count)]
    exact = torch.stack([t.dequantize() for t in each]).to(DEVICE)
    biases = torch.stack([t.bias for t in each]).double().to(DEVICE)
    for kernel, as_run, answer in candidates(op, cell.kernels):
        row = {"part": "experts", "kernel": kernel.name, "weight": cell.weight, "act": cell.act,
               "inputs": cell.inputs, "cases": 0, "worst": 0.0, "likewise": 0.0, "over": 0,
               "bad": []}  # fmt: skip
        bound = BOUND_8 if cell.inputs else LOOSE[cell.act]
        try:
            buffers = kernel.allocate(as_run, DEVICE)
            for i, part in enumerate(each):
                kernel.load_(buffers, as_run, part, {"row": 0, "expert": i})
            run, values = kernel.bind(as_run), list(buffers.values())
            for t in (0, 1, 7, 60, 300, 1500):
                if t and math.isinf(answer.cost_at(t)):
                    continue
                x = torch.randn(t, k, device=DEVICE).to(ACTS[cell.act])
                index = torch.randint(-1, count + 1, (t,), device=DEVICE)
                here = (index >= 0) & (index < count)
                y = run(values, x, index)
                if y.shape != (t, n) or y[~here].any():
                    row["bad"].append(f"T={t}: tokens of no expert")
                if not same(y, run(values, x, index)):
                    row["bad"].append(f"T={t}: another result the second time")
                if not here.any():
                    continue
                xr = x.float() if inputs is None else fake_quantize(x.float(), inputs)
                want = torch.zeros(t, n, dtype=torch.float64, device=DEVICE)
                for i in range(count):
                    of = index == i
                    want[of] = xr[of].double() @ exact[i].double().T + biases[i]
                e = error(y[here], want[here]) / (1 + 2 / math.sqrt(int(here.sum()) * n))
                row["cases"] += 1
                row["worst"] = max(row["worst"], e)
                row["over"] += e > (BOUND_8 if cell.inputs else BOUND[cell.act])
                if not e <= bound:
                    row["bad"].append(f"T={t}: error {e:.2e}")
                if GRAPHS and DEVICE == "cuda":
                    z = replayed(lambda v=values, x=x, i=index, run=run: run(v, x, i))
                    if not same(y, z):
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
    op = make_op(WEIGHTS[cell.weight], *cell.sizes, kind="embedding", act=cell.act,
                 device=_device())  # fmt: skip
    for kernel, as_run, _ in candidates(op, cell.kernels):
        row = {"part": "embedding", "kernel": kernel.name, "weight": cell.weight, "act": cell.act,
               "cases": 0, "worst": 0.0, "likewise": 0.0, "over": 0, "bad": []}  # fmt: skip
        try:
            held = Layer(kernel, as_run)
            exact = held.weights()[0].to(held.dtype)
            for shape in ((1,), (2, 7), (300,), (0,)):
                ids = torch.randint(0, cell.sizes[0], shape, device=DEVICE)
                row["cases"] += 1
                y = held.run(ids)
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
        name, k = cell.inputs, cell.sizes[1]
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


class Calls(TorchDispatchMode):
    """The registered operators of this project that calls reach, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("quant_") and name not in self.held:
            copies = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs or {}))
            self.held[name] = (func, *copies)
        return func(*args, **(kwargs or {}))


def opcheck(cell: Cell, send: Send) -> None:
    """torch's own checks of what one layer's kernels, or the operations between layers, call."""
    calls = Calls()
    if cell.weight:
        kind = "grouped_linear" if cell.index else "linear"
        inputs = INPUTS[cell.inputs] if cell.inputs else None
        op = make_op(WEIGHTS[cell.weight], *cell.sizes, kind=kind, act=cell.act, inputs=inputs,
                     device=_device(), experts=cell.index)  # fmt: skip
        picked = choose(op, registry())  # several kernels as one, which has operators of its own
        both = [*accepting(op, registry()), (picked.kernel, picked.op, picked.kernel.accepts(op))]
        for kernel, as_run, answer in both:
            m = next((r for r in (7, 100, 1) if math.isfinite(answer.cost_at(r))), 256)
            x = torch.randn(m, op.size("k"), device=DEVICE).to(ACTS[cell.act])
            with calls:
                if cell.index:
                    buffers = kernel.allocate(as_run, DEVICE)
                    for i in range(cell.index):
                        kernel.load_(buffers, as_run, make_layer(as_run), {"row": 0, "expert": i})
                    index = torch.arange(m, device=DEVICE) % cell.index
                    kernel.bind(as_run)(list(buffers.values()), x, index)
                else:
                    Layer(kernel, as_run).run(x)
        plain = make_op(WEIGHTS[cell.weight], *cell.sizes, kind="embedding", device=_device())
        for kernel, as_run, _ in accepting(plain, registry()) if not cell.inputs else ():
            with calls:
                Layer(kernel, as_run).run(torch.arange(5, device=DEVICE))
    else:
        import gpu_rounding
        import gpu_step

        seen = set()
        for name, (run, _) in gpu_step.cases().items():
            if name.split()[0] not in seen or "bool" in name:
                seen.add(name.split()[0])
                with calls:
                    run()
        with calls:
            gpu_rounding.check_hadamard(gpu_rounding.ORDERS[0])
    for name, (func, args, kwargs) in calls.held.items():
        row = {"part": "opcheck", "kernel": name, "weight": cell.weight, "cases": 1, "worst": 0.0,
               "likewise": 0.0, "over": 0, "bad": []}  # fmt: skip
        try:
            torch.library.opcheck(func, args, kwargs)
        except Exception as err:
            row["bad"].append(f"{type(err).__name__}: {str(err)[:600]}")
        send(row)


WORK = {"float": linear, "rounded": linear, "experts": experts, "embedding": embedding,
        "weightless": weightless, "opcheck": opcheck}  # fmt: skip


def work(cell: Cell, send: Send, end: float, device: str) -> None:
    """One cell; a row for each kernel."""
    global DEVICE
    DEVICE = device
    if time.monotonic() > end:
        send({"part": cell.part, "late": str(cell)})
        return
    torch.manual_seed(0)
    WORK[cell.part](cell, send)
    send({"part": cell.part, "done": str(cell)})
