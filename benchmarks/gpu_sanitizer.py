"""compute-sanitizer's memcheck and racecheck of every kernel family on one GPU.

    python benchmarks/gpu_sanitizer.py --out DIR [--tools memcheck,racecheck] [--only NAME,...]

Each case (``gpu_sanitizer_cases``) runs in a process of its own, first without a tool: its results
must be right, and its kernels are compiled from then on. Then under each tool; the logs are kept in
DIR. Controls, of which the tools must say something, or nothing, run too.

Two kinds of racecheck's reports are counted apart, by the lines that they name:

    dispatch   the shared memory by which Triton tells groups of warps what to run: reads of a
               kernel's first line against writes there and at ``warp_specialize``, not our code
    handed     a store in front of an mbarrier's arrival against a load behind the wait for it. All
               threads of a group store and meet at a barrier, then one of them arrives: racecheck
               takes that thread's stores for ordered and all others' for races, in the smallest
               right kernel too ("control cuda elected", and "cuda every", where all arrive, which
               it takes for right). That the barrier is there is what a test of such a kernel holds
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from source_tree import REPO, use

use()
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "plugins/kernels_triton/tests/support")]

_PLACE = re.compile(r"(Read|Write) access at (\S+)\+0x[0-9a-f]+(?: in (\S+):(\d+))?")
_SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
_OTHER = re.compile(r"=+ ((?:Invalid|Misaligned|Program hit|Warning|Error|Internal)[^\n]*)")
_THEIRS = "kns=_Z,kns=xmma"  # mangled names: torch's and cuBLAS's kernels, which make references
_lock = threading.Lock()


def run_case(name: str) -> int:
    """The process that a tool watches."""
    import torch
    from gpu_sanitizer_cases import CASES

    torch.manual_seed(0)
    wrong = CASES[name].run()
    torch.cuda.synchronize()
    print("WRONG " + "; ".join(wrong)[:2000] if wrong else "RIGHT", flush=True)
    return int(bool(wrong))


Place = tuple[str, str, str, str]
"""Read or Write, kernel, file, line."""


def _lines(place: Place, before: int = 0, after: int = 0) -> str:
    """The line of a source of this repository that a report names, and some around it."""
    _, _, file, number = place
    if not file:
        return ""
    found = sorted((*REPO.glob(f"plugins/*/src/*/{file}"), *REPO.glob(f"benchmarks/{file}")))
    lines = found[0].read_text("utf-8").splitlines() if found else []
    at = int(number) - 1
    return "\n".join(lines[max(0, at - before) : at + 1 + after])


def _dispatch(places: list[Place]) -> bool:
    """Whether all places of a report are those of Triton's dispatch of warp groups."""
    return bool(places) and all(
        _lines(p).startswith(("@gluon.jit", "def ")) or "gl.warp_specialize(" in _lines(p, after=1)
        for p in places
    )


def _handed(places: list[Place]) -> bool:
    """Whether a store before an arrival meets a load after the wait."""
    writes, reads = ([p for p in places if p[0] == kind] for kind in ("Write", "Read"))
    return (
        bool(writes and reads)
        and all(".store(" in _lines(p) and "mbarrier.arrive(" in _lines(p, after=1) for p in writes)
        and all(".load(" in _lines(p) and "mbarrier.wait(" in _lines(p, before=1) for p in reads)
    )


def read_log(text: str) -> dict[str, Any]:
    """Reports of a log by kind; ``ended``: whether the tool summed up."""
    named: Counter[str] = Counter()
    dispatch = handed = 0
    for report in re.split(r"=+ \n", text):
        places = _PLACE.findall(report)
        if places:
            if _dispatch(places):
                dispatch += 1
            elif _handed(places):
                handed += 1
            else:
                named[" / ".join(f"{a} {k} {f}:{n}" for a, k, f, n in places[:2])] += 1
        elif found := _OTHER.search(report):
            at = re.search(r"at (\S+)\+0x[0-9a-f]+(?: in (\S+))?", report)
            named[f"{found[1]} {' '.join(filter(None, at.groups())) if at else ''}".strip()] += 1
    summary = _SUMMARY.findall(text)
    return {"ended": bool(summary), "total": sum(map(int, summary)), "dispatch": dispatch,
            "handed": handed, "named": dict(named)}  # fmt: skip


