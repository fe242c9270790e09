"""Small-float layers: MXFP4, MXFP8, NVFP4 and FP8, stored under names of their own.

    data_type   bits   codes                       scales
    mx_fp       4      weight_packed u8 [N, K/2]   weight_scale u8 (e8m0) [N, K/32]
    mx_fp       8      weight e4m3 [N, K]          weight_scale u8 (e8m0) [N, K/32]
    nv_fp       4      weight_packed u8 [N, K/2]   weight_scale e4m3 [N, K/16]
                                                   weight_global_scale f32 [1], DIVIDES
    fp          8      weight e4m3 [N, K]          weight_scale [], [1], [N] or [N, 1]
    fp          8      weight e4m3 [N, K]          weight_scale_inv [N/r, K/c], multiplies

Activations (``act_*``) are floats, or of the same type as the weights:

    mx_fp   groups of 32 under a run-time power of two
    nv_fp   groups of 16 under run-time fp8 scales and a stored factor, input_global_scale f32 [1]
    fp      a run-time scale per token or group, or a stored one, input_scale [] or [1]

Stored scales are used as they are. Imports no torch.

Sources: AutoRound 0.16.1 ``export/export_to_autoround`` (names and shapes), ``data_type/mxfp.py``,
``data_type/nvfp.py`` (scales of activations).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import ConfigError, LayoutError, printable
from quant_core.floatspec import FLOAT_SCALES, FloatScheme, StoredScale, scale_grid
from quant_core.intspec import SCALE_ELEMENTS, unsized
from quant_core.spec import (
    CHANNEL,
    TENSOR,
    Element,
    Grain,
    LayerDesc,
    QuantSpec,
    Scale,
    TensorInfo,
    block,
    group,
)
from quant_plugin_autoround.config import AutoRoundConfig, LayerSettings

__all__ = ["family_of", "float_scheme"]

_TYPES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    **dict.fromkeys(("mx_fp", "mx_fp_rceil"), ("mx", (4, 8))),
    **dict.fromkeys(("mx_fp4", "mx_fp4e2m1"), ("mx", (4,))),
    **dict.fromkeys(("mx_fp8", "mx_fp8e4m3"), ("mx", (8,))),
    **dict.fromkeys(("nv_fp", "nv_fp4", "nv_fp4_with_static_gs"), ("nv", (4,))),
    **dict.fromkeys(("fp", "fp8", "fp8_e4m3", "fp8_sym"), ("fp", (8,))),
}
"""data_type -> family, widths."""
_GROUPS = {"mx": 32, "nv": 16}
_ELEMENTS = {
    4: Element(name="fp4_e2m1", bits=4, kind="float"),
    8: Element(name="fp8_e4m3", bits=8, kind="float"),
}
Leaves = Mapping[str, TensorInfo]


def family_of(data_type: str, bits: int) -> str:
    """ "mx", "nv" or "fp"; "" for a type that is not read here."""
    family, widths = _TYPES.get(data_type, ("", ()))
    return family if bits in widths else ""


def _refused(config: AutoRoundConfig, name: str, what: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{config.source}: module {printable(name)!r} needs {what} in packing_format "
        f"{config.packing_format!r}, expected {expected}. Other kinds are not read; export the "
        "model with one of these.",
        code="Q-CFG-VALUE",
        path=config.source,
        tensor=name,
        expected=expected,
        actual=what,
        plugin="autoround",
    )


def _sizes(layer: LayerDesc, name: str, codes: str, bits: int, leaves: Leaves,
           checkpoint: Checkpoint) -> tuple[int, int]:  # fmt: skip
    """(N, K): the engine's where known, else from the stored codes.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` without a matrix of codes.
        ConfigError: ``Q-CFG-CONFLICT`` if codes of another width are stored.
    """
    info = leaves.get(codes)
    other = "weight" if codes == "weight_packed" else "weight_packed"
    if info is None and other in leaves:
        raise ConfigError(
            f"{checkpoint.path}: module {printable(name)!r} stores {other} "
            f"({leaves[other].dtype}), but bits is {bits}, expected {codes}. "
            "Restore the config that belongs to these weights.",
            code="Q-CFG-CONFLICT",
            path=checkpoint.path,
            tensor=f"{name}.{other}",
            expected=codes,
            actual=other,
            plugin="autoround",
        )
    if info is None or len(info.shape) != 2:
        raise unsized(
            checkpoint, name, leaves, codes, expected=f"a matrix {codes!r}", plugin="autoround"
        )
    n, columns = info.shape
    return layer.out_features or n, layer.in_features or columns * 8 // bits


def _check_groups(config: AutoRoundConfig, name: str, settings: LayerSettings, family: str,
                  shape: tuple[int, int], leaves: Leaves) -> int:  # fmt: skip
    """The group size of the family, agreed on by config and shapes."""
    size, (_, k) = _GROUPS[family], shape
    if settings.group_size not in (None, size):
        found = f"{settings.data_type} in groups of {settings.group_size}"
        raise _refused(config, name, found, f"groups of {size}")
    info = leaves.get("weight_scale")
    stored = info.shape[1] if info is not None and len(info.shape) == 2 else k // size
    if k % size or stored != k // size:
        implied = f"{k // stored}" if stored and k % stored == 0 else "another size"
        raise LayoutError(
            f"{info.file if info else config.source}: {printable(name)!r} has {stored} scales a "
            f"row, expected groups of {size} to fill {k} input features. The shapes imply groups "
            f"of {implied}; check data_type and group_size in {config.source}.",
            code="Q-LAYOUT-GROUP",
            tensor=f"{name}.weight_scale",
            expected=size,
            actual=stored,
            plugin="autoround",
        )
    return size


def _stored(name: str, leaves: Leaves, shapes: tuple[tuple[int, ...], ...], default: str,
            dtypes: tuple[str, ...] = ()) -> StoredScale:  # fmt: skip
    """A scale in the shape and dtype it is stored in, if these are possible (else core reports)."""
    info = leaves.get(name)
    shape = info.shape if info is not None and info.shape in shapes else shapes[0]
    dtype = info.dtype if info is not None and info.dtype in (default, *dtypes) else default
    return StoredScale(name=name, shape=shape, dtype=dtype)


def _weight(config: AutoRoundConfig, name: str, settings: LayerSettings, family: str,
            shape: tuple[int, int], leaves: Leaves) -> tuple[tuple[Scale, ...], tuple[StoredScale, ...]]:  # fmt: skip  # noqa: E501
    """Meaning and storage of the weight's scales, finest first."""
    if family in _GROUPS:
        size = _check_groups(config, name, settings, family, shape, leaves)
        grid = (scale_grid(shape, group(size)),)
        if family == "mx":
            stored = _stored("weight_scale", leaves, grid, "uint8", ("float8_e8m0fnu",))
            return (Scale(element="e8m0", grain=group(size)),), (stored,)
        fine = _stored("weight_scale", leaves, grid, "float8_e4m3fn")
        factor = _stored("weight_global_scale", leaves, ((1,), ()), "float32")
        scales = (
            Scale(element="fp8_e4m3", grain=group(size)),
            Scale(element="f32", grain=TENSOR, inverse=True),
        )
        return scales, (fine, factor)
    wide = tuple(SCALE_ELEMENTS)
    grain: Grain
    if "weight_scale_inv" in leaves:
        if settings.block is None:
            raise _refused(config, name, "weight_scale_inv without blocks", "group_size [r, c]")
        grain = block(*settings.block)
        shapes: tuple[tuple[int, ...], ...] = (scale_grid(shape, grain),)
        stored = _stored("weight_scale_inv", leaves, shapes, "float32", wide)
    else:
        info, n = leaves.get("weight_scale"), shape[0]
        grain = CHANNEL if info is not None and prod(info.shape) == n else TENSOR
        shapes = ((n, 1), (n,)) if grain == CHANNEL else ((), (1,), (1, 1))
        stored = _stored("weight_scale", leaves, shapes, "float32", wide)
    return (Scale(element=FLOAT_SCALES[stored.dtype], grain=grain),), (stored,)


