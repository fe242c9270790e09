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

import ctypes
import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import QuantError
from quant_kernels_cpu.library import library

__all__ = ["HELD_SCHEMA", "HOLD_SCHEMA", "Held", "fake_held", "held_at"]

log = logging.getLogger("quant_core")

Values = Callable[[], Sequence[Tensor]]
Places = Callable[[], Sequence[tuple[Any, Any, Any]]]
HOLD_SCHEMA = "(Tensor[] tensors, int places, int count) -> int"
HELD_SCHEMA = (
    "(Tensor x, Tensor layers, Tensor(a!) cache, int[] of, int[] to, str layout, Tensor cos, "
    "Tensor sin, Tensor mask, Tensor first, float scale, float[] eps) -> Tensor"
)

_all: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
"""Address of a handle -> what it stands for."""


class _Place(ctypes.Structure):
    """``place`` of csrc/dispatch_layer.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("where", "key")),
        ("index", ctypes.c_int64),
        ("what", ctypes.c_void_p),
    ]


def _packed(places: Sequence[tuple[Any, Any, Any]]) -> ctypes.Array[_Place]:
    made = (_Place * len(places))()
    for place, (where, key, what) in zip(made, places, strict=True):
        place.where, place.what = id(where), id(what)
        if isinstance(where, dict):
            place.key = id(key)
        else:
            place.index = key
    return made


class Held:
    """Tensors that ``tensor`` stands for, as ``values`` gives them at that time.

    ``places`` says where they were found: (a dict or a list, the key or index, what is there), be
    it tensors or what leads to them. As long as all of it is there ``values`` is not asked again;
    without places it is asked on every call. A copy makes a handle of its own.
    """

    __slots__ = ("__weakref__", "_kept", "_state", "places", "tensor", "values")

    def __init__(self, values: Values, places: Places | None = None) -> None:
        self.values, self.places = values, places
        with torch.inference_mode(mode=False):
            self.tensor = torch.zeros(2, dtype=torch.int64)
        address = self.tensor.data_ptr()
        self._kept: Any = ([], None, [])  # what C has addresses of: places, packed; tensors
        self._state = (ctypes.c_int64 * 2).from_address(address)
        self._state[0] = address
        weakref.finalize(self, _release, self._state, self.tensor).atexit = False
        _all[address] = self

    def __reduce__(self) -> tuple[object, ...]:
        return Held, (self.values, self.places)

    def another(self, values: Values, places: Places | None = None) -> Held:
        """A handle of the same kernel for other tensors."""
        return Held(values, places)

    def address(self) -> int:
        """Where C holds the tensors, as they are now."""
        places = [] if self.places is None else list(self.places())
        tensors, (old, _, kept) = list(self.values()), self._kept
        if not (self._state[1] and _same(tensors, kept) and all(map(_same, places, old))):
            packed = _packed(places)
            at = torch.ops.quant_cpu.hold(tensors, ctypes.addressof(packed), len(places))
            _release(self._state)
            self._kept, self._state[1] = (places, packed, tensors), at
        return int(self._state[1])


def _same(now: Sequence[Any], kept: Sequence[Any]) -> bool:
    return len(now) == len(kept) and all(map(operator.is_, now, kept))


def _release(state: Any, tensor: Tensor | None = None) -> None:
    """Drop what C holds; ``tensor`` is the memory of ``state``, alive until here."""
    if state[1]:
        held, state[1] = state[1], 0
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
