"""int-quantized and naive-quantized integers: one int8 per weight, whatever the bits.

    weight             int8 [N, K]     v; 4-bit weights (W4A8) lie in -8..7
    weight_scale       [1], [N, 1] or [N, G]
    weight_zero_point  int8, shape of the scale; only if asymmetric

8-bit weights stay as they are. Narrower ones are packed on loading, code v + 2**(b-1), and take
their bits only; writing gives the bytes back.

Source: compressed-tensors 0.19.0 ``compressors/naive_quantized/base.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import Axis, Element, Packing, ParamSpec, QuantSpec, Scale, Zero
from quant_plugin_compressed_tensors.header import Header
from quant_plugin_compressed_tensors.scheme import CtScheme, grain_of, scale_shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PlainScheme", "build"]


@dataclass(frozen=True, kw_only=True)
class PlainScheme(CtScheme):
    """One int8 per weight."""

    def codes_params(self) -> tuple[ParamSpec, ...]:
        n, k = self.shape
        codes = ParamSpec(
            name="weight",
            shape=(n, k),
            dtypes=("int8",),
            axes=(Axis(tag="out"), Axis(tag="in")),
            role="codes",
        )
        if not self.zero_dtype:
            return (codes,)
        zeros = ParamSpec(
            name="weight_zero_point",
            shape=scale_shape(self.weights, n, k),
            dtypes=(self.zero_dtype,),
            axes=self.scale_axes(),
            role="zeros",
        )
        return (codes, zeros)

    def read_codes(
        self, where: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Packing, Tensor | None]:
        from quant_plugin_compressed_tensors.layout import read_plain

        return read_plain(self, where, tensors)

    def write_codes(
        self, codes: Tensor, packing: Packing, zeros: Tensor | None
    ) -> dict[str, Tensor]:
        from quant_plugin_compressed_tensors.layout import write_plain

        return write_plain(self, codes, packing, zeros)


def build(header: Header) -> PlainScheme:
    """The scheme of one module with an int8 weight.

    Raises:
        ConfigError, LayoutError, CheckpointError: config and shapes disagree, see ``Header``.
    """
    header.check_arguments()
    args, layer = header.weights, header.layer
    shape = header.shape("weight")
    if shape is None:
        raise header.unsized("weight")
    n = shape[0] if layer.out_features is None else layer.out_features
    k = shape[1] if layer.in_features is None else layer.in_features
    header.check_groups(n, k)
    common = header.common(n, k)
    narrow = args.bits < 8
    element = Element.uint(args.bits) if narrow else Element.int(8)
    zero = Zero(kind="const", value=1 << (args.bits - 1)) if narrow else None
    if not args.symmetric:
        zero = Zero(kind="code", element=element.name)
    weight = QuantSpec(
        element=element,
        scales=(Scale(element=SCALE_ELEMENTS[common["scale_dtype"]], grain=grain_of(args)),),
        zero=zero,
        gather=args.actorder == "group" and args.strategy == "group",
    )
    return PlainScheme(
        **common,
        operands=header.operands(weight),
        zero_dtype="" if args.symmetric else "int8",
    )