def _started(command: list[str], log: Path, seconds: float, env: dict[str, str]) -> int | None:
    """Exit status; None if it did not end in time."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env,
                                   start_new_session=True)  # fmt: skip
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return None


class Runner:
    """Cases in processes, several at a time, until ``end``."""

    def __init__(self, a: argparse.Namespace, end: float) -> None:
        self.a, self.end, self.rows = a, end, list[dict[str, Any]]()
        self.ports = itertools.count(50000, 16)  # ten from there on: more would not find a free one
        self.env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}

    def told(self, **row: Any) -> None:
        with _lock:
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            (self.a.out / "sanitizer.json").write_text(json.dumps(self.rows, indent=1))

    def one(self, name: str) -> None:
        from gpu_sanitizer_cases import CASES

        case, stem = CASES[name], re.sub(r"\W+", "_", name)
        command = [sys.executable, __file__, "--case", name]
        for tool in ("", *(t for t in self.a.tools if t in case.tools)):
            began, log = time.time(), self.a.out / f"{stem}.{tool or 'plain'}.log"
            left = min(self.a.limit, self.end - time.monotonic())
            if left < 5:
                self.told(case=name, tool=tool, result="no time", seconds=0)
                return
            said = self.a.out / f"{stem}.{tool}.txt"
            watch = [self.a.sanitizer, "--tool", tool, "--report-api-errors", "no",
                     "--print-limit", "1000", "--log-file", str(said),
                     *(["--racecheck-num-workers", "2"] if tool == "racecheck" else []),
                     "--port", str(next(self.ports)), "--kernel-name-exclude", _THEIRS,
                     *self.a.more]  # fmt: skip
            rc = _started([*(watch if tool else []), *command], log, left, self.env)
            row = {"case": name, "tool": tool, "seconds": round(time.time() - began, 1)}
            output = log.read_text("utf-8", "replace")
            right = "RIGHT" in output
            if rc is None:
                row["result"] = "out of time"
            elif not right and not (case.control and tool):
                row |= {"result": "wrong", "output": output[-1500:]}
            elif tool:
                held = read_log(said.read_text("utf-8", "replace")) if said.exists() else None
                limit = case.control == "limit" and tool != "racecheck"
                row |= self.judged(held, "" if limit else case.control)
            else:
                row["result"] = "right"
            self.told(**row)
            if row["result"] in ("wrong", "out of time") and not tool:
                return

    @staticmethod
    def judged(held: dict[str, Any] | None, control: str) -> dict[str, Any]:
        if held is None or not held["ended"]:
            return {"result": "no summary", "report": held}
        known = held["dispatch"] + held["handed"]
        clean = not held["named"] and held["total"] == known
        if control == "error":
            seen = not clean or held["handed"]
            return {"result": "named, as it should" if seen else "MISSED", "report": held}
        if control == "limit":
            return {"result": "clean" if clean and not known else "limit shown", "report": held}
        kinds = ", ".join(k for k in ("dispatch", "handed") if held[k])
        return {"result": "NAMED" if not clean else kinds or "clean", "report": held}


def table(rows: list[dict[str, Any]]) -> str:
    """Case, what each tool said, seconds."""
    tools = ("", "memcheck", "racecheck")
    lines = ["| case | results | memcheck | racecheck |", "|---|---|---|---|"]
    names = dict.fromkeys(r["case"] for r in rows)
    for name in sorted(names):
        cells = []
        for tool in tools:
            of = [r for r in rows if r["case"] == name and r["tool"] == tool]
            cells.append(f"{of[-1]['result']} ({of[-1]['seconds']:.0f} s)" if of else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """1 if a tool named something it should not, missed a control, or a case did not end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("sanitizer"))
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument(
        "--only", default="", help="cases whose names hold one of these, in their order"
    )
    parser.add_argument("--but", default="", help="cases to leave out, likewise")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one process")
    parser.add_argument("--seconds", type=float, default=1e6, help="of all")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="which to run")
    parser.add_argument("--more", type=shlex.split, default=[], help="more options of the tool")
    parser.add_argument("--case", default="", help="run this one, without a tool")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--show", type=Path, nargs="*", default=[],
                        help="results to print, the last of a case count")  # fmt: skip
    a = parser.parse_args()
    if a.case:
        return run_case(a.case)
    if a.show:
        rows = [r for path in a.show for r in json.loads(path.read_text("utf-8"))]
        print(table(rows))
        for r in rows:
            for what, count in (r.get("report") or {}).get("named", {}).items():
                print(f"- {r['case']}, {r['tool']}: {what}, {count} reports")
        return 0
    from gpu_sanitizer_cases import CASES

    some = list(dict.fromkeys(n for o in a.only.split(",") for n in CASES if o in n))
    some = [n for n in some if not any(o and o in n for o in a.but.split(","))]
    if a.list:
        print("\n".join(f"{n}: {', '.join(CASES[n].tools)}" for n in some))
        return 0
    a.tools, a.out = a.tools.split(","), a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(a, time.monotonic() + a.seconds)
    apart = [n for n in some if CASES[n].alone]
    for names, jobs in (([n for n in some if n not in apart], a.jobs), (apart, 1)):
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(runner.one, name) for name in names]:
                done.result()
    print(table(runner.rows))
    fine = ("right", "clean", "dispatch", "handed", "dispatch, handed", "limit shown",
            "named, as it should")  # fmt: skip
    return int(any(r["result"] not in fine for r in runner.rows))


if __name__ == "__main__":
    sys.exit(main())
