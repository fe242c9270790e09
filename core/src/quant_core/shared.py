"""Layers of one input, run together: q, k, v of an attention block, gate and up of an MLP.

    first pass     every layer runs alone; which of them got the very same tensor is noted
    later passes   the first layer called computes all of its group, the others take theirs

Nothing is known of names or models. A layer takes a result only if it is called with the same
tensor object, unchanged, and if no weights were loaded since; otherwise it runs alone. So what is
computed never depends on sharing (joined matrices may add float32 sums in another order), and where
a guess turns out wrong (an input is different after all) the group gives up after a few tries. Each
result is handed out once and kept for one thread.

Only for few tokens, where what surrounds the arithmetic counts; never where a gradient is needed,
and not under ``torch.compile``: there ``quant_core.kernels.merged`` joins calls in the graph, which
needs no first pass.

Kernels take part by ``bind_shared`` (``quant_core.kernels.base``); those of the GPU's storage order
as one matrix (``quant_core.kernels.joined``).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quant_core.kernels.failed import asked
from quant_core.kernels.joined import JOINABLE, JoinedRun, place_together_
from quant_core.walk import modules_of

if TYPE_CHECKING:
    from quant_core.nn import QuantLinear

__all__ = [
    "SharedGroup",
    "Siblings",
    "joined",
    "on_weights_changed",
    "share_inputs",
    "together",
    "weights_changed",
    "weights_epoch",
]

Run = Callable[[list[list[Tensor]], Tensor], list[Tensor]]
"""Buffers of each layer, in the order of ``allocate``, and x -> each layer's output."""

MOST_TOKENS = 16  # beyond, arithmetic outweighs what sharing saves
_TRIES = 3  # incomplete rounds before a group gives up

_epoch = 0
_listeners: list[Callable[[], object]] = []


def weights_changed() -> None:
    """Tell that some layer's buffers were written: results held for others are void."""
    global _epoch
    _epoch += 1
    for told in _listeners:
        told()


def on_weights_changed(told: Callable[[], object]) -> None:
    """Call ``told`` at every ``weights_changed`` from now on: for what lies outside of Python."""
    _listeners.append(told)


def weights_epoch() -> int:
    """A number that grows with every call of ``weights_changed``."""
    return _epoch


