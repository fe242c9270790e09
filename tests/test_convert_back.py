"""There and back through another format gives the same bytes, wherever both hold the same numbers.

What a producer wrote is compared with what comes back, tensor by tensor: names, types, shapes and
bytes. A scale that another format keeps as something else (a divisor as a multiplier, a block's
power of two as a factor of two parts) must return as what it was.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_sets import checkpoints_root
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert
from quant_core.plan import plan

WAYS = {
    "gptqmodel-awq-gemm-g128": "hqq quark torchao",
    "ct-nvfp4": "autoround",
    "quark-mxfp4": "quark",
    "hf-fp8-block128": "fp8",
    "modelopt-nvfp4": "nvfp4",
    "torchao-int8wo": "compressed_tensors bitsandbytes quark modelslim_npu nvfp4",
    "bnb-nf4-dq": "bitsandbytes",
    "hqq-4bit-g64": "hqq",
    # the full set only
    "ct-nvfp4a16": "nvfp4 quark autoround nvfp4,quark",
    "ct-moe-nvfp4": "autoround",
    "ar-nvfp4": "compressed_tensors",
    "modelopt-w4a16-nvfp4": "quark",
    "ct-fp8-dynamic": "quark nvfp4 torchao autoround modelslim_npu",
    "ct-fp8-static-tensor": "fp8 nvfp4 quark autoround",
    "modelopt-fp8-pc-pt": "compressed_tensors quark torchao",
    "modelopt-fp8-pb-wo": "compressed_tensors quark autoround",
    "hf-gptoss-mxfp4": "compressed_tensors quark nvfp4 autoround",
    "bnb-int8": "hqq quark torchao modelslim_npu",
    "msmodelslim-w8a16": "torchao quark nvfp4 compressed_tensors",
    "msmodelslim-w4a8-g64": "modelslim_npu",
    "quark-uint4-g128-awq": "awq torchao compressed_tensors gptq hqq",
    "torchao-intx4-g32": "quark awq hqq nvfp4",
}
CASES = [
    pytest.param(checkpoints_root() / source, way.split(","), id=f"{source}-{way}")
    for source, ways in WAYS.items()
    if (checkpoints_root() / source).is_dir()
    for way in ways.split()
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (f for f in folder.glob("*.safetensors") if f.name != "expected.safetensors")
    return load_file(file)


def assert_same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        other = b[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        flat, same = tensor.reshape(-1), other.reshape(-1)
        assert torch.equal(flat.view(torch.uint8), same.view(torch.uint8)), name


@pytest.mark.parametrize(("source", "way"), CASES)
def test_there_and_back_gives_the_same_bytes(source, way, tmp_path):
    own = plan(open_checkpoint(source)).match.plugin
    at = source
    for i, to in enumerate([*way, *([own] if way != [own] else [])]):
        assert convert(at, tmp_path / str(i), to=to).exact
        at = tmp_path / str(i)
    assert_same_bytes(stored(source), stored(at))


def test_a_changed_bit_would_be_seen(fixtures, tmp_path):
    """Negative control of the comparison above."""
    a = stored(fixtures / "hf-fp8-block128")
    b = {n: t.clone() for n, t in a.items()}
    name = next(n for n in b if n.endswith("weight_scale_inv"))
    b[name].view(torch.uint8)[0, 0] ^= 1
    save_file(b, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match="weight_scale_inv"):
        assert_same_bytes(a, stored(tmp_path))


def test_stacks_of_experts_are_put_together_from_matrices(checkpoints, tmp_path):
    """Gate and up lie row by row in turn: each half alone is not the stack."""
    source = checkpoints / "hf-gptoss-mxfp4"
    if not source.is_dir():
        pytest.skip("needs the full set of checkpoints beside the repository")
    convert(source, tmp_path / "ct", to="compressed_tensors")
    convert(tmp_path / "ct", tmp_path / "back", to="mxfp4")
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    want, got = stored(source)[name], stored(tmp_path / "back")[name]
    assert torch.equal(want, got)
    halves = torch.cat((want[:, ::2], want[:, 1::2]), dim=1)
    assert not torch.equal(halves, got)
