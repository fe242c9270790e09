"""Calls of one input become one call while a graph is traced.

    a = linear(x, A)  b = linear(x, B)   ->   y = linear_shared(x, [A, B]);  a, b = parts of y

A kernel package names the two operators (``merge_calls``); nothing else is needed of it, and
nothing of the model. The rewrite happens where ``torch.compile`` and ``torch.export`` record
operators: after functionalization, when a node stands for one value that nobody can change. Layers
whose calls name the same node get the very same input, in whatever order and at whatever distance
they are called; an input that was written to in between is another node. Shapes may be symbolic.

Only where the layers' tensors are inputs of the graph, as parameters and buffers are: then the
joint call can stand where the first one stood. Outside of such a trace (backend "eager", plain
``make_fx`` over closures) every call stays what it is.

What the operators must agree on:

    single(Tensor x, Tensor[] tensors, str layout) -> Tensor            x [..., K] -> [..., N]
    shared(Tensor x, Tensor[] tensors, str[] layouts) -> Tensor         -> [N1 + N2 + ..., M]

``tensors`` of ``shared`` are those of each layer one after another; M is the number of rows of x.
Its result is memory rather than a matrix: the N1 M elements of the first layer's y, then those of
the next, each in the order of y itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_slot

__all__ = ["merge_calls", "parts"]

_aten = torch.ops.aten
_ORIGIN = ("stack_trace", "nn_module_stack", "seq_nr")  # what a node says of where it comes from
_STRIDES = "eager_input_vals"  # inputs as eager code has them: Inductor keeps their strides


def parts(whole: Tensor, x: Tensor, rows: list[int]) -> list[Tensor]:
    """Each layer's y [..., N] from the result of ``shared``; views.

    Args:
        rows: N of each layer.
    """
    return [y.view(*x.shape[:-1], n) for y, n in zip(whole.split(rows), rows, strict=True)]


@dataclass
class _Merged:
    """The calls of one input that were traced so far."""

    args: list[tuple[Any, ...]] = field(default_factory=list)  # of the single calls
    proxies: list[fx.Proxy] = field(default_factory=list)  # their outputs; ``node`` is kept true
    outputs: list[Tensor] = field(default_factory=list)  # what these look like
    made: list[fx.Node] = field(default_factory=list)  # of the joint call, in order


class _Merger:
    """Rewrites the calls of one pair of operators; see the module's docstring."""

    def __init__(self, single: OpOverload, shared: OpOverload) -> None:
        self.single, self.shared = single, shared
        self._seen: weakref.WeakKeyDictionary[Any, dict[fx.Node, _Merged]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(
        self, mode: Any, func: OpOverload, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        out: Tensor = mode.__torch_dispatch__(func, types, args, kwargs)
        slot = get_proxy_slot(out, mode.tracer, None)
        if slot is not None:
            self._note(mode.tracer, slot.proxy)
        return out

    def _note(self, tracer: Any, proxy: fx.Proxy) -> None:
        args = proxy.node.args
        x, tensors = args[0], args[1]
        assert isinstance(tensors, (list, tuple)), "as the schema says"
        held = all(isinstance(t, fx.Node) and t.op == "placeholder" for t in tensors)
        if not isinstance(x, fx.Node) or not held:
            return
        merged = self._seen.setdefault(tracer, {}).setdefault(x, _Merged())
        merged.args.append(args)
        merged.proxies.append(proxy)
        merged.outputs.append(proxy.node.meta["val"])
        if len(merged.args) > 1:
            self._rewrite(x, merged)

    def _rewrite(self, x: fx.Node, merged: _Merged) -> None:
        """Put one call where the first one stands, and let everybody read its parts."""
        heads = [p.node for p in merged.proxies]
        graph, first, last = x.graph, heads[0], heads[-1]
        old = [last, *reversed(merged.made or [first])]  # users before what they use
        merged.made = []

        def add(target: Callable[..., Any], *args: Any, like: Tensor | None = None) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta = {k: v for k, v in first.meta.items() if k in _ORIGIN}
            vals = fx.map_arg(args, lambda n: n.meta["val"])
            node.meta["val"] = target(*vals) if like is None else like
            if target is self.shared and _STRIDES in first.meta:
                node.meta[_STRIDES] = (vals, {})
            merged.made.append(node)
            return node

        with graph.inserting_before(old[-1]):
            tensors = [t for args in merged.args for t in args[1]]
            whole = add(self.shared, x, tensors, [args[2] for args in merged.args])
            lead = [
                size if isinstance(size, int) else add(_aten.sym_size.int, x, dim)
                for dim, size in enumerate(x.meta["val"].shape[:-1])
            ]
            start = 0
            for head, proxy, out in zip(heads, merged.proxies, merged.outputs, strict=True):
                n = out.shape[-1]
                rows = add(_aten.slice.Tensor, whole, 0, start, start + n)
                part = add(_aten.view.default, rows, [*lead, n], like=out)
                start += n
                head.replace_all_uses_with(part)
                proxy.node = part
        for node in old:
            graph.erase_node(node)


def merge_calls(lib: torch.library.Library, single: OpOverload, shared: OpOverload) -> None:
    """Let traced calls of ``single`` with one input become one call of ``shared``.

    Args:
        lib: the library that defines ``single``.
    """
    torch.library.register_torch_dispatch(
        single._schema.name, ProxyTorchDispatchMode, _Merger(single, shared), lib=lib
    )
