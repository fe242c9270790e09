"""Prepared weights: kernels' final buffers kept on disk, read straight into place next time.

    first load    stored tensors -> canonical -> kernel buffers -> model, and one file in the cache
    next loads    that file -> kernel buffers -> model

    key     what the buffers depend on: the files, the plan, the software, the processor
    folder  where entries lie, how much they may take, which one goes first
    entry   one entry: a safetensors file whose header says what belongs where
    build   a ``Builder`` that takes modules from an entry, or builds and records them

Off unless asked for: ``load_model(path, prepared="auto")`` or ``QUANT_PREPARED``. An entry that
does not fit is not an error: it is rebuilt, with a warning that says why. Nothing is unpickled,
nothing is mapped unless asked for; files are written whole or not at all.
"""

from __future__ import annotations

__all__: list[str] = []