class _Held:
    """Results that wait for their layers, and all that must not have changed until then."""

    __slots__ = ("copy", "epoch", "outputs", "version", "x")

    def __init__(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self.x, self.outputs, self.epoch = x, outputs, _epoch
        # Inference tensors count no versions; their values are compared instead.
        self.copy = x.clone() if x.is_inference() else None
        self.version = 0 if self.copy is not None else x._version

    def valid(self, x: Tensor) -> bool:
        if x is not self.x or self.epoch != _epoch:
            return False
        if self.copy is not None:
            return torch.equal(x, self.copy)
        return x._version == self.version


class SharedGroup:
    """Layers that were seen to get one input. See the module's docstring."""

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.layers = tuple(layers)
        self._local = threading.local()
        self._misses = 0
        self._run: Run | None = None
        self.bind()

    def bind(self) -> None:
        """Ask the kernel again, after a layer has moved; dissolve if it is not one kernel."""
        self._run = _bind(self.layers)
        if self._run is None:
            self.dissolve()

    def dissolve(self) -> None:
        """Every layer runs alone from now on."""
        for layer in self.layers:
            layer._shared = None
        self.layers = ()

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output of layer ``index`` for ``x``."""
        if x.is_inference() and not x.is_cpu:  # its values would have to be fetched to compare
            layer = self.layers[index]
            return layer._run(layer._values(), x)  # type: ignore[no-any-return]
        held: _Held | None = getattr(self._local, "held", None)
        if held is not None:
            if held.valid(x):
                out = held.outputs.pop(index, None)
                if out is not None:
                    if not held.outputs:
                        self._local.held, self._misses = None, 0
                    return out
            self._misses += 1
        assert self._run is not None, "a dissolved group is asked by nobody"
        outputs = dict(enumerate(self._run([layer._values() for layer in self.layers], x)))
        out = outputs.pop(index)
        self._local.held = _Held(x, outputs)
        if self._misses >= _TRIES:
            self._local.held = None
            self.dissolve()
        return out


class Siblings:
    """Layers below one module, until their first pass has shown which get the same input."""

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.layers = tuple(layers)
        self._lock = threading.Lock()
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._thread = 0

    def note(self, index: int, x: Tensor) -> None:
        """Layer ``index`` is about to run on ``x``. A second call of any layer ends the pass."""
        with self._lock:
            here = threading.get_ident()
            if not self._seen:
                self._thread = here
            if here != self._thread or not self.layers:
                return
            if index not in self._seen:
                self._seen[index] = weakref.ref(x)
                return
            groups: dict[int, list[int]] = {}
            for i, ref in self._seen.items():
                groups.setdefault(id(ref), []).append(i)  # one live tensor has one weak reference
            for found in groups.values():
                if len(found) > 1:
                    group = SharedGroup([self.layers[i] for i in found])
                    for at, layer in enumerate(group.layers):
                        layer._shared = (group, at)
            for layer in self.layers:
                layer._siblings = None
            self.layers = ()


def _common(layer: QuantLinear) -> str:
    """What layers of one call have in common: the kernel, or a storage order that joins them."""
    layout = str(getattr(layer.kernel, "layout", ""))
    return layout if layout in JOINABLE else layer.kernel.name


def _bind(layers: Sequence[QuantLinear]) -> Run | None:
    """One call for all ``layers``; None where they have no kernel, or place, in common."""
    ask = getattr(layers[0].kernel, "bind_shared", None)
    places = {t.device for layer in layers for t in layer.tensors.values()}
    if ask is None or len(places) != 1 or len({_common(layer) for layer in layers}) != 1:
        return None
    first = layers[0]
    with asked("bind_shared", first.kernel, first.op, first.layer, first.trace):
        return ask([layer.op for layer in layers])  # type: ignore[no-any-return]


def _alone(run: Callable[..., Tensor], values: list[list[Tensor]], x: Tensor) -> list[Tensor]:
    return [run(values[0], x)]


def together(layers: Sequence[QuantLinear]) -> list[tuple[Run, tuple[int, ...]]]:
    """The calls that compute ``layers`` of one input: who runs, and for which of them.

    Layers of one kernel make one call where it can.
    """
    kernels: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        kernels.setdefault(_common(layer), []).append(i)
    calls: list[tuple[Run, tuple[int, ...]]] = []
    for found in kernels.values():
        run = _bind([layers[i] for i in found]) if len(found) > 1 else None
        if run is not None:
            calls.append((run, tuple(found)))
        else:
            calls += [(functools.partial(_alone, layers[i]._run), (i,)) for i in found]
    return calls


def share_inputs(model: nn.Module, *, place: bool | None = None) -> None:
    """Let neighbouring quantized layers of ``model`` run together where they get one input.

    Called by the engines after loading. Copies of a model (``deepcopy``, pickling) start without;
    call it again for them, and after a move to another device.

    Args:
        place: whether buffers may move, so that neighbours become one matrix
            (``kernels.joined``); takes one more copy of them, a block of layers at a time. None:
            everywhere but on a CPU, where a layer may be mapped from a file.
    """
    from quant_core.nn import QuantLinear

    known: dict[tuple[object, ...], Run | None] = {}  # layers alike share kernel and operation
    for module in modules_of(model):
        if len(module._modules) < 2:
            continue
        found: dict[tuple[str, int], list[QuantLinear]] = {}
        for child in dict.fromkeys(module._modules.values()):
            if isinstance(child, QuantLinear) and child.owns_buffers:
                found.setdefault((_common(child), child.in_features), []).append(child)
        for layers in found.values():
            if len(layers) < 2:
                continue
            kind = tuple((id(c.kernel), id(c.op)) for c in layers)
            places = {t.device for c in layers for t in c._values()}
            if (kind, *places) not in known:
                known[kind, *places] = _bind(layers)
            run = known[kind, *places]
            if run is None:
                continue
            if isinstance(run, JoinedRun):
                device = next(iter(layers[0].tensors.values())).device
                if not (device.type != "cpu" if place is None else place):
                    continue
                place_together_(layers)
            _observe(layers)


def joined(layers: Sequence[QuantLinear]) -> QuantLinear | None:
    """One layer in place of several of one input: its output is theirs, behind each other.

    For code that knows which layers get one input, and for ``torch.compile``, under which none
    learns it. The layers' buffers become parts of the joint ones: use either, both see a reload.
    None if they cannot be one matrix.
    """
    from quant_core.kernels.choose import Choice
    from quant_core.nn import QuantLinear

    run = _bind(layers)
    if not isinstance(run, JoinedRun):
        return None
    place_together_(layers)
    buffers = run.buffers([layer._values() for layer in layers])
    assert buffers is not None, "they have just been placed together"
    choice = Choice(kernel=run.kernel, op=run.op, trace=layers[0].trace)
    return QuantLinear(choice, dict(zip(layers[0].tensors, buffers, strict=True)))


def _observe(layers: Iterable[QuantLinear]) -> None:
    siblings = Siblings(tuple(layers))
    for i, layer in enumerate(siblings.layers):
        held = layer.__dict__  # past ``Module.__setattr__``: they are no tensors and no modules
        held.pop("_shared", None)
        held["_siblings"] = siblings, i
