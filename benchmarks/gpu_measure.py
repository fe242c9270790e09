"""One layer of ``benchmarks/gpu.py``: all contestants on it, for every number of rows.

Runs in a process that ``gpu_watch`` watches; what comes out is sent point by point.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from source_tree import use

use()
os.environ.setdefault("QUANT_MEASURED", "off")  # the plan picks by what is shipped

import torch  # noqa: E402
from gpu_layers import Case, make_case  # noqa: E402
from gpu_peers import BASE, BOUNDS, PEERS, Calls, over, peers  # noqa: E402

from quant_core.kernels.choose import accepting, choose  # noqa: E402
from quant_core.kernels.family import layout_of  # noqa: E402
from quant_core.kernels.measured import op_key  # noqa: E402
from quant_core.kernels.timing import captured, copies_for, host_us, interleaved  # noqa: E402
from quant_core.registry import registry  # noqa: E402

__all__ = ["Bench", "compile_cell", "measure_cell"]

HOST_ROWS = (1, 64)  # where the host's part of an eager call is timed,
HOST_MOST_US = 300.0  # of those that do not wait for the GPU
NOT_HERE = ("torch_ref", "humming")  # the oracle; and a peer that gpu_peers makes
MORE_ROWS = {"int4": (2, 8, 32, 96, 128, 192, 512)}  # measured too where ``Bench.more`` says so

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Bench:
    """How to measure. Messages: ``point``, ``problem``, ``trying`` (who is next) and ``costs``."""

    rows: tuple[int, ...]
    deadline: float = math.inf  # of time.monotonic()
    only: frozenset[str] = frozenset()
    rounds: int = 7
    more: bool = False

    def rows_of(self, scheme: str, experts: int) -> list[int]:
        more = MORE_ROWS.get(scheme, ()) if self.more and not experts else ()
        return sorted({*self.rows, *more})

    def left(self) -> float:
        return self.deadline - time.monotonic()


def problem(where: str, err: Exception | str) -> dict[str, Any]:
    """The message that something failed, or was left out."""
    text = err if isinstance(err, str) else f"{type(err).__name__}: {str(err)[:600]}"
    return {"problem": {"where": where, "error": text}}


@dataclass
class Contestant:
    """A kernel of the registry, loaded."""

    said: Any
    run: Any
    sets: list[list[torch.Tensor]]
    nbytes: int


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``want`` (float64)."""
    return float((y.double() - want).norm() / want.norm())


def _copies(case: Case, kernel: Any, op: Any, *, cold: bool) -> list[list[torch.Tensor]]:
    """The kernel's buffers, in copies enough to come from memory if ``cold``."""
    first = case.load(kernel, op)
    nbytes = sum(t.numel() * t.element_size() for t in first.values())
    more = copies_for(nbytes) - 1 if cold and not case.experts else 0
    sets = [first, *({n: t.clone() for n, t in first.items()} for _ in range(more))]
    return [list(s.values()) for s in sets]


def contestants(
    case: Case, only: frozenset[str], skip: frozenset[str], send: Send, *, cold: bool
) -> dict[str, Contestant]:
    """Kernels that accept the operation; ``cold``: with copies enough to come from memory."""
    found: dict[str, Contestant] = {}
    loaded: dict[Any, list[list[torch.Tensor]]] = {}  # kernels of one storage order share buffers
    for kernel, op, said in accepting(case.op, registry()):
        if kernel.name in (*NOT_HERE, *skip) or (only and kernel.name not in only):
            continue
        send({"trying": f"{kernel.name}: load"})
        try:
            key = (layout_of(kernel), op) if layout_of(kernel) else (kernel.name, op)
            if key not in loaded:
                loaded[key] = _copies(case, kernel, op, cold=cold)
            values = loaded[key]
            nbytes = sum(t.numel() * t.element_size() for t in values[0])
            found[kernel.name] = Contestant(said, kernel.bind(op), values, nbytes)
        except Exception as err:
            send(problem(f"{kernel.name} {case.shape} {case.scheme}: load", err))
    return found


def _winner(choice: Any, rows: int) -> str:
    for bucket in choice.buckets:
        if rows <= bucket.rows:
            return str(bucket.kernel)
    return str(choice.kernel.name)


def _hopeless(times: dict[str, float], m: int, before: dict[str, tuple[int, float]]) -> set[str]:
    """Contestants that more rows cannot bring back: far behind, or behind and growing with M."""
    best, out = min(times.values()), set()
    for name, us in times.items():
        rows, last = before.get(name, (m, us))
        grows = us / last > 0.5 * m / rows
        if us > 10 * best or (m >= 64 and us > 3 * best and grows):
            out.add(name)
    return out


