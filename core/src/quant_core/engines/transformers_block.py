"""Decoder layers of a transformers model, a decode step each in one call of a kernel.

``transformers_layers`` says which layers are candidates. Whether their parts are put together as in
``kernels.between.Block`` is proved on random input: the layer's own ``forward`` and the kernel's
must agree, with and without a mask, in what they return and in what they leave in the cache. The
first layer of a kind is proved with its parts (``transformers_later`` says when). A layer may do
something else for its number alone, so each is: on a CPU before its own first step, elsewhere at
once, for a step may be recorded as a graph.

The call is used for one new token a sequence over transformers' dynamic cache, and over its static
one where the kernel writes at a position that the device knows. Under ``torch.compile`` it is one
operator of the graph, over the static cache alone. Everything else runs the layer's own code:
prefill, other caches, training, gradients, export, hooks or adapters anywhere in the layer, another
attention implementation.

A graph holds what was decided while it was traced, and torch's guards say when that is void: the
modules that are gone past are compared by identity, and what the layer's own code would read is
read the same way. As everywhere under ``torch.compile``, hooks that are registered later are not
seen. The mask and the position are read when the operator runs.

Source: transformers 5.23.0 models/llama/modeling_llama.py (LlamaDecoderLayer, LlamaAttention).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.engines.transformers_attention import STEP
from quant_core.engines.transformers_parts import Buffers, Parts, Place, nearly, random
from quant_core.engines.transformers_room import note_cache, room_of
from quant_core.engines.transformers_swap import (
    Guard,
    Swapped,
    graph_wanted,
    identified,
    swap,
    unswap,
)
from quant_core.errors import printable
from quant_core.kernels.failed import Whose
from quant_core.nn import QuantLinear

__all__ = ["LayerPart", "differs", "take_over"]

_KNOWN = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")
)
log = logging.getLogger("quant_core")

_TIPPED = 1.0  # sums of 4096 and 14336 bfloat16 products in another order move a layer by 0.4


@dataclass(slots=True)
class LayerPart:
    """What a swapped decoder layer runs for one new token a sequence."""

    run: Callable[..., Tensor | None]
    whose: Whose
    rotated: int
    kv_heads: int
    linears: tuple[QuantLinear, ...]  # as in ``Block``
    norms: tuple[nn.Module, ...]  # likewise
    eps: tuple[str, ...]
    attention: nn.Module
    names: tuple[tuple[str, ...], ...]  # from the layer to linears, norms, all others gone past
    guard: Guard
    buffers: Buffers
    kernel: str
    table: Any = None  # of the kernel: stands for the buffers in a graph
    chain: Any = None  # of the kernel: stands for the tables and norms of several layers there
    index: int = 0  # of this one among them
    proved: bool | None = False  # None: at it, or found to be something else

    def prove(self, module: nn.Module, x: Tensor) -> bool:
        """Before the first step: is this what the layer computes? If not, it is left alone."""
        if self.proved is None:
            return False
        self.proved = None
        unswap(module)
        why = differs(module, self, Place(x.dtype, str(x.device)), thorough=False)
        if why:
            log.warning("%s runs its own code: %s", type(module).__name__, why)
            return False
        self.proved = True
        swap(module, _Layer)
        return True

    @torch.no_grad()
    def prove_for_graph(self, module: nn.Module) -> bool:
        """The same while a graph is traced, where a module must not change its class."""
        layer = self.linears[0]
        dtype, device = getattr(torch, layer.op.act_dtype), layer._values()[0].device
        holds = self.prove(module, torch.empty(0, dtype=dtype, device=device))
        swap(module, _Layer)
        return holds

    def step(
        self, module: nn.Module, x: Tensor, kwargs: Mapping[str, Any], *, proving: bool = False
    ) -> Tensor | None:
        """The layer's output; None for what is not a decode step, or not the kernel's."""
        if x.dim() != 3 or x.shape[1] != 1 or (graph_wanted() and not proving):
            return self.traced(module, x, kwargs) if torch.compiler.is_dynamo_compiling() else None
        cache, angles = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if cache is None or angles is None or not self.guard.holds(module):
            return None
        if not _known(kwargs):
            return None
        held: Any = self.attention.__dict__
        layer = _layer_of(cache, held["layer_idx"])
        if layer is None and hasattr(self.run, "takes_position"):
            layer = _static_layer_of(cache, held["layer_idx"], kwargs.get("attention_mask"))
        if layer is None or held["config"]._attn_implementation_internal != STEP:
            return None
        norms = [n.__dict__ for n in self.norms]
        weights = [n["_parameters"]["weight"] for n in norms]
        for weight in weights:
            if type(weight) is not nn.Parameter:
                return None
        if not self.proved and not proving and not self.prove(module, x):
            return None
        room = room_of(layer)
        mask: Tensor | None = kwargs.get("attention_mask")
        eps = [n[name] for n, name in zip(norms, self.eps)]
        inputs: tuple[Any, ...] = (weights, x, *angles, *room.next, mask, held["scaling"], eps)
        if torch.compiler.is_compiling():  # the proof of a layer while or after a graph is traced
            length = room.next[0].shape[2]
            last = torch.tensor(length - 1, device=x.device)
            if mask is None:
                mask = torch.ones((x.shape[0], 1, 1, length), dtype=torch.bool, device=x.device)
            inputs = (weights, x, *angles, *room.next, mask, held["scaling"], eps)
            y = self.run.traced(self.table.tensor, *inputs, last)  # type: ignore[attr-defined]
        else:
            more = () if room.at is None else (room.at,)
            try:
                y = self.run(self.buffers.of(self.linears), *inputs, *more)
            except Exception as err:
                self.whose.failed(err, x)
                raise
        if y is not None:
            room.take(layer)
        return y

    def traced(self, module: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """``step`` while Dynamo records it: everything is read through the module itself, so that
        torch guards it; None where the layer's own code is to be recorded."""
        run: Any = self.run
        if self.table is None or x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled():
            return None
        cache, angles = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        mask = kwargs.get("attention_mask")
        if cache is None or angles is None or mask is None:
            return None
        if not _known_while_traced(kwargs):
            return None
        attention: Any = module._modules[self.names[0][0]]
        if attention.config._attn_implementation_internal != STEP:
            return None
        stand = None if self.chain is None else _stand_of(cache)
        if stand is not None and attention.layer_idx < len(cache.layers):
            y = self._traced_held(module, attention, x, angles, stand, mask)
            if y is not None:
                return y
        layer = _static_layer_of(cache, attention.layer_idx, mask)
        if layer is None:
            return None
        below = [_below(module, path) for path in self.names]
        if not _settled(id(self), id(module), *[id(m) for m in below]):
            return None
        count = len(self.linears)
        norms = below[count : count + len(self.eps)]
        y = run.traced(
            self.table.tensor,
            [n.weight for n in norms],
            x,
            *angles,
            layer.keys,
            layer.values,
            mask,
            attention.scaling,
            [getattr(n, name) for n, name in zip(norms, self.eps)],
            layer.cumulative_length,
        )
        if y is not None:
            layer.cumulative_length.add_(1)
        return y  # type: ignore[no-any-return]

    def _traced_held(
        self, module: nn.Module, attention: Any, x: Tensor, angles: Any, stand: Any, mask: Tensor
    ) -> Tensor | None:
        """The same where handles stand for the weights of the layers and for the cache: neither
        the norms' weights nor keys, values and positions become inputs of the graph."""
        below = [_below(module, path) for path in self.names]
        if not _settled(id(self), id(module), *[id(m) for m in below]):
            return None
        count = len(self.linears)
        eps = [getattr(n, name) for n, name in zip(below[count:], self.eps)]
        run: Any = self.run
        first, index = stand.layers[0].cumulative_length, attention.layer_idx
        y = run.traced_held(
            self.chain.tensor,
            self.index,
            stand.tensor,
            index,
            stand.room,
            x,
            *angles,
            mask,
            first,
            attention.scaling,
            eps,
        )
        if y is not None and index == 0:  # which the graph reads; the others are the kernel's
            first.add_(1)
        return y  # type: ignore[no-any-return]

    def note(self, kwargs: Mapping[str, Any]) -> None:
        """The layer's own code has run: the cache may get what stands for it in graphs."""
        if self.chain is not None and not torch.compiler.is_compiling():
            index: Any = self.attention.__dict__["layer_idx"]
            note_cache(kwargs.get("past_key_values"), index, self.chain.another)


