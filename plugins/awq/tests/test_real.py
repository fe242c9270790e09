"""Checkpoints written by GPTQModel 7.7.0 and AutoRound 0.16.1, against their own weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from quant_core.checkpoint.open import open_checkpoint
from quant_core.packing import unpack
from quant_core.plan import plan
from quant_plugin_awq.writer import config_for

pytestmark = pytest.mark.shared
NAMES = ("gptqmodel-awq-gemm-g128", "ar-w4g128-asym-awq")


@pytest.fixture(params=NAMES)
def folder(request, shared):
    return shared / request.param


def _load(checkpoint, member):
    stored = {p.name: f"{member.layer.stored}.{p.name}" for p in member.params}
    tensors = {n: checkpoint.read(t) for n, t in stored.items() if t in checkpoint.tensors}
    return tensors, member.scheme.canonicalize(member.layer, tensors)


def _expected(folder):
    """module -> (first rows of the producer's weight, dtype it was rounded to)."""
    rounding = json.loads((folder / "expected.json").read_text())["reference_rounding"]["weights"]
    dtype = getattr(torch, rounding or "float32")
    for key, rows in load_file(folder / "expected.safetensors").items():
        if key.startswith("weight."):
            module = key.removeprefix("weight.").partition("#")[0].removesuffix(".weight")
            yield module, rows, dtype


def _ulp_equal(a, b):
    """Equal to one float32 ulp."""
    return torch.all((a - b).abs() <= b.abs() * 2**-23)


def test_weights_equal_the_producers_after_the_rounding_it_names(folder):
    checkpoint = open_checkpoint(folder)
    members = plan(checkpoint).quantized
    assert len(members) == 14
    checked = 0
    for module, rows, dtype in _expected(folder):
        _, lt = _load(checkpoint, members[module])
        ours = lt.dequantize()[: rows.shape[0]].to(dtype).float()
        assert _ulp_equal(ours, rows), module
        checked += 1
    assert checked >= 3


def test_every_layer_serializes_to_the_bytes_in_the_file(folder):
    checkpoint = open_checkpoint(folder)
    for member in plan(checkpoint).quantized.values():
        tensors, lt = _load(checkpoint, member)
        back = member.scheme.serialize(member.layer, lt)
        assert back.keys() == tensors.keys()
        for name, value in tensors.items():
            same = torch.equal(back[name].view(torch.uint8), value.view(torch.uint8))
            assert same, f"{member.layer.name}.{name}"


def test_reading_the_words_in_natural_order_misses_the_weights(folder):
    checkpoint = open_checkpoint(folder)
    members = plan(checkpoint).quantized
    module, rows, dtype = next(_expected(folder))
    _, lt = _load(checkpoint, members[module])
    packing = replace(lt.weight.packing, order=None)
    codes = unpack(lt.weight.codes, 4, lt.weight.shape, packing)
    natural = replace(
        lt.weight, codes=codes[:, ::2] | (codes[:, 1::2] << 4), packing=type(packing)()
    )
    assert not _ulp_equal(natural.dequantize()[: rows.shape[0]].to(dtype).float(), rows)


def test_zeros_shifted_by_one_miss_the_weights(folder):
    checkpoint = open_checkpoint(folder)
    members = plan(checkpoint).quantized
    module, rows, dtype = next(_expected(folder))
    _, lt = _load(checkpoint, members[module])
    shifted = replace(lt.weight, zeros=lt.weight.zeros + 1)
    assert not _ulp_equal(shifted.dequantize()[: rows.shape[0]].to(dtype).float(), rows)


def test_plan_reports_no_warning_and_the_producers_config_comes_back(folder):
    checkpoint = open_checkpoint(folder)
    planned = plan(checkpoint)
    assert planned.warnings == []
    config = config_for(planned)
    theirs = checkpoint.config["quantization_config"]
    for key in ("quant_method", "bits", "group_size", "zero_point", "version"):
        assert config[key] == theirs[key]
    assert config["modules_to_not_convert"] == ["lm_head"]


def test_stored_scale_dtype_is_kept(folder):
    members = plan(open_checkpoint(folder)).quantized
    elements = {m.scheme.weight.scales[0].element for m in members.values()}
    assert elements == {"bf16" if "gptqmodel" in folder.name else "f16"}
