"""Which scheme a module has: the stored tensors decide together with the config."""

from __future__ import annotations

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import LayoutError, printable
from quant_core.ledger import missing_error
from quant_core.presence import check_stacked, refuse_skipped, stored_modules, unquantized
from quant_core.spec import FormatMatch, LayerDesc, Unquantized
from quant_plugin_mxfp8.config import Mxfp8Config
from quant_plugin_mxfp8.detect import KV_LEAVES, SCALE_NAMES, is_quantized
from quant_plugin_mxfp8.scheme import KV_RULE, SCALE_DTYPES, Mxfp8Scheme

__all__ = ["scheme_for"]


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Mxfp8Scheme | Unquantized:
    """The scheme of one layer.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (config and stored tensors disagree),
            ``Q-TENSOR-MISSING`` (the weight).
        LayoutError: ``Q-LAYOUT-SHAPE`` of a weight.
    """
    config: Mxfp8Config = match.config
    modules = stored_modules(layer, checkpoint)
    leaves = next(iter(modules.values()))
    if "weight" not in leaves and (held := KV_LEAVES & leaves.keys()):
        return Unquantized(rule=KV_RULE, evidence=", ".join(sorted(held)), ignored=held)
    if not any(is_quantized(p, t) for p, t in modules.items()):
        return unquantized(
            layer, checkpoint, config.quantized, config.skip, source=config.file, plugin="mxfp8"
        )
    check_stacked(modules, is_quantized, checkpoint, plugin="mxfp8")
    for p in modules:
        refuse_skipped(p, config.skip, checkpoint, source=config.file, plugin="mxfp8")
    lost = [f"{p}.weight" for p, have in modules.items() if "weight" not in have]
    if lost:
        raise missing_error(checkpoint, lost, printable(layer.name))
    weight = leaves["weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise LayoutError(
            f"{weight.file}: tensor {printable(weight.name)!r} has shape {weight.shape}, expected "
            "[out, in]. The checkpoint was cut short, or stores experts in a way not read here.",
            code="Q-LAYOUT-SHAPE",
            path=weight.file,
            tensor=weight.name,
            actual=weight.shape,
            plugin="mxfp8",
        )
    name = next((s for s in SCALE_NAMES if s in leaves), SCALE_NAMES[0])
    scale = leaves.get(name)
    known = scale is not None and scale.dtype in SCALE_DTYPES
    return Mxfp8Scheme.of(
        (weight.shape[0], weight.shape[1]),
        scale_name=name,
        scale_dtype=scale.dtype if scale is not None and known else SCALE_DTYPES[0],
        cache=tuple(sorted(KV_LEAVES & leaves.keys())),
    )
