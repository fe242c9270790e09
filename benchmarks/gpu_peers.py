"""What ``benchmarks/gpu.py`` measures beside quant-core's own kernels.

    bf16            F.linear; stacks of experts: sorting, torch._grouped_mm, putting back
    torch int4      torch's _weight_int4pack_mm
    humming         humming-kernels where installed, through quant-kernels-humming; of stacks those
                    of 16-bit activations, with rows put into blocks by torch's operations
    humming experts its grouped products, of rows that were sorted and aligned beforehand
    torch fp8 experts  torch._scaled_grouped_mm, of rows sorted and quantized beforehand

The two last leave out what every complete candidate does, so they are bounds, not candidates.
A peer that lacks a detail of the layer gets the nearest one that it has (``nearest``): the products
are the same, the time is what is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from gpu_layers import Case
from torch import Tensor

from quant_core.kernels.base import Accepted
from quant_core.kernels.timing import copies_for
from quant_core.spec import OpSpec

__all__ = ["BASE", "BOUNDS", "PEERS", "nearest", "peers"]

BASE = "bf16"
BOUNDS = ("humming experts", "torch fp8 experts")
PEERS = (BASE, "torch int4", "humming", *BOUNDS)

Calls = Callable[[Sequence[tuple[Tensor, ...]]], list[Callable[[], Tensor]]]
"""Inputs to rotate over -> one call for each of them or for each copy of the weights."""


def over(sets: Sequence[Any], run: Callable[..., Tensor]) -> Calls:
    """Calls of ``run(weights, *inputs)`` that rotate over both."""

    def calls(inputs: Sequence[tuple[Tensor, ...]]) -> list[Callable[[], Tensor]]:
        turns = zip(cycle(sets), cycle(inputs))
        turns = islice(turns, max(len(sets), len(inputs)))
        return [lambda v=v, a=a: run(v, *a) for v, a in turns]

    return calls


def nearest(op: OpSpec) -> OpSpec:
    """``op`` with scales of activations as a fraction of the largest code, not of half a range."""
    acts = op.operand("input")
    if acts is None or not any(s.peak for s in acts.scales):
        return op
    plain = replace(acts, scales=tuple(replace(s, peak=0.0) for s in acts.scales))
    rest = (("input", plain) if role == "input" else (role, s) for role, s in op.operands)
    return replace(op, operands=tuple(rest))


def _int4(k: int, n: int) -> Calls:
    """Torch's own op on random codes."""
    sets = []
    for _ in range(copies_for(k * n / 2)):
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(raw, 8)
        grid = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        sets.append((packed, grid))
    return over(sets, lambda s, x: torch.ops.aten._weight_int4pack_mm(x, s[0], 128, s[1]))


def _humming(case: Case) -> Calls | None:
    try:
        from quant_kernels_humming.kernel import Humming
    except ImportError:
        return None
    kernel, op = Humming(), nearest(case.op)
    if not isinstance(kernel.accepts(op), Accepted):
        return None
    first = case.load(kernel, op)
    nbytes = sum(t.numel() * t.element_size() for t in first.values())
    more = 0 if case.experts else copies_for(nbytes) - 1
    sets = [first, *({n: t.clone() for n, t in first.items()} for _ in range(more))]
    values, run = [list(s.values()) for s in sets], kernel.bind(op)
    few = (torch.zeros(1, case.size[0], device="cuda", dtype=torch.bfloat16),)
    if case.experts:
        few = (*few, torch.zeros(1, device="cuda", dtype=torch.int64))
    for v in values:
        run(v, *few)  # makes the library's own copy, which a graph cannot
    return over(values, run)


