"""Attention of a decode step through a kernel, where an installed one takes it.

A model that is loaded with scaled-dot-product attention gets the implementation
``quant_core_step``: for one new token it asks the kernel, for everything else (prefill, dropout,
gradients, what the kernel declines) it is transformers' own ``sdpa``, mask and all. Without a
kernel for the device and dtype, or with another ``attn_implementation``, nothing changes;
``model.set_attn_implementation("sdpa")`` undoes it.

Source: transformers 5.23.0 modeling_utils.py (AttentionInterface), masking_utils.py,
integrations/sdpa_attention.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.errors import KernelError
from quant_core.kernels.choose import choose
from quant_core.kernels.device import device_key
from quant_core.kernels.failed import Whose
from quant_core.registry import Registry
from quant_core.registry import registry as default_registry
from quant_core.spec import OpSpec
from quant_core.walk import modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["STEP", "attach_attention"]

log = logging.getLogger("quant_core")

STEP = "quant_core_step"
_BASE = "sdpa"
_MORE = frozenset({"position_bias", "cache", "softcap", "s_aux", "output_attentions"})
_DISPATCH = re.compile(r"\b_attn_implementation\s*(==|!=|in\b|not in\b)")
_runs: dict[tuple[str, str], tuple[Callable[..., Tensor | None], Whose]] = {}
"""(device type, dtype) -> the bound kernel; attention has no weights, one serves all models."""


def attach_attention(
    model: PreTrainedModel,
    registry: Registry,
    *,
    dtype: torch.dtype,
    device: str,
    kernels: str | Sequence[str] | None = None,
) -> None:
    """Route the decode steps of ``model`` to a kernel; leaves it as it is where none fits."""
    op = OpSpec(
        op="attention",
        operands=(),
        act_dtype=str(dtype).removeprefix("torch."),
        device=device_key(device),
        features=frozenset({"one_token"}),
    )
    configs: dict[int, Any] = {}
    seen = set[tuple[type, int]]()  # layers of one class share their config
    for module in modules_of(model):
        kind = type(module), id(module.__dict__.get("config"))
        if kind not in seen:
            seen.add(kind)
            config = _config(model, module)
            if config is not None:
                configs[id(config)] = config
    if not configs or not _bound(op, registry, kernels):
        return
    for config in configs.values():
        config._attn_implementation_internal = STEP
    model._quant_core_step = _Routed(op, kernels)


def _bound(op: OpSpec, registry: Registry, kernels: str | Sequence[str] | None) -> bool:
    """Bind the kernel for ``op`` and register with transformers; False if there is none."""
    try:
        choice = choose(op, registry, kernels=kernels)
    except KernelError as err:
        log.debug("attention stays as it is: %s", err)
        return False
    whose = Whose(kernel=choice.kernel, op=choice.op, trace=choice.trace)
    with whose.bound():
        _runs[op.device[0], op.act_dtype] = choice.kernel.bind(choice.op), whose
    _register()
    return True


class _Routed:
    """Held by a routed model: where it is unpickled, the same is set up again."""

    def __init__(self, op: OpSpec, kernels: str | Sequence[str] | None) -> None:
        self.op, self.kernels = op, kernels

    def __reduce__(self) -> tuple[object, ...]:
        return _routed_here, (self.op, self.kernels)


def _routed_here(op: OpSpec, kernels: str | Sequence[str] | None) -> _Routed:
    if not _bound(op, default_registry(), kernels):
        _register()  # the name must be known; decode steps go through sdpa
    return _Routed(op, kernels)


def _config(model: nn.Module, module: Any) -> Any:
    """The config that decides how ``module`` attends, if it may be changed; else None."""
    if "config" not in module.__dict__ and not hasattr(type(module), "config"):
        return None  # without the error that torch makes of it
    config = getattr(module, "config", None)
    if (
        getattr(config, "_attn_implementation", None) != _BASE
        or not getattr(type(model), "_supports_attention_backend", False)
        or _dispatches(type(module).__module__)
    ):
        return None
    return config


@functools.cache
def _dispatches(name: str) -> bool:
    """Whether the code of a module chooses by the name of the implementation, or cannot be read."""
    code = sys.modules.get(name)
    return code is None or _DISPATCH.search(inspect.getsource(code)) is not None


def _register() -> None:
    """Add our name to transformers' tables; harmless to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if STEP not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(STEP, _attend)
        AttentionMaskInterface.register(STEP, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])


def _given(value: object) -> bool:
    return value is not None and value is not False


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (
        query.shape[2] == 1
        and not dropout
        and not (torch.is_grad_enabled() and query.requires_grad)
    ):
        found = _runs.get((query.device.type, str(query.dtype).removeprefix("torch.")))
        if found is not None and not any(_given(kwargs.get(name)) for name in _MORE):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            run, whose = found
            try:
                out = run([], query, key, value, attention_mask, scale)
            except Exception as err:
                whose.failed(err, query)
                raise
            if out is not None:
                return out, None
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
