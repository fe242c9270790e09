"""Decoder layers that handles stand for (held.py) in a graph: joined, and safe there.

    y = held_layers(x, layers, cache, [0], [0], ..., first, ...)
    first.add_(1)
    z = held_layers(y, layers, cache, [1], [1], ...)  ->  z = held_layers(x, ..., [0, 1], [0, 1])

Such a call writes tensors that are no inputs of the graph. A graph in which something else could
touch them, for it has an input of the size and type of the cache's, or one that may be a position,
is traced again with every tensor of the cache as an input. torch has that way back for passes of
its own (``TensorifyScalarRestartAnalysis``). What a graph is recorded for is asked of Dynamo while
it traces; where a torch does not say, no handles are used.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx
from torch._dynamo import exc
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext

from quant_kernels_cpu.layer import BlockLayout

__all__ = ["compiled_by", "is_declined", "join_held"]

_MOST = 64  # csrc/dispatch_layer.c
_X, _CACHE, _TO, _TEXT, _MASK, _FIRST = 0, 2, 4, 5, 8, 9  # arguments of ``held_layers``
_OWN = (3, 4, 11)  # of, to, eps: what each layer has of its own
_declined: weakref.WeakSet[CompileContext] = weakref.WeakSet()
"""Compilations whose graphs touch the cache themselves; not their ids, which
``torch._dynamo.reset`` gives out again."""


def compiled_by() -> Any:
    """Who gets the graph that is being traced; None where it is a part of another one, or torch
    does not say."""
    try:
        output = InstructionTranslator.current_tx().output
        if output.current_tracer is not output.root_tracer:
            return None
        found: Any = output.compiler_fn
    except AttributeError:
        return None
    while True:
        inner = getattr(found, "_torchdynamo_orig_backend", None)
        inner = inner or getattr(found, "_torchdynamo_orig_callable", None)
        if inner is None:
            return found
        found = inner


def is_declined() -> bool:
    """Whether the graph that is being traced was found to touch the cache itself."""
    return CompileContext.get() in _declined


def join_held(graph: fx.Graph) -> None:
    """Calls of ``held_layers`` that follow each other become one.

    Raises:
        TensorifyScalarRestartAnalysis: the graph may touch the cache, and is to be traced again.
    """
    held = torch.ops.quant_cpu.held_layers.default
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target is held]
    if calls and _is_touched(graph, calls):
        _declined.add(CompileContext.get())
        InstructionTranslator.current_tx().speculation_log.clear()  # another way is taken then
        raise exc.TensorifyScalarRestartAnalysis
    chain: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is held:
            if not (chain and len(chain) < _MOST and _goes_on(chain, node)):
                _join(graph, chain)
                chain = []
            chain.append(node)
        elif not (chain and _counts(node, chain[0])):
            _join(graph, chain)
            chain = []


def _is_touched(graph: fx.Graph, calls: list[fx.Node]) -> bool:
    """Whether an input that a call does not know of may be one of its cache's tensors."""
    known = {n for call in calls for n in call.args if isinstance(n, fx.Node)}
    rooms = {_room(call) for call in calls}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr") or node in known or not node.users:
            continue
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor):
            continue
        position = value.dtype == torch.int64 and value.numel() == 1 and value.dim() < 2
        if position or (value.dtype, tuple(value.shape)) in rooms:
            return True
    return False


def _room(call: fx.Node) -> tuple[Any, tuple[int, ...]]:
    """Type and sizes of keys and values."""
    layout = BlockLayout.of(call.args[_TEXT])  # type: ignore[arg-type]
    x, mask = (call.args[i].meta["example_value"] for i in (_X, _MASK))  # type: ignore[union-attr]
    return x.dtype, (x.shape[0], layout.kv_heads, mask.shape[-1], layout.dim)


def _goes_on(chain: list[fx.Node], node: fx.Node) -> bool:
    """Whether ``node`` is a next layer of the same handles, on what the last one gives."""
    first, last = chain[0], chain[-1]
    if node.args[_X] is not last or len(last.users) != 1:
        return False
    seen = {place for n in chain for place in n.args[_TO]}  # type: ignore[union-attr]
    if seen & set(node.args[_TO]):  # type: ignore[arg-type]
        return False
    same = [i for i in range(1, len(node.args)) if i not in _OWN]
    return all(node.args[i] == first.args[i] for i in same)


def _counts(node: fx.Node, call: fx.Node) -> bool:
    """Whether ``node`` is the count of the first layer's position, which no other reads."""
    adds = node.op == "call_method" and node.target == "add_" and not node.users
    return adds and node.args[0] is call.args[_FIRST]


def _join(graph: fx.Graph, chain: list[fx.Node]) -> None:
    """One call where the first one stood."""
    if len(chain) < 2:
        return
    first, last = chain[0], chain[-1]
    given = list(first.args)
    for i in _OWN:
        given[i] = [item for n in chain for item in n.args[i]]  # type: ignore[union-attr]
    with graph.inserting_before(first):
        node = graph.call_function(first.target, tuple(given))  # type: ignore[arg-type]
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for old in reversed(chain):
        graph.erase_node(old)
