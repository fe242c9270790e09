"""Fast paths of ``quant_core.packing`` on whole words, without one byte per code.

Three families of packings meet in the byte stream of ``CANONICAL`` (codes of one output row, LSB
first, along K):

    stream   codes already run along K: the words, transposed if stored [K.., N], ARE the stream
    block    P = 32 / bits codes of P consecutive rows share an int32 word (axis "out"): a block of
             P words x P codes is transposed in log2(P) steps of masked swaps

         k=0  | n0 n1 n2 ... n7 |            n=0 | k0 k1 k2 ... k7 |
         k=1  | n0 n1 n2 ... n7 |    ->      n=1 | k0 k1 k2 ... k7 |      bits = 4: P = 8
         ...                                 ...

    halves   byte i of a run of 4-bit codes holds code i and code run / 2 + i: both halves are
             squeezed into bytes of neighbours, 16 bits at a time
    field    such runs, or whole bytes, in blocks that hold other things beside

An order inside the word only renames the rows of the transposed block. Everything here is held to
the generic algorithm of ``quant_core.packing`` by tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.intspec import halves
from quant_core.spec import Packing

__all__ = ["WORD_BITS", "WORD_DTYPES", "from_stream", "has_fast_path", "to_stream", "view_as"]

WORD_BITS = {"uint8": 8, "int16": 16, "int32": 32}
WORD_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
_CHUNK_WORDS = 1 << 16  # 256 KiB of int32: the swap steps stay in the cache of one core


def _is_stream(bits: int, packing: Packing) -> bool:
    whole = packing.straddle or WORD_BITS[packing.word] % bits == 0
    plain = packing.order is None and not packing.planes and not packing.fields
    return packing.axis == "in" and plain and whole


def _is_block(bits: int, shape: tuple[int, int], packing: Packing) -> bool:
    if packing.axis != "out" or packing.word != "int32" or packing.planes or 32 % bits:
        return False
    per = 32 // bits
    order_fits = packing.order is None or len(packing.order) == per
    return per > 1 and order_fits and shape[0] % per == 0 and shape[1] % per == 0


def _is_halves(bits: int, shape: tuple[int, int], packing: Packing) -> bool:
    order = packing.order
    if order is None or bits != 4 or packing.word != "uint8" or packing.axis != "in":
        return False
    run = len(order)
    plain = not packing.planes and not packing.k_major and run % 8 == 0
    return plain and order == halves(run) and shape[1] % run == 0


def _is_field(bits: int, shape: tuple[int, int], packing: Packing) -> bool:
    if len(packing.fields) != 1 or packing.axis != "in" or packing.k_major:
        return False
    field = packing.fields[0]
    known = bits == 8 or (bits == 4 and field.stride % 4 == 0)
    return field.width == bits and known and shape[1] % field.count == 0


def has_fast_path(bits: int, shape: tuple[int, int], packing: Packing) -> bool:
    """Whether ``to_stream`` and ``from_stream`` know this packing at this size."""
    return (
        _is_stream(bits, packing)
        or _is_block(bits, shape, packing)
        or _is_halves(bits, shape, packing)
        or _is_field(bits, shape, packing)
    )


def view_as(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of ``data``, row-major, read as ``dtype``; the last axis changes its length.

    Goes through one flat axis of stride one, since torch keeps odd strides on axes of length one,
    also in ``view(-1)``. Copies when the data are not contiguous or do not start on a word of
    ``dtype``.
    """
    old = data.element_size()
    new = torch.empty((), dtype=dtype).element_size()
    flat = data.contiguous().as_strided((data.numel(),), (1,))
    if flat.storage_offset() * old % new:
        flat = flat.clone()
    return flat.view(dtype).view(*data.shape[:-1], data.shape[-1] * old // new)


def _swap_blocks_(x: Tensor, bits: int) -> Tensor:
    """Transpose every P x P block of codes, in place: int32 [B, P, M], P = 32 / bits."""
    blocks, per, width = x.shape
    step = max(1, _CHUNK_WORDS // (per * width))
    for start in range(0, blocks, step):
        part = x[start : start + step]
        span = per // 2
        while span:
            shift = span * bits
            mask = sum(((1 << shift) - 1) << at for at in range(0, 32, 2 * shift))
            pairs = part.view(part.shape[0], per // (2 * span), 2, span, width)
            low, high = pairs[:, :, 0], pairs[:, :, 1]
            diff = ((low >> shift) ^ high).bitwise_and_(mask)
            high ^= diff
            low ^= diff << shift
            span //= 2
    return x


def _block_to_stream(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    n, k = shape
    per = 32 // bits
    by_k = words if packing.k_major else words.transpose(0, 1)  # [K, N / P]
    x = by_k.contiguous().view(k // per, per, n // per)
    x = _swap_blocks_(x.clone() if x.data_ptr() == words.data_ptr() else x, bits)
    rows = x.view(k // per, n).t().contiguous()  # row = slot * (N / P) + block of n
    slots = rows.view(per, n // per, k // per)
    if packing.order is not None:
        slots = slots[list(packing.order)]
    return view_as(slots.transpose(0, 1).contiguous().view(n, k // per), torch.uint8)


def _stream_to_block(data: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    n, k = shape
    per = 32 // bits
    codes = view_as(data, torch.int32).view(n // per, per, k // per).transpose(0, 1)
    if packing.order is not None:
        at_slot = sorted(range(per), key=packing.order.__getitem__)
        codes = codes[at_slot]
    x = codes.contiguous().view(n, k // per).t().contiguous().view(k // per, per, n // per)
    if x.data_ptr() == data.data_ptr():
        x = x.clone()
    by_k = _swap_blocks_(x, bits).view(k, n // per)
    return by_k if packing.k_major else by_k.t().contiguous()


def _halves_to_stream(words: Tensor, run: int) -> Tensor:
    """uint8 [N, K / 2] in halves of ``run`` -> canonical bytes."""
    runs = view_as(words, torch.int16).view(-1, run // 4)
    out = torch.empty(runs.shape[0], 2, run // 4, dtype=torch.uint8, device=words.device)
    step = max(1, 2 * _CHUNK_WORDS // run)
    for start in range(0, runs.shape[0], step):
        part = runs[start : start + step]
        for half, nibbles in enumerate((part, part >> 4)):
            pairs = nibbles & 0x0F0F
            pairs |= pairs >> 4
            out[start : start + step, half] = pairs  # the low byte
    return out.view(words.shape)


def _stream_to_halves(data: Tensor, run: int) -> Tensor:
    """Inverse of ``_halves_to_stream``."""
    runs = data.contiguous().view(-1, 2, run // 4)
    out = torch.empty(runs.shape[0], run // 4, dtype=torch.int16, device=data.device)
    step = max(1, 2 * _CHUNK_WORDS // run)
    for start in range(0, runs.shape[0], step):
        pairs = runs[start : start + step].to(torch.int16)
        spread = (pairs | (pairs << 4)) & 0x0F0F
        out[start : start + step] = spread[:, 0] | (spread[:, 1] << 4)
    return view_as(out, torch.uint8).view(data.shape)


def _whole_bytes(words: Tensor, packing: Packing) -> Tensor:
    """The bytes of the only field, block after block, as a view: [N, blocks, bytes]."""
    field = packing.fields[0]
    blocks = words.view(words.shape[0], -1, packing.block)
    return blocks[..., field.at : field.at + field.nbytes]


def to_stream(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    """Words of ``packing`` as words of ``CANONICAL``; needs ``has_fast_path``.

    Shapes:  words packed_shape((N, K), bits, packing)  ->  uint8 [N, ceil(K * bits / 8)]
    Padding bits of the last byte become zero. May share memory with ``words``; changes nothing.
    """
    if _is_block(bits, shape, packing):
        return _block_to_stream(words, bits, shape, packing)
    if packing.fields:
        held = _whole_bytes(words.contiguous(), packing).reshape(shape[0], -1)
        return held if bits == 8 else _halves_to_stream(held, 2 * packing.fields[0].stride)
    if packing.order is not None:
        return _halves_to_stream(words, len(packing.order))
    k = shape[1]
    data = view_as(words.transpose(0, 1) if packing.k_major else words, torch.uint8)
    out = data[:, : -(-k * bits // 8)]
    if k * bits % 8:
        out = out.clone()
        out[:, -1] &= (1 << (k * bits % 8)) - 1
    return out.contiguous()


def from_stream(data: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    """Inverse of ``to_stream``: canonical bytes to words of ``packing``."""
    if _is_block(bits, shape, packing):
        return _stream_to_block(data, bits, shape, packing)
    if packing.fields:
        field = packing.fields[0]
        blocks = shape[1] // field.count
        out = torch.zeros(shape[0], blocks * packing.block, dtype=torch.uint8, device=data.device)
        held = data if bits == 8 else _stream_to_halves(data, 2 * field.stride)
        _whole_bytes(out, packing).copy_(held.view(shape[0], blocks, field.nbytes))
        return out
    if packing.order is not None:
        return _stream_to_halves(data, len(packing.order))
    pad = -data.shape[1] % (WORD_BITS[packing.word] // 8)
    if pad:
        data = torch.nn.functional.pad(data, (0, pad))
    words = view_as(data, WORD_DTYPES[packing.word])
    return words.transpose(0, 1).contiguous() if packing.k_major else words
