"""Starting a compiled kernel with little host time.

Triton's own dispatch inspects every argument on every call. A layer's arguments never change their
kind, so the compiled kernel is looked up by a short key instead, once it exists. Pointers must be
aligned to 16 bytes, which torch's allocations are; inputs that are not are copied (``aligned``).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

__all__ = ["aligned", "launch"]

_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def launch(
    fn: Any,
    key: Hashable,
    grid: tuple[int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Run ``fn`` on the current stream.

    Args:
        fn: a jitted function whose constants come after its arguments.
        key: with the device, everything that ``constants``, ``options`` and the kinds and the
            divisibility of ``args`` depend on.
        args: run-time arguments; integers that change between calls of one key must be marked
            ``do_not_specialize`` in ``fn``.
    """
    device = next(a for a in args if isinstance(a, Tensor)).device.index
    held = _compiled.get((key, device))
    if held is None:
        compiled = fn[grid](*args, **constants, **options)
        if hasattr(compiled, "run"):  # not in the interpreter
            values = tuple(constants[name] for name in fn.arg_names[len(args) :])
            _compiled[key, device] = compiled, values
        return
    compiled, values = held
    compiled[(*grid, 1)](*args, *values)
