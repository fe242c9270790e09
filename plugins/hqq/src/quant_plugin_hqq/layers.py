"""Which scheme one module has: what is stored decides, the config must agree."""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import ConfigError, LayoutError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.presence import check_stacked, refuse_skipped, stored_modules, unquantized
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_hqq.config import HqqConfig
from quant_plugin_hqq.detect import is_quantized
from quant_plugin_hqq.meta import Meta, read_meta
from quant_plugin_hqq.scheme import HqqScheme, build_scheme

__all__ = ["scheme_for"]

Leaves = Mapping[str, TensorInfo]
_SIZES = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


def _check_config(config: HqqConfig, path: str, meta: Meta) -> None:
    stated = config.settings(path)
    pairs = (("nbits", stated.bits, meta.bits), ("group_size", stated.group_size, meta.group_size))
    for key, says, found in (*pairs, ("axis", stated.axis, 1)):
        if says is not None and says != found:
            raise ConfigError(
                f"{config.file}: {key} is {says}, but {printable(path)!r} is stored with {found}; "
                "expected both to agree. Restore the config that belongs to these weights.",
                code="Q-CFG-CONFLICT",
                path=config.file,
                tensor=f"{path}.{key}",
                expected=says,
                actual=found,
                plugin="hqq",
            )


def _words(meta: Meta, info: TensorInfo | None) -> tuple[str, tuple[int, int]]:
    """Dtype and shape of W_q: words, or the same bytes viewed as floats."""
    dtype = meta.order.word if info is None else info.dtype
    itemsize, word = _SIZES.get(dtype, 0), _SIZES[meta.order.word]
    width = meta.group_size * word
    if not itemsize or (dtype in ("uint8", "int32") and dtype != meta.order.word):
        itemsize = 0
    if not itemsize or width % itemsize:
        assert info is not None
        raise LayoutError(
            f"{info.file}: tensor {printable(info.name)!r} has dtype {dtype}, expected "
            f"{meta.order.word} (or a float view of it) for packing {meta.packing!r}. "
            "Export the checkpoint again.",
            code="Q-LAYOUT-DTYPE",
            path=info.file,
            tensor=info.name,
            expected=meta.order.word,
            actual=dtype,
            plugin="hqq",
        )
    return dtype, (meta.word_rows, width // itemsize)


def _float_dtype(path: str, name: str, leaves: Leaves) -> str:
    info = leaves.get(name)
    if info is None:
        return "float32"  # reported as missing by the plan
    if info.dtype not in SCALE_ELEMENTS:
        raise LayoutError(
            f"{info.file}: tensor {printable(info.name)!r} has dtype {info.dtype}, expected one of "
            f"{tuple(SCALE_ELEMENTS)}. Quantized scales and zeros are not read; quantize again.",
            code="Q-LAYOUT-DTYPE",
            path=info.file,
            tensor=f"{path}.{name}",
            expected=tuple(SCALE_ELEMENTS),
            actual=info.dtype,
            plugin="hqq",
        )
    return info.dtype


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> HqqScheme | Unquantized:
    """The scheme of one member.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT``, ``Q-CFG-VALUE``.
        CheckpointError: ``Q-CKPT-MISMATCH``, ``Q-TENSOR-MISSING``.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-DTYPE``, ``Q-LAYOUT-GROUP``.
    """
    config: HqqConfig = match.config
    modules = stored_modules(layer, checkpoint)
    path, leaves = next(((p, v) for p, v in modules.items() if is_quantized(p, v)), ("", {}))
    if not path:
        return unquantized(
            layer, checkpoint, config.siblings, config.skip, source=config.file, plugin="hqq"
        )
    check_stacked(modules, is_quantized, checkpoint, plugin="hqq")
    refuse_skipped(path, config.skip, checkpoint, source=config.file, plugin="hqq")
    meta = read_meta(path, leaves, checkpoint)
    _check_config(config, path, meta)
    wanted = (layer.out_features or meta.shape[0], layer.in_features or meta.shape[1])
    if wanted != meta.shape:
        raise LayoutError(
            f"{path}: the stored weight has shape {meta.shape}, expected {wanted}. "
            "config.json describes another model.",
            code="Q-LAYOUT-SHAPE",
            tensor=path,
            expected=wanted,
            actual=meta.shape,
            plugin="hqq",
        )
    dtype, shape = _words(meta, leaves.get("W_q"))
    return build_scheme(
        meta,
        word_dtype=dtype,
        word_shape=shape,
        scale_dtype=_float_dtype(path, "scale", leaves),
        zero_dtype=_float_dtype(path, "zero", leaves),
        source=config.file,
    )