def _known(kwargs: Mapping[str, Any]) -> bool:
    """No argument says anything that the call does not know."""
    if kwargs.keys() <= _KNOWN:
        return True
    return all(v is None or v is False for n, v in kwargs.items() if n not in _KNOWN)


def _known_while_traced(kwargs: Mapping[str, Any]) -> bool:
    """The same with the names written out: a set would be guarded, name by name and layer by layer,
    on every call of the graph."""
    for n, v in kwargs.items():
        known = n in ("attention_mask", "position_ids", "past_key_values", "use_cache")
        if not (known or n == "position_embeddings" or v is None or v is False):
            return False
    return True


def _below(module: nn.Module, path: tuple[str, ...]) -> Any:
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


@torch._dynamo.assume_constant_result
def _settled(part_id: int, module_id: int, *below: int) -> bool:
    """Whether a ``LayerPart`` is proved for a module and nobody listens to what it goes past.

    Asked once while a graph is traced, with ``id`` of all of them: torch guards the identity of
    what is asked for it, and torch 2.11 takes nothing but constants here.
    """
    part, module = identified(part_id), identified(module_id)
    if torch.compiler.is_exporting() or not part.guard.holds(module):
        return False
    return bool(part.proved) or part.prove_for_graph(module)


@functools.cache
def _dynamic() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return DynamicCache, DynamicLayer


