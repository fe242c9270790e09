"""Packed modules back to dense ones: for comparisons, for fine-tuning, for tools that need weights.

Every weight becomes a float tensor of the wanted dtype, so memory grows to that of the float
model. What was tied stays tied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_core.dequantize import dense_weight
from quant_core.errors import LayoutError
from quant_core.nn import QuantComposite, QuantEmbedding, QuantGrouped, QuantLinear, QuantModule

__all__ = ["DenseGrouped", "dequantize_"]


class DenseGrouped(nn.Module):
    """One stack of experts as floats: x [T, K], expert index [T] -> [T, N]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], self.weight.shape[1])
        for expert in experts.unique().tolist():
            if 0 <= expert < self.weight.shape[0]:
                rows = torch.where(experts == expert)[0]
                out[rows] = F.linear(x[rows], self.weight[expert].to(x.dtype))
        return out


def _weight(module: QuantModule, dtype: torch.dtype) -> Tensor:
    op = module.op
    if len(op.operands) > 1 or module.restore().transforms:
        raise LayoutError(
            f"{op.op} with quantized activations or transforms has no dense form of equal results, "
            "expected weights alone. Keep the layer packed.",
            code="Q-LAYOUT-REPRESENT",
            actual=[role for role, _ in op.operands],
        )
    return dense_weight(module.restore().weight, op.size("k")).to(dtype)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _linear(weight: nn.Parameter, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    out.weight = weight
    if bias is not None:
        out.bias = _parameter(bias.to(dtype))
    return out


def dequantize_(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replace every packed module of ``model`` by a dense one, in place.

    Args:
        dtype: of the dense weights: float32, bfloat16 or float16.

    Returns:
        ``model``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for a layer that also quantizes its activations; the
            model is unchanged up to that layer.
    """
    tables: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding):
            weight = tables[id(module)] = _parameter(_weight(module, dtype))
            rows, width = weight.shape
            table = nn.Embedding(rows, width, device="meta")
            table.weight = weight
            model.set_submodule(name, table)
    inside: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if inside and name.startswith(inside):
            continue
        if isinstance(module, QuantComposite):
            parts = [p for p in module.parts if isinstance(p, QuantModule)]
            weight = _parameter(torch.cat([_weight(p, dtype) for p in parts]))
            biases = [p.restore().bias for p in parts]
            present = [b.to(dtype) for b in biases if b is not None]
            bias = torch.cat(present) if len(present) == len(parts) else None
            model.set_submodule(name, _linear(weight, bias, dtype))
            inside = (*inside, f"{name}.")
        elif isinstance(module, QuantGrouped):
            model.set_submodule(name, DenseGrouped(_weight(module, dtype)))
        elif isinstance(module, QuantLinear):
            owner = module._owner
            shared = tables.get(id(owner)) if owner is not None else None
            weight = shared if shared is not None else _parameter(_weight(module, dtype))
            model.set_submodule(name, _linear(weight, module.restore().bias, dtype))
    return model
