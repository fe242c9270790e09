"""Decoder layers whose weights and cache one handle each stands for, as one operator.

    quant_cpu::held_layers(x, layers, cache, of, to, layout, cos, sin, mask, first, scale, eps) -> y

        layers   ``Held.tensor`` of a table (layer.py) and the norms of each layer behind each other
        cache    ``Held.tensor`` of keys, values and a position, layer by layer
        of, to   which of the layers, in that order, each on the output of the one before, and which
                 layers of the cache they write
        layout   ``BlockLayout.text`` of all of them, with a mark of 0
        first    the position of the cache's first layer, which the graph counts itself
        the rest as in layers.py

A graph fetches, checks and hands over each of its inputs on every step, from objects that the
weights of the step before have pushed out of the caches: a layer's table, norms, keys, values and
position cost a seventh of what the layer takes. Here all layers together have two inputs.

What a handle stands for is looked up when the operator runs: where a tensor was put in another's
place, by whoever holds it, the new one is taken. Sizes and types are checked on every call. The
operator counts the positions of all layers but the first, as the layers' own code does.

The graph does not say which tensors are written. So it is recorded only for Inductor, and only
where nothing else in the graph can touch them (join.py).
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quant_core.errors import QuantError
from quant_kernels_cpu.library import library

__all__ = ["HELD_SCHEMA", "HOLD_SCHEMA", "Held", "fake_held", "held_at"]

log = logging.getLogger("quant_core")

HOLD_SCHEMA = "(Tensor[] tensors) -> int"
HELD_SCHEMA = (
    "(Tensor x, Tensor layers, Tensor(a!) cache, int[] of, int[] to, str layout, Tensor cos, "
    "Tensor sin, Tensor mask, Tensor first, float scale, float[] eps) -> Tensor"
)

_all: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
"""Address of a handle -> what it stands for."""


class Held:
    """Tensors that ``tensor`` stands for, as ``values`` gives them at that time.

    A copy makes a handle of its own, for what its copy of ``values`` gives.
    """

    __slots__ = ("__weakref__", "_at", "_kept", "tensor", "values")

    def __init__(self, values: Callable[[], Sequence[Tensor]]) -> None:
        self.values = values
        with torch.inference_mode(mode=False):
            self.tensor = torch.zeros(1, dtype=torch.int64)
        address = self.tensor.data_ptr()
        self.tensor[0] = address
        self._kept: Sequence[Tensor] = ()
        self._at = [0]  # of what C holds
        weakref.finalize(self, _release, self._at).atexit = False
        _all[address] = self

    def __reduce__(self) -> tuple[object, ...]:
        return Held, (self.values,)

    def another(self, values: Callable[[], Sequence[Tensor]]) -> Held:
        """A handle of the same kernel for other tensors."""
        return Held(values)

    def address(self) -> int:
        """Where C holds the present tensors."""
        now, kept = self.values(), self._kept
        if len(now) != len(kept) or not all(map(operator.is_, now, kept)):
            _release(self._at)
            self._kept = list(now)
            self._at[0] = torch.ops.quant_cpu.hold(self._kept)
        return self._at[0]


def _release(at: list[int]) -> None:
    if at[0]:
        held, at[0] = at[0], 0
        library().c.qk_release(held)


def held_at(address: int) -> int:
    """What C calls for a handle; 0 where it stands for nothing."""
    held = _all.get(address)
    if held is None:
        log.error("decoder layers: what the handle at %#x stood for is gone", address)
        return 0
    try:
        return held.address()
    except (QuantError, LookupError, AttributeError, RuntimeError, TypeError) as err:
        log.error("decoder layers: %s", err)
        return 0


def fake_held(
    x: Tensor, layers: Tensor, cache: Tensor, of: Sequence[int], to: Sequence[int], text: str,
    cos: Tensor, sin: Tensor, mask: Tensor, first: Tensor, scale: float, eps: Sequence[float],
) -> Tensor:  # fmt: skip
    """What the operator returns, for whoever traces."""
    return x.new_empty(x.shape)
