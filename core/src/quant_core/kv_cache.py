"""Quantized keys and values of attention: which scales a checkpoint stores, and what they mean.

    k^ = (clamp(round(k / s + z)) - z) * s        k [tokens, heads * head_dim], likewise v (and q)

A member of kind "attention" has no weight. Its operands are "k" and "v" (rarely "q"), tensors of no
rows whose static scales are those of the file: one value for all, or one per feature. ``site`` says
which values are rounded:

    cache        keys after the rotary embedding, as a cache holds them
    projection   outputs of the k and v projections, before it

Imports no torch; ``kv_states`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from quant_core.intspec import SCALE_ELEMENTS, check_tensors
from quant_core.resolve import numberless
from quant_core.scheme import Scheme
from quant_core.spec import (
    TENSOR,
    Axis,
    Element,
    Grain,
    LayerDesc,
    ParamSpec,
    QuantSpec,
    Scale,
    Source,
    TensorInfo,
    Zero,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.checkpoint.base import Checkpoint
    from quant_core.tensors import LayerTensors

__all__ = [
    "CacheForm",
    "CacheScheme",
    "CacheTensor",
    "Role",
    "cache_schemes",
    "served_cache_schemes",
    "unserved_scales",
]

Role = Literal["q", "k", "v"]
_ROLES: tuple[Role, ...] = ("q", "k", "v")
_FEATURE: Grain = (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """One stored scale or zero point of one role."""

    role: Role
    what: Literal["scale", "zero"]
    stored: str  # full name
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """Name of the param: ``k_scale``, ``v_zero``."""
        return f"{self.role}_{self.what}"


@dataclass(frozen=True, kw_only=True)
class CacheScheme(Scheme):
    """How the keys and values of one attention module are quantized. ``shape`` is (0, 0).

    Attributes:
        tensors: what is stored, roles in the order q, k, v.
        site: which values are rounded.
        projections: role -> name of the submodule that computes it; site "projection" only.
        default: the producer's own forward rounds them. Otherwise the scales are an offer to
            engines with a quantized cache, taken only on demand.
        plugin: named in errors.
    """

    tensors: tuple[CacheTensor, ...]
    site: Literal["cache", "projection"] = "cache"
    projections: Mapping[str, str] = field(default_factory=dict)
    default: bool = True
    plugin: str = ""

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        return tuple(
            ParamSpec(
                name=t.name,
                shape=t.shape,
                dtypes=(t.dtype,),
                axes=tuple(
                    Axis(tag="out") if size > 1 else Axis(tag="fixed", cut="replicate")
                    for size in t.shape
                ),
                role="cache",
                sources=(Source(name=t.stored),),
            )
            for t in self.tensors
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_core import kv_states

        check_tensors(layer, self.params(layer), tensors, plugin=self.plugin)
        return kv_states.canonicalize(self, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_core import kv_states

        return kv_states.serialize(self, tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheForm:
    """Which scales of keys and values a format can store, and under which names.

    Attributes:
        names: as ``suffixes`` of ``cache_schemes``.
        elements: names of the codes' element types.
        grain: one value for all, or one per feature.
        shape: of a scale that is one value.
        zeros: dtypes of zero points; () = none can be stored.
        sites: which values are rounded; the first is the usual one.
        projections, default: as in ``CacheScheme``.
    """

    names: Mapping[str, str]
    elements: tuple[str, ...]
    grain: Grain = TENSOR
    shape: tuple[int, ...] = ()
    zeros: tuple[str, ...] = ()
    sites: tuple[Literal["cache", "projection"], ...] = ("cache",)
    projections: Mapping[str, str] = field(default_factory=dict)
    default: bool = False


# --------------------------------------------------------------------------- from a file's header


def _parents(checkpoint: Checkpoint) -> dict[str, None]:
    """All module paths, those without tensors of their own included."""
    out: dict[str, None] = {}
    for path in checkpoint.modules:
        parts = path.split(".")
        out |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return out


def _owners(checkpoint: Checkpoint, suffixes: Sequence[str]) -> list[str]:
    """Modules with a tensor of one of the suffixes, and their namesakes in other layers."""
    ends = tuple(f".{s}" for s in suffixes)
    named = {
        n: next(e for e in ends if n.endswith(e)) for n in checkpoint.tensors if n.endswith(ends)
    }
    kinds = {numberless(name.removesuffix(end)) for name, end in named.items()}
    return [path for path in _parents(checkpoint) if numberless(path) in kinds] if kinds else []


def _tensors(
    checkpoint: Checkpoint, path: str, owners: Sequence[str], suffixes: Mapping[str, str]
) -> Iterator[CacheTensor]:
    """What one module stores. What only its namesakes have is expected of it too."""
    for role in _ROLES:
        for what, key in (("scale", role), ("zero", f"{role}_zero")):
            suffix = suffixes.get(key)
            like: TensorInfo | None = None
            for owner in (path, *owners) if suffix else ():
                like = checkpoint.tensors.get(f"{owner}.{suffix}")
                if like is not None and numberless(owner) == numberless(path):
                    break
                like = None
            if like is not None:
                yield CacheTensor(
                    role=role,
                    what=what,  # type: ignore[arg-type]
                    stored=f"{path}.{suffix}",
                    shape=like.shape,
                    dtype=like.dtype,
                )


def _spec(element: Element, tensors: Mapping[str, CacheTensor]) -> QuantSpec:
    scale, zero = tensors["scale"], tensors.get("zero")
    grain = TENSOR if prod(scale.shape) == 1 else _FEATURE
    kind = None if zero is None else SCALE_ELEMENTS.get(zero.dtype, element.name)
    return QuantSpec(
        element=element,
        scales=(Scale(element=SCALE_ELEMENTS.get(scale.dtype, "f32"), grain=grain),),
        zero=None if kind is None else Zero(kind="code", element=kind),
    )


def cache_schemes(
    checkpoint: Checkpoint,
    suffixes: Mapping[str, str],
    *,
    element: Element,
    site: Literal["cache", "projection"] = "cache",
    projections: Mapping[str, str] | None = None,
    default: bool = True,
    plugin: str = "",
) -> dict[str, CacheScheme]:
    """The attention modules of a checkpoint that store scales of keys and values.

    All modules of one name, layer numbers aside, are expected to have what one of them has: a
    scale that one layer lacks is reported as missing, not left out.

    Args:
        suffixes: "q", "k", "v" (scales) and "q_zero", "k_zero", "v_zero" -> what follows the path
            of the attention module in the stored name: "k_scale", "k_proj.k_scale".
        element: of the codes.

    Returns:
        Stored path of the attention module -> its scheme.
    """
    owners = _owners(checkpoint, list(suffixes.values()))
    out = {}
    for path in owners:
        tensors = tuple(_tensors(checkpoint, path, owners, suffixes))
        by_role: dict[str, dict[str, CacheTensor]] = {}
        for t in tensors:
            by_role.setdefault(t.role, {})[t.what] = t
        if not all("scale" in found for found in by_role.values()):
            continue  # a zero point alone: nothing to apply, left to the plan's own checks
        out[path] = CacheScheme(
            name=f"kv_{element.name}",
            shape=(0, 0),
            operands={role: _spec(element, found) for role, found in by_role.items()},
            tensors=tensors,
            site=site,
            projections={r: n for r, n in (projections or {}).items() if r in by_role},
            default=default,
            plugin=plugin,
        )
    return out


_SERVED: tuple[Mapping[str, str], ...] = (
    {"k": "k_proj.k_scale", "v": "v_proj.v_scale"},
    {"k": "k_proj.output_scale", "v": "v_proj.output_scale"},
    {"k": "attn.k_scale", "v": "attn.v_scale"},
    {"k": "k_scale", "v": "v_scale"},
)
"""Names that serving engines look for; the first that a checkpoint has is its own."""


def served_cache_schemes(
    checkpoint: Checkpoint, *, element: Element, plugin: str
) -> dict[str, CacheScheme]:
    """Scales of keys and values under the names that serving engines read, as an offer.

    Whether the cache is quantized is decided where the model is served.

    Source: vLLM 0.32 ``model_executor/model_loader/weight_utils.py`` (maybe_remap_kv_scale_name).

    Returns:
        Stored path of the attention module -> its scheme; empty without scales of both.
    """
    for suffixes in _SERVED:
        ends = tuple(f".{s}" for s in suffixes.values())
        if any(n.endswith(ends) for n in checkpoint.tensors):
            found = cache_schemes(
                checkpoint, suffixes, element=element, default=False, plugin=plugin
            )
            both = all({"k", "v"} <= s.operands.keys() for s in found.values())
            return found if both else {}
    return {}


def unserved_scales(
    checkpoint: Checkpoint,
    schemes: Mapping[str, CacheScheme],
    leaves: frozenset[str],
    *,
    asked_in: str = "",
) -> tuple[str, ...]:
    """What to tell of stored scales of keys and values that nobody is offered.

    Args:
        schemes: what is offered, as ``served_cache_schemes`` answers.
        leaves: last name components of all scales that a quantized cache may have in this format.
        asked_in: the file whose ``kv_cache_scheme`` asks for a quantized cache; "" if none does.
    """
    offered = {t.stored for scheme in schemes.values() for t in scheme.tensors}
    owners = [
        module
        for module, held in checkpoint.modules.items()
        if any(f"{module}.{leaf}" not in offered for leaf in leaves & held.keys())
    ]
    if owners:
        return (f"KV-cache scales present, not applied ({len(owners)} modules)",)
    if asked_in and not offered:
        return (
            f"{asked_in}: kv_cache_scheme is set, but no scales are stored; the cache stays "
            "unquantized",
        )
    return ()
