"""``quant bench``: which kernel runs a layer fastest for how many rows, measured here.

Every kernel that accepts the operation is run beside a plain matmul of floats (``F.linear``),
interleaved, on cold weights. The table shows per number of rows what the plan chooses, what was
fastest or second, and the speed over floats. ``--save`` keeps the times on disk, where the choice
finds them from then on (``QUANT_MEASURED=off`` ignores them).
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant_core.cli.output import Progress, emit, escaped, in_range, table
from quant_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from quant_core.kernels.base import Accepted
    from quant_core.registry import Registry
    from quant_core.scheme import Scheme
    from quant_core.spec import OpSpec
    from quant_core.tensors import LayerTensors

__all__ = ["HELP", "add_arguments", "measure", "run"]

HELP = "measure which kernel is fastest for which number of rows"
FLOATS = "F.linear"
_SHAPE = re.compile(r"([0-9]{1,18})x([0-9]{1,18})")
_MOST_WEIGHTS = 1 << 36


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET and what to measure."""
    parser.add_argument(
        "target", metavar="MODEL|NxK[,..]",
        help="a checkpoint, or sizes out_features x in_features such as 4096x14336",
    )  # fmt: skip
    parser.add_argument("--online", default="int4", help="what to make of sizes (default int4)")
    parser.add_argument("--rows", default="1,16,64,256,1024", help="numbers of rows of x")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of activations")
    parser.add_argument("--kernels", default=None, help="only these, as QUANT_KERNELS")
    most = in_range(1, 100_000, "layers")
    parser.add_argument("--layers", type=most, default=8, help="most distinct layers of a model")
    parser.add_argument("--save", action="store_true", help="keep the times for later choices")


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    scheme: Scheme
    tensors: LayerTensors


def _numbers(text: str, what: str) -> list[int]:
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not parts or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(
            f"bench: {what} is {text!r}, expected positive integers such as 1,16,256. Correct it.",
            code="Q-CFG-VALUE",
            tensor=what,
            actual=text,
        )
    return [int(p) for p in parts]


