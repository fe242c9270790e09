"""Which scheme one module has: the header's entry decides, tensors and config must agree."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.presence import check_stacked, refuse_skipped, stored_modules, unquantized
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_torchao.config import CLASSES, TorchaoConfig
from quant_plugin_torchao.detect import PREFIX, is_quantized
from quant_plugin_torchao.entry import Entry, read_entry
from quant_plugin_torchao.scheme import FP8, TorchaoScheme, build_scheme

__all__ = ["scheme_for"]

Leaves = Mapping[str, TensorInfo]
_OTHER = re.compile(r"_(?!weight_)(\w+)_qdata")


def _conflict(config: TorchaoConfig, name: str, key: str, says: str, found: str) -> ConfigError:
    return ConfigError(
        f"{config.file}: {key} is {says}, but {printable(name)!r} is stored as {found}; expected "
        "both to agree. Restore the config that belongs to these weights.",
        code="Q-CFG-CONFLICT",
        path=config.file,
        tensor=name,
        expected=says,
        actual=found,
        plugin="torchao",
    )


def _check_config(config: TorchaoConfig, name: str, entry: Entry) -> None:
    if CLASSES.get(config.recipe, entry.kind) != entry.kind:
        raise _conflict(config, name, "quant_type", config.recipe, entry.kind)
    integer = entry.kind == "IntxUnpackedToInt8Tensor"
    if integer and config.weight_dtype and config.weight_dtype != f"int{entry.bits}":
        raise _conflict(config, name, "weight_dtype", config.weight_dtype, f"int{entry.bits}")
    dynamic = "DynamicActivation" in config.recipe
    if config.recipe in CLASSES and dynamic != (entry.inputs is not None):
        found = "quantized activations" if entry.inputs is not None else "float activations"
        raise _conflict(config, name, "quant_type", config.recipe, found)


def _wrong(info: TensorInfo, code: str, what: str, expected: object) -> LayoutError:
    return LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has {what}, expected {expected}. "
        "Tensors and header belong to different checkpoints; export it again.",
        code=code,
        path=info.file,
        tensor=info.name,
        expected=expected,
        actual=what,
        plugin="torchao",
    )


def _shape(layer: LayerDesc, info: TensorInfo, entry: Entry) -> tuple[int, int]:
    if len(info.shape) != 2 or 0 in info.shape:
        raise _wrong(info, "Q-LAYOUT-SHAPE", f"shape {info.shape}", "a matrix")
    allowed = tuple(FP8) if entry.kind == "Float8Tensor" else ("int8",)
    if info.dtype not in allowed:
        raise _wrong(info, "Q-LAYOUT-DTYPE", f"dtype {info.dtype}", " or ".join(allowed))
    n, k = info.shape
    wanted = (layer.out_features or n, layer.in_features or k)
    if wanted != (n, k):
        raise _wrong(info, "Q-LAYOUT-SHAPE", f"shape {info.shape}", wanted)
    return n, k


def _scale_shape(info: TensorInfo, entry: Entry, shape: tuple[int, int]) -> tuple[int, ...]:
    """The stored shape of the scales, checked against the blocks."""
    n, k = shape
    if info.dtype not in SCALE_ELEMENTS:
        expected = " or ".join(SCALE_ELEMENTS)
        raise _wrong(info, "Q-LAYOUT-DTYPE", f"dtype {info.dtype}", expected)
    r, c = entry.block or (n, k)
    if entry.block:
        if n % r or k % c:
            raise _wrong(info, "Q-LAYOUT-GROUP", f"blocks of {r} x {c}", f"divisors of {n} x {k}")
        want = (n // r, k // c)
        if info.shape == want or (want == (1, 1) and info.shape in ((), (1,))):
            return info.shape
        raise _wrong(info, "Q-LAYOUT-GROUP", f"shape {info.shape}", want)
    rows = info.shape[0] if len(info.shape) == 2 else 1
    cols = info.shape[1] if len(info.shape) == 2 else 1
    if len(info.shape) > 2 or not rows or not cols or n % rows or k % cols:
        raise _wrong(info, "Q-LAYOUT-GROUP", f"shape {info.shape}", f"divisors of {n} x {k}")
    return info.shape


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> TorchaoScheme | Unquantized:
    """The scheme of one member.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT``, ``Q-CFG-VALUE``, ``Q-CFG-TRANSFORM``.
        CheckpointError: ``Q-CKPT-MISMATCH``, ``Q-CKPT-HEADER``, ``Q-TENSOR-MISSING``.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-DTYPE``, ``Q-LAYOUT-GROUP``.
    """
    config: TorchaoConfig = match.config
    modules = stored_modules(layer, checkpoint)
    path, leaves = next(((p, v) for p, v in modules.items() if is_quantized(p, v)), ("", {}))
    if not path:
        first, plain = next(iter(modules.items()))
        other = next((leaf for leaf in plain if _OTHER.fullmatch(leaf)), "")
        if other:
            raise ConfigError(
                f"{plain[other].file}: {printable(first)!r} stores the quantized parameter "
                f"{other!r}, expected weights of modules only. Fused experts are not read yet; "
                "export with one module an expert.",
                code="Q-CFG-VALUE",
                path=plain[other].file,
                tensor=f"{first}.{other}",
                actual=other,
                plugin="torchao",
            )
        return unquantized(
            layer, checkpoint, config.siblings, config.skip, source=config.file, plugin="torchao"
        )
    check_stacked(modules, is_quantized, checkpoint, plugin="torchao")
    refuse_skipped(path, config.skip, checkpoint, source=config.file, plugin="torchao")
    name = f"{path}.weight"
    entries = {
        p: read_entry(f"{p}.weight", checkpoint, next(iter(v.values())).file)
        for p, v in modules.items()
        if v
    }
    entry = entries[path]
    odd = next((p for p, e in entries.items() if e != entry), "")
    if odd:
        raise LayoutError(
            f"{printable(odd)!r} is stored unlike {printable(path)!r} of the same stack, expected "
            "one layout. Quantize all experts alike.",
            code="Q-LAYOUT-FUSED",
            tensor=odd,
            expected=entry,
            actual=entries[odd],
            plugin="torchao",
        )
    _check_config(config, name, entry)
    parts = {part: leaves.get(f"{PREFIX}{part}") for part in entry.parts}
    lost = next((part for part, info in parts.items() if info is None), "")
    if lost:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {path + '.' + PREFIX + lost!r} is missing, expected it "
            "because the header lists it. The checkpoint is incomplete; download it again.",
            code="Q-TENSOR-MISSING",
            path=checkpoint.path,
            tensor=f"{path}.{PREFIX}{lost}",
            plugin="torchao",
        )
    infos = {part: info for part, info in parts.items() if info is not None}
    shape = _shape(layer, infos["qdata"], entry)
    zero = infos.get("zero_point")
    if zero is not None and zero.dtype != "int8" and zero.dtype not in SCALE_ELEMENTS:
        raise _wrong(zero, "Q-LAYOUT-DTYPE", f"dtype {zero.dtype}", "int8 or a float")
    return build_scheme(
        entry,
        shape,
        code_dtype=infos["qdata"].dtype,
        scale_dtype=infos["scale"].dtype,
        scale_shape=_scale_shape(infos["scale"], entry, shape),
        zero_dtype="" if zero is None else zero.dtype,
        source=config.file,
    )
