"""Which decoder layers a kernel may run in one call: what they are made of, and in which roles.

A candidate has two norms and an MLP that kernels run already (``transformers_parts``,
``transformers_mlp``), an attention module, and nothing else but dropouts of nothing. The attention
has packed layers, for q, k, v and o or one for all of q, k, v and o, and may have a norm for the
heads of queries and one for those of keys. Roles are found out by the probe of
``transformers_block``: every order that the shapes allow is tried.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.engines.transformers_attention import STEP
from quant_core.engines.transformers_block import LayerPart, differs, take_over
from quant_core.engines.transformers_mlp import MlpPart
from quant_core.engines.transformers_parts import Buffers, NormPart, Parts
from quant_core.engines.transformers_swap import Guard, Swapped
from quant_core.kernels.between import Block, gated_op, rotary_op
from quant_core.kernels.failed import Whose
from quant_core.kernels.family import binder
from quant_core.nn import QuantLinear

__all__ = ["attach_blocks"]

_NEEDED = ("attention_mask", "past_key_values", "position_embeddings")


@dataclass(frozen=True, slots=True)
class _Found:
    """The parts of a candidate, by the names of its children."""

    norms: tuple[str, ...]
    attention: str
    mlp: str
    idle: tuple[str, ...]  # dropouts
    linears: tuple[str, ...]  # of the attention: q, k, v, o; or one for q, k, v, and o
    head_norms: tuple[str, ...]  # of the attention: of queries, of keys; or none


@dataclass(frozen=True, slots=True)
class _Roles:
    """One way in which the parts might be put together."""

    norms: tuple[str, ...]
    linears: tuple[str, ...]
    head_norms: tuple[str, ...]
    rotated: int


def _sorted(module: nn.Module) -> dict[str, list[str]]:
    """Names of a module's children by what they are."""
    kinds: dict[str, list[str]] = {"norm": [], "mlp": [], "linear": [], "idle": [], "other": []}
    for name, child in module._modules.items():
        held: dict[str, Any] = child.__dict__ if child is not None else {}
        if isinstance(held.get("_quant_norm"), NormPart):
            kinds["norm"].append(name)
        elif isinstance(held.get("_quant_mlp"), MlpPart):
            kinds["mlp"].append(name)
        elif type(child) is QuantLinear:
            kinds["linear"].append(name)
        elif type(child) is nn.Dropout and child.p == 0:
            kinds["idle"].append(name)
        else:
            kinds["other"].append(name)
    return kinds


def _candidate(module: nn.Module) -> _Found | None:
    kinds = _sorted(module)
    if [len(kinds[k]) for k in ("norm", "mlp", "linear", "other")] != [2, 1, 0, 1]:
        return None
    inner: Any = module._modules[kinds["other"][0]]
    below = _sorted(inner)
    if len(below["linear"]) not in (2, 4) or len(below["norm"]) not in (0, 2):
        return None
    if below["mlp"] or below["idle"] or below["other"]:
        return None
    if module._parameters or module._buffers or inner._parameters or inner._buffers:
        return None
    takes = inspect.signature(module.forward).parameters
    if not all(n in takes for n in _NEEDED):
        return None
    return _Found(
        norms=tuple(kinds["norm"]),
        attention=kinds["other"][0],
        mlp=kinds["mlp"][0],
        idle=tuple(kinds["idle"]),
        linears=tuple(below["linear"]),
        head_norms=tuple(below["norm"]),
    )


def _attach_block(name: str, module: nn.Module, parts: Parts) -> None:
    found = _candidate(module)
    if found is None:
        return
    attention: Any = module._modules[found.attention]
    held = attention.__dict__
    config, dim = held.get("config"), held.get("head_dim")
    if type(dim) is not int or type(held.get("layer_idx")) is not int:
        return
    if type(held.get("scaling")) is not float:
        return
    if getattr(config, "_attn_implementation_internal", None) != STEP:
        parts.left[name] = "its attention runs in no kernel"
        return
    mlp: Any = module._modules[found.mlp]
    gated: MlpPart = mlp._quant_mlp
    linears = [attention._modules[n] for n in found.linears]
    linears += [mlp._modules[n] for n in gated.names]
    if (
        not hasattr(linears[0].kernel, "bind_block")
        or len({binder(c.kernel) for c in linears}) != 1
    ):
        return
    if gated.whole is None or not all(c.owns_buffers for c in linears):
        return
    known = parts.knows(module)
    if known is None and found.head_norms and _alike(attention, found.head_norms):
        parts.left[name] = "its norms of queries and keys cannot be told apart: equal weights"
        return
    first = linears[0]
    if not hasattr(first.kernel, "bind_block"):
        return
    whose = Whose(
        kernel=first.kernel, op=first.op, layer=name, trace=first.trace, method="bind_block"
    )
    for roles in _all_roles(found, dim) if known is None else (known,):
        part = _part(module, found, roles, gated, whose, parts)
        if part is None:
            continue
        later = known is not None and parts.key[1][0] == "cpu"
        why = "" if later else differs(module, part, parts, thorough=known is None)
        if not why:
            parts.learn(module, roles)
            take_over(module, part, proved=not later)
            parts.swapped[name] = part.kernel
            parts.left.pop(name, None)
            return
        parts.left.setdefault(name, why)


def _alike(attention: Any, names: Sequence[str]) -> bool:
    first, second = (attention._modules[n].weight for n in names)
    return first.shape == second.shape and torch.equal(first, second)


