"""Block types of grids as 4-bit codes under scales, and back: IQ1, IQ2, IQ3 and TQ2_0.

Eight weights (four in IQ3) are an entry of a grid, a fixed list of magnitudes; signs lie beside it,
and a scale serves 16 or 32 weights:

    type              magnitudes of the grid       a scale for   scale
    IQ3_S             1 3 5 7 9 11 13 15           32            d (1 + 2 s)
    IQ3_XXS           4 12 20 28 36 44 52 62       32            d (1 + 2 s) / 4
    IQ2_XXS, _XS, _S  8 25 43                      32, 16, 16    d (1 + 2 s) / 8
    IQ1_S, IQ1_M      -1 0 1, plus or minus 1/8    32, 16        d (1 + 2 s)
    TQ2_0             codes 0 to 3 less 1          256           d

So a weight is one of at most 16 values: a table, with d and 1 + 2 s as factors. Products are exact
in float32, the weights are those of the reference bit for bit. A code is the position of the
magnitude, plus 8 for a minus sign; in IQ1 that of the grid plus 3 where 1/8 is taken off. ``pack``
finds the grid's entry again: no two are alike. TQ1_0 is not here: 13 of its bytes have a double.

Eight codes are one word of 32 bits, which is an entry of a table, or with a table of signs in it.

The grids are the gguf package's own. Source of the fields: gguf 0.19.0, quants.py.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_core.packing import unpack
from quant_core.spec import Element, QuantSpec, Scale, Zero, group
from quant_core.tensors import QuantizedTensor

__all__ = ["iq1_m", "iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs", "tq2_0"]

Array = np.ndarray[Any, Any]
_BLOCK = 256
_ROWS = 1 << 20  # weights taken apart at a time, in rows of whole blocks


@dataclass(frozen=True, slots=True)
class _Fields:
    """Blocks taken apart: scales 1 + 2 s [B, 256 / g], d as float16 bits [B].

    ``codes``: one to a byte [B, 256] for ``join``, in canonical packing [B, ...] from ``split``.
    """

    codes: Array
    scales: Array
    d: Array


@dataclass(frozen=True, slots=True)
class _Grid:
    """``words``: codes of every entry, four bits each; ``entry``: of positions, ``bits`` each."""

    words: Array
    entry: Array
    bits: int


@functools.cache
def _grid(name: str) -> _Grid:
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    magnitudes = np.array(kind.grid_map)
    at = np.searchsorted(magnitudes, kind.grid.reshape(kind.grid_shape)).astype(np.uint8)
    bits = 3 if len(magnitudes) > 4 else 2
    entry = np.zeros(1 << bits * at.shape[1], np.uint16)
    entry[_packed(at, bits)] = np.arange(len(at), dtype=np.uint16)
    return _Grid(_packed(at, 4).astype(np.uint32 if at.shape[1] == 8 else np.uint16), entry, bits)


@functools.cache
def _sign_words() -> Array:
    """Eight sign bits -> the highest bit of each of eight codes."""
    return _packed(_bits(np.arange(256, dtype=np.uint8), range(8)) & 1, 4) << 3


@functools.cache
def _sign_words7() -> Array:
    """Seven sign bits, and one that makes their number even."""
    low = np.arange(128, dtype=np.uint8)
    odd = (_bits(low, range(7)) & 1).sum(-1).astype(np.uint8) & 1
    return _sign_words()[low | odd << 7]


def _packed(at: Array, bits: int) -> Array:
    """Positions [..., weights] as one number each."""
    shifts = np.arange(at.shape[-1], dtype=np.uint32) * bits
    return np.bitwise_or.reduce(at.astype(np.uint32) << shifts, axis=-1)


def _entries(name: str, at: Array) -> Array:
    """Inverse of the grid: positions [..., weights] to entries, uint16."""
    grid = _grid(name)
    return grid.entry[_packed(at, grid.bits)]


def _bits(values: Array, counts: list[int] | range) -> Array:
    """values [...] shifted right by each of ``counts``: [..., len(counts)]."""
    return values[..., None] >> np.array(counts, values.dtype)


def _join(parts: Array, counts: list[int] | range, dtype: type) -> Array:
    """Inverse of ``_bits`` for parts that do not overlap."""
    shifted = parts.astype(dtype) << np.array(counts, dtype)
    return np.bitwise_or.reduce(shifted, axis=-1).astype(dtype)


def _nibbles(values: Array) -> Array:
    return (_bits(values, [0, 4]) & 15).reshape(len(values), -1)


def _of_nibbles(values: Array) -> Array:
    return _join(values.reshape(len(values), -1, 2), [0, 4], np.uint8)


def _index7(signs: Array) -> Array:
    return _join(signs[..., :7], range(7), np.uint8)


def _cut(blocks: Array, *sizes: int) -> list[Array]:
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _words(blocks: Array, dtype: type) -> Array:
    return np.ascontiguousarray(blocks).view(dtype)


def _bytes(*parts: Array) -> Array:
    n = len(parts[0])
    return np.concatenate(
        [np.ascontiguousarray(p).reshape(n, -1).view(np.uint8) for p in parts], axis=1
    )


class _Codes(ABC):
    """One block type; subclasses say where its fields lie. See ``kernels.expanded.BlockCodes``."""

    grid, group = "", 32
    values: tuple[float, ...] = ()

    def __init__(self) -> None:
        factors = [Scale(element="f16", grain=group(_BLOCK))]
        factors.insert(0, Scale(element="uint8", grain=group(self.group)))
        element = Element(name=type(self).__name__.lower().strip("_"), bits=4, kind="lut")
        self.spec = QuantSpec(element=element, scales=tuple(factors))

    @abstractmethod
    def split(self, b: Array) -> _Fields:
        """The fields of blocks [B, bytes]."""

    @abstractmethod
    def join(self, f: _Fields) -> Array:
        """Inverse of ``split``."""

    def _codes_of(self, entries: Array) -> Array:
        """Codes of the grid's entries, eight to a word: [B, 32]."""
        return _words(_grid(self.grid).words[entries].reshape(len(entries), -1), np.uint32)

    def unpack(self, blocks: Tensor, k: int) -> QuantizedTensor:
        n = blocks.shape[0]
        data = blocks.contiguous().cpu().numpy().reshape(n, k // _BLOCK, -1)
        step = max(1, _ROWS // max(k, 1))
        codes, scales, d = [], [], []
        for start in range(0, n, step):
            rows = data[start : start + step]
            fields = self.split(rows.reshape(-1, rows.shape[-1]))
            codes.append(torch.from_numpy(fields.codes.view(np.uint8).reshape(len(rows), -1)))
            scales.append(torch.from_numpy(fields.scales.reshape(len(rows), -1).astype(np.uint8)))
            d.append(torch.from_numpy(fields.d.view(np.float16).reshape(len(rows), -1).copy()))
        factors = (torch.cat(scales), torch.cat(d))[-len(self.spec.scales) :]
        return QuantizedTensor(
            spec=self.spec,
            shape=(n, k),
            codes=torch.cat(codes).to(blocks.device),
            scales=tuple(f.to(blocks.device) for f in factors),
            codebook=(torch.tensor(self.values).to(blocks.device),) if self.values else (),
        )

    def pack(self, weight: QuantizedTensor) -> Tensor:
        n, k = weight.shape
        codes = unpack(weight.codes, self.spec.element.bits, (n, k), weight.packing)
        held = [s.contiguous().cpu().numpy() for s in weight.scales]
        step = max(1, _ROWS // max(k, 1))
        parts = []
        for start in range(0, n, step):
            at = slice(start, start + step)
            rows = codes[at].contiguous().cpu().numpy()
            d = held[-1][at].reshape(-1).view(np.uint16)
            fields = _Fields(rows.reshape(-1, _BLOCK), held[0][at].reshape(len(d), -1), d)
            parts.append(torch.from_numpy(self.join(fields).reshape(len(rows), -1)))
        return torch.cat(parts).to(weight.codes.device)


def _table(magnitudes: tuple[float, ...], over: float) -> tuple[float, ...]:
    """16 values: magnitudes, then the same negative; what no code names is 0."""
    half = [m / over for m in magnitudes] + [0.0] * (8 - len(magnitudes))
    return (*half, *(-v for v in half))


class IQ3_S(_Codes):
    """d | 64 low bytes of entries | 8 of their ninth bits | 32 of signs | 4 of scales"""

    grid, values = "IQ3_S", _table((1, 3, 5, 7, 9, 11, 13, 15), 1)

    def split(self, b: Array) -> _Fields:
        d, qs, qh, signs, scales = _cut(b, 2, 64, 8, 32)
        entries = (
            qs.astype(np.uint16)
            | (_bits(qh, range(8)) & 1).reshape(len(b), 64).astype(np.uint16) << 8
        )
        codes = self._codes_of(entries) | _sign_words()[signs]
        return _Fields(codes, 1 + 2 * _nibbles(scales), _words(d, np.uint16))

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        entries = _entries("IQ3_S", f.codes.reshape(n, 64, 4) & 7)
        high = _join((entries >> 8).reshape(n, 8, 8), range(8), np.uint8)
        signs = _join((f.codes >> 3).reshape(n, 32, 8), range(8), np.uint8)
        return _bytes(f.d, entries.astype(np.uint8), high, signs, _of_nibbles(f.scales >> 1))


class IQ3_XXS(_Codes):
    """d | 64 entries | 8 words: four times seven signs, a scale of four bits"""

    grid, values = "IQ3_XXS", _table((4, 12, 20, 28, 36, 44, 52, 62), 4)

    def split(self, b: Array) -> _Fields:
        d, qs, words = _cut(b, 2, 64)
        words = _words(words, np.uint32)
        signs = _sign_words7()[_bits(words, [0, 7, 14, 21]) & 127]
        codes = self._codes_of(qs) | signs.reshape(len(b), 32)
        return _Fields(codes, 1 + 2 * (words >> 28), _words(d, np.uint16))

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        entries = _entries("IQ3_XXS", f.codes.reshape(n, 64, 4) & 7).astype(np.uint8)
        signs = _index7((f.codes >> 3).reshape(n, 8, 4, 8))
        words = _join(signs, [0, 7, 14, 21], np.uint32) | f.scales.astype(np.uint32) >> 1 << 28
        return _bytes(f.d, entries, words)


class IQ2_XXS(_Codes):
    """d | 8 times: four entries, then a word of four times seven signs and a scale"""

    grid, values = "IQ2_XXS", _table((8, 25, 43), 8)

    def split(self, b: Array) -> _Fields:
        d, rest = _cut(b, 2)
        words = _words(rest, np.uint32).reshape(len(b), 8, 2)
        entries = _words(words[..., 0], np.uint8).reshape(len(b), 32)
        signs = _sign_words7()[_bits(words[..., 1], [0, 7, 14, 21]) & 127]
        codes = self._codes_of(entries) | signs.reshape(len(b), 32)
        return _Fields(codes, 1 + 2 * (words[..., 1] >> 28), _words(d, np.uint16))

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        entries = _entries("IQ2_XXS", f.codes.reshape(n, 32, 8) & 7).astype(np.uint8)
        signs = _index7((f.codes >> 3).reshape(n, 8, 4, 8))
        words = _join(signs, [0, 7, 14, 21], np.uint32) | f.scales.astype(np.uint32) >> 1 << 28
        both = np.stack([_words(entries, np.uint32), words], axis=-1)
        return _bytes(f.d, both)


class IQ2_XS(_Codes):
    """d | 32 words: entry of nine bits, seven signs | 8 bytes of scales"""

    grid, group, values = "IQ2_XS", 16, _table((8, 25, 43), 8)

    def split(self, b: Array) -> _Fields:
        d, qs, scales = _cut(b, 2, 64)
        words = _words(qs, np.uint16)
        codes = self._codes_of(words & 511) | _sign_words7()[words >> 9]
        return _Fields(codes, 1 + 2 * _nibbles(scales), _words(d, np.uint16))

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        entries = _entries("IQ2_XS", f.codes.reshape(n, 32, 8) & 7)
        signs = _index7((f.codes >> 3).reshape(n, 32, 8)).astype(np.uint16)
        return _bytes(f.d, entries | signs << 9, _of_nibbles(f.scales >> 1))


class IQ2_S(_Codes):
    """d | 32 low bytes of entries | 32 of signs | 8 of their two high bits | 8 of scales"""

    grid, group, values = "IQ2_S", 16, _table((8, 25, 43), 8)

    def split(self, b: Array) -> _Fields:
        d, qs, signs, qh, scales = _cut(b, 2, 32, 32, 8)
        high = (_bits(qh, [0, 2, 4, 6]) & 3).reshape(len(b), 32).astype(np.uint16)
        codes = self._codes_of(qs | high << 8) | _sign_words()[signs]
        return _Fields(codes, 1 + 2 * _nibbles(scales), _words(d, np.uint16))

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        entries = _entries("IQ2_S", f.codes.reshape(n, 32, 8) & 7)
        high = _join((entries >> 8).reshape(n, 8, 4), [0, 2, 4, 6], np.uint8)
        signs = _join((f.codes >> 3).reshape(n, 32, 8), range(8), np.uint8)
        return _bytes(f.d, entries.astype(np.uint8), signs, high, _of_nibbles(f.scales >> 1))


_LESS = np.uint32(0x33333333)  # 3 more in each of eight codes
_SHIFTED = (-0.875, 0.125, 1.125, -1.125, -0.125, 0.875, *[0.0] * 10)


class IQ1_S(_Codes):
    """d | 32 low bytes of entries | 8 words: four times three high bits, a scale, a shift"""

    grid, values = "IQ1_S", _SHIFTED

    def split(self, b: Array) -> _Fields:
        d, qs, words = _cut(b, 2, 32)
        words = _words(words, np.uint16)
        high = (_bits(words, [0, 3, 6, 9]) & 7).reshape(len(b), 32)
        less = np.repeat(words >> 15, 4, axis=1).astype(np.uint32)
        codes = self._codes_of(qs | high << 8) + less * _LESS
        return _Fields(codes, 1 + 2 * (words >> 12 & 7), _words(d, np.uint16))

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        less = (f.codes > 2).reshape(n, 8, 32)[..., 0].astype(np.uint16)
        entries = _entries("IQ1_S", (f.codes % 3).reshape(n, 32, 8))
        words = _join((entries >> 8).reshape(n, 8, 4), [0, 3, 6, 9], np.uint16)
        words |= (f.scales >> 1).astype(np.uint16) << 12 | less << 15
        return _bytes(f.d, entries.astype(np.uint8), words)


class IQ1_M(_Codes):
    """32 low bytes of entries | 16 of nibbles: three high bits, a shift | 4 words: four times three
    bits of scales, a nibble of d"""

    grid, group, values = "IQ1_S", 16, _SHIFTED

    def split(self, b: Array) -> _Fields:
        qs, qh, words = _cut(b, 32, 16)
        words = _words(words, np.uint16)
        nibbles = _nibbles(qh).astype(np.uint16)
        codes = self._codes_of(qs | (nibbles & 7) << 8) + (nibbles >> 3).astype(np.uint32) * _LESS
        scales = (_bits(words, [0, 3, 6, 9]) & 7).reshape(len(b), 16)
        d = _join(words >> 12, [0, 4, 8, 12], np.uint16)
        return _Fields(codes, 1 + 2 * scales, d)

    def join(self, f: _Fields) -> Array:
        n = len(f.codes)
        less = (f.codes > 2).reshape(n, 32, 8)[..., 0].astype(np.uint8)
        entries = _entries("IQ1_S", (f.codes % 3).reshape(n, 32, 8))
        nibbles = (entries >> 8).astype(np.uint8) | less << 3
        words = _join((f.scales >> 1).reshape(n, 4, 4), [0, 3, 6, 9], np.uint16)
        words |= (_bits(f.d, [0, 4, 8, 12]) & 15) << 12
        return _bytes(entries.astype(np.uint8), _of_nibbles(nibbles), words)


class TQ2_0(_Codes):
    """64 bytes: of 32 in turn the four codes of two bits are columns 32 apart | d"""

    def __init__(self) -> None:
        self.spec = QuantSpec(
            element=Element.uint(2),
            scales=(Scale(element="f16", grain=group(_BLOCK)),),
            zero=Zero(kind="const", value=1),
        )

    def split(self, b: Array) -> _Fields:
        qs, d = _cut(b, 64)
        codes = _bits(qs.reshape(len(b), 2, 32), [0, 2, 4, 6]) & 3
        codes = codes.transpose(0, 1, 3, 2).reshape(len(b), 64, 4)
        return _Fields(
            _join(codes, [0, 2, 4, 6], np.uint8),
            np.ones((len(b), 1), np.uint8),
            _words(d, np.uint16),
        )

    def join(self, f: _Fields) -> Array:
        codes = f.codes.reshape(len(f.codes), 2, 4, 32).transpose(0, 1, 3, 2)
        return _bytes(_join(codes, [0, 2, 4, 6], np.uint8), f.d)


iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s = IQ1_S(), IQ1_M(), IQ2_XXS(), IQ2_XS(), IQ2_S()
iq3_xxs, iq3_s, tq2_0 = IQ3_XXS(), IQ3_S(), TQ2_0()
