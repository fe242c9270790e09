"""Gradients through packed layers: for adapters (LoRA) trained on a quantized base.

The packed weight itself is never trained. For y = x W^T the gradient that reaches x is

    dL/dx = dL/dy @ W        W dequantized for the backward pass only

Where a layer also quantizes its activations, rounding counts as the identity (straight-through
estimator). The forward pass is the kernel's own; without gradients this module is not entered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_core.dequantize import dense_weight
from quant_core.errors import KernelError

if TYPE_CHECKING:
    from quant_core.nn import QuantModule

__all__ = ["grouped_with_grad", "linear_with_grad", "wants_grad"]


def wants_grad(x: Tensor) -> bool:
    """Whether a gradient has to flow back to ``x``.

    Never while compiling: a compiled forward is one graph of opaque ops, for inference.
    """
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def _weight(module: QuantModule, dtype: torch.dtype) -> Tensor:
    canonical = module.restore()
    if canonical.transforms:
        raise KernelError(
            f"{type(module).__name__}: the layer transforms its input "
            f"({canonical.transforms[0][0].kind}), expected none when gradients are needed. "
            "Detach its input, or train on a dequantized model (quant_core.dense.dequantize_).",
            code="Q-KERNEL-GRAD",
            actual=canonical.transforms[0][0].kind,
        )
    return dense_weight(canonical.weight, module.op.size("k")).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantModule, run: Any, values: list[Tensor]) -> Tensor:
        ctx.module = module
        out: Tensor = run(values, x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        return grad @ _weight(ctx.module, grad.dtype), None, None, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: Tensor, module: QuantModule, run: Any) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(experts)
        out: Tensor = run(module._values(), x, experts)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,), (experts,) = grads, ctx.saved_tensors
        weight = _weight(ctx.module, grad.dtype)
        out = grad.new_zeros(grad.shape[0], weight.shape[-1])
        for expert in experts.unique().tolist():
            if 0 <= expert < weight.shape[0]:
                rows = torch.where(experts == expert)[0]
                out[rows] = grad[rows] @ weight[expert]
        return out, None, None, None


def linear_with_grad(module: QuantModule, run: Any, values: list[Tensor], x: Tensor) -> Tensor:
    """``run(values, x)`` with a gradient to x. x [..., K] -> [..., N].

    Raises (in the backward pass):
        KernelError: ``Q-KERNEL-GRAD`` for a layer that transforms its input.
    """
    return _Linear.apply(x, module, run, values)  # type: ignore[no-any-return]


def grouped_with_grad(module: QuantModule, run: Any, x: Tensor, experts: Tensor) -> Tensor:
    """As ``linear_with_grad`` for a stack of experts. x [T, K], experts [T] -> [T, N]."""
    return _Grouped.apply(x, experts, module, run)  # type: ignore[no-any-return]
