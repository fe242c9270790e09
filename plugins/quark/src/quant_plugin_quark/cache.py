"""Quantized keys and values: outputs of k_proj and v_proj, with a stored scale each.

    <attention>.k_proj.output_scale, v_proj.output_scale (q_proj)    [], also output_zero_point int8

The arguments are the ``output_tensors`` of these modules. Values are rounded as they leave the
projection, keys before the rotary embedding, as the producer's own forward does; in the cache only
if the config says ``kv_cache_post_rope``. Applied: fp8 and int8 with one stored scale per tensor.
``prob_output_scale`` (of the softmax) is not applied.

Source: measured against the reload of amd-quark 0.13 (``import_model_from_safetensors``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from quant_core.checkpoint.base import Checkpoint
from quant_core.describe import one_value
from quant_core.kv_cache import CacheForm, CacheScheme, cache_schemes
from quant_plugin_quark.args import TensorArgs
from quant_plugin_quark.beside import KV_MODULES
from quant_plugin_quark.config import QuarkConfig
from quant_plugin_quark.scheme import KV_RULE

__all__ = ["FORM", "cache_args", "cache_warnings", "schemes"]

_PROJECTIONS = {name[0]: name for name in KV_MODULES}
_NAMES = {role: f"{name}.output_scale" for role, name in _PROJECTIONS.items()}
_ZERO_NAMES = {f"{r}_zero": f"{n}.output_zero_point" for r, n in _PROJECTIONS.items()}

FORM = CacheForm(
    names=_NAMES | _ZERO_NAMES,
    elements=("fp8_e4m3", "int8"),
    zeros=("int8",),
    sites=("projection", "cache"),
    projections=_PROJECTIONS,
    default=True,
)


def cache_args(schemes: Iterable[CacheScheme]) -> tuple[TensorArgs, bool]:
    """``output_tensors`` of the projections, and whether keys are rounded after the rotary
    embedding.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the attention modules differ.
    """
    kinds = {
        (o.element.name, o.zero is None, s.site == "cache")
        for s in schemes
        for o in s.operands.values()
    }
    dtype, symmetric, post_rope = one_value(kinds, "output_tensors", plugin="quark")
    return TensorArgs(dtype=dtype, qscheme="per_tensor", symmetric=symmetric), post_rope


def _owners(checkpoint: Checkpoint) -> list[str]:
    """Projections that store the scale of their outputs."""
    return [
        module
        for module, leaves in checkpoint.modules.items()
        if "output_scale" in leaves and module.rpartition(".")[2] in KV_MODULES
    ]


def _arguments(config: QuarkConfig, projections: list[str]) -> TensorArgs | None:
    """The one kind of all outputs; None if there is none, or it cannot be applied."""
    found = {config.args_of(path).outputs for path in projections}
    if len(found) != 1:
        return None
    (outputs,) = found
    applied = (
        len(outputs) == 1
        and outputs[0].dtype in ("fp8_e4m3", "int8")
        and outputs[0].qscheme == "per_tensor"
        and not outputs[0].dynamic
        and not outputs[0].e8m0
        and (outputs[0].symmetric or outputs[0].dtype == "int8")
    )
    return outputs[0] if applied else None


def schemes(config: QuarkConfig, checkpoint: Checkpoint) -> dict[str, CacheScheme]:
    """Stored path of the attention module -> its scheme; empty if there is none to apply."""
    projections = _owners(checkpoint)
    args = _arguments(config, projections) if projections else None
    if args is None:
        return {}
    found = cache_schemes(
        checkpoint,
        _NAMES if args.symmetric else _NAMES | _ZERO_NAMES,
        element=args.element,
        site="cache" if config.post_rope else "projection",
        projections=_PROJECTIONS,
        plugin="quark",
    )
    single = all(prod(t.shape) == 1 for scheme in found.values() for t in scheme.tensors)
    return found if single else {}


def cache_warnings(config: QuarkConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """What the file says of quantized keys and values and cannot be applied."""
    softmax = {m for m, leaves in checkpoint.modules.items() if "prob_output_scale" in leaves}
    owners = {path.rpartition(".")[0] for path in _owners(checkpoint)}
    if schemes(config, checkpoint):
        if softmax:
            yield f"scales of the softmax present, not applied ({len(softmax)} attention modules)"
    elif owners or softmax:
        yield f"{KV_RULE} ({len(owners | softmax)} attention modules)"
    elif config.kv_cache:
        yield (
            f"{config.file}: export.kv_cache_group names keys or values, but no scales of them "
            "are stored; the cache stays unquantized"
        )
