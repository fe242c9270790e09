"""Quantize weights that are in memory: one matrix, one layer, or the linear layers of a model.

The online schemes of the installed plugins (``quant_core.online``) round the weights where they
are, so a model on a GPU is quantized there. What comes out is bound to kernels like any loaded
layer.

    scheme, tensors = quantize_matrix("int4", weight)
    layer = linear_of("int4", weight, bias)
    quantize_model_(model, "fp8", skip=["lm_head"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.answers import ask_offer, ask_scheme
from quant_core.build import op_spec
from quant_core.errors import LayoutError
from quant_core.kernels.choose import choose
from quant_core.kernels.failed import allocated, asked
from quant_core.nn import QuantLinear
from quant_core.online import SkipRules, find_online, settled_options
from quant_core.parts import with_packing
from quant_core.registry import Registry
from quant_core.registry import registry as default_registry
from quant_core.scheme import Scheme
from quant_core.spec import LayerDesc, Span
from quant_core.tensors import LayerTensors

__all__ = ["linear_of", "quantize_matrix", "quantize_model_"]


def quantize_matrix(
    online: str,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    name: str = "linear",
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> tuple[Scheme, LayerTensors]:
    """The scheme that ``online`` names for a float weight [N, K], and its canonical tensors.

    Args:
        online: as ``load_model(online=...)``.
        options: settings of the scheme.

    Raises:
        ConfigError: no installed plugin makes it (``Q-CFG-VALUE``).
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the scheme cannot hold a matrix of this size,
            ``Q-VALUE-WEIGHT`` for NaN or infinity.
    """
    from quant_core.quantize import check_finite

    n, k = weight.shape
    layer = LayerDesc(
        kind="linear",
        name=name,
        stored=name,
        inp=Span.whole(k),
        out=Span.whole(n),
        bias=bias is not None,
        dtype=str(weight.dtype).removeprefix("torch."),
    )
    plugin, offer = find_online(registry or default_registry(), online)
    scheme = ask_offer(plugin, offer, layer, settled_options(online, offer, options or {}))
    if not isinstance(scheme, Scheme):
        raise LayoutError(
            f"{name}: {online!r} does not hold a {n} x {k} matrix: {scheme.rule}"
            f"{f' ({scheme.evidence})' if scheme.evidence else ''}; expected one it can. "
            "Skip this layer.",
            code="Q-LAYOUT-REPRESENT",
            tensor=name,
            actual=(n, k),
        )
    check_finite(name, weight)
    return scheme, replace(ask_scheme(scheme, "quantize", layer, weight, None), bias=bias)


def linear_of(
    online: str,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    name: str = "linear",
    dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    kernels: str | Sequence[str] | None = None,
    prefer: str | None = None,
    registry: Registry | None = None,
) -> QuantLinear:
    """A packed linear layer on the weight's device; arguments as ``quantize_matrix``.

    Args:
        dtype: of activations; default the weight's.
        kernels, prefer: as ``kernels.choose.choose``.
    """
    reg = registry or default_registry()
    scheme, lt = quantize_matrix(online, weight, bias, name=name, options=options, registry=reg)
    device = str(weight.device)
    op = op_spec("linear", lt, scheme, device=device, dtype=dtype or weight.dtype)
    choice = choose(op, reg, kernels=kernels, prefer=prefer, module=name)
    buffers = allocated(choice.kernel, choice.op, device, name, choice.trace)
    with asked("load_", choice.kernel, choice.op, name, choice.trace):
        choice.kernel.load_(buffers, choice.op, with_packing(lt, choice.op.packing), {"row": 0})
    return QuantLinear(choice, buffers)


def quantize_model_(
    model: nn.Module,
    online: str,
    *,
    skip: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    kernels: str | Sequence[str] | None = None,
    prefer: str | None = None,
) -> tuple[str, ...]:
    """Replace the ``nn.Linear`` layers of ``model`` by packed ones, in place, one at a time.

    Output embeddings and routers stay floats unless ``skip`` says otherwise
    (``online.SkipRules``). Each float weight is freed before the next layer is rounded.

    Returns:
        Names of the layers that were replaced.
    """
    rules = SkipRules(tuple(skip))
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not rules(name)
    ]
    for name in names:
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        old: nn.Linear = getattr(parent, attribute)
        with torch.no_grad():
            new = linear_of(
                online,
                old.weight.detach(),
                None if old.bias is None else old.bias.detach(),
                name=name,
                options=options,
                kernels=kernels,
                prefer=prefer,
            )
        setattr(parent, attribute, new)
        del old
    return tuple(names)
