"""The storage order "tiles16" of GPU kernels: weights in the order of tensor core registers.

Kernels of any package that derive from ``storage.Tiles16`` read the same buffers, so one stored
copy serves every number of rows. A tile is 16 output rows; K is cut in groups of 128. Lane l of a
warp owns, of every tile and group, rows l // 4 and l // 4 + 8 and the columns

    k = S * 16 + kh * 8 + (l % 4) * 2 + p      step S 0..7, kh 0..1, p 0..1

which is the A operand of mma.m16n8k16 and of wgmma. With h = row half, R = tiles, G = groups:

    bits  buffer     shape, dtype                    what one lane finds, little-endian
    4     codes      [R, G, 2, 32, 8] int16          word (S % 4, p) of half S // 4: nibble 2 kh + h
    8     codes      [R, G, 4, 32, 16] uint8         piece S // 2: byte (S % 2, kh, h, p)
    2     codes      [R, G, 32, 8] int16             word (S // 2, p): crumb (S % 2, kh, h)
    3     codes      the low two bits as for 2 bits
          codes_high [R, G, 32, 4] int16             word (S // 4, p): bit (S % 4, kh, h)

5- to 7-bit codes are kept in 8 bits. Codes are the raw bits of the canonical form.

    a factor, zero or offset of grain   shape (dtype of its own element: restore is bit-exact)
    (1, c): c of 16 32 64 or n * 128    [R, ceil(Kp / c), 8, 2]     [.., row % 8, row // 8]
    (1, 0), or c >= K                   [Np]
    (0, 0)                              [1]
    (r, c) else                         [ceil(N / r), ceil(K / c)]  as it is
    gather                              int32 [Kp], -1 = padding
    bias                                [N]

Np is N rounded up to 64, Kp is K rounded up to 128; K is a multiple of 32. Padding rows and whole
padding groups have scale bits 0, padding codes are the constant zero or 0 and always finite.
READERS TREAT x AS ZERO BEYOND K: the last group of a row may hold padding under a real scale.

A stack of experts has a leading axis E everywhere but on codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.kernels.base import Rejected
from quant_core.numerics import scale_dtype
from quant_core.packing import pack, unpack
from quant_core.packing_bits import pack_stream, unpack_stream
from quant_core.spec import CANONICAL, Grain, OpSpec, Scale
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = [
    "allocate",
    "buffer_shapes",
    "factor_grids",
    "grain_kind",
    "load_",
    "padded",
    "problem",
    "restore",
    "stored_bits",
    "tile_codes",
    "tile_grid",
    "untile_codes",
    "untile_grid",
]

TILE = 16  # rows of a tile
GROUP = 128  # columns of a group
_ROWS = 64  # N is padded to this
_BLOCK_CODES = 32 << 20  # codes held one per byte at once
_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # stored bits -> bits of each plane
_PLANES = ("codes", "codes_high")
_FEATURES = ("bias", "gather")


def padded(n: int, k: int) -> tuple[int, int]:
    """(Np, Kp) of a matrix with n rows and k stored columns."""
    return n + -n % _ROWS, k + -k % GROUP


def stored_bits(bits: int) -> int:
    """Bits that a code of ``bits`` takes in the tiles."""
    return bits if bits in _WIDTHS else 8


def grain_kind(grain: Grain, k: int) -> str:
    """ "tensor", "channel", "group" (tiled) or "block" (stored as it is)."""
    r, c = grain
    if r == 0 and c == 0:
        return "tensor"
    if r == 1:
        return "channel" if c == 0 or c >= k else "group"
    return "block"


def _bias_dtype(op: OpSpec) -> torch.dtype:
    text = next((f for f in op.features if f.startswith("bias:")), "bias:float32")
    dtype: torch.dtype = getattr(torch, text.partition(":")[2])
    return dtype


def _sizes(op: OpSpec) -> tuple[int, int]:
    return op.size("n"), op.size("k_stored", op.size("k"))


def factor_grids(op: OpSpec) -> dict[str, Scale]:
    """Buffer name -> element and grain of every factor, of zeros and of offsets."""
    spec = op.weight
    out = {f"scales_{i}": s for i, s in enumerate(spec.scales)}
    if spec.zero is not None and spec.zero.kind == "code":
        out["zeros"] = Scale(element=spec.zero.element, grain=spec.scales[0].grain)
    if spec.zero is not None and spec.zero.kind == "offset":
        out |= {f"offset_{i}": s for i, s in enumerate(spec.zero.levels)}
    return out


def problem(op: OpSpec) -> Rejected | None:
    """Why the tiles cannot hold the weight of ``op``; None if they can."""
    spec, (n, k) = op.weight, _sizes(op)
    e = spec.element
    if spec.blocks:
        return Rejected(axis="blocks", have=spec.blocks, need="codes with scales")
    if e.kind == "vector" or not 2 <= e.bits <= 8:
        return Rejected(axis="element", have=e.name, need="scalar codes of 2 to 8 bits")
    if op.packing != CANONICAL:
        return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
    if k % 32 or not k:
        return Rejected(axis="in_features", have=str(k), need="a multiple of 32")
    if not n:
        return Rejected(axis="out_features", have="0", need="at least one row")
    for name, s in factor_grids(op).items():
        c = s.grain[1]
        if not s.static:
            return Rejected(axis=name, have="a run-time scale", need="a stored scale")
        if grain_kind(s.grain, k) == "group" and c not in (16, 32, 64) and c % GROUP:
            return Rejected(axis=name, have=f"group {c}", need="16, 32, 64 or a multiple of 128")
    if extra := sorted(f for f in op.features if f.partition(":")[0] not in (*_FEATURES, "tied")):
        return Rejected(axis="features", have=", ".join(extra), need=" or ".join(_FEATURES))
    return None


# ------------------------------------------------------------------------------ codes <-> tiles


def _plane_to_words(codes: Tensor, width: int) -> Tensor:
    """uint8 [R * 16, G * 128] of ``width`` bits to the words of the module's table."""
    r, g = codes.shape[0] // TILE, codes.shape[1] // GROUP
    if width == 8:
        v = codes.view(r, 2, 8, g, 4, 2, 2, 4, 2)  # R h row G piece S%2 kh t p
        return v.permute(0, 3, 4, 2, 7, 5, 6, 1, 8).reshape(r, g, 4, 32, 16)
    steps = 4 // width  # in a word
    v = codes.view(r, 2, 8, g, 8 // steps, steps, 2, 4, 2)  # R h row G J S%steps kh t p
    v = v.permute(0, 3, 2, 7, 4, 8, 5, 6, 1).reshape(r * g * 32, 64)
    words = pack_stream(v, width).contiguous().view(torch.int16).view(r, g, 32, -1)
    if width == 4:
        words = words.view(r, g, 32, 2, 8).transpose(2, 3).contiguous()
    return words


def _words_to_plane(words: Tensor, width: int) -> Tensor:
    """Inverse of ``_plane_to_words``."""
    r, g = words.shape[:2]
    if width == 8:
        v = words.view(r, g, 4, 8, 4, 2, 2, 2, 2)  # R G piece row t S%2 kh h p
        return v.permute(0, 7, 3, 1, 2, 5, 6, 4, 8).reshape(r * TILE, g * GROUP)
    steps = 4 // width
    if width == 4:
        words = words.transpose(2, 3)
    raw = words.contiguous().view(torch.uint8).reshape(r * g * 32, 8 * width)
    v = unpack_stream(raw, width, 64).reshape(r, g, 8, 4, 8 // steps, 2, steps, 2, 2)
    return v.permute(0, 8, 2, 1, 4, 6, 7, 3, 5).reshape(r * TILE, g * GROUP)


def tile_codes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """One code per byte, uint8 [R * 16, G * 128], to the planes of ``bits`` (2, 3, 4 or 8)."""
    if bits == 3:
        return _plane_to_words(codes & 3, 2), _plane_to_words(codes >> 2, 1)
    return (_plane_to_words(codes, bits),)


def untile_codes(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """Inverse of ``tile_codes``: uint8 [R * 16, G * 128]."""
    if bits == 3:
        return _words_to_plane(planes[0], 2) | (_words_to_plane(planes[1], 1) << 2)
    return _words_to_plane(planes[0], bits)


def tile_grid(values: Tensor) -> Tensor:
    """[R * 16, groups] -> [R, groups, 8, 2]."""
    return values.view(-1, 2, 8, values.shape[1]).permute(0, 3, 2, 1).contiguous()


def untile_grid(tiles: Tensor) -> Tensor:
    """Inverse of ``tile_grid``."""
    return tiles.permute(0, 3, 2, 1).reshape(-1, tiles.shape[1])


# ------------------------------------------------------------------------------------- buffers


def buffer_shapes(op: OpSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Buffer name -> (shape without the expert axis, dtype), in the order of ``allocate``."""
    spec, (n, k) = op.weight, _sizes(op)
    np_, kp = padded(n, k)
    r, g = np_ // TILE, kp // GROUP
    bits = stored_bits(spec.element.bits)
    shapes: dict[int, tuple[tuple[int, ...], torch.dtype]] = {
        1: ((r, g, 32, 4), torch.int16),
        2: ((r, g, 32, 8), torch.int16),
        4: ((r, g, 2, 32, 8), torch.int16),
        8: ((r, g, 4, 32, 16), torch.uint8),
    }
    out = {name: shapes[width] for name, width in zip(_PLANES, _WIDTHS[bits])}
    for name, s in factor_grids(op).items():
        rows, c = s.grain
        shape: tuple[int, ...] = {
            "tensor": (1,),
            "channel": (np_,),
            "group": (r, -(-kp // (c or 1)), 8, 2),
            "block": (-(-n // rows) if rows else 1, -(-k // c) if c else 1),
        }[grain_kind(s.grain, k)]
        out[name] = (shape, scale_dtype(s.element))
    if spec.gather:
        out["gather"] = ((kp,), torch.int32)
    tables = [1 << spec.element.bits] if spec.element.kind == "lut" else []
    tables += [256] * any(s.element == "lut8" for s in spec.scales)
    out |= {f"codebook_{i}": ((size,), torch.float32) for i, size in enumerate(tables)}
    if "bias" in op.features:
        out["bias"] = ((n,), _bias_dtype(op))
    return out


def _pad_code(op: OpSpec) -> int:
    zero = op.weight.zero
    return zero.value if zero is not None and zero.kind == "const" and zero.value > 0 else 0


def _row_blocks(row: int, rows: int, kp: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of output rows, cut at tiles so that a block stays small."""
    step = max(TILE, _BLOCK_CODES // kp // TILE * TILE)
    start = row
    while start < row + rows:
        stop = min(row + rows, start // TILE * TILE + step)
        yield start, stop
        start = stop


def _write_codes_(planes: tuple[Tensor, ...], bits: int, row: int, codes: Tensor) -> None:
    """codes uint8 [rows, Kp] into the tiles from output row ``row`` on; other rows stay."""
    first, last = row // TILE, -(-(row + codes.shape[0]) // TILE)
    held = tuple(p[first:last] for p in planes)
    if row % TILE or codes.shape[0] % TILE:
        whole = untile_codes(held, bits)
        at = row - first * TILE
        whole[at : at + codes.shape[0]] = codes
        codes = whole
    for target, words in zip(held, tile_codes(codes.contiguous(), bits), strict=True):
        target.copy_(words)


def _write_grid_(target: Tensor, row: int, values: Tensor) -> None:
    """values [rows, groups] into [R, padded groups, 8, 2]; groups beyond are set to zero bits."""
    r = torch.arange(row, row + values.shape[0], device=target.device)
    groups = values.shape[1]
    rows = target.permute(0, 3, 2, 1)  # [R, h, row, groups]
    rows[r // TILE, r // 8 % 2, r % 8, :groups] = values
    if groups < rows.shape[-1]:
        rows[r // TILE, r // 8 % 2, r % 8, groups:] = 0


def _planes(buffers: Mapping[str, Tensor], op: OpSpec, expert: int | None) -> tuple[Tensor, ...]:
    width = _WIDTHS[stored_bits(op.weight.element.bits)]
    held = (buffers[name] for name, _ in zip(_PLANES, width))
    return tuple(t if expert is None else t[expert] for t in held)


def _poison(t: Tensor) -> Tensor:
    if t.is_floating_point():
        return t.fill_(float("nan"))
    return t.fill_(-1 if t.dtype.is_signed else 255)


def allocate(op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
    """Poisoned buffers of ``buffer_shapes`` whose padding rows are already written."""
    n, k = _sizes(op)
    np_, kp = padded(n, k)
    experts, bits = op.size("experts", 0), stored_bits(op.weight.element.bits)
    out = {}
    for name, (shape, dtype) in buffer_shapes(op).items():
        lead = (experts,) if experts and not name.startswith("codebook") else ()
        out[name] = _poison(torch.empty((*lead, *shape), dtype=dtype, device=device))
    pad = torch.full((np_ - n, kp), _pad_code(op), dtype=torch.uint8, device=device)
    for expert in range(experts) if experts else (None,):
        if np_ > n:
            _write_codes_(_planes(out, op, expert), bits, n, pad)
        for name, s in factor_grids(op).items():
            target = out[name] if expert is None else out[name][expert]
            kind = grain_kind(s.grain, k)
            if kind == "group" and np_ > n:
                _write_grid_(target, n, target.new_zeros(np_ - n, target.shape[1]))
            elif kind == "channel":
                target[n:] = 0
    return out


def _checked(part: LayerTensors, op: OpSpec, names: set[str]) -> dict[str, Tensor]:
    """The part's tensors, after checking names, shapes and dtypes against the operation."""
    qt = part.weight
    tensors = dict(qt.tensors())
    if part.bias is not None:
        tensors["bias"] = part.bias
    held = names - {"codes_high"}
    if qt.spec != op.weight or qt.packing != op.packing or set(tensors) != held:
        raise LayoutError(
            f"part is {qt.spec.label} with {sorted(tensors)}, the operation {op.weight.label} with "
            f"{sorted(held)}; expected the same. The part belongs to another layer.",
            code="Q-LAYOUT-FUSED",
            expected=sorted(held),
            actual=sorted(tensors),
        )
    k, rows = _sizes(op)[1], qt.shape[0]
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((rows, -(-k * op.weight.element.bits // 8)), torch.uint8),
        "gather": ((k,), torch.int32),
        "bias": ((rows,), _bias_dtype(op)),
    }
    for name, s in factor_grids(op).items():
        r, c = s.grain
        grid = (-(-rows // r) if r else 1, -(-k // c) if c else 1)
        expected[name] = (grid, scale_dtype(s.element))
    for name, value in tensors.items():
        if name.startswith("codebook"):
            continue
        shape, dtype = expected[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise LayoutError(
                f"{name} has shape {tuple(value.shape)} {value.dtype}, expected {shape} {dtype}. "
                "The parts of one layer differ in layout.",
                code="Q-LAYOUT-SHAPE",
                tensor=name,
                expected=shape,
                actual=tuple(value.shape),
            )
    return tensors


def load_(
    buffers: Mapping[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
) -> None:
    """Write one part (canonical packing, on any device) into ``buffers``; see ``Kernel.load_``.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED`` for another spec, ``Q-LAYOUT-SHAPE`` for wrong shapes or
            rows beyond the layer.
    """
    tensors = _checked(part, op, set(buffers))
    (n, k), expert, row = _sizes(op), at.get("expert"), at.get("row", 0)
    rows, kp = part.weight.shape[0], padded(n, k)[1]
    if row < 0 or row + rows > n:
        raise LayoutError(
            f"part covers output rows {row} to {row + rows}, expected rows within 0 to {n}. "
            "Pass the first row of the part.",
            code="Q-LAYOUT-SHAPE",
            expected=n,
            actual=row + rows,
        )
    bits = op.weight.element.bits
    planes = _planes(buffers, op, expert)
    device = planes[0].device
    for start, stop in _row_blocks(row, rows, kp):
        words = tensors["codes"][start - row : stop - row].to(device)
        codes = torch.full((stop - start, kp), _pad_code(op), dtype=torch.uint8, device=device)
        codes[:, :k] = unpack(words, bits, (stop - start, k), CANONICAL)
        _write_codes_(planes, stored_bits(bits), start, codes)
    grids = factor_grids(op)
    for name, value in tensors.items():
        if name == "codes":
            continue
        target = buffers[name]
        if expert is not None and not name.startswith("codebook"):
            target = target[expert]
        value = value.to(device)
        kind = grain_kind(grids[name].grain, k) if name in grids else ""
        if kind == "group":
            _write_grid_(target, row, value)
        elif kind == "channel":
            target[row : row + rows].copy_(value.view(-1))
        elif kind == "block":
            r = grids[name].grain[0]
            target[row // r if r else 0 :][: value.shape[0]].copy_(value)
        elif name == "gather":
            target[:k].copy_(value)
            target[k:] = -1
        elif name == "bias":
            target[row : row + rows].copy_(value)
        else:  # one value per tensor, codebooks
            target.copy_(value.view(target.shape))


def _matrix(buffers: Mapping[str, Tensor], op: OpSpec, expert: int | None) -> dict[str, Tensor]:
    """Canonical tensors of one matrix under the names of ``QuantizedTensor.tensors()``."""
    n, k = _sizes(op)
    kp, bits = padded(n, k)[1], op.weight.element.bits
    planes = _planes(buffers, op, expert)
    parts = []
    for start, stop in _row_blocks(0, n, kp):
        held = tuple(p[start // TILE : -(-stop // TILE)] for p in planes)
        codes = untile_codes(held, stored_bits(bits))[: stop - start, :k]
        parts.append(pack(codes.contiguous(), bits, CANONICAL))
    out = {"codes": torch.cat(parts)}
    for name, s in factor_grids(op).items():
        held_grid = buffers[name] if expert is None else buffers[name][expert]
        kind = grain_kind(s.grain, k)
        if kind == "group":
            groups = -(-k // s.grain[1])
            out[name] = untile_grid(held_grid)[:n, :groups].contiguous()
        elif kind == "channel":
            out[name] = held_grid[:n].reshape(n, 1).clone()
        elif kind == "tensor":
            out[name] = held_grid.reshape(1, 1).clone()
        else:
            out[name] = held_grid.clone()
    if "gather" in buffers:
        columns = buffers["gather"] if expert is None else buffers["gather"][expert]
        out["gather"] = columns[:k].clone()
    out |= {name: t for name, t in buffers.items() if name.startswith("codebook")}
    return out


def restore(buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
    """The canonical tensors back, bit for bit; a stack keeps its leading expert axis."""
    spec, (n, k) = op.weight, _sizes(op)
    experts = op.size("experts", 0)
    if experts:
        each = [_matrix(buffers, op, e) for e in range(experts)]
        tensors = {
            name: each[0][name]
            if name.startswith("codebook")
            else torch.stack([m[name] for m in each])
            for name in each[0]
        }
    else:
        tensors = _matrix(buffers, op, None)
    levels = spec.zero.levels if spec.zero is not None else ()
    qt = QuantizedTensor(
        spec=spec,
        shape=(experts, n, k) if experts else (n, k),
        codes=tensors["codes"],
        packing=CANONICAL,
        scales=tuple(tensors[f"scales_{i}"] for i in range(len(spec.scales))),
        zeros=tensors.get("zeros"),
        offset=tuple(tensors[f"offset_{i}"] for i in range(len(levels))),
        gather=tensors.get("gather"),
        codebook=tuple(t for name, t in tensors.items() if name.startswith("codebook")),
    )
    bias = buffers["bias"].clone() if "bias" in buffers else None
    return LayerTensors(operands={"weight": qt}, bias=bias)