def _input(config: AutoRoundConfig, name: str, settings: LayerSettings, family: str,
           leaves: Leaves) -> tuple[QuantSpec | None, StoredScale | None]:  # fmt: skip
    """Meaning of quantized activations and their stored factor; (None, None) for floats.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for activations of another kind.
    """
    if settings.act_bits >= 16:
        return None, None
    size, dynamic = settings.act_group_size, settings.act_dynamic
    kind = family_of(settings.act_data_type, settings.act_bits)
    element = _ELEMENTS.get(settings.act_bits)
    scalar = ((1,), ())
    if kind == family and element is not None and settings.act_sym:
        if family == "mx" and dynamic and size in (None, 32):
            rule = "rceil" if settings.act_data_type.endswith("rceil") else "floor"
            scale = Scale(element="e8m0", grain=group(32), static=False, rule=rule)
            return QuantSpec(element=element, scales=(scale,)), None
        if family == "nv" and size in (None, 16):
            fine = Scale(element="fp8_e4m3", grain=group(16), static=False)
            factor = Scale(element="f32", grain=TENSOR, inverse=True)
            stored = _stored("input_global_scale", leaves, scalar, "float32")
            return QuantSpec(element=element, scales=(fine, factor)), stored
        if family == "fp" and dynamic:
            grain = group(size) if size and size > 0 else TENSOR if size == 0 else CHANNEL
            scale = Scale(element="f32", grain=grain, static=False)
            return QuantSpec(element=element, scales=(scale,)), None
        if family == "fp" and size in (None, 0, -1):
            stored = _stored("input_scale", leaves, scalar, "float32", tuple(SCALE_ELEMENTS))
            scale = Scale(element=FLOAT_SCALES[stored.dtype], grain=TENSOR)
            return QuantSpec(element=element, scales=(scale,)), stored
    found = f"{settings.activations} in groups of {size}, dynamic={dynamic}"
    raise _refused(config, name, found, "float activations, or those that go with the weights")


