"""Header checks of one packed layer: sizes, words, groups, dtypes, each with the likely cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import LayerDesc, TensorInfo
from quant_plugin_awq.config import LAYOUTS, AwqConfig
from quant_plugin_awq.geometry import TILED, padded_groups, stored_shapes
from quant_plugin_awq.scheme import AwqScheme

__all__ = ["check_header", "header_sizes", "resolve_group"]

Leaves = Mapping[str, TensorInfo]
Shape = tuple[int, ...] | None


def _layout_error(
    info: TensorInfo, code: str, found: str, expected: Any, actual: Any, fix: str
) -> LayoutError:
    return LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} {found}. {fix}",
        code=code,
        path=info.file,
        tensor=info.name,
        expected=expected,
        actual=actual,
        plugin="awq",
    )


def _common(votes: list[int]) -> int | None:
    return Counter(votes).most_common(1)[0][0] if votes else None


def _implied_bits(words: int, n: int) -> int | None:
    """Bits per code if ``words`` 32-bit words hold ``n`` codes, None if that is no whole number."""
    bits, rest = divmod(words * 32, n) if n else (0, 1)
    return bits if rest == 0 and 1 < bits < 9 else None


def _gemm_out(config: AwqConfig, weight: Shape, zeros: Shape, scales: Shape) -> int | None:
    """N, from the scales unless they alone disagree with the words."""
    words = {t[1] for t in (weight, zeros) if t}
    if scales and len(words) == 1:
        (width,) = words
        fits = -(-scales[1] * config.bits // 32) == width
        return scales[1] if fits or _implied_bits(width, scales[1]) else width * 32 // config.bits
    if scales:
        return scales[1]
    return min(words) * 32 // config.bits if words else None


def header_sizes(
    config: AwqConfig, layer: LayerDesc, path: str, leaves: Leaves, zeros_name: str
) -> tuple[int, int]:
    """(N, K) of the layer: the engine's, else what most of the stored shapes agree on.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` if too little is stored to tell.
    """

    def shape(name: str) -> Shape:
        info = leaves.get(name)
        return info.shape if info is not None and len(info.shape) == 2 else None

    weight, zeros, scales = shape("qweight"), shape(zeros_name), shape("scales")
    k: int | None
    if config.layout == "gemm":
        n = _gemm_out(config, weight, zeros, scales)
        k = weight[0] if weight else None
        if k is None and config.group_size > 0 and (scales or zeros):
            k = (scales or zeros or (0,))[0] * config.group_size
    elif config.layout == "gemv":
        n = _common([t[0] for t in (weight, zeros, scales) if t])
        k = weight[1] * 8 if weight else None
    else:
        n = _common([t[1] for t in (zeros, scales) if t] + ([weight[0] * 4] if weight else []))
        k = weight[1] if weight else None
    n = layer.out_features if layer.out_features is not None else n
    k = layer.in_features if layer.in_features is not None else k
    if n is None or k is None:
        names = [f"{path}.{x}" for x in ("qweight", zeros_name, "scales") if x and x not in leaves]
        odd = ", ".join(f"{t.name} {t.shape}" for t in leaves.values())
        if not names:
            info = leaves["qweight"]
            found = f"has shape {info.shape}, expected two dimensions"
            fix = "Export the checkpoint again."
            raise _layout_error(info, "Q-LAYOUT-SHAPE", found, 2, info.shape, fix)
        raise CheckpointError(
            f"{printable(path)}: not stored: {', '.join(names)}; expected beside {odd}. "
            "The checkpoint is incomplete; download or export it again.",
            code="Q-TENSOR-MISSING",
            tensor=names[0],
            expected=names,
            plugin="awq",
        )
    return n, k


def resolve_group(config: AwqConfig, path: str, leaves: Leaves, k: int) -> int:
    """The group size of a layer with ``k`` input features; -1 becomes ``k``.

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP`` if it does not divide ``k`` or the layout lacks it.
    """
    g = k if config.group_size == -1 else config.group_size
    padded = config.layout != "gemm"
    problem = ""
    if g > k or k % g:
        problem = f"group_size {g} does not divide in_features {k}"
    elif padded and not padded_groups(k, g):
        problem = f"layout {config.layout!r} has no group_size {g}; it has 32, 64 and 128 upwards"
    if not problem:
        return g
    scales = leaves.get("scales")
    hint = f"Correct group_size in {config.file}, or export the checkpoint again."
    if config.layout == "gemm" and scales is not None and scales.shape[0]:
        hint = f"The stored scales imply group_size {k / scales.shape[0]:g}. " + hint
    raise LayoutError(
        f"{printable(path)}: {problem} ({config.file}), expected a divisor. {hint}",
        code="Q-LAYOUT-GROUP",
        path=config.file,
        tensor=f"{path}.scales",
        expected=f"a divisor of {k}",
        actual=g,
        plugin="awq",
    )


def _other_layout(scheme: AwqScheme, leaves: Leaves) -> str:
    """A hint if the stored shapes fit another layout of this format."""
    n, k = scheme.shape
    names = {"qweight": "qweight", "scales": "scales"}
    if scheme.zeros:
        names[scheme.zeros] = "zeros"
    for layout in LAYOUTS:
        if layout == scheme.layout or (scheme.bits != 4 and layout != "gemm"):
            continue
        shapes = stored_shapes(layout, scheme.bits, n, k, scheme.group_size)
        if all(x in leaves and leaves[x].shape == shapes[role] for x, role in names.items()):
            return f"The stored shapes fit version {layout!r}; correct it in the config."
    return ""


def _check_bits(config: AwqConfig, scheme: AwqScheme, info: TensorInfo) -> None:
    n, k = scheme.shape
    implied = _implied_bits(info.shape[1], n)
    if scheme.layout == "gemm" and info.shape[0] == k and implied not in (None, scheme.bits):
        raise ConfigError(
            f"{config.file}: bits is {scheme.bits}, but tensor {printable(info.name)!r} of shape "
            f"{info.shape} holds {implied}-bit codes for out_features {n}; expected one number. "
            "Correct bits, or restore the config that belongs to these weights.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=info.name,
            expected=scheme.bits,
            actual=implied,
            plugin="awq",
        )


def _shape_error(
    config: AwqConfig, scheme: AwqScheme, info: TensorInfo, expected: tuple[int, ...], fix: str
) -> LayoutError:
    k, g = scheme.shape[1], scheme.group_size
    group_axis = 1 if scheme.layout == "gemv" else 0
    code = "Q-LAYOUT-SHAPE"
    is_grouped = not info.name.endswith((".qweight", ".bias"))
    if len(info.shape) == 2 and is_grouped:
        rest_equal = info.shape[1 - group_axis] == expected[1 - group_axis]
        if rest_equal and info.shape[group_axis]:
            code = "Q-LAYOUT-GROUP"
            if scheme.layout == "gemm":
                implied = f"group_size {k / info.shape[0]:g}"
                fix = f"The checkpoint may have been made with {implied} or be cut short; " + (
                    f"check group_size in {config.file}."
                )
    found = (
        f"has shape {info.shape}, expected {expected} for out_features={scheme.shape[0]}, "
        f"in_features={k}, bits={scheme.bits}, group_size={g} in layout {scheme.layout!r}"
    )
    fix = fix or "The checkpoint was cut short, or its config describes another layout."
    return _layout_error(info, code, found, expected, info.shape, fix)


def check_header(
    config: AwqConfig, scheme: AwqScheme, path: str, leaves: Leaves, layer: LayerDesc
) -> None:
    """Compare every stored shape and dtype of one matrix with the scheme.

    Absent tensors are not reported here: core names all of them at once.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` if the words hold another number of bits.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-GROUP`` or ``Q-LAYOUT-DTYPE``.
    """
    hint = _other_layout(scheme, leaves)
    for param in scheme.params(layer):
        info = leaves.get(param.name)
        if info is None:
            continue
        allowed = param.dtypes
        if (
            param.name == "scales"
            and f"{path}.scales" == info.name
            and info.dtype not in SCALE_ELEMENTS
        ):
            allowed = tuple(SCALE_ELEMENTS)
        if info.dtype not in allowed:
            found = f"has dtype {info.dtype}, expected {' or '.join(allowed)}"
            fix = hint or "Export the checkpoint again without casting its tensors."
            raise _layout_error(info, "Q-LAYOUT-DTYPE", found, allowed, info.dtype, fix)
        if info.shape == param.shape:
            continue
        if param.name == "qweight" and len(info.shape) == 2 and not hint:
            _check_bits(config, scheme, info)
        raise _shape_error(config, scheme, info, param.shape, hint)
    n, k = scheme.shape
    unaligned = (scheme.layout == "gemv" and k % 8) or (
        scheme.layout in TILED and (k % 64 or n % 4)
    )
    if unaligned and "qweight" in leaves:
        need = (
            "in_features % 8" if scheme.layout == "gemv" else "in_features % 64, out_features % 4"
        )
        found = f"belongs to a layer of {n} x {k}, but layout {scheme.layout!r} needs {need} == 0"
        raise _layout_error(
            leaves["qweight"],
            "Q-LAYOUT-SHAPE",
            found,
            need,
            (n, k),
            "Correct 'version' in the config.",
        )
