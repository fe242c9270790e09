"""A container that describes its model itself runs without a config.json beside it."""

from __future__ import annotations

import shutil

import pytest
import torch

import quant_core
from checkpoint_sets import checkpoint_dirs
from quant_core.checkpoint.open import open_checkpoint

DIRS = checkpoint_dirs(("gguf-moe", "gguf-llama-q4_k_m"))


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_file_alone_gives_the_producers_logits(folder, tmp_path):
    (file,) = folder.glob("*.gguf")
    shutil.copy(file, tmp_path)
    with open_checkpoint(folder / "expected.safetensors") as expected:
        ids, want = expected.read("input_ids"), expected.read("logits")
    model = quant_core.load_model(tmp_path / file.name, dtype=torch.float32)
    with torch.inference_mode():
        got = model(input_ids=ids[None], use_cache=False).logits[0]
    assert (got - want).abs().max() < 0.006  # the bound of expected.json for these files
