"""A process that compiles what it is sent; ``ahead`` starts it. It imports Triton, but not torch.

standard input    pickled (file, ``Source``), one behind the other
standard output   a line for each: "ok", "left" (Triton has to launch it), or what went wrong
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from quant_kernels_triton.machine_code import Source, lowered, stored

__all__ = ["main"]


def answer(file: Path, source: Source) -> str:
    """Compile ``source`` unless its file is there; in one line what became of it."""
    try:
        made = stored(file) or lowered(source, file)
    except Exception as err:  # whoever needs the code compiles it again, and raises this
        return f"{type(err).__name__}: {err}".replace("\n", " ")[:500]
    return "left" if made is None else "ok"


def main() -> None:
    """Until the input ends."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print is not an answer
    os.nice(5)
    while True:
        try:
            file, source = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        told.write(answer(file, source) + "\n")


if __name__ == "__main__":
    main()