def _all_roles(found: _Found, dim: int) -> Iterator[_Roles]:
    orders = (found.linears, found.linears[::-1]) if len(found.linears) == 2 else (found.linears,)
    head_norms = (found.head_norms, found.head_norms[::-1]) if found.head_norms else ((),)
    for norms in (found.norms, found.norms[::-1]):
        for linears, heads in itertools.product(orders, head_norms):
            for rotated in (dim, dim // 2, dim // 4):
                yield _Roles(norms, linears, heads, rotated)


def _heads(module: Any, linears: Sequence[QuantLinear]) -> tuple[int, int] | None:
    """Heads of queries and of keys, from the shapes; None where they make no sense."""
    dim = module.head_dim
    if len(linears) == 2:
        every, heads = linears[0].out_features // dim, linears[1].in_features // dim
        kv_heads, left = divmod(every - heads, 2)
        sizes: tuple[int, ...] = ((heads + 2 * kv_heads) * dim,)
    else:
        heads, kv_heads = (c.out_features // dim for c in linears[:2])
        left, sizes = 0, (heads * dim, kv_heads * dim, kv_heads * dim)
    if left or tuple(c.out_features for c in linears[:-1]) != sizes or kv_heads <= 0:
        return None
    return None if heads <= 0 or heads % kv_heads else (heads, kv_heads)


def _part(
    module: nn.Module, found: _Found, roles: _Roles, gated: MlpPart, whose: Whose, parts: Parts,
) -> LayerPart | None:  # fmt: skip
    """The layer put together in this way, if the kernel can."""
    attention: Any = module._modules[found.attention]
    mlp: Any = module._modules[found.mlp]
    dim, qkv = attention.head_dim, len(roles.linears) - 1
    linears: tuple[QuantLinear, ...] = tuple(attention._modules[n] for n in roles.linears)
    linears += tuple(mlp._modules[n] for n in gated.names)
    heads = _heads(attention, linears[: qkv + 1])
    if heads is None or parts.chosen(rotary_op(dim, roles.rotated, *parts.key)) is None:
        return None
    norms: list[Any] = [module._modules[n] for n in roles.norms]
    norms += [attention._modules[n] for n in roles.head_norms]
    held = [n._quant_norm for n in norms]
    if any(n.op.size("k") != dim for n in held[2:]):
        return None
    block = Block(
        linears=tuple(c.op for c in linears),
        norms=tuple(n.op for n in held),
        gated=gated_op(linears[-1].in_features, gated.form, *parts.key),
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=dim,
        rotated=roles.rotated,
        qkv=qkv,
        sides=len(gated.names) - 1,
        up_first=gated.up_first,
    )
    with whose.bound():
        run = whose.kernel.bind_block(block)  # type: ignore[attr-defined]
    if run is None:
        return None
    below = [(module, n) for n in (*roles.norms, found.attention, found.mlp, *found.idle)]
    below += [(attention, n) for n in (*roles.linears, *roles.head_norms)]
    below += [(mlp, n) for n in (*gated.names, gated.act)]
    names: list[tuple[str, ...]] = [(found.attention, n) for n in roles.linears]
    names += [(found.mlp, n) for n in gated.names]
    names += [(n,) for n in roles.norms]
    names += [(found.attention, n) for n in roles.head_norms]
    names += [(found.mlp, gated.act), (found.attention,), (found.mlp,)]
    names += [(n,) for n in found.idle]
    return LayerPart(
        run,
        whose,
        roles.rotated,
        heads[1],
        linears,
        tuple(norms),
        tuple(n.eps for n in held),
        attention,
        tuple(names),
        Guard(below),
        Buffers(),
        f"decoder layer in {whose.kernel.name}",
        run.table(functools.partial(_values, linears)) if hasattr(run, "table") else None,
    )


def _values(layers: tuple[QuantLinear, ...]) -> list[list[Tensor]]:
    return [layer._values() for layer in layers]


def _chained(tables: tuple[Any, ...], norms: tuple[tuple[nn.Module, ...], ...]) -> list[Tensor]:
    """Of each layer the table, then the norms' weights."""
    found: list[Any] = []
    for table, own in zip(tables, norms):
        found.append(table.tensor)
        found.extend([n._parameters["weight"] for n in own])
    return found


def _places(norms: tuple[tuple[nn.Module, ...], ...]) -> list[tuple[Any, Any, Any]]:
    held = [n._parameters for own in norms for n in own]
    return [(d, "weight", d["weight"]) for d in held]


def _chain(parts: Sequence[LayerPart]) -> None:
    """One handle for layers that differ in nothing but their weights, where the kernel has such."""
    kinds: dict[str, list[LayerPart]] = {}
    for part in parts:
        kind = getattr(part.run, "kind", None)
        if kind is not None and part.table is not None:
            kinds.setdefault(kind, []).append(part)
    for alike in kinds.values():
        first: Any = alike[0].run
        tables, norms = tuple(p.table for p in alike), tuple(p.norms for p in alike)
        chain = first.held(
            functools.partial(_chained, tables, norms), functools.partial(_places, norms)
        )
        for i, part in enumerate(alike):
            part.chain, part.index = chain, i


@torch.no_grad()
def attach_blocks(model: nn.Module, parts: Parts) -> None:
    """Swap the decoder layers that a kernel computes; after ``attach_norms_and_mlps``."""
    attached: list[LayerPart] = []
    for name, module in model.named_modules():
        if len(module._modules) >= 4 and not isinstance(module, Swapped):
            _attach_block(name, module, parts)
            part = module.__dict__.get("_quant_layer")
            if isinstance(part, LayerPart):
                attached.append(part)
    _chain(attached)