def _ends(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(order that sorts rows by expert, how many rows lie up to the end of each expert)."""
    ids, order = index.sort()
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
    return order, ends.int()


def _bf16_experts(weights: Tensor, x: Tensor, index: Tensor) -> Tensor:
    order, ends = _ends(index, weights.shape[0])
    y = torch._grouped_mm(x[order], weights.transpose(1, 2), offs=ends)
    return torch.empty_like(y).index_copy_(0, order, y)


def _humming_experts(case: Case) -> Calls | None:
    """Its indexed kernel for 16-bit activations, its grouped one for quantized ones."""
    try:
        from humming.layer import HummingLayer, HummingLayerMethod

        from quant_kernels_humming.layout import configs, tensors_of
    except ImportError:
        return None
    one = replace(
        nearest(case.op), op="linear", sizes=tuple(s for s in case.op.sizes if s[0] != "experts")
    )
    made = configs(one)
    if not isinstance(made, tuple):
        return None
    weight, acts = made
    (k, n), experts = case.size, case.experts
    layer = HummingLayer(
        shape_n=n, shape_k=k, weight_config=dict(weight), num_experts=experts,
        input_config=None if acts is None else dict(acts), torch_dtype=torch.bfloat16,
    ).to("cuda")  # fmt: skip
    given = [tensors_of(lt.weight, None) for lt in case.parts]
    layer.load_from_tensors(
        {name: torch.stack([given[e % len(given)][name] for e in range(experts)])
         for name in given[0]}
    )  # fmt: skip
    layer.transform()
    kind = "indexed" if acts is None else "grouped_contiguous"
    table = HummingLayerMethod.get_default_tuning_configs(layer, gemm_type=kind)

    def calls(inputs: Sequence[tuple[Tensor, ...]]) -> list[Callable[[], Tensor]]:
        out = []
        for x, index in inputs:
            config = next(c for low, high, c in table if low < x.shape[0] <= high)
            common = {"compute_config": {"gemm_type": kind}, "tuning_config": json.dumps(config)}
            if acts is None:
                rows, owners, count = _aligned(index, experts, config["block_shape"][0])
                given = {"sorted_ids": rows, "expert_ids": owners, "num_tokens_padded": count}
            else:
                order, ends = _ends(index, experts)
                x = x[order].contiguous()
                given = {"expert_layout": F.pad(ends, (1, 0)).long()}
            out.append(lambda x=x, given={**common, **given}: layer(x, **given))
        return out

    return calls


def _aligned(index: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each expert padded to whole blocks, the expert of each block, how many rows."""
    rows, owners = [], []
    for e in range(experts):
        mine = torch.where(index == e)[0].int()
        blocks = -(-mine.numel() // block)
        rows.append(F.pad(mine, (0, blocks * block - mine.numel()), value=index.numel()))
        owners += [e] * blocks
    flat = torch.cat(rows).int()
    made = {"dtype": torch.int32, "device": index.device}
    return flat, torch.tensor(owners, **made), torch.tensor([flat.numel()], **made)


def _fp8_experts(case: Case) -> Calls:
    """Row scales for both sides; x is rounded before the clock starts."""
    top = 448.0  # max finite e4m3fn
    dense = case.dense[torch.arange(case.experts) % len(case.parts)]
    scale = dense.abs().amax(2) / top
    weights = (dense / scale[..., None]).to(torch.float8_e4m3fn).transpose(1, 2)

    def calls(inputs: Sequence[tuple[Tensor, ...]]) -> list[Callable[[], Tensor]]:
        out = []
        for x, index in inputs:
            order, ends = _ends(index, case.experts)
            mine = x[order].float()
            by_row = (mine.abs().amax(1) / top).clamp_min(1e-12)
            codes = (mine / by_row[:, None]).to(torch.float8_e4m3fn)
            out.append(
                lambda a=codes, s=by_row, e=ends: torch._scaled_grouped_mm(
                    a, weights, s, scale, offs=e, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            )
        return out

    return calls


def peers(
    case: Case, failed: Callable[[str, Exception], None], skip: frozenset[str] = frozenset()
) -> dict[str, Calls]:
    """Name -> its calls; what does not take the layer is left out, what breaks is told."""
    k, n = case.size

    def bf16() -> Calls:
        dense = case.dense.bfloat16()
        if case.experts:
            return over([dense[torch.arange(case.experts) % len(dense)]], _bf16_experts)
        copies = [dense[0].clone() for _ in range(copies_for(k * n * 2))]
        return over(copies, lambda w, x: F.linear(x, w))

    makers: dict[str, Callable[[], Calls | None]] = {BASE: bf16}
    if case.experts:
        makers["humming experts"] = lambda: _humming_experts(case)
        if case.op.operand("input") is None:
            makers["humming"] = lambda: _humming(case)
        if case.scheme == "fp8":
            makers["torch fp8 experts"] = lambda: _fp8_experts(case)
    else:
        makers["humming"] = lambda: _humming(case)
        if case.scheme == "int4":
            makers["torch int4"] = lambda: _int4(k, n)
    out = {}
    for name, make in makers.items():
        if name in skip:
            continue
        try:
            calls = make()
        except Exception as err:
            failed(f"{name} {case.shape} {case.scheme}", err)
            continue
        if calls is not None:
            out[name] = calls
    return out
