"""Decoder layers that follow each other in a graph become one operator.

    y = decoder_layer(x, ...)
    z = decoder_layer(y, ...)      ->      z = decoder_layers(x, [...], ...)    see layers.py

A graph of ``torch.compile`` records layer by layer. Where one layer's output is the next one's
input and nothing else, Inductor is given one call for all of them, in which C opens one parallel
region (csrc/blocks.c) and between whose layers no Python runs. It is a pass over the graph as
Dynamo recorded it, where an operator that writes still stands where it was called. Between two
layers there is nothing but the count of the first one's positions, or they stay apart. That tensors
which are inputs of their own share no memory is taken for granted. Backends other than Inductor run
the single operators.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor import config, custom_graph_pass

from quant_kernels_cpu.join_held import compiled_by, is_declined, join_held
from quant_kernels_cpu.layer import BlockLayout

__all__ = ["JoinLayers", "join_layers", "joins_held"]

log = logging.getLogger("quant_core")

_MOST = 64  # csrc/dispatch_layer.c
_OWN = ("table", "keys", "values", "at")  # a tensor for each layer
_WRITTEN = ("keys", "values", "at")  # the last one by the graph itself


class JoinLayers(custom_graph_pass.CustomGraphPass):
    """Calls of ``decoder_layer`` that follow each other become one of ``decoder_layers``."""

    def __init__(self) -> None:
        self.single = torch.ops.quant_cpu.decoder_layer.default
        self.joint = torch.ops.quant_cpu.decoder_layers.default

    def uuid(self) -> Any:
        return custom_graph_pass.get_hash_for_files((__file__, join_held.__code__.co_filename))

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):  # what Dynamo leaves of a question like ``x.is_cpu``
            if node.op == "call_function" and node.target is getattr and not node.users:
                graph.erase_node(node)
        join_held(graph)
        chain: list[fx.Node] = []
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is self.single:
                if not (chain and len(chain) < _MOST and self._follows(chain, node)):
                    self._join(graph, chain)
                    chain = []
                chain.append(node)
            elif not _counts(node, chain):
                self._join(graph, chain)
                chain = []

    def _follows(self, chain: list[fx.Node], node: fx.Node) -> bool:
        """Whether ``node`` may run right behind the last of ``chain``."""
        before, mine = _named(chain[0]), _named(node)
        if mine["x"] is not chain[-1] or len(chain[-1].users) != 1:
            return False
        if any(mine[n] != before[n] for n in ("cos", "sin", "mask", "scale", "eps")):
            return False
        if _sizes(mine["layout"]) != _sizes(before["layout"]):
            return False
        own = [mine[n] for n in _OWN] + list(mine["norms"])
        if any(not isinstance(n, fx.Node) or n.op != "placeholder" for n in own):
            return False  # it might not be there where the first one runs
        written = {_named(n)[name] for n in chain for name in _WRITTEN}
        return not written & set(own)

    def _join(self, graph: fx.Graph, chain: list[fx.Node]) -> None:
        if len(chain) < 2:
            return
        given = [_named(node) for node in chain]
        first, last = given[0], chain[-1]

        def each(name: str) -> list[Any]:
            return [g[name] for g in given]

        with graph.inserting_before(chain[0]):
            node = graph.call_function(
                self.joint,
                (
                    first["x"], each("table"), _flat(each("norms")),
                    each("layout"), first["cos"], first["sin"], each("keys"), each("values"),
                    first["mask"], each("at"), first["scale"], _flat(each("eps")),
                ),
            )  # fmt: skip
        node.meta = dict(last.meta)
        last.replace_all_uses_with(node)
        for old in reversed(chain):
            graph.erase_node(old)


_NAMES = (
    *("x", "table", "norms", "layout", "cos", "sin"),
    *("keys", "values", "mask", "at", "scale", "eps"),
)


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of ``decoder_layer``."""
    return dict(zip(_NAMES, node.args, strict=True))


def _sizes(layout: str) -> BlockLayout:
    """All that a layout says but for its weights."""
    return replace(BlockLayout.of(layout), mark=0)


def _flat(lists: list[list[Any]]) -> list[Any]:
    return [item for one in lists for item in one]


def _counts(node: fx.Node, chain: list[fx.Node]) -> bool:
    """Whether ``node`` is the count of positions of a layer of ``chain``, which no other reads."""
    return (
        node.op == "call_method"
        and node.target == "add_"
        and not node.users
        and any(node.args[0] is _named(n)["at"] for n in chain)
    )


def join_layers() -> None:
    """Let Inductor join layers from now on, beside the passes that others asked for."""
    held: Any = config.pre_grad_custom_pass
    several = list(held) if isinstance(held, (list, tuple)) else [] if held is None else [held]
    if any(isinstance(p, JoinLayers) for p in several):
        return
    if not several:
        config.pre_grad_custom_pass = JoinLayers()
    elif hasattr(custom_graph_pass, "get_custom_graph_passes"):  # this torch takes several
        config.pre_grad_custom_pass = [*several, JoinLayers()]
    else:
        log.info("decoder layers stay apart: another pass is set as pre_grad_custom_pass")


def joins_held() -> bool:
    """Whether layers that handles stand for may be recorded in the graph that is being traced: it
    is a whole one, Inductor gets it, with this pass, and nothing else there touches the cache."""
    join_layers()
    found = compiled_by()
    if found is None or getattr(found, "compiler_name", "") != "inductor" or is_declined():
        return False
    own = getattr(found, "config", {})
    passes = own.get("pre_grad_custom_pass", config.pre_grad_custom_pass)
    runs = own.get("use_pre_grad_passes", getattr(config, "use_pre_grad_passes", True))
    several = passes if isinstance(passes, (list, tuple)) else [passes]
    return bool(runs) and any(isinstance(p, JoinLayers) for p in several)
