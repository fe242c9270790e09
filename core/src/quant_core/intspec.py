"""Integer weights with one scale per group of input features: meaning, sizes, header checks.

    W[n, k] = scales[g, n] * (code - zero[g, n]),     g = k // group_size

What the formats that store such weights in 32-bit words share, and no torch: ``intpack`` holds
the tensor code. N = out_features, K = in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quant_core.errors import CheckpointError, LayoutError, printable
from quant_core.spec import (
    CHANNEL,
    Axis,
    Element,
    LayerDesc,
    ParamSpec,
    QuantSpec,
    Scale,
    TensorInfo,
    Zero,
    group,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.checkpoint.base import Checkpoint
    from quant_core.tensors import LayerTensors

__all__ = [
    "INTERLEAVE",
    "SCALE_ELEMENTS",
    "bias_param",
    "cannot_hold",
    "check_groups",
    "check_plain",
    "check_tensors",
    "check_whole_groups",
    "halves",
    "unsized",
    "weight_spec",
    "word_count",
]

SCALE_ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # dtype -> element
INTERLEAVE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Slot of output channel j inside a run of eight, in words made for half2 instructions."""


@functools.cache
def halves(run: int) -> tuple[int, ...]:
    """Order of 4-bit codes whose byte i holds code i and code run / 2 + i, low nibble first."""
    return (*range(0, run, 2), *range(1, run, 2))


