"""Work in a process of its own, which is ended when it falls silent, and begun again.

A kernel that hangs, or breaks the CUDA context, must not take the rest of a run with it.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Broken", "watched"]

Send = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Broken:
    """A cell that was given up."""

    why: str


@dataclass(frozen=True, slots=True)
class _Began:
    cell: int


def _serve(
    work: Callable[..., None], cells: Sequence[Any], first: int, args: tuple[Any, ...],
    to: Connection,
) -> None:  # fmt: skip
    for i in range(first, len(cells)):
        to.send(_Began(i))
        try:
            work(cells[i], to.send, *args)
        except Exception as err:
            traceback.print_exc()
            to.send(Broken(f"{type(err).__name__}: {str(err)[:500]}"))
            sys.stdout.flush()
            sys.exit(1)  # whatever it was, the next cell begins with a fresh context
    to.send(None)


def watched(
    work: Callable[..., None], cells: Sequence[Any], *args: Any, silent_s: float
) -> Iterator[tuple[Any, Any]]:
    """(cell, what ``work(cell, send, *args)`` sent) in order; ``Broken`` for what was given up.

    Args:
        work: a function of a module, called for one cell after another.
        silent_s: a process that sends nothing for so long is ended.
    """
    context = multiprocessing.get_context("spawn")
    at = 0
    while at < len(cells):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(work, cells, at, args, there))
        process.start()
        there.close()
        told = False
        try:
            while here.poll(silent_s):
                message = here.recv()
                if message is None:
                    return
                if isinstance(message, _Began):
                    at = message.cell
                    continue
                told = isinstance(message, Broken)
                yield cells[at], message
            why = f"silent for {silent_s:.0f} s"
        except EOFError:
            process.join()
            why = f"its process ended with {process.exitcode}"
        finally:
            process.kill()
            process.join()
            here.close()
        if not told:
            yield cells[at], Broken(why)
        at += 1
