"""torch_npu's operators on the CPU, written from their pages (see docs/kernels/npu.md).

Each checks the dtypes and shapes that its page allows, and computes its formula in float64, so that
a call with wrong arguments fails here as it would on a device. What pages leave open (the value
of a row of zeros, the order of nibbles) is taken as vLLM-Ascend's and SGLang's own stand-ins do.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__version__ = "7.2.0.emulated"
float8_e8m0fnu = 293  # an integer on a device too

_HALF = (torch.float16, torch.bfloat16)
calls: list[str] = []


def _nibbles(codes: Tensor) -> Tensor:
    """int codes [..., 8 n] to int32 [..., n], written value by value."""
    flat = codes.reshape(-1, 8).tolist()
    words = [sum((int(v) & 15) << (4 * i) for i, v in enumerate(row)) for row in flat]
    packed = np.array(words, dtype=np.uint32).astype(np.int32)
    return torch.from_numpy(packed).view(*codes.shape[:-1], -1)


def _int4(words: Tensor, *, axis: int) -> Tensor:
    """int32 words to signed codes along ``axis``."""
    moved = words.movedim(axis, -1).contiguous()
    parts = [(moved.long() >> (4 * i)) & 15 for i in range(8)]
    codes = torch.stack(parts, -1).flatten(-2)
    return (codes - 16 * (codes > 7)).movedim(-1, axis)


def npu_dynamic_quant(x, *, smooth_scales=None, group_index=None, dst_type=None):
    calls.append("npu_dynamic_quant")
    assert x.dtype in _HALF
    assert x.dim() >= 2
    assert smooth_scales is None
    assert group_index is None
    assert dst_type in (None, torch.int8, torch.quint4x2)
    largest = 7 if dst_type == torch.quint4x2 else 127
    scale = x.float().abs().amax(-1) / largest
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (x.float() / safe[..., None]).round().clamp(-largest - 1, largest)
    if dst_type == torch.quint4x2:
        assert x.shape[-1] % 8 == 0
        return _nibbles(q.to(torch.int32)), scale
    return q.to(torch.int8), scale


def npu_quantize(input, scales, zero_points, dtype, axis=1, div_mode=True):
    calls.append("npu_quantize")
    assert input.dtype in (*_HALF, torch.float32)
    assert dtype == torch.qint8
    assert div_mode
    assert scales.dtype in (torch.float32, torch.bfloat16)
    assert scales.dim() == 1
    assert scales.numel() in (1, input.shape[axis])
    assert zero_points.dtype in (torch.int8, torch.uint8, torch.int32, torch.bfloat16)
    q = (input.float() / scales.float() + zero_points.float()).round()
    return q.clamp(-128, 127).to(torch.int8)


def _mx_matmul(x1, x2, scale, pertoken_scale, bias, output_dtype):
    assert x1.dtype == x2.dtype == torch.float8_e4m3fn
    (m, k), n = x1.shape, x2.shape[1]
    assert scale.shape == (k // 64, n, 2)
    assert pertoken_scale.shape == (m, k // 64, 2)
    assert bias is None or bias.dtype == torch.float32
    ws = torch.exp2(scale.double() - 127).permute(0, 2, 1).reshape(k // 32, n)
    xs = torch.exp2(pertoken_scale.double() - 127).reshape(m, k // 32)
    w = x2.double() * ws.repeat_interleave(32, 0)
    y = (x1.double() * xs.repeat_interleave(32, 1)) @ w
    return (y if bias is None else y + bias.double()).to(output_dtype)


def npu_quant_matmul(
    x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None,
    scale_dtype=None, pertoken_scale_dtype=None, group_sizes=None,
):  # fmt: skip
    calls.append("npu_quant_matmul")
    assert x1.dim() == x2.dim() == 2
    assert offset is None
    assert max(x1.shape[-1], x2.shape[-1]) <= 65535
    if group_sizes is not None:
        assert group_sizes == [1, 1, 32]
        assert scale_dtype == pertoken_scale_dtype == float8_e8m0fnu
        return _mx_matmul(x1, x2, scale, pertoken_scale, bias, output_dtype)
    assert x1.dtype == x2.dtype
    assert x1.dtype in (torch.int8, torch.int32)
    assert scale.dtype == torch.float32
    assert output_dtype in _HALF
    if x1.dtype == torch.int32:  # x2 is [K/8, N], the transpose of a contiguous [N, K/8]
        assert x1.is_contiguous()
        assert x2.t().is_contiguous()
        assert bias is None
        assert output_dtype == torch.float16
        x1, x2 = _int4(x1, axis=1), _int4(x2, axis=0)
    n = x2.shape[1]
    assert x1.shape[1] == x2.shape[0]
    assert scale.shape in ((1,), (n,))
    sums = x1.double() @ x2.double()
    if bias is not None and bias.dtype == torch.int32:
        sums, bias = sums + bias.double(), None
    y = sums * scale.double()
    if pertoken_scale is not None:
        assert pertoken_scale.dtype == torch.float32
        assert pertoken_scale.shape == (x1.shape[0],)
        y = y * pertoken_scale.double()[:, None]
    if bias is not None:
        assert bias.dtype in (torch.bfloat16, torch.float32)
        assert bias.shape == (n,)
        y = y + bias.double()
    return y.to(output_dtype)


def npu_convert_weight_to_int4pack(weight, inner_k_tiles=0):
    assert weight.dtype == torch.int32
    assert weight.shape[-1] % 8 == 0
    return _nibbles(weight)


def npu_weight_quant_batchmatmul(
    x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None,
    bias=None, antiquant_group_size=0, inner_precise=0,
):  # fmt: skip
    calls.append("npu_weight_quant_batchmatmul")
    assert x.dtype in _HALF
    assert x.dim() == 2
    assert quant_scale is None
    if weight.dtype == torch.int32:
        assert weight.t().is_contiguous()
        weight = _int4(weight, axis=0)
    else:
        assert weight.dtype == torch.int8
    k, n = weight.shape
    assert x.shape[1] == k
    assert antiquant_scale.dtype == x.dtype
    size = antiquant_group_size or k
    if antiquant_group_size:
        assert antiquant_group_size % 32 == 0
        assert 32 <= antiquant_group_size <= k - 1
    assert antiquant_scale.shape == (-(-k // size), n)
    w = weight.double()
    if antiquant_offset is not None:
        assert antiquant_offset.dtype == antiquant_scale.dtype
        assert antiquant_offset.shape == antiquant_scale.shape
        w = w + antiquant_offset.double().repeat_interleave(size, 0)[:k]
    w = w * antiquant_scale.double().repeat_interleave(size, 0)[:k]
    y = x.double() @ w
    if bias is not None:
        assert bias.dtype == (torch.float16 if x.dtype == torch.float16 else torch.float32)
        y = y + bias.double()
    return y.to(x.dtype)


def npu_dynamic_mx_quant(
    x, *, axis=-1, round_mode="rint", dst_type=None, block_size=32, scale_alg=0
):
    calls.append("npu_dynamic_mx_quant")
    assert x.dtype in (*_HALF, torch.float32)
    assert dst_type == torch.float8_e4m3fn
    assert (axis, round_mode, block_size) == (-1, "rint", 32)
    m, k = x.shape
    blocks = x.double().view(m, k // 32, 32)
    largest = blocks.abs().amax(-1)
    exponents = []
    for value in largest.flatten().tolist():
        mantissa, e = np.frexp(value if scale_alg == 0 else value / 448.0)
        if scale_alg == 0:  # floor(log2 max) - 8
            exponents.append(int(e) - 1 - 8 if value else -127)
        else:  # the least power of two that is not below max / 448
            exponents.append((int(e) - (mantissa == 0.5)) if value else -127)
    power = torch.tensor(exponents, dtype=torch.float64).view(m, k // 32).clamp(-127, 127)
    q = (blocks / torch.exp2(power)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.view(m, k), (power + 127).to(torch.uint8).view(m, k // 64, 2)


def npu_grouped_matmul(
    x, weight, *, bias=None, scale=None, offset=None, per_token_scale=None, group_list=None,
    split_item=0, group_type=None, group_list_type=0, output_dtype=None,
):  # fmt: skip
    calls.append("npu_grouped_matmul")
    (x,), (weight,), (scale,), (tokens,) = x, weight, scale, per_token_scale
    assert x.dtype == weight.dtype == torch.int8
    assert (split_item, group_type, group_list_type) == (2, 0, 1)
    assert bias is None
    assert offset is None
    experts, _, n = weight.shape
    assert group_list.dtype == torch.int64
    assert group_list.shape == (experts,)
    assert scale.dtype == tokens.dtype == torch.float32
    assert scale.shape == (experts, n)
    assert tokens.shape == (x.shape[0],)
    out = torch.full((x.shape[0], n), float("nan"), dtype=output_dtype)  # rows of no group
    start = 0
    for e, size in enumerate(group_list.tolist()):
        rows = slice(start, start + size)
        y = x[rows].double() @ weight[e].double() * scale[e].double()
        out[rows] = (y * tokens[rows].double()[:, None]).to(output_dtype)
        start += size
    return [out]
