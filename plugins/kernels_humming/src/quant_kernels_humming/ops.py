"""``quant_humming::linear``: one opaque op around a ``HummingLayer`` made on the first call.

Left to itself the library compiles the kernels of all numbers of rows of x at the first call, some
thirty a layer. Here each call names the one configuration that the library's own table has for its
rows, so a kernel is compiled when it first runs.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quant_core.kernels.base import Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.kernels.storage import misused
from quant_core.spec_json import op_from_text
from quant_kernels_humming.layout import configs, tensors_of

__all__ = ["run_linear"]


@dataclass(frozen=True, slots=True)
class _Made:
    """The library's layer for one version of the weights."""

    version: int
    layer: Any
    bounds: tuple[int, ...]  # largest number of rows of each configuration, ascending
    configs: tuple[str, ...]

    def __call__(self, x: Tensor) -> Tensor:
        at = min(bisect_left(self.bounds, x.shape[0]), len(self.bounds) - 1)
        y: Tensor = self.layer(x, tuning_config=self.configs[at])
        return y


_made = WeakTensorKeyDictionary()  # codes -> _Made

_lib = torch.library.Library("quant_humming", "DEF")
_lib.define("linear(Tensor x, Tensor[] tensors, str op) -> Tensor")


def _make(tensors: list[Tensor], text: str) -> _Made:
    from humming.layer import HummingLayer, HummingLayerMethod

    op = op_from_text(text)
    made = configs(op)
    if isinstance(made, Rejected):
        raise misused("humming", made)
    weight, acts = made
    names = ReferenceKernel().allocate(op, "meta")
    held = ReferenceKernel().restore(dict(zip(names, tensors, strict=True)), op)
    dtype: torch.dtype = getattr(torch, op.act_dtype)
    with torch.cuda.device(tensors[0].device):
        layer = HummingLayer(
            shape_n=op.size("n"),
            shape_k=op.size("k"),
            weight_config=dict(weight),
            input_config=None if acts is None else dict(acts),
            has_bias=held.bias is not None,
            torch_dtype=dtype,
        ).to(tensors[0].device)
        layer.load_from_tensors(tensors_of(held.weight, held.bias))
        layer.transform()
        table = HummingLayerMethod.get_default_tuning_configs(layer)
    return _Made(
        version=tensors[0]._version,
        layer=layer,
        bounds=tuple(most for _, most, _ in table),
        configs=tuple(json.dumps(config) for _, _, config in table),
    )


def _linear(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    codes = tensors[0]
    made = _made.get(codes)
    if made is None or made.version != codes._version:
        made = _made[codes] = _make(tensors, op)
    spec = op_from_text(op)
    flat = x.reshape(-1, spec.size("k")).contiguous()
    shape = (*x.shape[:-1], spec.size("n"))
    if not flat.shape[0]:
        return x.new_empty(shape)
    return made(flat).reshape(shape)


def _fake(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], op_from_text(op).size("n"))


_lib.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("quant_humming::linear", _fake, lib=_lib)


def run_linear(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.ops.quant_humming.linear(x, tensors, text)
    return result
