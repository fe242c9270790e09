"""A process that compiles what it is sent; ``ahead`` starts it. It imports Triton, but not torch.

standard input    pickled (file, ``Source``, whether a call waits for it), one behind the other
standard output   a line for each: "ok", "left" (Triton has to launch it), or what went wrong;
                  behind a tab, what the stages took as JSON

It imports what the largest kernels need before it is asked: it may be started ahead of a first call
(``ahead.ready``), which then waits for the compilation alone.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import select
import sys
from importlib import import_module
from pathlib import Path

from quant_core.memory import collector_paused
from quant_kernels_triton.machine_code import Source, lowered, stored

__all__ = ["main"]


def answer(file: Path, source: Source) -> str:
    """Compile ``source`` unless its file is there; in one line what became of it."""
    try:
        made = stored(file) or lowered(source, file)
    except Exception as err:  # whoever needs the code compiles it again, and raises this
        return f"{type(err).__name__}: {err}".replace("\n", " ")[:500]
    if made is None:
        return "left"
    return "ok" if file.exists() else f"{file.parent} cannot be written"


class _Last(logging.Handler):
    """What the stages of the last compilation took, as JSON."""

    stages = ""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "stages"):
            self.stages = json.dumps(record.stages)


def _asked() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _imported() -> None:
    """What compiling imports, until there is something to do; what is missing is said there."""
    needed = ("triton.compiler", "triton.experimental.gluon._runtime", "triton.backends.nvidia",
              "quant_kernels_triton.gluon_ws", "quant_kernels_triton.codes_gluon")  # fmt: skip
    with collector_paused():
        for name in needed:
            if _asked():
                return
            try:
                import_module(name)
            except ImportError:
                return


def main() -> None:
    """Until the input ends."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print is not an answer
    last = _Last(logging.DEBUG)
    log = logging.getLogger("quant_core")
    log.addHandler(last)
    log.setLevel(logging.DEBUG)
    _imported()
    polite = False
    while True:
        try:
            file, source, waited_for = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if not (waited_for or polite):  # for good: one that was polite cannot take it back
            os.nice(5)
            polite = True
        last.stages = ""
        told.write(f"{answer(file, source)}\t{last.stages}\n")


if __name__ == "__main__":
    main()
