"""bitsandbytes tensors to canonical ones and back, exactly.

4 bits: the weights of a matrix are one sequence in row order, two codes a byte, the first in the
high nibble, and blocks of ``block`` consecutive weights share a scale:

    weight.absmax[b]     one value a block: float32, or a code of nested_quant_map
    nested_absmax[b // 256], nested_offset      what that code is multiplied by, then added

Where K is no multiple of the block, blocks run over the ends of rows; ``quant_core.flat`` then
repeats scales on a finer grid. The offset of the nested scales becomes a level that is added, so
that every rounding stays where bitsandbytes has it.

8 bits: SCB is the largest magnitude of a row, so the scale is SCB / 127; the factor 1/127 is a
level of its own and SCB stays as stored.

Source: bitsandbytes 0.50.2 ``functional.py`` (dequantize_4bit, int8_vectorwise_dequant).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.flat import flat_to_grid, grid_to_flat, shrink_grid
from quant_core.intspec import cannot_hold
from quant_core.packing import pack, repack, unpack
from quant_core.rewrites.grains import with_grains
from quant_core.spec import CANONICAL, TENSOR, QuantSpec
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_bitsandbytes.scheme import HIGH_FIRST, STORAGE, FourBitScheme, Int8Scheme
from quant_plugin_bitsandbytes.state import PREFIX, parse_state

__all__ = ["read_four_bit", "read_int8", "write_four_bit", "write_int8"]

_PLUGIN = "bitsandbytes"
_STEP = 1 / 127  # int8 codes reach from -127 to 127


# -------------------------------------------------------------------------------------- 4 bits


def _check_table(where: str, name: str, table: Tensor) -> Tensor:
    if not bool(torch.isfinite(table).all()):
        raise LayoutError(
            f"{where}.{name}: holds NaN or infinity, expected {table.numel()} finite values. "
            "Export the checkpoint again.",
            code="Q-VALUE-SCALE",
            tensor=f"{where}.{name}",
            plugin=_PLUGIN,
        )
    return table


def _codes_from_bytes(raw: Tensor, shape: tuple[int, int]) -> tuple[Tensor, bool]:
    """Stored bytes as codes of the matrix, and whether their order was kept."""
    n, k = shape
    if k % 2 == 0:
        return raw.view(n, k // 2), True
    codes = unpack(raw.view(1, -1), 4, (1, 2 * raw.numel()), HIGH_FIRST)
    return pack(codes[0, : n * k].reshape(n, k), 4, CANONICAL), False


def _codes_to_bytes(qt: QuantizedTensor, shape: tuple[int, int]) -> Tensor:
    if shape[1] % 2 == 0:
        return repack(qt.codes, 4, shape, qt.packing, HIGH_FIRST).reshape(-1)
    codes = unpack(qt.codes, 4, shape, qt.packing).reshape(1, -1)
    return pack(codes, 4, HIGH_FIRST).reshape(-1)


def read_four_bit(scheme: FourBitScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of a 4-bit weight to canonical form.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED`` if the matrix (an expert) is described unlike its stack,
            ``Q-VALUE-SCALE`` for a table that is not finite.
    """
    name = f"{PREFIX}{scheme.state.quant_type}"
    state = parse_state(bytes(tensors[name].tolist()), f"{where}.{name}")
    if not state.same_layout(scheme.state):
        raise LayoutError(
            f"{where}: is described as {state.quant_type}, block {state.block}, shape "
            f"{state.shape}, expected {scheme.state.quant_type}, block {scheme.state.block}, shape "
            f"{scheme.state.shape}. Quantize all experts of a stack alike.",
            code="Q-LAYOUT-FUSED",
            tensor=f"{where}.{name}",
            expected=scheme.state.shape,
            actual=state.shape,
            plugin=_PLUGIN,
        )
    raw = (
        tensors["weight"].reshape(-1).view(torch.uint8)[: -(-state.shape[0] * state.shape[1] // 2)]
    )
    codes, kept = _codes_from_bytes(raw, state.shape)
    absmax = flat_to_grid(tensors["weight.absmax"], state.block, state.shape)
    tables = (_check_table(where, "weight.quant_map", tensors["weight.quant_map"]),)
    scales: tuple[Tensor, ...] = (absmax,)
    if state.nested_block:
        coarse = flat_to_grid(
            tensors["weight.nested_absmax"], state.block * state.nested_block, state.shape
        )
        scales = (_scalar(state.offset, absmax), absmax, coarse)
        nested = tensors["weight.nested_quant_map"]
        tables += (_check_table(where, "weight.nested_quant_map", nested),)
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=state.shape,
        codes=codes,
        packing=HIGH_FIRST if kept else CANONICAL,
        scales=scales,
        codebook=tables,
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def write_four_bit(scheme: FourBitScheme, where: str, lt: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``read_four_bit``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for another meaning, or scales finer than the blocks.
    """
    state, shape = scheme.state, scheme.shape
    qt = _checked(lt, scheme.weight, shape, where, f"bitsandbytes {state.quant_type}")
    grains = [s.grain for s in qt.spec.scales]
    fine = 1 if state.nested_block else 0
    raw = _codes_to_bytes(qt, shape)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % STORAGE[scheme.storage]))
    out = {
        "weight": raw.view(getattr(torch, scheme.storage)).view(-1, 1),
        "weight.absmax": grid_to_flat(qt.scales[fine], grains[fine], state.block, shape, where),
        "weight.quant_map": qt.codebook[0],
    }
    offset = 0.0
    if state.nested_block:
        block = state.block * state.nested_block
        mean = shrink_grid(qt.scales[0], grains[0], TENSOR, shape, where)
        offset = float(mean[0, 0])
        out["weight.nested_absmax"] = grid_to_flat(qt.scales[2], grains[2], block, shape, where)
        out["weight.nested_quant_map"] = qt.codebook[1]
    text = state.text(state.offset if _rounds_to(state.offset, offset) else offset)
    out[f"{PREFIX}{state.quant_type}"] = torch.tensor(
        list(text), dtype=torch.uint8, device=qt.codes.device
    )
    if lt.bias is not None:
        out["bias"] = lt.bias
    return out


def _scalar(value: float, like: Tensor) -> Tensor:
    """A float32 [1, 1] on the device of ``like``, whatever the default device."""
    return torch.tensor([[value]], dtype=torch.float32, device=like.device)


def _rounds_to(value: float, single: float) -> bool:
    """Whether a number as the file states it is this float32."""
    return struct.unpack("f", struct.pack("f", value))[0] == single


# -------------------------------------------------------------------------------------- 8 bits


def read_int8(scheme: Int8Scheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of an int8 weight to canonical form."""
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=tensors["weight"].view(torch.uint8),
        scales=(tensors["SCB"].view(-1, 1), _scalar(_STEP, tensors["SCB"])),
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def write_int8(scheme: Int8Scheme, where: str, lt: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``read_int8``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for another meaning.
    """
    qt = _checked(lt, scheme.weight, scheme.shape, where, "bitsandbytes int8")
    grains = [s.grain for s in qt.spec.scales]
    step = shrink_grid(qt.scales[1], grains[1], TENSOR, scheme.shape, where)
    if not _rounds_to(_STEP, float(step[0, 0])):
        raise cannot_hold(where, f"a factor of {float(step[0, 0])}", "bitsandbytes int8", "1/127",
                          plugin=_PLUGIN)  # fmt: skip
    rows = shrink_grid(qt.scales[0], grains[0], (1, 0), scheme.shape, where)
    codes = repack(qt.codes, 8, scheme.shape, qt.packing, CANONICAL)
    out = {"weight": codes.view(torch.int8), "SCB": rows.reshape(-1)}
    if scheme.has_format:
        out["weight_format"] = torch.zeros((), dtype=torch.uint8, device=codes.device)
    if lt.bias is not None:
        out["bias"] = lt.bias
    return out


# -------------------------------------------------------------------------------------- common


def _checked(
    lt: LayerTensors, want: QuantSpec, shape: tuple[int, int], where: str, holder: str
) -> QuantizedTensor:
    """The weight, if nothing but its grains differs from ``want``."""
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    extras = [name for name in names if getattr(lt, name) is not None]
    extras += ["transforms"] if lt.transforms else []
    extras += sorted(lt.operands.keys() - {"weight"})
    if extras:
        expected = "a weight and a bias only"
        raise cannot_hold(where, ", ".join(extras), holder, expected, plugin=_PLUGIN)
    qt = lt.weight

    def whole(spec: QuantSpec) -> QuantSpec:
        return with_grains(spec, lambda s: TENSOR)

    if whole(qt.spec) != whole(want) or tuple(qt.shape) != shape:
        found = f"{qt.spec.label} of shape {tuple(qt.shape)}"
        raise cannot_hold(where, found, holder, f"{want.label} of {shape}", plugin=_PLUGIN)
    return qt
