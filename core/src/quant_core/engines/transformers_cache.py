"""Keys and values rounded inside a transformers model, as a quantized cache would hold them.

A checkpoint's scales become a ``QuantCache`` below each attention module, and its ``site`` says how
the values get there:

    cache        the model's attention implementation becomes ``quant_core_<name>``, a function
                 registered with transformers' AttentionInterface (the mask function too, under the
                 same name). It rounds keys and values, after the rotary embedding and with all that
                 the cache holds, and calls the implementation that was configured.
    projection   a forward hook on the k and v projections rounds their outputs.

The cache of transformers keeps floats: numbers are those of a quantized cache, the memory is not.

Source: transformers 5.23.0 modeling_utils.py (AttentionInterface), masking_utils.py.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from quant_core.engines.transformers_names import Layout
from quant_core.errors import ConfigError, LayoutError, summarize
from quant_core.kv_cache import CacheScheme
from quant_core.kv_states import QuantCache
from quant_core.ledger import unexpected_error
from quant_core.load import read_matrix
from quant_core.plan import Member, Plan, member_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CHILD", "CacheMode", "attach_caches", "check_mode"]

log = logging.getLogger("quant_core")

CacheMode = Literal["checkpoint", "float"]
CHILD = "quant_cache"
"""Name of the ``QuantCache`` below an attention module."""
_PREFIX = "quant_core_"
_BASES = ("eager", "sdpa")
_DISPATCH = re.compile(r"\b_attn_implementation\s*(==|!=|in\b|not in\b)")


def check_mode(value: object) -> CacheMode | None:
    """``kv_cache`` as the user gave it.

    Raises:
        ConfigError: ``Q-CFG-VALUE``.
    """
    if value is None or value == "checkpoint" or value == "float":
        return value  # type: ignore[return-value]
    raise ConfigError(
        f"kv_cache: is {value!r}, expected 'checkpoint' (round keys and values by the file's "
        "scales), 'float', or None for what the format itself does. Correct the argument.",
        code="Q-CFG-VALUE",
        tensor="kv_cache",
        expected=("checkpoint", "float", None),
        actual=value,
    )


# ------------------------------------------------------------------------------ what is attached


def _wanted(plan: Plan, mode: CacheMode | None) -> dict[str, Member]:
    """The members to apply; the tensors of the others are skipped by a named rule."""
    if mode == "checkpoint" and not plan.attention:
        raise ConfigError(
            f"{plan.checkpoint.path}: kv_cache is 'checkpoint', but the file holds no scales of "
            "keys and values that can be applied; expected some. Load with kv_cache='float'.",
            code="Q-ENGINE-CACHE",
            path=plan.checkpoint.path,
            tensor="kv_cache",
            actual=mode,
        )
    wanted, left = {}, []
    for name, member in plan.attention.items():
        assert isinstance(member.scheme, CacheScheme)
        if mode == "checkpoint" or (mode is None and member.scheme.default):
            wanted[name] = member
            continue
        left.append(name)
        why = "kv_cache='float'" if mode else "the producer's own forward leaves the cache float"
        for _, stored, _, _ in member_parts(member):
            plan.ledger.skip(stored, f"scales of the KV cache: {why}")
    if left and mode is None:
        log.warning(
            "%s: scales of keys and values of %d attention modules are not applied, as in the "
            "producer's own forward; load with kv_cache='checkpoint' to apply them",
            plan.checkpoint.path,
            len(left),
        )
    return wanted


def _suffixes(layout: Layout) -> Iterator[tuple[str, str]]:
    """(public name, module of the model) of everything that has a place."""
    for module, rows in layout.layers.items():
        yield from ((member.layer.name, module) for member in rows.values())
    for public, slot in layout.slots.items():
        yield public, slot.target


def _place(name: str, model: nn.Module, layout: Layout) -> str:
    """The model's own name of an attention module; "" if it has none."""
    for public, target in _suffixes(layout):
        rest = public.removeprefix(name)
        if rest != public and rest.startswith(".") and target.endswith(rest):
            return target.removesuffix(rest)
    return name if any(name == path for path, _ in model.named_modules()) else ""


def attach_caches(
    model: PreTrainedModel,
    plan: Plan,
    layout: Layout,
    *,
    mode: CacheMode | None,
    device: str,
    beyond: Callable[[str], str],
) -> None:
    """Apply the quantized keys and values of ``plan`` to ``model``, in place.

    Args:
        beyond: name of a tensor -> rule by which the model has no place for it, or "".

    Raises:
        ConfigError: ``Q-ENGINE-CACHE`` if the model cannot do it, or there is nothing to apply.
        LayoutError: ``Q-VALUE-SCALE``.
        CheckpointError: ``Q-TENSOR-UNEXPECTED`` for scales of modules that the model lacks.
    """
    attached = []
    for name, member in _wanted(plan, mode).items():
        where = _place(name, model, layout)
        if not where:
            _skip_absent(model, plan, member, beyond(f"{name}.weight"))
            continue
        scheme = member.scheme
        assert isinstance(scheme, CacheScheme)
        cache = QuantCache(member.layer, scheme, read_matrix(plan, member)).to(device)
        owner: Any = model.get_submodule(where)
        if scheme.site == "projection":
            _hook_projections(owner, where, cache)
        else:
            _route_attention(model, owner, where, cache)
        owner.add_module(CHILD, cache)
        attached.append(name)
    if attached:
        log.info("keys and values of %d attention modules are rounded", len(attached))


