"""Sizes of one packed layer from its header, checked against the config.

                       along K (minus_one, raw)                interleaved
    N                  columns of scales, or of qweight        of scales, or qweight cols*32/b
    K                  length of g_idx, or qweight rows*32/b   rows of qweight
    bits, twice        qweight rows*32/K, qzeros cols*32/N     qweight and qzeros cols*32/N
    G                  rows of scales, checked against group_size

The engine's sizes count first where it gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS, check_groups, unsized
from quant_core.spec import LayerDesc, TensorInfo
from quant_plugin_autoround.config import AutoRoundConfig, LayerSettings
from quant_plugin_autoround.scheme import AutoRoundScheme, build_scheme

__all__ = ["scheme_of"]

_INTERLEAVED_BITS = (4, 5, 6, 7)
_NEEDED = ("qweight", "qzeros", "scales")
Leaves = Mapping[str, TensorInfo]
Shape = tuple[int, ...] | None


def _shape(leaves: Leaves, leaf: str, rank: int = 2) -> Shape:
    """Stored shape of ``leaf``; None if it is absent or of another rank (reported later)."""
    info = leaves.get(leaf)
    return info.shape if info is not None and len(info.shape) == rank else None


def _out_features(
    config: AutoRoundConfig, layer: LayerDesc, leaves: Leaves, settings: LayerSettings
) -> int | None:
    if layer.out_features is not None:
        return layer.out_features
    if scales := _shape(leaves, "scales"):
        return scales[1]
    qweight = _shape(leaves, "qweight")
    if qweight and config.dialect == "interleaved":
        return qweight[1] * 32 // settings.bits
    return qweight[1] if qweight else None


def _in_features(
    config: AutoRoundConfig, layer: LayerDesc, leaves: Leaves, settings: LayerSettings
) -> int | None:
    if layer.in_features is not None:
        return layer.in_features
    if g_idx := _shape(leaves, "g_idx", 1):
        return g_idx[0]
    if qweight := _shape(leaves, "qweight"):
        interleaved = config.dialect == "interleaved"
        return qweight[0] if interleaved else qweight[0] * 32 // settings.bits
    scales, size = _shape(leaves, "scales"), settings.group_size or -1
    return scales[0] * size if scales and size > 0 else None


def _implied_bits(
    config: AutoRoundConfig, layer: LayerDesc, leaves: Leaves, settings: LayerSettings, n: int
) -> int | None:
    """Width that two stored sizes agree on; None if they do not or are absent."""
    found = []
    if (qzeros := _shape(leaves, "qzeros")) and n:
        found.append(32 * qzeros[1] / n)
    qweight = _shape(leaves, "qweight")
    if qweight and config.dialect == "interleaved" and n:
        found.append(32 * qweight[1] / n)
    elif qweight:
        k = layer.in_features
        if k is None and (g_idx := _shape(leaves, "g_idx", 1)):
            k = g_idx[0]
        size, scales = settings.group_size or -1, _shape(leaves, "scales")
        if k is None and scales and size > 0:
            k = size * scales[0]
        found += [32 * qweight[0] / k] if k else []
    whole = {int(b) for b in found if b == int(b) and 2 <= b <= 8}
    return whole.pop() if len(whole) == 1 and len(found) == 2 else None


def _check_bits(
    config: AutoRoundConfig, settings: LayerSettings, name: str, implied: int | None
) -> None:
    if implied not in (None, settings.bits):
        raise ConfigError(
            f"{config.source}: bits is {settings.bits} for {printable(name)!r}, but the stored "
            f"tensors say {implied}; expected both to agree. The tensors were packed with "
            f"{implied} bits; correct bits or extra_config.",
            code="Q-CFG-CONFLICT",
            path=config.source,
            tensor=name,
            expected=implied,
            actual=settings.bits,
            plugin="autoround",
        )
    if config.dialect == "interleaved" and settings.bits not in _INTERLEAVED_BITS:
        raise ConfigError(
            f"{config.source}: bits is {settings.bits} for {printable(name)!r} in packing_format "
            f"{config.packing_format!r}, expected one of {_INTERLEAVED_BITS}. Tools order other "
            "widths differently; export with packing_format auto_round:auto_gptq.",
            code="Q-CFG-VALUE",
            path=config.source,
            tensor=name,
            expected=_INTERLEAVED_BITS,
            actual=settings.bits,
            plugin="autoround",
        )


def scheme_of(
    config: AutoRoundConfig,
    settings: LayerSettings,
    layer: LayerDesc,
    name: str,
    leaves: Leaves,
    checkpoint: Checkpoint,
) -> AutoRoundScheme:
    """The scheme of the packed module ``name``.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` if the sizes cannot be told.
        ConfigError: ``Q-CFG-CONFLICT``, ``Q-CFG-VALUE`` for the bits.
        LayoutError: ``Q-LAYOUT-GROUP``.
    """
    n = _out_features(config, layer, leaves, settings)
    _check_bits(config, settings, name, _implied_bits(config, layer, leaves, settings, n or 0))
    k = _in_features(config, layer, leaves, settings)
    if not n or not k or settings.group_size is None:
        absent = next((t for t in _NEEDED if t not in leaves), _NEEDED[0])
        raise unsized(
            checkpoint, name, leaves, absent,
            expected="qweight, qzeros and scales", plugin="autoround",
        )  # fmt: skip
    scales = leaves.get("scales")
    group_size = check_groups(
        scales, k, settings.group_size, source=config.source, plugin="autoround"
    )
    known = scales is not None and scales.dtype in SCALE_ELEMENTS
    return build_scheme(
        shape=(n, k),
        bits=settings.bits,
        group_size=group_size,
        sym=settings.sym,
        dialect=config.dialect,
        has_g_idx="g_idx" in leaves,
        scale_dtype=scales.dtype if scales is not None and known else "float16",
        source=config.source,
        stated=config.stated,
    )
