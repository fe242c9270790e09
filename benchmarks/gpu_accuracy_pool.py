"""Processes that compile, in front of a few that use the GPU.

    tasks (processor only)  ──►  compilers  ──►  a cell is ready when its tasks are done
    cells                   ──►  testers        in order; rows come back as they are made

A process that dies or falls silent is ended and begun again, and what it worked on is given up and
said: a kernel that hangs, or breaks the CUDA context, must not take the rest of a run with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Broken", "Late", "Pool", "Task"]

_fork = multiprocessing.get_context("fork")  # what this process has imported need not be again


@dataclass(frozen=True, slots=True)
class Broken:
    """What was given up, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Late:
    """What was not begun in time."""


@dataclass(frozen=True, slots=True)
class Task:
    """Something to compile for the cells of some positions."""

    job: Any
    cells: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Done:
    pass


def _serve(work: Callable[..., None], start: Callable[[], None], to: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        start()
        while (job := to.recv()) is not None:
            work(job, to.send)
            to.send(_Done())
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as err:
        traceback.print_exc()
        to.send(Broken(f"{type(err).__name__}: {str(err)[:500]}"))
        sys.stdout.flush()
        os._exit(1)  # whatever it was, the next begins with a fresh context


class _Server:
    """One process, begun again when it was ended."""

    def __init__(self, work: Callable[..., None], start: Callable[[], None]) -> None:
        self.work, self.start, self.job = work, start, None
        self.heard = 0.0
        self._begin()

    def _begin(self) -> None:
        self.conn, there = _fork.Pipe()
        self.process = _fork.Process(target=_serve, args=(self.work, self.start, there))
        self.process.start()
        there.close()

    def give(self, job: Any, position: int) -> None:
        self.job, self.heard = position, time.monotonic()
        try:
            self.conn.send(job)
        except BrokenPipeError:  # it ended while it had nothing to do
            self.renew()
            self.job = position
            self.conn.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.conn.close()

    def renew(self) -> None:
        self.end()
        self.job = None
        self._begin()


@dataclass(slots=True)
class Pool:
    """Runs tasks, then the cells that they were for.

    Attributes:
        compile, test: functions of a job or a cell, and of a function that sends what was found.
        start_compiler, start_tester: called first in each process.
        silent_s: a tester that sends nothing for so long is ended.
    """

    compile: Callable[..., None]
    test: Callable[..., None]
    start_compiler: Callable[[], None]
    start_tester: Callable[[], None]
    compilers: int
    testers: int
    silent_s: float = 60.0

    def run(
        self, cells: Sequence[Any], tasks: Sequence[Task], end: float
    ) -> Iterator[tuple[Any, Any]]:
        """(cell or task, what was sent about it); nothing new is begun after ``end``."""
        left = [0] * len(cells)
        for task in tasks:
            for at in task.cells:
                left[at] += 1
        todo, waiting = deque(range(len(tasks))), deque(range(len(cells)))
        first = [_Server(self.test, self.start_tester) for _ in range(self.testers)]
        second = [_Server(self.compile, self.start_compiler) for _ in range(self.compilers)]
        try:
            while True:
                in_time = time.monotonic() < end
                for s in second if in_time else ():
                    if s.job is None and todo:
                        at = todo.popleft()
                        s.give(tasks[at].job, at)
                for s in first if in_time else ():
                    ready = next((at for at in waiting if not left[at]), None)
                    if s.job is None and ready is not None:
                        waiting.remove(ready)
                        s.give(cells[ready], ready)
                if all(s.job is None for s in first) and (not in_time or not waiting):
                    break
                busy = [s for s in (*first, *second) if s.job is not None]
                by = {s.conn: s for s in busy}
                for conn in wait(list(by), timeout=0.2):
                    s = by[conn]
                    yield from self._heard(s, cells, tasks, left, testing=s in first)
                for s in first:
                    if s.job is not None and time.monotonic() - s.heard > self.silent_s:
                        yield cells[s.job], Broken(f"silent for {self.silent_s:.0f} s")
                        s.renew()
        finally:
            for s in (*first, *second):
                s.end()
        for at in waiting:
            yield cells[at], Late()

    def _heard(
        self, s: _Server, cells: Sequence[Any], tasks: Sequence[Task], left: list[int], *,
        testing: bool,
    ) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        of = cells[s.job] if testing else tasks[s.job]
        job, over = s.job, False
        try:
            message = s.conn.recv()
        except EOFError:
            s.process.join()
            message = Broken(f"its process ended with {s.process.exitcode}")
        s.heard = time.monotonic()
        if isinstance(message, _Done):
            over, s.job = True, None
        else:
            yield of, message
            if isinstance(message, Broken):
                over = True
                s.renew()
        if over and not testing:
            for at in tasks[job].cells:
                left[at] -= 1