def _made(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[_Layer]:
    """Random layers of the sizes asked for, quantized where they are measured."""
    import torch

    from quant_core.live import quantize_matrix

    for text in args.target.split(","):
        n, k = (int(p) for p in text.split("x"))
        if not 0 < n * k <= _MOST_WEIGHTS:
            raise ConfigError(
                f"bench: {text!r} has {n * k} weights, expected 1 to {_MOST_WEIGHTS}. Correct the "
                "sizes.",
                code="Q-CFG-VALUE",
                tensor="NxK",
                actual=text,
            )
        g = torch.Generator(device=args.device).manual_seed(0)
        w = torch.randn(n, k, generator=g, device=args.device).mul_(0.02).to(dtype)
        scheme, lt = quantize_matrix(args.online, w, name=text)
        yield _Layer(f"{text} {args.online}", scheme, lt)


def _stored(args: argparse.Namespace) -> Iterator[_Layer]:
    """One layer of each distinct size and type of a checkpoint."""
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.load import read_matrix
    from quant_core.plan import plan
    from quant_core.scheme import Scheme

    seen: set[str] = set()
    with open_checkpoint(args.target) as checkpoint:
        planned = plan(checkpoint)
        for name, member in planned.quantized.items():
            scheme = member.scheme
            if member.layer.kind != "linear" or not isinstance(scheme, Scheme):
                continue
            text = str((scheme.shape, *sorted((r, str(s)) for r, s in scheme.operands.items())))
            if text in seen or len(seen) >= args.layers:
                continue
            seen.add(text)
            yield _Layer(name, scheme, read_matrix(planned, member))


def _calls(
    op: OpSpec, layer: _Layer, registry: Registry, device: str, kernels: str | None
) -> dict[str, tuple[Accepted, Callable[..., Any], list[list[Any]]]]:
    """Kernel name -> (answer, bound function, buffers of each copy)."""
    from quant_core.kernels.choose import accepting
    from quant_core.kernels.timing import copies_for
    from quant_core.parts import with_packing

    out = {}
    for kernel, mine, said in accepting(op, registry, kernels=kernels, module=layer.name):
        if kernel.name == "torch_ref":  # the oracle; nobody waits for it
            continue
        first = kernel.allocate(mine, device)
        kernel.load_(first, mine, with_packing(layer.tensors, mine.packing), {"row": 0})
        nbytes = sum(t.numel() * t.element_size() for t in first.values())
        copies = [list(first.values())]
        copies += [[t.clone() for t in first.values()] for _ in range(copies_for(nbytes) - 1)]
        out[kernel.name] = (said, kernel.bind(mine), copies)
    return out


def measure(
    layer: Any, *, rows: Sequence[int], device: str, dtype: torch.dtype, registry: Registry,
    kernels: str | None = None,
) -> tuple[OpSpec, list[dict[str, Any]]]:  # fmt: skip
    """Times of one layer: a record per number of rows.

    Returns:
        The operation, and records with ``rows``, ``chosen``, ``times`` (name -> microseconds,
        ``F.linear`` among them), ``best``, ``best_exact``, ``runner_up`` and ``ratio`` (floats over
        chosen).
    """
    import torch
    import torch.nn.functional as F

    from quant_core.build import op_spec
    from quant_core.dequantize import dense_weight
    from quant_core.kernels.choose import choose
    from quant_core.kernels.timing import copies_for, medians

    op = op_spec("linear", layer.tensors, layer.scheme, device=device, dtype=dtype)
    choice = choose(op, registry, kernels=kernels, module=layer.name)
    found = _calls(op, layer, registry, device, kernels)
    dense = dense_weight(layer.tensors.weight, op.size("k")).to(device=device, dtype=dtype)
    floats = [dense.clone() for _ in range(copies_for(dense.numel() * dense.element_size()))]
    out = []
    for m in rows:
        x = torch.randn(m, op.size("k"), device=device).to(dtype)
        calls: dict[str, list[Callable[[], Any]]] = {
            FLOATS: [lambda w=w, x=x: F.linear(x, w) for w in floats]  # type: ignore[misc]
        }
        for name, (said, run_, copies) in found.items():
            if said.cost_at(m) < math.inf:
                calls[name] = [lambda v=v, r=run_, x=x: r(v, x) for v in copies]  # type: ignore[misc]
        times = medians(calls, device)
        chosen = next((b.kernel for b in choice.buckets if m <= b.rows), choice.kernel.name)
        ranked = sorted((us, name) for name, us in times.items() if name != FLOATS)
        others = [name for _, name in ranked if name != chosen]
        best = ranked[0][1] if ranked else None
        out.append(
            {
                "rows": m,
                "chosen": chosen,
                "times": {name: round(us, 2) for name, us in times.items()},
                "best": best,
                "best_exact": best is None or found[best][0].exact,
                "runner_up": others[0] if others else None,
                "ratio": round(times[FLOATS] / times[chosen], 3) if chosen in times else None,
            }
        )
    return op, out


def _faster(record: Mapping[str, Any]) -> str:
    if record["best"] in (None, record["chosen"]):
        return ""
    note = "" if record["best_exact"] else ", which rounds more: only where it is named"
    return f"faster: {record['best']}{note}"


def _render(data: Mapping[str, Any]) -> Iterator[str]:
    for layer in data["layers"]:
        yield f"{escaped(layer['name'])}: {layer['operation']}"
        lines = []
        for r in layer["rows"]:
            t, second = r["times"], r["runner_up"]
            lines.append(
                (
                    r["rows"], r["chosen"],
                    f"{t[r['chosen']]:.1f}" if r["chosen"] in t else "not measured",
                    "" if second is None else f"{second} {t[second]:.1f}",
                    f"{t[FLOATS]:.1f}",
                    "" if r["ratio"] is None else f"{r['ratio']:.2f}x",
                    _faster(r),
                )
            )  # fmt: skip
        header = ("rows", "chosen", "us", "next, us", f"{FLOATS} us", "speed", "")
        yield from table(header, lines)
    if data["saved"]:
        yield f"saved in {escaped(data['saved'])}"


def run(args: argparse.Namespace) -> int:
    """Measure; 0 unless something cannot be run."""
    import torch

    from quant_core.kernels.device import check_device
    from quant_core.kernels.measured import op_key, save
    from quant_core.registry import registry

    rows = _numbers(args.rows, "rows")
    dtype = getattr(torch, args.dtype, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(
            f"bench: dtype is {args.dtype!r}, expected bfloat16, float16 or float32. Correct it.",
            code="Q-CFG-VALUE",
            tensor="dtype",
            actual=args.dtype,
        )
    check_device(args.device)
    sizes = all(_SHAPE.fullmatch(t) for t in args.target.split(","))
    layers = _made(args, dtype) if sizes else _stored(args)
    out, costs, key = [], {}, ("cpu", "")
    progress = Progress(len(args.target.split(",")) if sizes else args.layers)
    for layer in layers:
        op, records = measure(
            layer, rows=rows, device=args.device, dtype=dtype, registry=registry(),
            kernels=args.kernels,
        )  # fmt: skip
        key = op.device
        names = {n for r in records for n in r["times"] if n != FLOATS}
        costs[op_key(op)] = {
            n: [[r["rows"], r["times"][n]] for r in records if n in r["times"]] for n in names
        }
        label = ", ".join(f"{role} {spec.label}" for role, spec in op.operands)
        text = f"{op.size('n')} x {op.size('k')}, {label}, {op.act_dtype} on {args.device}"
        out.append({"name": layer.name, "operation": text, "rows": records})
        progress.step(layer.name)
    progress.finish()
    saved = str(save(key, costs)) if args.save and costs else None
    data = {"device": args.device, "layers": out, "saved": saved}
    emit(args, data, _render(data))
    return 0
