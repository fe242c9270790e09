"""The layers that ``benchmarks/gpu.py`` measures: dense ones and stacks of experts.

A scheme is named by what an installed plugin makes of float weights, with three additions that no
online scheme has: zero codes, fp8 or int8 activations on int4 weights, and stacks of experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quant_core.build import op_spec
from quant_core.kernels.activations import fake_quantize
from quant_core.live import quantize_matrix
from quant_core.parts import with_packing
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale, Zero
from quant_core.tensors import LayerTensors

__all__ = ["EXPERTS", "SCHEMES", "Case", "make_case", "make_stack"]

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {"group_size": 128}),
    "int4-zero": ("int4", {"group_size": 128}),
    "int4-g32": ("int4", {"group_size": 32}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "int8a16": ("int8", {"activations": False}),
    "fp8a16": ("compressed_tensors:fp8", {"activations": False}),
    "fp8": ("compressed_tensors:fp8", {}),
    "fp8_block": ("compressed_tensors:fp8_block", {}),
    "int8": ("int8", {}),
    "w4a8": ("int4", {"group_size": 128}),
    "w4a8-int8": ("int4", {"group_size": 128}),
    "mxfp8": ("compressed_tensors:mxfp8", {}),
}
EXPERTS = {"8x4096x14336": (8, 2, 4096, 14336), "128x2048x1536": (128, 8, 2048, 1536)}
"""Name -> (experts, experts a token, in_features, out_features)."""


def _token(element: Element) -> QuantSpec:
    return QuantSpec(element=element, scales=(Scale(element="f32", grain=CHANNEL, static=False),))


ACTIVATIONS = {
    "w4a8": _token(Element(name="fp8_e4m3", bits=8, kind="float")),
    "w4a8-int8": _token(Element.int(8)),
}
_DISTINCT = 4  # experts of different weights in a stack; the others repeat them
_ROUTINGS = 6  # that calls rotate over, so that small batches read cold experts


def _with_zero_codes(lt: LayerTensors) -> LayerTensors:
    """The same codes about random zeros, one a group: what an asymmetric checkpoint holds."""
    qt = lt.weight
    spec = replace(qt.spec, zero=Zero(kind="code", element=qt.spec.element.name))
    zeros = torch.randint_like(qt.scales[0], 4, 12).to(torch.uint8)
    return replace(lt, operands={"weight": replace(qt, spec=spec, zeros=zeros)})


@dataclass
class Case:
    """One operation to measure.

    Attributes:
        parts: the matrix, or the distinct ones of a stack of experts.
        experts, top: 0 for a dense layer.
    """

    scheme: str
    shape: str
    op: OpSpec
    parts: list[LayerTensors]
    experts: int = 0
    top: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.op.size("k"), self.op.size("n")

    @cached_property
    def dense(self) -> Tensor:
        """Weights [distinct, N, K] in bfloat16's stead: float32, as the codes mean them."""
        return torch.stack([lt.dequantize() for lt in self.parts])

    def load(self, kernel: Any, op: OpSpec) -> dict[str, Tensor]:
        """The kernel's buffers, filled."""
        buffers: dict[str, Tensor] = kernel.allocate(op, "cuda")
        packed = [with_packing(lt, op.packing) for lt in self.parts]
        if not self.experts:
            kernel.load_(buffers, op, packed[0], {"row": 0})
        for e in range(self.experts):
            kernel.load_(buffers, op, packed[e % len(packed)], {"row": 0, "expert": e})
        return buffers

    def inputs(self, tokens: int) -> list[tuple[Tensor, ...]]:
        """What calls rotate over besides the weights: (x,), or (x, expert of each row)."""
        k, _ = self.size
        x = torch.randn(tokens * self.top, k, device="cuda").bfloat16()
        if not self.experts:
            return [(x,)]
        picks = torch.rand(_ROUTINGS, tokens, self.experts, device="cuda")
        index = picks.topk(self.top, dim=2).indices
        return [(x, i.reshape(-1)) for i in index]

    def wanted(self, args: tuple[Tensor, ...], most: int = 64) -> Tensor:
        """The first ``most`` rows in float64, with activations rounded as the scheme says."""
        acts = self.op.operand("input")
        x = args[0][:most]
        x = (x if acts is None else fake_quantize(x.float(), acts)).double()
        if not self.experts:
            return x @ self.dense[0].double().t()
        at = args[1][:most] % len(self.parts)
        out = x.new_zeros(x.shape[0], self.size[1])
        for i, w in enumerate(self.dense):
            out[at == i] = x[at == i] @ w.double().t()
        return out


def make_case(scheme: str, shape: str) -> Case:
    """The layer ``shape``: "KxN" (in x out), or a key of ``EXPERTS``; always the same values."""
    experts, top, k, n = EXPERTS[shape] if shape in EXPERTS else (0, 1, *map(int, shape.split("x")))
    return replace(make_stack(scheme, experts, top, k, n), shape=shape)


def make_stack(scheme: str, experts: int, top: int, k: int, n: int, seed: int = 0) -> Case:
    """A stack of experts, or a layer where there are none; always the same values."""
    torch.manual_seed(seed)
    online, options = SCHEMES[scheme]
    parts = []
    for _ in range(_DISTINCT if experts else 1):
        weight = torch.randn(n, k, device="cuda").mul_(0.02).bfloat16()
        made, lt = quantize_matrix(online, weight, options=options)
        parts.append(_with_zero_codes(lt) if scheme == "int4-zero" else lt)
    kind, sizes = ("grouped_linear", {"experts": experts}) if experts else ("linear", {})
    op = op_spec(kind, parts[0], made, device="cuda", dtype=torch.bfloat16, **sizes)
    if scheme in ACTIVATIONS:
        op = replace(op, operands=(*op.operands, ("input", ACTIVATIONS[scheme])))
    shape = f"{experts}x{k}x{n}" if experts else f"{k}x{n}"
    return Case(scheme=scheme, shape=shape, op=op, parts=parts, experts=experts, top=top)