def word_count(count: int, bits: int, *, run: int = 1) -> int:
    """int32 words that hold ``count`` codes, filled up to whole runs of ``run`` codes."""
    return -(-(count + -count % run) * bits // 32)


def bias_param(layer: LayerDesc, n: int) -> ParamSpec:
    """The float bias [N]: required of a layer that has one, else a stored one is reported."""
    return _bias_param(layer.bias, n)


@functools.lru_cache(maxsize=256)
def _bias_param(required: bool, n: int) -> ParamSpec:
    return ParamSpec(
        name="bias",
        shape=(n,),
        dtypes=tuple(SCALE_ELEMENTS),
        axes=(Axis(tag="out"),),
        role="bias",
        need="required" if required else "optional",
        rule="" if required else "linear without bias",
    )


def unsized(
    checkpoint: Checkpoint,
    module: str,
    leaves: Mapping[str, TensorInfo],
    leaf: str,
    *,
    expected: str,
    plugin: str,
) -> CheckpointError:
    """The error where too little is stored to tell a layer's sizes.

    Args:
        leaf: the tensor that would have told them.
        expected: in words: ``a matrix 'weight' and its weight_scale``.
    """
    have = ", ".join(f"{name} {info.shape}" for name, info in leaves.items())
    return CheckpointError(
        f"{checkpoint.path}: sizes of module {printable(module)!r} cannot be told from what is "
        f"stored ({printable(have)}), expected {expected}. The checkpoint is incomplete; download "
        "or export it again.",
        code="Q-TENSOR-MISSING",
        path=checkpoint.path,
        tensor=f"{module}.{leaf}",
        expected=leaf,
        actual=sorted(leaves),
        plugin=plugin,
    )


def weight_spec(
    bits: int,
    in_features: int,
    group_size: int,
    *,
    sym: bool,
    scale_dtype: str = "float16",
    gather: bool = False,
) -> QuantSpec:
    """What the codes of a layer mean.

    Args:
        group_size: at or above ``in_features``: one scale per output channel.
        sym: all zeros are 2**(bits-1).
        scale_dtype: stored dtype of the scales, a key of ``SCALE_ELEMENTS``.
    """
    grain = CHANNEL if group_size >= in_features else group(group_size)
    zero = (
        Zero(kind="const", value=1 << (bits - 1))
        if sym
        else Zero(kind="code", element=f"uint{bits}")
    )
    return QuantSpec(
        element=Element.uint(bits),
        scales=(Scale(element=SCALE_ELEMENTS[scale_dtype], grain=grain),),
        zero=zero,
        gather=gather,
    )


# --------------------------------------------------------------------------------------- checks


def check_tensors(
    layer: LayerDesc,
    params: Iterable[ParamSpec],
    tensors: Mapping[str, Tensor],
    *,
    plugin: str,
) -> None:
    """Presence, shapes and dtypes of what ``canonicalize`` was given.

    A loader that checked the header finds nothing here; direct callers do.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-DTYPE``.
    """
    for param in params:
        name = f"{layer.stored}.{param.name}"
        tensor = tensors.get(param.name)
        if tensor is None:
            if param.need == "required":
                raise CheckpointError(
                    f"{name}: not given, expected a tensor of shape {param.shape}. "
                    "The checkpoint is incomplete; download or export it again.",
                    code="Q-TENSOR-MISSING",
                    tensor=name,
                    expected=param.shape,
                    plugin=plugin,
                )
            continue
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        fix = "Check bits, group_size and layout in the config, or export the checkpoint again."
        same_rank = len(shape) == len(param.shape)
        if not same_rank or any(w not in (s, -1) for s, w in zip(shape, param.shape)):
            raise LayoutError(
                f"{name}: has shape {shape}, expected {param.shape}. {fix}",
                code="Q-LAYOUT-SHAPE",
                tensor=name,
                expected=param.shape,
                actual=shape,
                plugin=plugin,
            )
        if dtype not in param.dtypes:
            raise LayoutError(
                f"{name}: has dtype {dtype}, expected {' or '.join(param.dtypes)}. {fix}",
                code="Q-LAYOUT-DTYPE",
                tensor=name,
                expected=param.dtypes,
                actual=dtype,
                plugin=plugin,
            )


def check_groups(
    scales: TensorInfo | None, in_features: int, group_size: int, *, source: str, plugin: str
) -> int:
    """The group size of a layer, in_features where there is one group, checked by the header.

    Args:
        scales: stored as [G, N]; another rank is left to the shape check.
        group_size: -1 = one group.
        source: file that states it, for the message.

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP`` for another number of groups, with the size it implies.
    """
    size = in_features if group_size == -1 or group_size > in_features else group_size
    groups = -(-in_features // size)
    if scales is None or len(scales.shape) != 2 or scales.shape[0] == groups:
        return size
    found = scales.shape[0]
    implied = in_features // found if found and in_features % found == 0 else None
    hint = f"group_size={implied}" if implied else "another group_size or in_features"
    raise LayoutError(
        f"{scales.file}: tensor {printable(scales.name)!r} has {found} groups, expected "
        f"{groups} for in_features={in_features}, group_size={size}. The shapes imply {hint}; "
        f"check group_size in {source}.",
        code="Q-LAYOUT-GROUP",
        path=scales.file,
        tensor=scales.name,
        expected=groups,
        actual=found,
        plugin=plugin,
    )


def check_whole_groups(
    scales: TensorInfo | None,
    axis: int,
    in_features: int,
    group_size: int,
    *,
    module: str,
    source: str,
    plugin: str,
) -> int:
    """Groups of a row where only whole ones are stored.

    Args:
        scales: a matrix whose ``axis`` counts groups; another rank is left to the shape check.
        source: file that states the group size, for the message.

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP``, with the group size that the shapes imply.
    """
    k = in_features
    stored = scales.shape[axis] if scales is not None and len(scales.shape) == 2 else None
    if k % group_size == 0 and stored in (None, k // group_size):
        return k // group_size
    implied = f"group_size {k // stored}" if stored and k % stored == 0 else "another one"
    found = f"{stored} scales a row" if k % group_size == 0 else f"in_features {k}"
    where = scales.file if scales is not None else source
    raise LayoutError(
        f"{where}: {printable(module)!r} has {found}, expected groups of {group_size} to fill {k} "
        f"input features. The shapes imply {implied}; check group_size in {source}.",
        code="Q-LAYOUT-GROUP",
        path=where,
        tensor=f"{module}.weight_scale",
        expected=group_size,
        actual=stored,
        plugin=plugin,
    )


def cannot_hold(where: str, found: str, holder: str, expected: str, *, plugin: str) -> LayoutError:
    """The error of everything that a format has no way to store."""
    return LayoutError(
        f"{where}: {found} cannot be stored as {holder}, expected {expected}. "
        "Write a format that can hold it.",
        code="Q-LAYOUT-REPRESENT",
        tensor=where,
        expected=expected,
        actual=found,
        plugin=plugin,
    )


def check_plain(
    where: str,
    tensors: LayerTensors,
    want: QuantSpec,
    shape: tuple[int, int],
    *,
    holder: str,
    plugin: str,
) -> None:
    """A weight of one wide scale per group with integer zeros, perhaps a bias, nothing else.

    Left to the caller: the values of the zeros, and a gather.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what the format cannot hold.
    """
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    extras = [name for name in names if getattr(tensors, name) is not None]
    extras += ["transforms"] if tensors.transforms else []
    extras += sorted(tensors.operands.keys() - {"weight"})
    if extras:
        expected = "a weight and a bias only"
        raise cannot_hold(where, ", ".join(extras), holder, expected, plugin=plugin)
    qt = tensors.weight
    levels, zero = qt.spec.scales, qt.spec.zero
    plain = (
        qt.spec.element == want.element
        and not qt.spec.blocks
        and len(levels) == 1
        and levels[0].grain == want.scales[0].grain
        and levels[0].element in SCALE_ELEMENTS.values()
        and not levels[0].inverse
        and zero is not None
        and zero.kind in ("const", "code")
        and (zero.kind == "const" or zero.element not in SCALE_ELEMENTS.values())
    )
    if not plain:
        raise cannot_hold(where, qt.spec.label, holder, want.label, plugin=plugin)
    if zero is not None and zero.kind == "const" and not 0 <= zero.value < 1 << want.element.bits:
        expected = f"0 to {(1 << want.element.bits) - 1}"
        raise cannot_hold(where, f"zero points of {zero.value}", holder, expected, plugin=plugin)
    if qt.shape[0] != shape[0] or (qt.gather is None and tuple(qt.shape) != shape):
        found = f"a weight of shape {tuple(qt.shape)}"
        raise cannot_hold(where, found, holder, f"{shape}", plugin=plugin)
