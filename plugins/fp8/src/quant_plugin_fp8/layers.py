"""Which scheme a module has: the stored tensors decide together with the config.

A weight scale is a tensor beside the weight, or rows of one that all experts of a layer share:

    experts.3.gate_proj.weight            [I, H]
    experts.gate_up_proj_scale_inv        [E, 2 * ceil(I/128), ceil(H/128)]    rows of gate, of up
    experts.down_proj_scale_inv           [E, ceil(H/128), ceil(I/128)]

(transformers 5.23 saves experts so.) The halves are told apart by whole rows, so I must be a
multiple of the block's rows there.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import LayoutError, printable
from quant_core.ledger import missing_error
from quant_core.presence import check_stacked, refuse_skipped, stored_modules, unquantized
from quant_core.resolve import numberless
from quant_core.spec import EXPERT, FormatMatch, LayerDesc, Source, TensorInfo, Unquantized
from quant_plugin_fp8.config import Fp8Config
from quant_plugin_fp8.detect import INPUT_NAMES, KV_LEAVES, SCALE_NAMES, is_quantized
from quant_plugin_fp8.scheme import FLOATS, KV_RULE, Fp8Scheme, build_scheme

__all__ = ["scheme_for"]

Leaves = Mapping[str, TensorInfo]

_HALVES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Fp8Scheme | Unquantized:
    """The scheme of one layer.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (config and stored tensors disagree),
            ``Q-TENSOR-MISSING`` (the weight).
        LayoutError: ``Q-LAYOUT-SHAPE`` of a weight, or of scales that experts share.
    """
    config: Fp8Config = match.config
    modules = stored_modules(layer, checkpoint)
    path, leaves = next(iter(modules.items()))
    if "weight" not in leaves and leaves and all(map(_is_stacked_scale, leaves)):
        return Unquantized(rule="scales of experts", evidence=", ".join(leaves))
    if "weight" not in leaves and (held := KV_LEAVES & leaves.keys()):
        return Unquantized(rule=KV_RULE, evidence=", ".join(sorted(held)), ignored=held)
    if not any(is_quantized(p, t) for p, t in modules.items()):
        return unquantized(
            layer, checkpoint, config.quantized, config.skip, source=config.file, plugin="fp8"
        )
    check_stacked(modules, is_quantized, checkpoint, plugin="fp8")
    for p in modules:
        refuse_skipped(p, config.skip, checkpoint, source=config.file, plugin="fp8")
    lost = [f"{p}.weight" for p, have in modules.items() if "weight" not in have]
    if lost:
        raise missing_error(checkpoint, lost, printable(layer.name))
    return _scheme(config, layer, path, leaves, checkpoint)


def _is_stacked_scale(leaf: str) -> bool:
    return leaf.endswith("_proj_scale_inv")


def _scheme(
    config: Fp8Config, layer: LayerDesc, path: str, leaves: Leaves, checkpoint: Checkpoint
) -> Fp8Scheme:
    weight = leaves["weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise _shape_error(weight, "two dimensions, neither of them 0")
    n, k = weight.shape
    source, info = None, next((leaves[s] for s in SCALE_NAMES if s in leaves), None)
    if info is None and config.block is not None and layer.experts:
        source, info = _stacked(config, layer, path, (n, k), checkpoint)
    found = next((s for s in INPUT_NAMES if s in leaves), INPUT_NAMES[0]) if config.static else ""
    name = _scale_name(config, leaves)
    return build_scheme(
        config,
        (n, k),
        scale_name=name,
        scale_shape=_scale_shape(config, (n, k), None if source else info),
        scale_dtype=_scale_dtype(config, info),
        scale_source=source,
        input_name=found,
        input_shape=_scalar(leaves.get(found)),
        input_dtype=_input_dtype(leaves.get(found)),
        cache=tuple(sorted(KV_LEAVES & leaves.keys())),
    )


def _scale_name(config: Fp8Config, leaves: Leaves) -> str:
    """The stored name; where it is missing, the one usual for this kind."""
    usual = SCALE_NAMES[0] if config.block is not None else SCALE_NAMES[1]
    return next((s for s in SCALE_NAMES if s in leaves), usual)


def _scalar(info: TensorInfo | None) -> tuple[int, ...]:
    """Shape of a single value: as it is stored, () or (1,)."""
    return (1,) if info is not None and info.shape == (1,) else ()


def _scale_shape(
    config: Fp8Config, shape: tuple[int, int], info: TensorInfo | None
) -> tuple[int, ...]:
    n, k = shape
    if config.block is not None:
        return (-(-n // config.block[0]), -(-k // config.block[1]))
    if config.method == "fp8":
        return _scalar(info)
    return (n,) if info is not None and info.shape == (n,) else (n, 1)


def _scale_dtype(config: Fp8Config, info: TensorInfo | None) -> str:
    """The stored type; float32 if there is none or it is no scale's, which core then reports."""
    allowed = set(FLOATS)
    if config.block is not None:
        allowed.add("float8_e8m0fnu")
    if config.ue8m0:
        allowed.add("uint8")
    return info.dtype if info is not None and info.dtype in allowed else FLOATS[0]


def _input_dtype(info: TensorInfo | None) -> str:
    return info.dtype if info is not None and info.dtype in FLOATS else FLOATS[0]


def _stacked(
    config: Fp8Config, layer: LayerDesc, path: str, shape: tuple[int, int], checkpoint: Checkpoint
) -> tuple[Source | None, TensorInfo | None]:
    """The rows of a tensor of scales that the experts share; (None, None) if there is none.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if its shape does not follow from the weights'.
    """
    assert config.block is not None
    parent, _, leaf = layer.stored.partition(".{expert}.")
    fused, half = _HALVES.get(leaf, (leaf, 0))
    parts = 2 if leaf in _HALVES else 1
    name = f"{parent}.{fused}_scale_inv"
    info = checkpoint.tensors.get(name)
    rows, cols = -(-shape[0] // config.block[0]), -(-shape[1] // config.block[1])
    index = (EXPERT, (half * rows, (half + 1) * rows)) if parts == 2 else (EXPERT,)
    if info is None:
        kin = numberless(name)
        shared = any(t.endswith("_scale_inv") and numberless(t) == kin for t in checkpoint.tensors)
        # where another layer has such a tensor this one lost it, and core names it
        return (Source(name=name, index=index) if shared else None), None
    want = (len(layer.experts), parts * rows, cols)
    if info.shape[1:] == want[1:] and info.shape[0] > want[0]:
        gone = sorted(set(range(info.shape[0])) - set(layer.experts))
        names = [f"{layer.stored.format(expert=e)}.weight" for e in gone]
        raise missing_error(checkpoint, names, f"{name}, which holds {info.shape[0]} experts")
    if info.shape != want:
        raise _shape_error(info, f"{want} for {want[0]} experts of {shape[0]} x {shape[1]}")
    if parts == 2 and shape[0] % config.block[0]:
        raise _shape_error(
            info, f"out_features {shape[0]} of {path} in whole blocks of {config.block[0]} rows"
        )
    return Source(name=info.name, index=index), info


def _shape_error(info: TensorInfo, expected: str) -> LayoutError:
    return LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has shape {info.shape}, expected "
        f"{expected}. The checkpoint was cut short, or weight_block_size in config.json is wrong.",
        code="Q-LAYOUT-SHAPE",
        path=info.file,
        tensor=info.name,
        expected=expected,
        actual=info.shape,
        plugin="fp8",
    )
