"""Which scheme one module has: the stored tensors decide, the config must agree.

weight.absmax, weight.quant_map, ... or a uint8 weight    4 bits, described by its quant_state
SCB or an int8 weight                                     8 bits
a float weight                                            unquantized
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.presence import check_stacked, refuse_skipped, stored_modules, unquantized
from quant_core.scheme import Scheme
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_bitsandbytes.config import TYPES, BnbConfig
from quant_plugin_bitsandbytes.detect import is_quantized
from quant_plugin_bitsandbytes.scheme import STORAGE, four_bit, int8
from quant_plugin_bitsandbytes.state import PREFIX, contradiction, parse_state

__all__ = ["scheme_for"]

Leaves = Mapping[str, TensorInfo]
_TILES = {1: "col32", 2: "col_turing", 3: "col_ampere"}


def _missing(checkpoint: Checkpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: tensor {printable(name)!r} is missing, expected it {why}. "
        "The checkpoint is incomplete; download or export it again.",
        code="Q-TENSOR-MISSING",
        path=checkpoint.path,
        tensor=name,
        plugin="bitsandbytes",
    )


def _check_size(layer: LayerDesc, path: str, shape: tuple[int, int]) -> None:
    wanted = (layer.out_features or shape[0], layer.in_features or shape[1])
    if wanted != shape:
        raise LayoutError(
            f"{path}: the stored weight has shape {shape}, expected {wanted}. "
            "config.json describes another model.",
            code="Q-LAYOUT-SHAPE",
            tensor=path,
            expected=wanted,
            actual=shape,
            plugin="bitsandbytes",
        )


def _four_bit(
    config: BnbConfig, layer: LayerDesc, path: str, leaves: Leaves, checkpoint: Checkpoint
) -> Scheme:
    found = [f"{PREFIX}{t}" for t in TYPES if f"{PREFIX}{t}" in leaves]
    if not found:
        name = f"{path}.{PREFIX}{config.quant_type or 'nf4'}"
        raise _missing(checkpoint, name, "to describe the 4-bit weight")
    name = f"{path}.{found[0]}"
    state = parse_state(checkpoint.read_bytes(name), name)
    if config.bits == 8:
        raise contradiction(path, "load_in_8bit", True, "4 bits", config.file)
    if state.quant_type != found[0].removeprefix(PREFIX):
        raise contradiction(name, "quant_type", found[0], state.quant_type, name)
    if config.quant_type and config.quant_type != state.quant_type:
        key = "bnb_4bit_quant_type"
        raise contradiction(path, key, config.quant_type, state.quant_type, config.file)
    nested = bool(state.nested_block)
    if config.double_quant is not None and config.double_quant != nested:
        key = "bnb_4bit_use_double_quant"
        raise contradiction(path, key, config.double_quant, nested, config.file)
    _check_size(layer, path, state.shape)
    weight = leaves.get("weight")
    storage = weight.dtype if weight is not None else "uint8"
    if weight is not None and (storage not in STORAGE or len(weight.shape) != 2):
        raise LayoutError(
            f"{weight.file}: tensor {printable(weight.name)!r} is {storage} of shape "
            f"{weight.shape}, expected packed bytes [{prod(state.shape) // 2}, 1]. "
            "Export the checkpoint again.",
            code="Q-LAYOUT-DTYPE" if storage not in STORAGE else "Q-LAYOUT-SHAPE",
            path=weight.file,
            tensor=weight.name,
            expected=tuple(STORAGE),
            actual=storage,
            plugin="bitsandbytes",
        )
    return four_bit(state, storage, config.file)


def _int8(
    config: BnbConfig, layer: LayerDesc, path: str, leaves: Leaves, checkpoint: Checkpoint
) -> Scheme:
    if config.bits == 4:
        raise contradiction(path, "load_in_4bit", True, "8 bits", config.file)
    weight = leaves.get("weight")
    if weight is None:
        raise _missing(checkpoint, f"{path}.weight", "beside SCB")
    if len(weight.shape) != 2:
        raise LayoutError(
            f"{weight.file}: tensor {printable(weight.name)!r} has shape {weight.shape}, expected "
            "two sizes. Export the checkpoint again.",
            code="Q-LAYOUT-SHAPE",
            path=weight.file,
            tensor=weight.name,
            actual=weight.shape,
            plugin="bitsandbytes",
        )
    has_format = "weight_format" in leaves
    if has_format and leaves["weight_format"].nbytes == 1:
        order = checkpoint.read_bytes(f"{path}.weight_format")[0]
        if order:
            raise ConfigError(
                f"{path}.weight_format is {order} ({_TILES.get(order, 'unknown')}), expected 0 "
                "(row). Rows in the order of a kernel are not read; load and save the checkpoint "
                "with bitsandbytes 0.45 or newer.",
                code="Q-CFG-VALUE",
                path=checkpoint.path,
                tensor=f"{path}.weight_format",
                expected=0,
                actual=order,
                plugin="bitsandbytes",
            )
    shape = (weight.shape[0], weight.shape[1])
    _check_size(layer, path, shape)
    return int8(shape, has_format=has_format, source=config.file)


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    """The scheme of one member.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT``, ``Q-CFG-VALUE``.
        CheckpointError: ``Q-CKPT-MISMATCH``, ``Q-TENSOR-MISSING``, ``Q-CKPT-HEADER``.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-DTYPE``.
    """
    config: BnbConfig = match.config
    owner = next((o for o in (".weight.quant_state", ".weight") if layer.stored.endswith(o)), "")
    if owner:  # parts of a weight that is not there itself
        name = layer.stored.removesuffix(owner) + ".weight"
        raise _missing(checkpoint, name, "beside its scales")
    modules = stored_modules(layer, checkpoint)
    path, leaves = next(((p, v) for p, v in modules.items() if is_quantized(p, v)), ("", {}))
    if not path:
        return unquantized(
            layer,
            checkpoint,
            config.siblings,
            config.skip,
            source=config.file,
            plugin="bitsandbytes",
        )
    check_stacked(modules, is_quantized, checkpoint, plugin="bitsandbytes")
    refuse_skipped(path, config.skip, checkpoint, source=config.file, plugin="bitsandbytes")
    weight = leaves.get("weight")
    four = any(leaf.startswith("weight.") for leaf in leaves)
    if four or (weight is not None and weight.dtype == "uint8"):
        return _four_bit(config, layer, path, leaves, checkpoint)
    return _int8(config, layer, path, leaves, checkpoint)
