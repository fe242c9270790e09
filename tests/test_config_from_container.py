"""A container that describes its model itself runs without a config.json beside it."""

from __future__ import annotations

import shutil

import pytest
import torch

import quant_core
from checkpoint_sets import checkpoint_dirs
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert

BOUND = 0.006  # of expected.json for these files
DIRS = checkpoint_dirs(("gguf-moe", "gguf-llama-q4_k_m"))


def off_by(model, folder) -> float:
    """The largest difference from the producer's logits."""
    with open_checkpoint(folder / "expected.safetensors") as expected:
        ids, want = expected.read("input_ids"), expected.read("logits")
    with torch.inference_mode():
        got = model(input_ids=ids[None], use_cache=False).logits[0]
    return float((got - want).abs().max())


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_file_alone_gives_the_producers_logits(folder, tmp_path):
    (file,) = folder.glob("*.gguf")
    shutil.copy(file, tmp_path)
    model = quant_core.load_model(tmp_path / file.name, dtype=torch.float32)
    assert off_by(model, folder) < BOUND


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_file_alone_is_converted_with_a_config_that_describes_it(folder, tmp_path):
    (file,) = folder.glob("*.gguf")
    shutil.copy(file, tmp_path)
    kept = {"zero_points": "float"}  # off by less than 1e-7
    convert(tmp_path / file.name, tmp_path / "out", to="compressed_tensors", allow_inexact=True,
            options=kept)  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert off_by(quant_core.load_model(tmp_path / "out", dtype=torch.float32), folder) < BOUND
