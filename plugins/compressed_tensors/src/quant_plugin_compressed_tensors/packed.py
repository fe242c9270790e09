"""pack-quantized: integers of 2 to 8 bits in int32 words.

    weight_packed      int32 [N, W]              codes v + 2**(b-1), one stream per row along K
    weight_scale       [1], [N, 1] or [N, G]
    weight_zero_point  int32 [ceil(N*b/32), G]   the same stream along N; before 0.9.1 int8 [N, G]
                       floats [N, G]             a scale per block; of the scale's own type
    weight_shape       int64 [2]                 N, K
    weight_g_idx       int32 [K]                 group of each column (up to 0.18, actorder group)

b = 2, 4, 8 fill words evenly. For 3, 5, 6 and 7 there are two packings:

    dense   (0.18 on)  W = ceil(K*b / 32), codes run across words
    padded  (before)   W = ceil(K / (32 // b)), floor(32/b) codes a word, top bits zero

The stored width tells them apart; where both are equally wide, the writer's version does.

Source: compressed-tensors 0.19.0 and 0.9.4 ``compressors/**/pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.errors import LayoutError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import Axis, Element, Packing, ParamSpec, QuantSpec, Scale, Zero
from quant_plugin_compressed_tensors.args import INT_BITS
from quant_plugin_compressed_tensors.header import Header
from quant_plugin_compressed_tensors.scheme import CtScheme, grain_of, scale_shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PackedScheme", "build", "packed_words"]

_DENSE_SINCE = (0, 18, 0)
_SHAPE_DTYPES = {"int64": 8, "int32": 4}


def packed_words(count: int, bits: int, padded: bool) -> int:
    """int32 words that hold ``count`` codes."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


@dataclass(frozen=True, kw_only=True)
class PackedScheme(CtScheme):
    """Attributes:
    padded: floor(32/b) codes a word (before 0.18), for codes and zero points.
    shape_dtype: stored dtype of ``weight_shape``.
    """

    padded: bool = False
    shape_dtype: str = "int64"

    @property
    def packing(self) -> Packing:
        """Order of ``weight_packed``."""
        return Packing(word="int32", straddle=not self.padded)

    @property
    def zeros_packing(self) -> Packing:
        """Order of packed zero points, seen as a matrix [N, G]."""
        return replace(self.packing, axis="out")

    @property
    def pattern(self) -> tuple[Hashable, Sequence[str]] | None:
        """See ``Scheme.pattern``; one scheme stands for all modules that are stored alike."""
        looked_at = self.zero_dtype or self.has_g_idx or self.rotations or self.input_scale_name
        return None if looked_at or not self.ordered else (id(self), ("weight_shape",))

    def codes_params(self) -> tuple[ParamSpec, ...]:
        n, k = self.shape
        per_word = Fraction(32 // self.bits) if self.padded else Fraction(32, self.bits)
        out = [
            ParamSpec(
                name="weight_packed",
                shape=(n, packed_words(k, self.bits, self.padded)),
                dtypes=("int32",),
                axes=(Axis(tag="out"), Axis(tag="in", per=per_word)),
                role="codes",
            ),
            ParamSpec(
                name="weight_shape",
                shape=(2,),
                dtypes=(self.shape_dtype,),
                axes=(Axis(tag="fixed", cut="replicate"),),
                role="shape",
            ),
        ]
        if self.zero_dtype == "int32":
            groups = scale_shape(self.weights, n, k)[-1]
            zeros = ParamSpec(
                name="weight_zero_point",
                shape=(packed_words(n, self.bits, self.padded), groups),
                dtypes=("int32",),
                axes=(Axis(tag="out", per=per_word), self.group_axis()),
                role="zeros",
            )
            out.append(zeros)
        elif self.zero_dtype:
            zeros = ParamSpec(
                name="weight_zero_point",
                shape=scale_shape(self.weights, n, k),
                dtypes=(self.zero_dtype,),
                axes=self.scale_axes(),
                role="zeros",
            )
            out.append(zeros)
        return tuple(out)

    def read_codes(
        self, where: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Packing, Tensor | None]:
        from quant_plugin_compressed_tensors.layout import read_packed

        return read_packed(self, where, tensors)

    def write_codes(
        self, codes: Tensor, packing: Packing, zeros: Tensor | None
    ) -> dict[str, Tensor]:
        from quant_plugin_compressed_tensors.layout import write_packed

        return write_packed(self, codes, packing, zeros)


def _sizes(header: Header) -> tuple[int, int]:
    """(N, K): the engine's, else what the stored shapes say."""
    layer, args = header.layer, header.weights
    if layer.out_features is not None and layer.in_features is not None:
        return layer.out_features, layer.in_features
    codes, scale = header.shape("weight_packed"), header.shape("weight_scale")
    if args.strategy == "group" and scale:
        return (codes or scale)[0], scale[1] * args.group_size
    sizes = header.stored_sizes()  # a width of words alone does not tell K to the last column
    if sizes is None:
        raise header.unsized("weight_packed" if codes is None else "weight_shape")
    return sizes


def _width_error(header: Header, k: int, width: int) -> Exception:
    """Why ``width`` words hold no ``k`` codes of the config's bits."""
    bits, sizes = header.weights.bits, header.stored_sizes()
    if sizes is not None and sizes[1] != k:
        k = sizes[1]
        header.check_groups(*sizes)  # raises: the config's group size does not fit
    implied = [b for b in INT_BITS if b != bits and packed_words(k, b, False) == width]
    if len(implied) == 1:
        fix = "Correct num_bits, or restore the config of these weights."
        return header.conflict("weights.num_bits", bits, implied[0], fix)
    info = header.leaves["weight_packed"]
    expected = [(info.shape[0], packed_words(k, bits, padded)) for padded in (False, True)]
    return LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has shape {info.shape}, expected "
        f"{expected[0]} (or {expected[1]}, padded) for in_features {k} and {bits} bits. "
        "The checkpoint was cut short, or its config describes another model.",
        code="Q-LAYOUT-SHAPE",
        path=info.file,
        tensor=info.name,
        expected=expected[0],
        actual=info.shape,
        plugin="compressed_tensors",
    )