def _layer_of(cache: Any, index: int) -> Any:
    """The layer of a plain dynamic cache that holds something; None for any other."""
    whole, part = _dynamic()
    if type(cache) is not whole or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not part or not layer.is_initialized:
        return None
    return layer if layer.keys.dim() == 4 and layer.keys.shape[2] else None


def _static_layer_of(cache: Any, index: int, mask: Tensor | None) -> Any:
    """The layer of a plain static cache; its mask must say what of it is in use."""
    from transformers.cache_utils import StaticCache, StaticLayer

    if type(cache) is not StaticCache or cache.offloading or mask is None:
        return None
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is not StaticLayer or not layer.is_initialized:
        return None
    same = layer.cumulative_length.device == layer.keys.device
    return layer if same and layer.cumulative_length.dtype == torch.int64 else None


def _stand_of(cache: Any) -> Any:
    """What stands for all layers of a plain static cache; None where nothing does.

    Dynamo finds one list in two places, and guards that it is.
    """
    from transformers.cache_utils import StaticCache

    if type(cache) is not StaticCache or cache.offloading:
        return None
    stand = getattr(cache, "_quant_stand", None)
    return stand if stand is not None and stand.layers is cache.layers else None


class _Layer(Swapped):
    _quant_layer: LayerPart

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not self.training:  # type: ignore[attr-defined]
            y = self._quant_layer.step(self, args[0], kwargs)  # type: ignore[arg-type]
            if y is not None:
                return y
            if not isinstance(self, _Layer):  # it was found to be something else
                return self(*args, **kwargs)
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        self._quant_layer.note(kwargs)
        return out

    def extra_repr(self) -> str:
        return f"kernel={self._quant_layer.kernel}"


def take_over(module: nn.Module, part: LayerPart, *, proved: bool) -> None:
    """Let ``part`` run the steps of ``module``; before its first one it is proved if it was not."""
    part.proved = proved
    module._quant_layer = part  # type: ignore[assignment]
    swap(module, _Layer)


# -------------------------------------------------------------------------------------- the probe


def _angles(part: LayerPart, batch: int, parts: Parts | Place) -> tuple[Tensor, Tensor]:
    half = random((batch, 1, part.rotated // 2), parts, 7).float()
    whole = torch.cat([half, half], -1)
    return whole.cos().to(parts.dtype), whole.sin().to(parts.dtype)


def _cache(part: LayerPart, batch: int, parts: Parts | Place) -> Any:
    """A cache that holds three random positions for the layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    index, dim = (part.attention.__dict__[n] for n in ("layer_idx", "head_dim"))
    shape = (batch, part.kv_heads, 3, dim)
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(index + 1)]
    cache.update(random(shape, parts, 8), random(shape, parts, 9), index)
    return cache


def differs(module: nn.Module, part: LayerPart, parts: Parts | Place, *, thorough: bool) -> str:
    """Why the layer is not what ``part`` computes; "" if it is."""
    index: Any = part.attention.layer_idx
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.bool, device=parts.device)
    # a far position, by which some layers scale their queries; angles are given either way
    cases: list[tuple[int, float, int, Any]] = [(2, 0.1, 1 << 20, mask[:, None, None])]
    if thorough:
        cases += [(1, 0.01, 3, None), (1, 1.0, 3, None)]
    for batch, scale, position, seen in cases:
        x = random((batch, 1, part.linears[0].in_features), parts, batch) * scale
        own, ours = _cache(part, batch, parts), _cache(part, batch, parts)
        arguments = {
            "attention_mask": seen,
            "position_ids": torch.full((batch, 1), position, device=parts.device),
            "use_cache": True,
            "position_embeddings": _angles(part, batch, parts),
        }
        try:
            want = module(x, past_key_values=own, **arguments)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as err:
            return f"its forward takes other arguments ({printable(err, 200)})"
        got = part.step(module, x, {**arguments, "past_key_values": ours}, proving=True)
        if got is None:
            return "the kernel declines its shapes"
        mine, theirs = ours.layers[index], own.layers[index]
        if not (nearly(got, want, mean=_TIPPED) and nearly(mine.keys, theirs.keys)):
            return "it computes something else than a pre-norm decoder layer"
        if not nearly(mine.values, theirs.values):
            return "its cache holds other values"
        if not nearly(got - x, want - x, mean=_TIPPED):
            return "its branches compute something else"
    return ""
