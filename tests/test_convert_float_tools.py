"""What the formats' own tools make of converted small floats and tables, where they install on CPU.

Each tool dequantizes what it read; that must be our weight, rounded to the type the tool gives it
in. Tools that are not installed are skipped by name.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_sets import checkpoints_root
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert
from quant_core.load import load_tensor
from quant_core.plan import plan

pytest.importorskip("transformers")
BF16 = torch.bfloat16


def needs(*packages: str) -> None:
    """Skip without importing: a tool that is half installed must not be loaded by its presence."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")


def converted(source: str, to: str, tmp_path: Path, via: str = "") -> Path:
    folder = checkpoints_root() / source
    if not folder.is_dir():
        pytest.skip("needs the full set of checkpoints beside the repository")
    if via:
        convert(folder, tmp_path / "via", to=via, allow_inexact=True)
        folder = tmp_path / "via"
    convert(folder, tmp_path / "out", to=to, allow_inexact=True)
    return tmp_path / "out"


def loaded(folder: Path, **kw):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, **kw)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> our weight, of everything that is quantized."""
    found = plan(open_checkpoint(folder))
    return {n: load_tensor(found, n).dequantize() for n in found.quantized}


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("ct-nvfp4", "nvfp4-pack-quantized"),
        ("modelopt-nvfp4", "nvfp4-pack-quantized"),
        ("quark-mxfp4", "mxfp4-pack-quantized"),
        ("hf-fp8-block128", "float-quantized"),
        ("torchao-int8wo", "pack-quantized"),
        ("modelopt-mxfp8", "mxfp8-quantized"),
        ("quark-ptpc-fp8", "float-quantized"),
        ("ar-nvfp4", "nvfp4-pack-quantized"),
    ],
)
def test_compressed_tensors_reads_the_same_weights(source, kept, tmp_path):
    needs("compressed_tensors", "accelerate")
    from transformers import CompressedTensorsConfig

    out = converted(source, "compressed_tensors", tmp_path)
    assert f'"{kept}"' in (out / "config.json").read_text()
    model = loaded(out, quantization_config=CompressedTensorsConfig(run_compressed=False))
    for name, want in weights(out).items():
        assert torch.equal(model.get_submodule(name).weight, want.to(BF16)), name


@pytest.mark.parametrize("source", ["hf-fp8-block128", "ct-fp8-block128", "modelopt-fp8-pb-wo"])
def test_transformers_reads_the_same_weights_from_fp8_blocks(source, tmp_path):
    needs("accelerate")
    from transformers import FineGrainedFP8Config

    via = "compressed_tensors" if source.startswith("hf") else ""
    out = converted(source, "fp8", tmp_path, via)
    model = loaded(out, quantization_config=FineGrainedFP8Config(dequantize=True))
    for name, want in weights(out).items():
        assert torch.equal(model.get_submodule(name).weight, want.to(BF16)), name


def test_transformers_reads_the_same_experts_from_mxfp4(tmp_path):
    needs("accelerate")
    from transformers import Mxfp4Config

    out = converted("hf-gptoss-mxfp4", "mxfp4", tmp_path, "compressed_tensors")
    model = loaded(out, quantization_config=Mxfp4Config(dequantize=True))
    found = plan(open_checkpoint(out))
    experts = model.model.layers[0].mlp.experts
    for i in range(2):
        gate = load_tensor(found, "model.layers.0.mlp.experts.gate_proj", expert=i).dequantize()
        # transposed there, gate and up column by column in turn
        assert torch.equal(experts.gate_up_proj[i, :, ::2].T, gate.to(BF16))


@pytest.mark.parametrize(
    "source",
    ["torchao-int8wo", "gptqmodel-awq-gemm-g128", "ct-w8a8-int8-dynamic-gptq", "ct-fp8-dynamic"],
)
def test_torchao_reads_the_same_weights(source, tmp_path):
    needs("torchao", "accelerate")
    out = converted(source, "torchao", tmp_path)
    model = loaded(out)
    for name, want in weights(out).items():
        weight = model.get_submodule(name).weight
        assert type(weight).__module__.startswith("torchao"), name
        assert torch.equal(weight.dequantize(), want.to(BF16)), name


@pytest.mark.parametrize("source", ["bnb-nf4-dq", "torchao-int8wo"])
def test_bitsandbytes_reads_the_same_weights(source, tmp_path):
    needs("bitsandbytes", "accelerate")
    from bitsandbytes import functional

    out = converted(source, "bitsandbytes", tmp_path)
    model = loaded(out)
    for name, want in weights(out).items():
        weight = model.get_submodule(name).weight
        if source.startswith("bnb"):
            got = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(got, want.to(BF16)), name
        else:
            # the tool multiplies in another order: up to two units in the last place of float32
            got = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            torch.testing.assert_close(got, want, rtol=2**-22, atol=0)


@pytest.mark.parametrize("source", ["hqq-4bit-g64", "gptqmodel-awq-gemm-g128"])
def test_hqq_reads_the_same_weights(source, tmp_path):
    needs("hqq", "termcolor", "tqdm")
    from hqq.core.quantize import Quantizer

    out = converted(source, "hqq", tmp_path)
    stored = load_file(out / "model.safetensors")
    for name, want in weights(out).items():

        def part(leaf, name=name):
            return stored[f"{name}.{leaf}"]

        meta = {
            "nbits": int(part("nbits")),
            "group_size": int(part("group_size")),
            "shape": part("shape").tolist(),
            "axis": int(part("axis")),
            "packing": bytes(part("packing").tolist()).decode(),
            "unpack_view_dtype": torch.uint8,
            "view_as_float": bool(part("view_as_float")),
            "compute_dtype": torch.float32,
            "scale": part("scale").float(),
            "zero": part("zero").float(),
        }
        assert torch.equal(Quantizer.dequantize(part("W_q"), meta), want), name