def _is_padded(header: Header, k: int) -> bool:
    """Which of the two packings the stored words have.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` if the width implies other bits, or both packings fit and
            no version tells.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-GROUP``.
    """
    bits, version = header.weights.bits, header.config.version
    if 32 % bits == 0:
        return False
    dense, padded = (packed_words(k, bits, p) for p in (False, True))
    shape = header.shape("weight_packed")
    width = shape[1] if shape else None
    if dense == padded or width is None:
        if version == (0, 0, 0) and width is not None:
            fix = "Add the version of compressed-tensors that wrote the file."
            raise header.conflict("version", None, "dense or padded words", fix)
        return version != (0, 0, 0) and version < _DENSE_SINCE
    return width == padded


def build(header: Header) -> PackedScheme:
    """The scheme of one pack-quantized module; one for all that are stored alike.

    Raises:
        ConfigError, LayoutError, CheckpointError: config and shapes disagree, see ``Header``.
    """
    alike = None
    if header.weights.strategy == "group" and not header.config.transforms:  # nothing to be read
        layer, leaves = header.layer, header.leaves
        stored = tuple((leaf, t.dtype, t.shape) for leaf, t in leaves.items())
        last = header.path.rpartition(".")[2]
        alike = (header.group.name, last, layer.out_features, layer.in_features, stored)
    known: PackedScheme | None = header.config.schemes.get(alike)
    if known is None:
        known = _build(header)
        if alike is not None:
            known = next((s for s in header.config.schemes.values() if s == known), known)
            header.config.schemes[alike] = known
    return known


def _build(header: Header) -> PackedScheme:
    header.check_arguments()
    args = header.weights
    n, k = _sizes(header)
    padded = _is_padded(header, k)
    shape = header.shape("weight_packed")
    if shape and shape[1] != packed_words(k, args.bits, padded):
        raise _width_error(header, k, shape[1])
    header.check_groups(n, k)
    zero_dtype, packs_zeros = "", args.strategy in ("group", "channel")
    common = header.common(n, k)
    zero = Zero(kind="const", value=1 << (args.bits - 1))
    if not args.symmetric:
        # the library computes in the type of the scale; a wider zero point would lose digits there
        floats = {common["scale_dtype"]} if args.strategy == "block" else set()
        allowed = dict.fromkeys(("int32", "int8", *floats))
        default = "int32" if packs_zeros else args.zp_dtype if args.zp_dtype in floats else "int8"
        zero_dtype = header.dtype("weight_zero_point", allowed, default)
        zero = Zero(kind="code", element=SCALE_ELEMENTS.get(zero_dtype, f"uint{args.bits}"))
    weight = QuantSpec(
        element=Element.uint(args.bits),
        scales=(Scale(element=SCALE_ELEMENTS[common["scale_dtype"]], grain=grain_of(args)),),
        zero=zero,
        gather=args.actorder == "group" and args.strategy == "group",
    )
    return PackedScheme(
        **common,
        operands=header.operands(weight),
        zero_dtype=zero_dtype,
        padded=padded,
        shape_dtype=header.dtype("weight_shape", _SHAPE_DTYPES, "int64"),
    )
