"""One call of the operators for each form; arguments as their pages describe them.

    int8, int4   q, s = npu_dynamic_quant(x)          y = npu_quant_matmul(q, W^T, scale, s)
    static       q = npu_quantize(x, s, z)            y = (q W^T + acc_bias) * out_scale
    ""           y = npu_weight_quant_batchmatmul(x, W^T, scale, offset)    W = (code + offset) * s
    mxfp8        q, s = npu_dynamic_mx_quant(x)       y = npu_quant_matmul(q, W^T, scale, s, 32)
    experts      rows sorted by expert, then npu_grouped_matmul

Weights are stored [N, K] and given as transposed views, which the operators read without a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_kernels_npu.device import torch_npu
from quant_kernels_npu.support import Form

__all__ = ["run_grouped", "run_linear"]


def _check(form: Form, x: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] != form.k or str(x.dtype) != f"torch.{form.dtype}":
        raise LayoutError(
            f"input has shape {tuple(x.shape)} {x.dtype}, expected [..., {form.k}] {form.dtype}. "
            "Pass the layer's own activations, or cast the model as a whole.",
            code="Q-LAYOUT-INPUT",
            expected=(form.k, form.dtype),
            actual=(tuple(x.shape), str(x.dtype)),
        )


def run_linear(form: Form, names: tuple[str, ...], tensors: list[Tensor], x: Tensor) -> Tensor:
    """x [..., K] -> [..., N] in its dtype."""
    _check(form, x)
    held = dict(zip(names, tensors, strict=True))
    flat = x.reshape(-1, form.k)
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], form.n)
    y = _LINEAR[form.acts](form, held, flat)
    return y.view(*x.shape[:-1], form.n)


def _bias(held: dict[str, Tensor]) -> Tensor | None:
    bias = held.get("bias")
    return None if bias is None else bias.float()


def _int8(form: Form, held: dict[str, Tensor], x: Tensor) -> Tensor:
    npu = torch_npu()
    q, s = npu.npu_dynamic_quant(x)
    y: Tensor = npu.npu_quant_matmul(
        q, held["weight"].t(), held["scales_0"].float().view(-1),
        pertoken_scale=s.view(-1), bias=_bias(held), output_dtype=x.dtype,
    )  # fmt: skip
    return y


def _int4(form: Form, held: dict[str, Tensor], x: Tensor) -> Tensor:
    npu = torch_npu()
    q, s = npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
    y: Tensor = npu.npu_quant_matmul(
        q, held["weight"].t(), held["scales_0"].float().view(-1),
        pertoken_scale=s.view(-1), bias=None, output_dtype=torch.float16,
    )  # fmt: skip
    bias = _bias(held)
    return y.to(x.dtype) if bias is None else (y.float() + bias).to(x.dtype)


def _static(form: Form, held: dict[str, Tensor], x: Tensor) -> Tensor:
    npu = torch_npu()
    zero = held["input_zero"].view(torch.int8).to(torch.int32)
    scale = held["input_scale"].float()
    q = npu.npu_quantize(x.float(), scale, zero, torch.qint8, -1, True)
    y: Tensor = npu.npu_quant_matmul(
        q, held["weight"].t(), held["out_scale"], bias=held["acc_bias"], output_dtype=x.dtype
    )
    return y


def _float(form: Form, held: dict[str, Tensor], x: Tensor) -> Tensor:
    npu = torch_npu()
    stored = held["scales_0"]
    scale = torch.ones_like(stored) if form.after else stored
    scale = scale.to(x.dtype)
    zeros = held.get("zeros")
    offset = None if zeros is None else (form.signed - zeros.to(x.dtype)).t()
    bias = held.get("bias")
    if bias is not None:
        bias = bias.to(torch.float16 if x.dtype == torch.float16 else torch.float32)
    y: Tensor = npu.npu_weight_quant_batchmatmul(
        x, held["weight"].t(), scale.t(), antiquant_offset=offset,
        bias=None if form.after else bias, antiquant_group_size=form.group,
    )  # fmt: skip
    if not form.after:
        return y
    wide = y.float() * stored.float().view(-1)
    return (wide if bias is None else wide + bias).to(x.dtype)


def _mx(form: Form, held: dict[str, Tensor], x: Tensor) -> Tensor:
    npu = torch_npu()
    q, s = npu.npu_dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn, scale_alg=form.scale_alg)
    scale = held["scales_0"].view(form.n, form.k // 64, 2).transpose(0, 1)
    y: Tensor = npu.npu_quant_matmul(
        q, held["weight"].t(), scale, scale_dtype=npu.float8_e8m0fnu, pertoken_scale=s,
        pertoken_scale_dtype=npu.float8_e8m0fnu, bias=_bias(held), output_dtype=x.dtype,
        group_sizes=[1, 1, 32],
    )  # fmt: skip
    return y


_LINEAR = {"int8": _int8, "int4": _int4, "static": _static, "": _float, "mxfp8": _mx}


def run_grouped(
    form: Form, names: tuple[str, ...], tensors: list[Tensor], x: Tensor, experts: Tensor
) -> Tensor:
    """x [T, K], expert index [T] -> [T, N]; rows of no expert of ours are zero."""
    _check(form, x)
    held = dict(zip(names, tensors, strict=True))
    if not x.shape[0]:
        return x.new_empty(0, form.n)
    npu, count = torch_npu(), form.experts
    ours = (experts >= 0) & (experts < count)
    index = torch.where(ours, experts, count)  # the others last, in no group
    order = index.argsort(stable=True)
    sizes = torch.zeros(count + 1, dtype=torch.int64, device=x.device)
    sizes = sizes.scatter_add(0, index.long(), torch.ones_like(index, dtype=torch.int64))[:count]
    q, s = npu.npu_dynamic_quant(x[order])
    (y,) = npu.npu_grouped_matmul(
        [q], [held["weight"]], scale=[held["scales_0"].float().view(count, form.n)],
        per_token_scale=[s.view(-1)], group_list=sizes, split_item=2, group_type=0,
        group_list_type=1, output_dtype=x.dtype,
    )  # fmt: skip
    out = torch.empty_like(y).index_copy_(0, order, y)
    return torch.where(ours[:, None], out, torch.zeros((), dtype=x.dtype, device=x.device))
