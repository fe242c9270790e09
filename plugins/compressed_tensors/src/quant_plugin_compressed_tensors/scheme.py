"""What all compressed-tensors layers share: arguments, scales, activations, bias, checks.

    W[n, k] = (v[n, k] - z) * weight_scale       z = 0 if symmetric

The storage of the codes v differs by format; each has a module of its own with a subclass:
``packed`` (pack-quantized), ``plain`` (int-quantized, naive-quantized integers) and ``floats``
(fp8, fp6, fp4). Activations are in ``inputs``.
Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import (
    CHANNEL,
    TENSOR,
    Axis,
    Grain,
    LayerDesc,
    Packing,
    ParamSpec,
    group,
)
from quant_plugin_compressed_tensors.args import FLOAT_SCALES, QuantArgs
from quant_plugin_compressed_tensors.transforms import Rotation

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = [
    "KV_RULE",
    "CtScheme",
    "grain_of",
    "scalar_or",
    "scale_shape",
    "scheme_name",
]

KV_RULE = "KV-cache scales present, not applied"


def _word(args: QuantArgs) -> str:
    """``8``, ``fp8``, ``mxfp4``, ``nvfp4``."""
    if args.kind == "int":
        return str(args.bits)
    mx = args.group_size == 32 and (args.bits < 8 or FLOAT_SCALES.get(args.scale_dtype) == "e8m0")
    kind = "nvfp" if args.strategy == "tensor_group" else "mxfp" if mx else "fp"
    return f"{kind}{args.bits}"


def scheme_name(weights: QuantArgs, inputs: QuantArgs | None) -> str:
    """``w4a16``, ``w8a8``, ``w4afp8``, ``wfp8afp8``, ``wnvfp4anvfp4``, ``wmxfp4a16``."""
    return f"w{_word(weights)}a{'16' if inputs is None else _word(inputs)}"


def grain_of(args: QuantArgs) -> Grain:
    """Grain of a weight scale."""
    if args.strategy == "tensor":
        return TENSOR
    if args.strategy == "channel":
        return CHANNEL
    return args.block if args.strategy == "block" else group(args.group_size)


def scale_shape(args: QuantArgs, n: int, k: int) -> tuple[int, ...]:
    """Stored shape of a weight scale, and of zero points that are not packed."""
    r, c = grain_of(args)
    if args.strategy == "tensor":
        return (1,)
    return (-(-n // r) if r else 1, -(-k // c) if c else 1)


def scalar_or(scheme: CtScheme, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Stored shape of a tensor; () if the file holds the single value without an axis."""
    return () if name in scheme.scalars else shape


def _param(
    name: str, shape: tuple[int, ...], dtype: str, axes: tuple[Axis, ...], role: str
) -> ParamSpec:
    """A required tensor of one dtype."""
    return ParamSpec(name=name, shape=shape, dtypes=(dtype,), axes=axes, role=role)


@dataclass(frozen=True, kw_only=True)
class CtScheme(Scheme):
    """How one layer is stored.

    Attributes:
        weights, inputs: the config's arguments; inputs None: activations stay float.
        format: the storage format, as the config names it.
        scale_dtype, input_scale_dtype: stored dtypes.
        zero_dtype: stored dtype of the zero points, "" if none are stored.
        has_g_idx: whether ``weight_g_idx`` is stored; it is written back if so.
        scalars: stored tensors of a single value that have no axis.
        rotations: matrices applied around the matmul while the model runs.
        output_scale: whether an older kind of KV-cache scale lies beside the weights.
        source: file of the config, for messages.
    """

    weights: QuantArgs
    inputs: QuantArgs | None = None
    format: str
    scale_dtype: str = "bfloat16"
    input_scale_dtype: str = "bfloat16"
    zero_dtype: str = ""
    has_g_idx: bool = False
    scalars: frozenset[str] = frozenset()
    rotations: tuple[Rotation, ...] = ()
    output_scale: bool = False
    source: str = field(default="", compare=False)

    @property
    def bits(self) -> int:
        return self.weights.bits

    @property
    def half(self) -> int:
        """The unsigned code of the value 0."""
        return 1 << (self.bits - 1)

    @property
    def ordered(self) -> bool:
        """Columns are in the order of their groups."""
        return self.weights.actorder != "group" or self.weights.strategy != "group"

    @property
    def input_scale_name(self) -> str:
        """Stored tensor with the static scale of activations; "" if there is none."""
        if self.inputs is None or self.inputs.dynamic is True:
            return ""
        return "input_global_scale" if self.inputs.dynamic == "local" else "input_scale"

    @abstractmethod
    def codes_params(self) -> tuple[ParamSpec, ...]:
        """Codes and zero points: the part that differs by format."""

    @abstractmethod
    def read_codes(
        self, where: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Packing, Tensor | None]:
        """Stored tensors to canonical codes, their packing, and zero codes uint8 of the scales'
        grid (None: no zero points are stored)."""

    @abstractmethod
    def write_codes(
        self, codes: Tensor, packing: Packing, zeros: Tensor | None
    ) -> dict[str, Tensor]:
        """Exact inverse of ``read_codes``."""

    def group_axis(self) -> Axis:
        """How the groups of a scale or zero point run along the input."""
        c = grain_of(self.weights)[1]
        if not c:
            return Axis(tag="fixed", cut="replicate")
        return Axis(tag="group", per=Fraction(c), cut="slice" if self.ordered else "replicate")

    def scale_axes(self) -> tuple[Axis, ...]:
        """Axes of ``weight_scale`` and of zero points that are not packed."""
        if self.weights.strategy == "tensor":
            return (Axis(tag="fixed", cut="replicate"),)
        r, _ = grain_of(self.weights)
        return (Axis(tag="out", per=Fraction(r)), self.group_axis())

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        return (*self._own_params, bias_param(layer, self.shape[0]))

    @functools.cached_property
    def _own_params(self) -> tuple[ParamSpec, ...]:
        """All but the bias: the same for every layer of this scheme."""
        n, k = self.shape
        scale = scalar_or(self, "weight_scale", scale_shape(self.weights, n, k))
        out = [
            *self.codes_params(),
            _param("weight_scale", scale, self.scale_dtype, self.scale_axes(), "scales"),
        ]
        fixed = (Axis(tag="fixed", cut="replicate"),)
        if self.has_g_idx or not self.ordered:
            columns = (Axis(tag="in"),)
            out.append(_param("weight_g_idx", (k,), "int32", columns, "gather"))
        if name := self.input_scale_name:
            dtype = "float32" if name == "input_global_scale" else self.input_scale_dtype
            shape = scalar_or(self, name, (1,))
            out.append(_param(name, shape, dtype, fixed, "input_scale"))
            if self.inputs is not None and not self.inputs.symmetric:
                out.append(_param("input_zero_point", (1,), "int8", fixed, "input_zero"))
        out += [
            ParamSpec(
                name=name,
                shape=(1,),
                dtypes=(*SCALE_ELEMENTS, "int8"),
                axes=fixed,
                role="output_scale",
                need="ignored",
                rule=KV_RULE,
            )
            for name in (("output_scale", "output_zero_point") if self.output_scale else ())
        ]
        out += [rotation.param for rotation in self.rotations]
        return tuple(out)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_compressed_tensors import layout

        check_tensors(layer, self.params(layer), tensors, plugin="compressed_tensors")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_compressed_tensors import layout

        return layout.serialize(self, layer.stored, tensors)

    def quantize(
        self, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None = None
    ) -> LayerTensors:
        from quant_plugin_compressed_tensors.online import quantize

        return quantize(self, layer, dense)
