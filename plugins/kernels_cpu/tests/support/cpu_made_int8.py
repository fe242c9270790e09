"""Random layers that quantize their activations to int8, and what they compute, in float64."""

from __future__ import annotations

import torch

from quant_core.dequantize import unpack_codes
from quant_core.kernels.activations import fake_quantize
from quant_core.numerics import decode, decode_scale
from quant_core.packing import pack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    Grain,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_HALF = Zero(kind="const", value=8)


def weight(bits: int = 8, grain: Grain = CHANNEL, scale: str = "f32") -> QuantSpec:
    element = Element.int(8) if bits == 8 else Element.uint(bits)
    zero = None if bits == 8 else _HALF
    return QuantSpec(element=element, scales=(Scale(element=scale, grain=grain),), zero=zero)


def acts(
    *, bits: int = 8, static: str = "", zero: bool = False, peak: float = 0.0, most: float = 0.0
) -> QuantSpec:
    """A run-time scale per token, or a stored one of the tensor in ``static``."""
    scale = Scale(
        element=static or "f32",
        grain=TENSOR if static else CHANNEL,
        static=bool(static),
        peak=peak,
        most=most,
    )
    z = Zero(kind="code", element="int8") if zero else None
    return QuantSpec(element=Element.int(bits), scales=(scale,), zero=z)


TOKEN = acts(peak=127.5)
ASYM = acts(static="f32", zero=True)
# name -> (weight, input, combined scale)
CASES = {
    "channel f32, token 127.5": (weight(), TOKEN, False),
    "channel bf16, token 127": (weight(scale="bf16"), acts(), False),
    "channel f16, token bounded": (weight(scale="f16"), acts(most=0.02), False),
    "tensor f32, static f32": (weight(grain=TENSOR), acts(static="f32"), False),
    "channel f32, static bf16": (weight(), acts(static="bf16"), False),
    "channel f32, static asymmetric": (weight(), ASYM, False),
    "tensor f16, static asymmetric": (weight(grain=TENSOR, scale="f16"), ASYM, False),
    "group 48 f32, token": (weight(grain=group(48)), acts(), False),
    "group 32 f16, static asymmetric": (weight(grain=group(32), scale="f16"), ASYM, False),
    "4 bits, group 32, token": (weight(4, group(32), "bf16"), acts(), False),
    "4 bits, channel, 4-bit token": (weight(4), acts(bits=4), False),
    "combined scale": (weight(), acts(static="f32"), True),
    "combined scale, asymmetric": (weight(), ASYM, True),
    "combined scale, groups": (weight(grain=group(32)), ASYM, True),
}


def make(
    case: tuple[QuantSpec, QuantSpec, bool], n: int, k: int, seed: int = 0,
    bias: torch.dtype | None = None,
) -> LayerTensors:  # fmt: skip
    w, x, combined = case
    g = torch.Generator().manual_seed(seed)
    bits, (r, c) = w.element.bits, w.scales[0].grain
    grid = (n if r else 1, -(-k // c) if c else 1)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    scale = (torch.rand(grid, generator=g) * 0.1 + 0.01).to(_DTYPES[w.scales[0].element])
    qt = QuantizedTensor(spec=w, shape=(n, k), codes=pack(codes, bits, CANONICAL), scales=(scale,))
    lt = LayerTensors(operands={"weight": qt})
    if x.scales[0].static:
        lt.input_scale = torch.tensor([0.0213 + 0.001 * seed]).to(_DTYPES[x.scales[0].element])
    if x.zero is not None:
        lt.input_zero = torch.tensor([37 - 60 * seed], dtype=torch.int8).view(torch.uint8)
    if combined:
        lt.acc_bias = torch.randint(-9999, 9999, (n,), dtype=torch.int32, generator=g)
        lt.out_scale = torch.rand(n, generator=g) * 1e-3
    if bias is not None:
        lt.bias = torch.randn(n, generator=g).to(bias)
    return lt


def make_op(
    lt: LayerTensors, x: QuantSpec, act: str = "float32", kind: str = "linear", **sizes: int
) -> OpSpec:
    names = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
    features = {name for name in names if getattr(lt, name) is not None}
    if lt.bias is not None:
        features.add(f"bias:{str(lt.bias.dtype).removeprefix('torch.')}")
    n, k = lt.weight.shape[-2:]
    return OpSpec(
        op=kind,  # type: ignore[arg-type]
        operands=(("weight", lt.weight.spec), ("input", x)),
        sizes=(("n", n), ("k", k), ("k_stored", k), *sizes.items()),
        act_dtype=act,
        features=frozenset(features),
    )


def exact(x: torch.Tensor, lt: LayerTensors, spec: QuantSpec) -> torch.Tensor:
    """float64 result from the codes that ``fake_quantize`` gives, without the bias.

    What it returns is (q - z) * s rounded to float32; divided by s and rounded these are whole.
    """
    wide, scale = x.float(), spec.scales[0]
    if scale.static:
        s = decode_scale(lt.input_scale, scale.element)
    else:
        peak = scale.peak or float((1 << (spec.element.bits - 1)) - 1)
        s = wide.abs().amax(1, keepdim=True) / peak
        s = s.clamp(max=scale.most) if scale.most else s
    s = s.double()
    less_zero = (fake_quantize(wide, spec, lt.input_scale, lt.input_zero).double() / s).round()
    qt = lt.weight
    codes = decode(unpack_codes(qt), qt.spec.element).double()
    codes = codes - (qt.spec.zero.value if qt.spec.zero is not None else 0)
    if lt.out_scale is not None:
        z = 0 if lt.input_zero is None else int(lt.input_zero.view(torch.int8))
        return ((less_zero + z) @ codes.t() + lt.acc_bias.double()) * lt.out_scale.double()
    c = qt.spec.scales[0].grain[1]
    w_scale = qt.scales[0].double()
    if c:
        w_scale = w_scale.repeat_interleave(c, 1)[:, : codes.shape[1]]
    return less_zero @ (codes * w_scale).t() * s
