"""Seconds to the first result of a packed layer in a new process with empty caches, on a GPU.

    python benchmarks/gpu_cold.py --json out.json [--jobs 1] [--again] [--fork]

A process of its own for every scheme and number of rows, with fresh folders in place of Triton's
cache and this project's. The clock starts where torch is imported and its CUDA context and cuBLAS
stand, and covers importing quant_core, choosing a kernel, storing 4096 x 4096 weights that were
quantized before, compiling, and the call. Python's bytecode is kept in a folder of the run, as
installing a wheel keeps it; the run's first process, which makes it (and on a machine that has just
started reads all libraries from the disk), comes first in the table and does not count.

The table at the end says where the time went: stages are those of Triton's compiler or NVRTC, of
the kernel that took longest; "beside" is the compiling of others, which runs at the same time;
"rest" is the call without that kernel's stages: until its compiler has started, and launching. User
and system are processor time of this process from choosing on, without its compilers.

``--again``: the same in a further process that finds those caches filled. Compiling takes a
processor or two; more jobs than a quarter of them disturb each other. ``--fork``: the processes are
copies of one that has imported torch and done nothing else, which saves the seconds of that import.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

SCHEMES = ("int4", "int4-g32", "mxfp4", "nvfp4", "int8a16", "fp8a16", "fp8", "fp8_block", "int8",
           "w4a8", "w4a8-int8", "mxfp8")  # fmt: skip
ROWS = (1, 64, 1024)
STAGES = ("import", "front end", "ttir", "ttgir", "llir", "ptx", "cubin", "NVRTC")


class _Stages(logging.Handler):
    """What compilations for this process report: names of kernels, seconds of stages."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.compiled: list[tuple[str, dict[str, float]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        stages: dict[str, float] | None = getattr(record, "stages", None)
        if stages is not None:
            name = str(record.args[0]) if isinstance(record.args, tuple) else ""
            self.compiled.append((name, stages))


def once(scheme: str, rows: int) -> dict[str, Any]:
    """The figures of this process."""
    import torch

    a = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    from source_tree import use

    use()
    start = time.perf_counter()
    from quant_core.kernels.choose import choose
    from quant_core.registry import registry

    stages = _Stages()
    log = logging.getLogger("quant_core")
    log.addHandler(stages)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    known = registry()
    listed = time.perf_counter() - start
    from gpu_layers import make_case

    case = make_case(scheme, "4096x4096")
    torch.cuda.synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    choice = choose(case.op, known)
    chosen = time.perf_counter() - start
    buffers = case.load(choice.kernel, choice.op)
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    loaded = time.perf_counter() - start
    run = choice.kernel.bind(choice.op)
    y = run(list(buffers.values()), x)
    torch.cuda.synchronize()
    done = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    again = run(list(buffers.values()), x)
    torch.cuda.synchronize()
    return {
        "scheme": scheme, "rows": rows, "kernel": choice.kernel.name, "plugins_s": listed,
        "choose_s": chosen, "load_s": loaded - chosen, "call_s": done - loaded,
        "total_s": listed + done, "second_call_s": time.perf_counter() - start,
        "user_s": after.ru_utime - before.ru_utime, "system_s": after.ru_stime - before.ru_stime,
        "read_from_disk": after.ru_majflt - before.ru_majflt,
        "compiled": stages.compiled, "same": torch.equal(y, again),
    }  # fmt: skip


def _started(scheme: str, rows: int, env: Mapping[str, str]) -> dict[str, Any]:
    """``once`` in a process that starts from nothing."""
    got = subprocess.run(
        [sys.executable, __file__, "--once", scheme, str(rows)], env={**os.environ, **env},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if got.returncode:
        return {"scheme": scheme, "rows": rows, "problem": got.stderr[-500:]}
    said: dict[str, Any] = json.loads(got.stdout.strip().splitlines()[-1])
    return said


def _forked(scheme: str, rows: int, env: Mapping[str, str]) -> dict[str, Any]:
    """``once`` in a copy of this process, which has imported torch but not touched the device."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.environ.update(env)
        try:
            said = once(scheme, rows)
        except Exception as err:
            said = {"scheme": scheme, "rows": rows, "problem": f"{type(err).__name__}: {err}"}
        with os.fdopen(writing, "w") as out:
            out.write(json.dumps(said))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as held:
        text = held.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"scheme": scheme, "rows": rows, "problem": "it died"}


def apart(scheme: str, rows: int, processes: int, fork: bool) -> dict[str, Any]:
    """``once`` in a new process with empty caches, and in those after it."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"TRITON_CACHE_DIR": f"{folder}/triton", "QUANT_CACHE": f"{folder}/own"}
        said = []
        for _ in range(processes):
            said.append((_forked if fork else _started)(scheme, rows, env))
            if "problem" in said[-1]:
                return said[-1]
    return said[0] | {f"again_{i}_s": s["total_s"] for i, s in enumerate(said) if i}


def table(rows: list[dict[str, Any]]) -> str:
    """Where the seconds went, a line for each process; the stages are parts of the call."""
    longest = [max((k[1] for k in r["compiled"]), key=_total, default={}) for r in rows]
    used = [s for s in STAGES if any(s in stages for stages in longest)]
    lines = [["type", "rows", "total", "plugins", "choose", "load", "call", *used, "rest", "beside",
              "user", "system"]]  # fmt: skip
    for r, stages in zip(rows, longest, strict=True):
        spent = [r[f"{n}_s"] for n in ("total", "plugins", "choose", "load", "call")]
        parts = [stages.get(s, 0.0) for s in used]
        beside = sum(_total(k[1]) for k in r["compiled"]) - _total(stages)
        numbers = [*spent, *parts, r["call_s"] - _total(stages), beside, r["user_s"], r["system_s"]]
        lines.append([r["scheme"], str(r["rows"]), *(f"{n:.2f}" for n in numbers)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _total(stages: Mapping[str, float]) -> float:
    return sum(stages.values())


def keep_bytecode(folder: str) -> None:
    """Of this process and those that it starts, whatever the environment said."""
    os.environ |= {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    sys.pycache_prefix, sys.dont_write_bytecode = folder, False


def main() -> None:
    """All schemes, some at a time; the processor is shared among them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--fork", action="store_true", help="copies of one process; one job")
    parser.add_argument("--once", nargs=2)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once[0], int(args.once[1]))))
        return
    work = [(s, int(m)) for s in args.schemes.split(",") for m in args.rows.split(",")]
    each = partial(apart, processes=1 + args.again, fork=args.fork)
    rows = []
    with tempfile.TemporaryDirectory() as bytecode, ThreadPoolExecutor(args.jobs) as pool:
        keep_bytecode(bytecode)
        if args.fork:
            import torch  # noqa: F401
        first = apart(*work[0], 1, args.fork)
        answers = (each(*w) for w in work) if args.fork else pool.map(lambda w: each(*w), work)
        for row in chain([first | {"scheme": f"{work[0][0]}, first"}], answers):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    measured = [r for r in rows if "total_s" in r]
    if measured:
        print(table(measured))
    measured = measured[1:] if "total_s" in first else measured
    if measured:
        worst = max(measured, key=lambda r: r["total_s"])
        print(f"worst of {len(measured)}: {worst['total_s']:.2f} s, {worst['scheme']}, "
              f"{worst['rows']} rows, {worst['kernel']}")  # fmt: skip
        if args.again:
            print(f"with filled caches at most {max(r['again_1_s'] for r in measured):.2f} s")


if __name__ == "__main__":
    main()
