"""Room for the next token in transformers' caches of keys and values.

``DynamicLayer`` grows by ``torch.cat``: every step copies all it holds. Here keys and values become
views of a larger buffer, whose next position the kernel of a decoder layer writes. Nobody else sees
that: what a view shows never changes, and only who holds the newest view may grow it in place.
Whatever else happens to the cache (crop, reorder, copies, transformers' own update) makes other
tensors, which are copied into a new buffer when they grow here.

``StaticLayer`` has its room already; it counts what it holds in a tensor on the device, which says
where a kernel writes, also when a graph of the call is replayed. All layers of a static cache
together may have one handle that stands for them in a graph (``Stand``).

Source: transformers 5.23.0 cache_utils.py (DynamicLayer.update, crop, reorder_cache;
StaticLayer.update).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FixedRoom", "Room", "Stand", "note_cache", "room_of"]

_LEAST = 64  # positions of room
_PART = 4  # and a quarter of what is held


class Room:
    """Buffers of one layer of a cache, and the newest views of them."""

    __slots__ = ("_all_keys", "_all_values", "_keys", "_values", "next")
    at = None  # the last position of ``next``

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[2]
        size = length + max(_LEAST, length // _PART)
        self._all_keys, self._all_values = _larger(keys, size), _larger(values, size)
        self._keys, self._values = keys, values
        self.next = self._views(length + 1)

    def __reduce__(self) -> tuple[object, ...]:
        """None for a copy: views that were pickled share no memory any more."""
        return _no_room, ()

    def _views(self, length: int) -> tuple[Tensor, Tensor]:
        return self._all_keys.narrow(2, 0, length), self._all_values.narrow(2, 0, length)

    def belongs_to(self, layer: Any) -> bool:
        """The layer holds the newest views, and there is room for one more position."""
        return layer.keys is self._keys and layer.values is self._values and self._fits()

    def _fits(self) -> bool:
        return self._keys.shape[2] < self._all_keys.shape[2]

    def take(self, layer: Any) -> None:
        """The next position was written: it belongs to the layer now."""
        layer.keys, layer.values = self._keys, self._values = self.next
        if self._fits():
            self.next = self._views(self._keys.shape[2] + 1)


def _no_room() -> None:
    return None


class FixedRoom:
    """A static layer: ``next`` is all of it, ``at`` where the new token belongs."""

    __slots__ = ("at", "next")

    def __init__(self, layer: Any) -> None:
        self.next = (layer.keys, layer.values)
        self.at = layer.cumulative_length.view(1)

    def take(self, layer: Any) -> None:
        """The position was written."""
        layer.cumulative_length.add_(1)


def _larger(held: Tensor, size: int) -> Tensor:
    batch, heads, length, dim = held.shape
    out = torch.empty((batch, heads, size, dim), dtype=held.dtype, device=held.device)
    out.narrow(2, 0, length).copy_(held)
    return out


def room_of(layer: Any) -> Room | FixedRoom:
    """The room of a layer that holds something; ``room.next`` is what the kernel writes to."""
    from transformers.cache_utils import StaticLayer

    if type(layer) is StaticLayer:
        return FixedRoom(layer)
    held: Room | None = layer.__dict__.get("_quant_room")
    if held is None or not held.belongs_to(layer):
        held = layer._quant_room = Room(layer.keys, layer.values)
    return held


class Stand:
    """What stands for all layers of a static cache in a graph: ``tensor``, a handle of a kernel.

    ``layers`` is the very list of the cache, so that torch's guards see another one; ``room`` and
    ``dtype`` are those of keys and values of every layer when it was made.
    """

    __slots__ = ("dtype", "held", "layers", "room", "tensor")

    def __init__(self, layers: list[Any], held: Any) -> None:
        self.layers, self.held, self.tensor = layers, held, held.tensor
        self.room, self.dtype = tuple(layers[0].keys.shape), layers[0].keys.dtype

    def __reduce__(self) -> tuple[object, ...]:
        """None for a copy: the copied cache is noted again when it is used."""
        return _no_room, ()

    def fits(self, layers: list[Any]) -> bool:
        keys = layers[0].keys
        return layers is self.layers and tuple(keys.shape) == self.room and keys.dtype == self.dtype


def _tensors(layers: list[Any]) -> list[Tensor]:
    return [t for c in layers for t in (c.keys, c.values, c.cumulative_length)]


def _places(layers: list[Any]) -> list[tuple[Any, Any, Any]]:
    found: list[tuple[Any, Any, Any]] = [(layers, i, c) for i, c in enumerate(layers)]
    for layer in layers:
        held = layer.__dict__
        found += [(held, n, held[n]) for n in ("keys", "values", "cumulative_length")]
    return found


def _are_alike(layers: list[Any]) -> bool:
    """Whether all are plain static layers of one size, each with memory of its own."""
    from transformers.cache_utils import StaticLayer

    if not all(type(c) is StaticLayer and c.is_initialized for c in layers):
        return False
    first, tensors = layers[0].keys, _tensors(layers)
    for layer in layers:
        for t in (layer.keys, layer.values):
            if t.shape != first.shape or t.dtype != first.dtype or t.device != first.device:
                return False
        at = layer.cumulative_length
        if at.dtype != torch.int64 or at.device != first.device or at.dim():
            return False
    return len({t.data_ptr() for t in tensors}) == len(tensors)


def note_cache(cache: Any, index: int, hold: Callable[..., Any]) -> None:
    """Give a plain static cache what stands for it, once its last layer holds something.

    Args:
        index: of the layer that was just run by its own code.
        hold: ``another`` of what a kernel's ``held`` made (``kernels.between.Block``).
    """
    from transformers.cache_utils import StaticCache

    if type(cache) is not StaticCache or cache.offloading or index != len(cache.layers) - 1:
        return
    layers: list[Any] = cache.layers
    held: Stand | None = cache.__dict__.get("_quant_stand")
    if not _are_alike(layers) or (held is not None and held.fits(layers)):
        return
    lists = (functools.partial(_tensors, layers), functools.partial(_places, layers))
    cache._quant_stand = Stand(layers, hold(*lists))
