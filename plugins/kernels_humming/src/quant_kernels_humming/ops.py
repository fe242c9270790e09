"""``quant_humming::linear``: one opaque op around a ``HummingLayer`` made on the first call."""

from __future__ import annotations

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

_made = WeakTensorKeyDictionary()  # codes -> (their version, layer)

_lib = torch.library.Library("quant_humming", "DEF")
_lib.define("linear(Tensor x, Tensor[] tensors, str op) -> Tensor")


def _make(tensors: list[Tensor], text: str) -> Any:
    from humming.layer import HummingLayer

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
    return layer


def _linear(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    codes = tensors[0]
    version, layer = _made.get(codes, (-1, None))
    if layer is None or version != codes._version:
        layer = _make(tensors, op)
        _made[codes] = (codes._version, layer)
    spec = op_from_text(op)
    flat = x.reshape(-1, spec.size("k")).contiguous()
    shape = (*x.shape[:-1], spec.size("n"))
    if not flat.shape[0]:
        return x.new_empty(shape)
    y: Tensor = layer(flat)
    return y.reshape(shape)


def _fake(x: Tensor, tensors: list[Tensor], op: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], op_from_text(op).size("n"))


_lib.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("quant_humming::linear", _fake, lib=_lib)


def run_linear(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.ops.quant_humming.linear(x, tensors, text)
    return result
