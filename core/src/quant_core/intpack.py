"""Integer weights in 32-bit words: zeros, symmetric files, and the turn to the canonical form.

    qzeros  int32 [G, words of N]   zeros of one group in a row, packed along N like the codes
    scales  float [G, N]            stored group by group; the canonical form wants [N, G]

Two dialects of zeros: ``z`` as it is, or ``z - 1``. Writers of the second with 2, 4 or 8 bits
subtract 1 from every field by subtracting 0x11111111 (or alike) from whole words, so a zero of 0
borrows from its neighbour:

    z   0  5  0  0  0  0  0  0        stored   15  3 15 14 14 14 14 14

Adding the constant to whole words undoes that; adding 1 per field would not, and where no field
is 2**bits - 1 both agree. Other widths are shifted per field, modulo 2**bits.

Sources, facts only: GPTQModel 7.7.0 ``utils/model.py`` (convert_gptq_v1_to_v2_format_module),
AutoRound 0.16.1 ``auto_round_extension/torch/qlinear_torch_zp.py``.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.errors import ConfigError, QuantWarning
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.packing import pack, unpack
from quant_core.spec import Packing, QuantSpec
from quant_core.tensors import QuantizedTensor

__all__ = [
    "check_symmetric",
    "from_groups",
    "read_zeros",
    "stored_zeros",
    "usual_zeros",
    "write_zeros",
]

_WORD_BITS = (2, 4, 8)  # widths whose fields fill words, so that the shift acts on whole words


def _add_words(words: Tensor, constant: int) -> Tensor:
    """int32 words + constant modulo 2**32."""
    total = (words.to(torch.int64) + constant) & 0xFFFFFFFF
    return (total - ((total >> 31) << 32)).to(torch.int32)


def _ones(bits: int) -> int:
    """A word with 1 in every field: 0x11111111 for 4 bits."""
    return sum(1 << at for at in range(0, 32, bits))


def read_zeros(qzeros: Tensor, bits: int, n: int, packing: Packing, *, minus_one: bool) -> Tensor:
    """Stored zeros as codes.

    Args:
        packing: order of qzeros seen as a matrix [G, N], packed along N.
        minus_one: z - 1 is stored.

    Shapes:  qzeros int32 (G, words of N)  ->  uint8 (G, N)
    Raises:  LayoutError if the shape disagrees with bits and N.
    """
    if minus_one and bits in _WORD_BITS:
        qzeros = _add_words(qzeros, _ones(bits))
    zeros = unpack(qzeros, bits, (qzeros.shape[0], n), packing)
    if minus_one and bits not in _WORD_BITS:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return zeros


def write_zeros(zeros: Tensor, bits: int, packing: Packing, *, minus_one: bool) -> Tensor:
    """Inverse of ``read_zeros``: uint8 (G, N) to int32 words."""
    if minus_one and bits not in _WORD_BITS:
        zeros = (zeros - 1) & ((1 << bits) - 1)
    words = pack(zeros, bits, packing)
    return _add_words(words, -_ones(bits)) if minus_one and bits in _WORD_BITS else words


def _half_zeros(bits: int, n: int, packing: Packing, minus_one: bool) -> Tensor | int:
    """What every word of zeros that all are 2**(bits-1) is; else the words of one group."""
    half = 1 << (bits - 1)
    if bits in _WORD_BITS and n % (32 // bits) == 0 and packing.word == "int32":
        word = (half - minus_one) * _ones(bits)
        return word - ((word >> 31) << 32)
    row = torch.full((1, n), half, dtype=torch.uint8, device="cpu")
    return write_zeros(row, bits, packing, minus_one=minus_one)


def usual_zeros(qzeros: Tensor, bits: int, n: int, packing: Packing, *, minus_one: bool) -> bool:
    """Whether all zeros are 2**(bits-1) in the dialect that is said; see ``read_zeros``."""
    wanted = _half_zeros(bits, n, packing, minus_one)
    if isinstance(wanted, int) and qzeros.numel():
        least, most = torch.aminmax(qzeros)  # one pass: an eighth of comparing every word
        return int(least) == int(most) == wanted
    return bool((qzeros == wanted).all())


def check_symmetric(
    qzeros: Tensor,
    bits: int,
    n: int,
    packing: Packing,
    *,
    minus_one: bool,
    where: str,
    source: str,
    plugin: str,
    claim: str = "sym is true",
    fix: str = "Set sym to false if the checkpoint is asymmetric.",
    flagged: bool = True,
) -> None:
    """All zeros are 2**(bits-1) in the dialect of the config, or in the other one.

    A symmetric file with the wrong dialect is readable: its values tell. It is then written back
    with the constants of its config.

    Args:
        where: stored module path.
        source: file of the config.
        claim: why the layer counts as symmetric.
        flagged: the config states the dialect, so another one deserves a warning.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` if zeros have other values.
    """
    half = 1 << (bits - 1)
    if usual_zeros(qzeros, bits, n, packing, minus_one=minus_one):
        return  # equal words, nothing to unpack
    zeros = read_zeros(qzeros, bits, n, packing, minus_one=minus_one)
    if bool((zeros == half).all()):
        return
    other = read_zeros(qzeros, bits, n, packing, minus_one=not minus_one)
    if bool((other == half).all()):
        if flagged:
            said, found = ("z - 1", "z") if minus_one else ("z", "z - 1")
            warnings.warn(
                f"{source}: the config implies that zeros are stored as {said}, the values are "
                f"{found} (first: {where}); read by the values",
                QuantWarning,
                stacklevel=3,
            )
        return
    bad = (zeros != half).nonzero()
    g, column = (int(i) for i in bad[0])
    actual = int(zeros[g, column])
    raise ConfigError(
        f"{where}: {claim} ({source}), but {len(bad)} zero points differ from {half} "
        f"(group {g}, output {column}: {actual}); expected {half} everywhere. {fix}",
        code="Q-CFG-CONFLICT",
        path=source or None,
        tensor=f"{where}.qzeros",
        expected=half,
        actual=actual,
        plugin=plugin,
    )


def from_groups(
    spec: QuantSpec,
    shape: tuple[int, int],
    packing: Packing,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    gather: Tensor | None = None,
) -> QuantizedTensor:
    """The canonical weight of codes in stored words and scales stored group by group.

    ``spec`` is taken as it is but for the element of its one scale, which follows the stored
    dtype, and for the gather.

    Shapes:  scales float (G, N), zeros uint8 (G, N) or None  ->  (N, G) each, views of them
    """
    level = replace(spec.scales[0], element=SCALE_ELEMENTS[str(scales.dtype)[6:]])
    return QuantizedTensor(
        spec=replace(spec, scales=(level,), gather=gather is not None),
        shape=shape,
        codes=codes,
        packing=packing,
        scales=(scales.t(),),
        zeros=None if zeros is None else zeros.t(),
        gather=gather,
    )


def stored_zeros(qt: QuantizedTensor) -> Tensor:
    """Zeros of every group, those of a constant spelled out: uint8 (N, G).

    For weights whose spec ``intspec.check_plain`` accepts.
    """
    if qt.zeros is not None:
        return qt.zeros
    value = qt.spec.zero.value if qt.spec.zero is not None else 0
    scales = qt.scales[0]
    return torch.full(scales.shape, value, dtype=torch.uint8, device=scales.device)
