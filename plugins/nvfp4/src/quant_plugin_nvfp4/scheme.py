"""One ModelOpt layer: which tensors it stores, and their way to the canonical form.

    weight            codes, as ``Algo.stored`` says
    weight_scale      [], [N], [N, K/g] or [N/128, 1, K/128, 1]
    weight_scale_2    float32 [], fp4 and W4A8 only
    input_scale       float32 [], where activations have a stored scale
    pre_quant_scale   [K], multiplies the input first
    bias              [N]

Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import Axis, LayerDesc, ParamSpec, Transform
from quant_plugin_nvfp4.algos import Algo

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["KV_RULE", "SMOOTH", "ModelOptScheme", "scheme_of"]

KV_RULE = "KV-cache scales present, not applied"
SMOOTH = Transform(site="input", kind="scale", key="pre_quant_scale", tp="block")
_FLOATS = tuple(SCALE_ELEMENTS)
_ELEMENTS = {**SCALE_ELEMENTS, "float8_e4m3fn": "fp8_e4m3", "uint8": "e8m0"}
_FIXED = Axis(tag="fixed", cut="replicate")


@dataclass(frozen=True, kw_only=True)
class ModelOptScheme(Scheme):
    """How one layer is stored.

    Attributes:
        group_size: of the weight's groups or blocks, 0 = none.
        scale_dtype, input_dtype: stored dtypes of ``weight_scale`` and ``input_scale``.
        scale_shape: stored shape of ``weight_scale``.
        vectors: stored scales of one value that have an axis: [1], not [].
        smoothed: ``pre_quant_scale`` is stored.
        cache: scales of the KV cache that lie beside the weight.
        source: file of the config, for messages.
    """

    algo: Algo
    group_size: int = 0
    scale_dtype: str = "float32"
    input_dtype: str = "float32"
    scale_shape: tuple[int, ...] = ()
    vectors: frozenset[str] = frozenset()
    smoothed: bool = False
    cache: frozenset[str] = frozenset()
    source: str = field(default="", compare=False)

    def one_value(self, name: str) -> tuple[int, ...]:
        """Stored shape of a scale of one value."""
        return (1,) if name in self.vectors else ()

    def _codes(self) -> ParamSpec:
        n, k = self.shape
        dtype, per = self.algo.stored[0], Fraction(8, self.algo.element.bits)
        pairs_of_rows = self.algo.packing.axis == "out"
        out, inp = Axis(tag="out"), Axis(tag="in")
        if pairs_of_rows:
            shape, out = (-(-n // int(per)), k), Axis(tag="out", per=per)
        else:
            shape, inp = (n, -(-k // int(per))), Axis(tag="in", per=per)
        return ParamSpec(name="weight", shape=shape, dtypes=(dtype,), axes=(out, inp), role="codes")

    def _scale_axes(self) -> tuple[Axis, ...]:
        shape, (r, c) = self.scale_shape, self.algo.grain(self.group_size)
        rows = Axis(tag="out", per=Fraction(r)) if r else _FIXED
        columns = Axis(tag="group", per=Fraction(c)) if c else _FIXED
        one = (_FIXED,)
        axes = {0: (), 1: (rows,), 2: (rows, columns), 4: (rows, *one, columns, *one)}
        return axes[len(shape)]

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, k = self.shape

        def scalar(name: str, dtype: str, role: str) -> ParamSpec:
            shape = self.one_value(name)
            axes = (_FIXED,) * len(shape)
            return ParamSpec(name=name, shape=shape, dtypes=(dtype,), axes=axes, role=role)

        out = [
            self._codes(),
            ParamSpec(
                name="weight_scale",
                shape=self.scale_shape,
                dtypes=(self.scale_dtype,),
                axes=self._scale_axes(),
                role="scales",
            ),
        ]
        if self.algo.second:
            out.append(scalar("weight_scale_2", "float32", "scales"))
        if self.algo.static_input:
            out.append(scalar("input_scale", self.input_dtype, "input_scale"))
        if self.smoothed:
            out.append(
                ParamSpec(
                    name="pre_quant_scale",
                    shape=(k,),
                    dtypes=_FLOATS,
                    axes=(Axis(tag="in"),),
                    role="transform",
                )
            )
        out += [
            ParamSpec(
                name=name, shape=(), dtypes=_FLOATS, role="cache", need="ignored", rule=KV_RULE
            )
            for name in sorted(self.cache)
        ]
        out.append(bias_param(layer, n))
        return tuple(out)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_nvfp4 import layout

        params = [p for p in self.params(layer) if p.need != "ignored"]
        check_tensors(layer, params, tensors, plugin="nvfp4")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_nvfp4 import layout

        return layout.serialize(self, layer.stored, tensors)

    def quantize(
        self, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None = None
    ) -> LayerTensors:
        from quant_plugin_nvfp4 import rounding

        return rounding.quantize(self, layer, dense, stats)


def scheme_of(
    algo: Algo,
    shape: tuple[int, int],
    *,
    group_size: int = 0,
    scale_dtype: str = "float32",
    input_dtype: str = "float32",
    smoothed: bool = False,
) -> ModelOptScheme:
    """The scheme of a matrix that is written anew.

    Args:
        group_size: where the algorithm has none of its own.
        scale_dtype: where the algorithm stores a float scale.
    """
    size = algo.group_size or group_size
    dtype = scale_dtype if algo.stored[1] == "float" else algo.stored[1]
    inputs = algo.input_spec(SCALE_ELEMENTS[input_dtype])
    return ModelOptScheme(
        name=algo.scheme,
        shape=shape,
        operands={
            "weight": algo.weight_spec(size, _ELEMENTS[dtype]),
            **({} if inputs is None else {"input": inputs}),
        },
        transforms=(SMOOTH,) if smoothed else (),
        algo=algo,
        group_size=size,
        scale_dtype=dtype,
        input_dtype=input_dtype,
        scale_shape=algo.scale_shapes(*shape, size)[0],
        smoothed=smoothed,
    )
