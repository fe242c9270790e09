"""Every checkpoint's weights against the numbers its own producer computed.

``weight.<module>#R`` in expected.safetensors is the first R rows of the producer's dequantized
weight; ``reference_rounding`` of expected.json names the rounding it applied. The comparison is to
one float32 ulp, or exact after that rounding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoint_sets import checkpoint_dirs
from quant_core.checkpoint.open import open_checkpoint
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import Member, Plan, param_sources, plan

PREFIXES = (
    "bnb-", "hf-fp8", "hqq-", "torchao-",
    "gptqmodel-2", "gptqmodel-3", "gptqmodel-4", "gptqmodel-awq", "gptqmodel-dynamic",
    "ar-w4g128-gptq", "ar-w4g128-asym-awq", "gguf-", "ar-gguf-",
    "ar-lmhead", "ar-mixed", "ar-moe", "ar-w2", "ar-w3", "ar-w4g128-sym", "ar-w4g64",
    "ar-mxfp4", "ar-nvfp4",
    "ct-w3", "ct-w4", "ct-w8", "ct-kvfp8-w4",
    "hf-gptoss", "ct-fp8", "ct-mla", "ct-mixed", "ct-moe", "ct-mxfp", "ct-nvfp4", "ct-spinquant",
    "modelopt-", "msmodelslim-", "quark-",
)  # fmt: skip
DIRS = checkpoint_dirs(PREFIXES)


def _expected(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = open_checkpoint(folder / "expected.safetensors")
    meta = json.loads((folder / "expected.json").read_text())
    return {n: tensors.read(n) for n in tensors.tensors if n.startswith("weight.")}, meta


def _parse(key: str) -> tuple[str, int | None, int | None]:
    """``weight.<name>[#eE][#R]`` -> module name, expert, rows. The expert may be in the name."""
    name, *marks = key.removeprefix("weight.").split("#")
    expert = rows = None
    if numbered := re.match(r"(.*\.experts)\.(\d+)(\..*)", name):
        name, expert = numbered[1] + numbered[3], int(numbered[2])
    for mark in marks:
        if mark.startswith("e"):
            expert = int(mark[1:])
        else:
            rows = int(mark)
    return name.removesuffix(".weight"), expert, rows


def _stored_row_order(p: Plan, stored: str, w: torch.Tensor) -> torch.Tensor:
    """Rows as a llama file stores q and k: HF.reshape(h, 2, D/2, K).swap(1, 2)."""
    config = p.checkpoint.config
    if config.get("model_type") != "llama" or not stored.endswith(("attn_q", "attn_k")):
        return w
    key = "num_attention_heads" if stored.endswith("attn_q") else "num_key_value_heads"
    heads = config[key]
    return w.view(heads, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def _by_stored_name(p: Plan, name: str) -> str:
    for public, member in p.members.items():
        if member.layer.stored == name:
            return public
    raise AssertionError(f"no member stored as {name}")


def _weight(p: Plan, name: str, expert: int | None) -> torch.Tensor:
    if name.endswith(".experts.gate_up_proj"):  # rows of gate and up in turn
        parts = (name.replace("gate_up", part) for part in ("gate", "up"))
        pair = [load_tensor(p, part, expert=expert).dequantize() for part in parts]
        return torch.stack(pair, dim=1).flatten(0, 1)
    if name in p.members:
        return load_tensor(p, name, expert=expert).dequantize()
    public = _by_stored_name(p, name)
    return _stored_row_order(p, name, load_tensor(p, public, expert=expert).dequantize())


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_weights_equal_the_producers(folder):
    p = plan(open_checkpoint(folder))
    weights, meta = _expected(folder)
    assert weights
    rounding = meta["reference_rounding"]["weights"]
    for key, want in weights.items():
        name, expert, rows = _parse(key)
        got = _weight(p, name, expert)[:rows]
        if rounding:
            dtype = getattr(torch, rounding)
            got, want = got.to(dtype).float(), want.to(dtype).float()
            # the producer added and took off a bias in the rounded type where there is one
            assert (got == want).float().mean() > 0.999, key
        else:
            ulp = torch.finfo(torch.float32).eps * want.abs()
            assert ((got - want).abs() <= ulp).all(), key


def stored_bytes_differ(p: Plan, member: Member) -> list[str]:
    """Stored tensors of a member that its scheme does not write back byte for byte."""
    out = []
    for expert in member.layer.experts or (None,):
        lt = read_matrix(p, member, expert)
        stored = member.scheme.serialize(member.layer, lt)
        for param in member.params:
            if param.need == "ignored":
                continue  # not in the canonical form; saving copies it from the source
            for name, index in param_sources(member.layer, param, expert):
                if name not in p.checkpoint.tensors:
                    continue
                want, got = p.checkpoint.read(name, index), stored[param.name]
                same = got.dtype == want.dtype and got.shape == want.shape
                got, want = (t.reshape(-1).view(torch.uint8) for t in (got, want))
                if not same or not torch.equal(got, want):
                    out.append(name)
    return out


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_every_member_serializes_to_the_stored_bytes(folder):
    p = plan(open_checkpoint(folder))
    assert [n for m in p.quantized.values() for n in stored_bytes_differ(p, m)] == []
