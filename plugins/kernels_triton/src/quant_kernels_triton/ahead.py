"""Compiling in other processes what will be launched, while this one does something else.

    ready()          called while kernels are chosen: starts a worker if nothing was compiled yet
    ahead(source)    queued once; a few ``worker`` processes take what was queued first
    awaited(source)  called where the code is needed: waits for a worker that is at it, or has
                     nothing to do; takes it out of the queue if all are busy

A first call waits for one compilation. A worker that was started before it has imported Triton by
then, and the call's own process, which goes on choosing and loading meanwhile, never does.

A worker only fills the cache on disk. Which kernel a call takes does not depend on it: what it
failed at, or did not come to, is compiled where it is needed, which is where its error is raised.
Workers end when their input does: with this process, or after a while without work. A forked child
has none.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from quant_kernels_triton.machine_code import Source, any_stored, report

__all__ = ["ahead", "awaited", "ready", "settled", "stop"]

log = logging.getLogger("quant_core")

_MOST = 4  # workers
_READY = 2  # of them: a first call launches one kernel, or two
_IDLE_S = 20.0
_LONGEST_S = 120.0  # that a call waits for a worker before it compiles itself


def _wanted() -> int:
    """How many workers may run: half of the processors of this process, none by QUANT_AHEAD=off."""
    if os.environ.get("QUANT_AHEAD", "on") == "off":
        return 0
    mine = getattr(os, "sched_getaffinity", None)
    return min(_MOST, (len(mine(0)) if mine else os.cpu_count() or 1) // 2)


class _Pool:
    """The queue, and who works on it; all under one lock."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queue: OrderedDict[Path, tuple[Source, bool]] = OrderedDict()  # and is it waited for
        self.at_work: set[Path] = set()
        self.known: set[Path] = set()  # queued ever
        self.running: dict[subprocess.Popen[bytes], None] = {}
        self.closed = False
        self.failed = False  # ever: what is waited for is not left to workers then

    def ready(self) -> None:
        with self.changed:
            if not self.closed and not self.running:
                for _ in range(min(_READY, _wanted())):
                    self._start()
                _standing_by(bool(self.running))

    def add(self, file: Path, source: Source) -> None:
        with self.changed:
            if self.closed or file in self.known or file.exists():
                return
            most = _wanted()
            if not most:
                return
            self.known.add(file)
            idle = len(self.queue) + len(self.at_work) < len(self.running)
            self.queue[file] = source, idle  # whoever was made ready is waited for
            self.changed.notify_all()
            if len(self.running) < min(most, len(self.queue) + len(self.at_work)):
                self._start()

    def _start(self) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        try:
            one = subprocess.Popen(
                [sys.executable, "-m", "quant_kernels_triton.worker"], env=env,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as err:
            _warn_once(f"no process can be started: {err}")
            self.queue.clear()
            return
        self.running[one] = None
        threading.Thread(
            target=self._serve, args=(one,), name="quant-compile-ahead", daemon=True
        ).start()

    def _next(self) -> tuple[Path, Source, bool] | None:
        with self.changed:
            found = self.changed.wait_for(lambda: self.queue or self.closed, _IDLE_S)
            if not found or self.closed:
                return None
            file, (source, waited_for) = self.queue.popitem(last=False)
            self.at_work.add(file)
            self.changed.notify_all()
            return file, source, waited_for

    def _serve(self, one: subprocess.Popen[bytes]) -> None:
        """Feed one worker until there is nothing left, or it ended."""
        assert one.stdin is not None
        assert one.stdout is not None
        while (job := self._next()) is not None:
            try:
                pickle.dump(job, one.stdin)
                one.stdin.flush()
                said, _, stages = one.stdout.readline().decode().strip().partition("\t")
            except OSError:
                said = stages = ""
            if said not in ("ok", "left") and not self.closed:
                self.failed = True
                _warn_once(said or "the process ended")
            if stages:
                report(job[1].name, json.loads(stages), " in another process")
            with self.changed:
                self.at_work.discard(job[0])
                self.changed.notify_all()
            if not said:
                break
        with self.changed:
            self.running.pop(one, None)
            if not self.running:
                _standing_by(False)
            self.changed.notify_all()
        one.stdin.close()
        one.wait()
        one.stdout.close()

    def awaited(self, file: Path, source: Source) -> None:
        with self.changed:
            self.queue.pop(file, None)
            idle = len(self.at_work) < len(self.running) and not self.failed
            if file not in self.at_work and idle:
                self.queue[file] = source, True
                self.queue.move_to_end(file, last=False)
                self.changed.notify_all()
                begun = self.changed.wait_for(
                    lambda: file not in self.queue or not self.running or self.closed, _LONGEST_S
                )
                self.queue.pop(file, None)
                if not begun:
                    return
            self.changed.wait_for(lambda: file not in self.at_work or self.closed, _LONGEST_S)

    def settled(self) -> None:
        with self.changed:
            self.changed.wait_for(
                lambda: self.closed or not self.running or not (self.queue or self.at_work)
            )

    def stop(self) -> None:
        with self.changed:
            self.closed = True
            self.queue.clear()
            running = list(self.running)
            self.changed.notify_all()
        for one in running:
            one.kill()


def _standing_by(idle: bool) -> None:
    from quant_core.kernels.ahead import standby  # imports torch, as whoever gets here has

    standby.idle = idle


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("compiling ahead: %s; what is missing is compiled where it is needed", reason)


_pool = _Pool()


def _forked() -> None:
    global _pool
    _pool = _Pool()  # the parent's workers are the parent's


os.register_at_fork(after_in_child=_forked)


def ahead(source: Source) -> None:
    """Compile ``source`` in another process, unless its code is on disk."""
    _pool.add(source.file, source)


def ready() -> None:
    """Start a worker, if it is likely that something has to be compiled soon: this process uses a
    GPU, and nothing of this build is on disk."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and not any_stored():
        _pool.ready()


def awaited(file: Path, source: Source) -> None:
    """Have a worker compile ``source`` if one is at it or idle; none will be at it afterwards."""
    _pool.awaited(file, source)


def settled() -> None:
    """Return when all that was queued is done."""
    _pool.settled()


def stop() -> None:
    """End all workers, for good: at the exit of the interpreter."""
    _pool.stop()


atexit.register(stop)