def float_scheme(
    config: AutoRoundConfig,
    settings: LayerSettings,
    layer: LayerDesc,
    name: str,
    leaves: Leaves,
    checkpoint: Checkpoint,
) -> FloatScheme:
    """The scheme of the module ``name``, whose type ``family_of`` knows.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` if the sizes cannot be told.
        ConfigError: ``Q-CFG-VALUE`` for a kind that is not read.
        LayoutError: ``Q-LAYOUT-GROUP``.
    """
    family, bits = family_of(settings.data_type, settings.bits), settings.bits
    others = {"super_bits": settings.super_groups, "rotation_config": settings.rotated}
    if odd := [key for key, there in others.items() if there] + ([] if settings.sym else ["sym"]):
        raise _refused(
            config, name, f"{odd[0]} with {settings.data_type}", "plain symmetric floats"
        )
    codes = "weight" if bits == 8 else "weight_packed"
    shape = _sizes(layer, name, codes, bits, leaves, checkpoint)
    scales, stored = _weight(config, name, settings, family, shape, leaves)
    spec, input_scale = _input(config, name, settings, family, leaves)
    weight = QuantSpec(element=_ELEMENTS[bits], scales=scales)
    word = f"{'' if family == 'fp' else family}fp{bits}"
    return FloatScheme(
        name=f"w{word}a{'16' if spec is None else word}",
        shape=shape,
        operands={"weight": weight} | ({} if spec is None else {"input": spec}),
        codes=codes,
        scales=stored,
        input_scale=input_scale,
        plugin="autoround",
    )