def captured_calls(
    calls: dict[str, Calls],
    inputs: list[tuple[torch.Tensor, ...]],
    want: torch.Tensor,
    where: str,
    send: Send,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, list[Callable[[], torch.Tensor]]]]:
    """(graphs, what is known of each besides its time, its calls: a graph reads what they hold)."""
    graphs, facts, held = {}, {}, {}
    for name, made in calls.items():
        send({"trying": name})
        try:
            thunks = made(inputs)
            eager, *_ = [call() for call in thunks]  # all: some prepare each copy, no graph can
            graph, outputs = captured(thunks)
            for out in outputs:
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            compared = name not in ("torch int4", *BOUNDS)
            facts[name] = {
                "graph": bool(torch.equal(outputs[0], eager)),
                "error": relative_error(eager[:64], want) if compared else None,
                "host_us": None,
            }
            graphs[name], held[name] = (graph, len(thunks)), thunks
        except Exception as err:
            send(problem(f"{name} {where}", err))
            torch.cuda.synchronize()  # raises if the context is broken: the process ends
    return graphs, facts, held


def measure_cell(cell: tuple[str, str, frozenset[str]], send: Send, bench: Bench) -> None:
    """All contestants of one (shape, scheme, whom to skip) for every number of rows."""
    shape, scheme, skip = cell
    if bench.left() < 10:
        return send(problem(f"{shape} {scheme}", "out of time"))
    case = make_case(scheme, shape)
    found = contestants(case, bench.only, skip, send, cold=True)
    rivals = {} if bench.only else peers(case, lambda where, err: send(problem(where, err)), skip)
    choice = choose(case.op, registry())
    before: dict[str, tuple[int, float]] = {}
    dropped: set[str] = set()
    costs: dict[str, list[list[float]]] = {}
    every = bench.rows_of(scheme, case.experts)
    kept = {BASE, *(_winner(choice, m * case.top) for m in every)}
    for m in every:
        if bench.left() < 5:
            send(problem(f"{shape} {scheme} from {m} rows", "out of time"))
            break
        inputs, rows = case.inputs(m), m * case.top
        able = {n: over(c.sets, c.run) for n, c in found.items() if c.said.cost_at(rows) < math.inf}
        calls = {n: c for n, c in {**able, **rivals}.items() if n not in dropped}
        where = f"{shape} {scheme} M={m}"
        graphs, facts, held = captured_calls(calls, inputs, case.wanted(inputs[0]), where, send)
        if not graphs:
            continue
        send({"trying": "timing"})
        times = interleaved(graphs, rounds=bench.rounds, ms=1.0)
        for name in times:
            if m in HOST_ROWS and times[name] < HOST_MOST_US:
                facts[name]["host_us"] = host_us(held[name][0], 60)
        chosen = _winner(choice, rows)
        dropped |= _hopeless(times, m, before) - kept
        before = {name: (m, us) for name, us in times.items()}
        for name, us in times.items():
            point = {
                "shape": shape, "scheme": scheme, "rows": m, "who": name, "us": us,
                "chosen": name == chosen, "peer": name in PEERS, "bound": name in BOUNDS,
                "exact": name not in found or found[name].said.exact,
                "bytes": found[name].nbytes if name in found else None, **facts[name],
            }  # fmt: skip
            send({"point": point})
            if name in found:
                costs.setdefault(name, []).append([rows, us])
        line = ", ".join(f"{w}{'*' if w == chosen else ''} {t:.1f}" for w, t in times.items())
        print(f"{bench.left():.0f} s left, {where}: {line}", flush=True)
        del graphs, held, calls
    send({"costs": {op_key(case.op): costs}, "device": case.op.device})
    del found, rivals, case
    gc.collect()
    torch.cuda.empty_cache()


def compile_cell(shape: str, scheme: str, bench: Bench) -> list[dict[str, Any]]:
    """One call of every contestant for every number of rows; the problems."""
    out: list[dict[str, Any]] = []
    case = make_case(scheme, shape)
    ready = contestants(case, bench.only, frozenset(), out.append, cold=False)
    for m in bench.rows_of(scheme, case.experts):
        inputs = case.inputs(m)[0]
        for name, c in ready.items():
            if c.said.cost_at(m * case.top) < math.inf:
                try:
                    c.run(c.sets[0], *inputs)
                    torch.cuda.synchronize()
                except Exception as err:
                    out.append(problem(f"{name} {shape} {scheme} M={m}: compile", err))
    return [o for o in out if "problem" in o]