def _skip_absent(model: nn.Module, plan: Plan, member: Member, rule: str) -> None:
    stored = [name for _, name, _, _ in member_parts(member)]
    if not rule:
        why = f"only attention modules that {type(model).__name__} of config.json has"
        raise unexpected_error(plan.checkpoint, stored, why)
    for name in stored:
        plan.ledger.skip(name, rule)


# ---------------------------------------------------------------------------- at the projections


class _Rounding:
    """Forward hook: rounds what a projection gives."""

    def __init__(self, cache: QuantCache, role: str) -> None:
        self.cache, self.role = cache, role

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return self.cache.rounded(self.role, output)


def _hook_projections(owner: nn.Module, where: str, cache: QuantCache) -> None:
    children = dict(owner.named_children())
    lacking = sorted(set(cache.scheme.projections.values()) - children.keys())
    if lacking:
        raise _refused(where, f"has no submodule {summarize(lacking)}")
    for role, name in cache.scheme.projections.items():
        children[name].register_forward_hook(_Rounding(cache, role))


def _refused(where: str, found: str) -> LayoutError:
    return LayoutError(
        f"{where}: {found}, expected attention whose keys and values can be reached. "
        "Load with kv_cache='float'.",
        code="Q-ENGINE-CACHE",
        tensor=where,
        actual=found,
    )


# ----------------------------------------------------------------------------- in the attention


def _attend(name: str) -> Callable[..., Any]:
    """The attention function registered for the implementation ``name``."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        cache: QuantCache | None = getattr(module, CHILD, None)
        if cache is None or not cache.attention:  # shares the config, has no scales
            return _implementations(module)[name](module, query, key, value, *args, **kwargs)
        query = cache.rounded_heads("q", query)
        key = cache.rounded_heads("k", key)
        value = cache.rounded_heads("v", value)
        return cache.attention[name](module, query, key, value, *args, **kwargs)

    return attend


def _implementations(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """The attention functions that the model's own code would call, by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    code = sys.modules.get(type(module).__module__)
    eager = getattr(code, "eager_attention_forward", None)
    known: Mapping[str, Any] = getattr(code, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found = {name: known.get(name) for name in _BASES if name != "eager"} | {"eager": eager}
    return {name: function for name, function in found.items() if function is not None}


def _register() -> None:
    """Add our names to transformers' tables; harmless to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in _BASES:
        if f"{_PREFIX}{name}" not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(f"{_PREFIX}{name}", _attend(name))
            AttentionMaskInterface.register(f"{_PREFIX}{name}", ALL_MASK_ATTENTION_FUNCTIONS[name])


def _still_routed(module: Any, args: object) -> None:
    """Forward pre-hook: another implementation would leave keys and values float in silence."""
    name = module.config._attn_implementation
    if not str(name).startswith(_PREFIX):
        raise ConfigError(
            f"attn_implementation: was set to {name!r} after loading, expected "
            f"{' or '.join(_PREFIX + b for b in _BASES)}, which round keys and values by the "
            "checkpoint's scales. Set one of these, or load with kv_cache='float'.",
            code="Q-ENGINE-CACHE",
            tensor="attn_implementation",
            expected=tuple(_PREFIX + b for b in _BASES),
            actual=name,
        )


def _route_attention(model: PreTrainedModel, owner: Any, where: str, cache: QuantCache) -> None:
    """Let ``owner`` call our attention function.

    Raises:
        LayoutError: ``Q-ENGINE-CACHE``.
    """
    config = getattr(owner, "config", None)
    name = getattr(config, "_attn_implementation", None) or "eager"
    base = name.removeprefix(_PREFIX)
    functions = _implementations(owner)
    code = sys.modules.get(type(owner).__module__)
    if config is None or not getattr(type(model), "_supports_attention_backend", False):
        raise _refused(where, f"{type(owner).__name__} does not take attention functions")
    if base not in _BASES or base not in functions:
        raise _refused(
            where, f"attn_implementation is {name!r}; keys and values are rounded in eager and sdpa"
        )
    if code is not None and _DISPATCH.search(inspect.getsource(code)):
        raise _refused(where, f"the code of {type(owner).__name__} depends on the name {name!r}")
    _register()
    cache.attention = functions
    config._attn_implementation_internal = f"{_PREFIX}{base}"
    owner.register_forward_pre_hook(_still_routed)
