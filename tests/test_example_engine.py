"""The engine of examples/engine.py computes what the transformers engine does, on every format."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_sets import REPO, checkpoint_dirs
from quant_core import load_model, load_tensor
from quant_core.engines.sharing import Options, Piece, open_plan
from quant_core.errors import CheckpointError, FormatError, LayoutError
from quant_core.load import read_parameter
from test_checkpoint_weights import PREFIXES

pytest.importorskip("transformers")


def _llama(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text("utf-8"))["model_type"] == "llama"


DIRS = [d for d in checkpoint_dirs(PREFIXES) if _llama(d)]
AWQ = "gptqmodel-awq-gemm-g128"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_engine", REPO / "examples" / "engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_are_those_of_the_transformers_engine(folder):
    ids = torch.arange(12)[None] + 40
    got = _example().Engine(str(folder))(ids)
    with torch.no_grad():
        want = load_model(folder, dtype=torch.float32, kv_cache="float")(ids).logits
    # the same kernels on the same weights; attention and rotation are the example's own, in another
    # order, so that a quantized activation may round to its neighbour
    assert float((got - want).abs().max()) < 2e-3 * float(want.abs().max())


def test_dropped_tensors_and_further_layers_stop_the_example(fixtures, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(fixtures / AWQ, folder)
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.self_attn.k_proj.qweight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="k_proj"):
        _example().Engine(str(folder))
    shutil.copy(fixtures / AWQ / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\."):
        _example().Engine(str(folder))


def test_what_an_engine_may_ask_wrongly_is_an_error_of_ours(fixtures):
    plan = open_plan(str(fixtures / AWQ), Options())
    with pytest.raises(FormatError, match=r"down_proj\.weight") as missing:
        read_parameter(plan, "model.layers.0.mlp.down_proj.weight")
    assert missing.value.code == "Q-FMT-NAME"
    head = plan.members["lm_head"]
    with pytest.raises(LayoutError, match="lm_head: is stored as floats") as shape:
        Piece.whole(head)
    assert shape.value.code == "Q-LAYOUT-SHAPE"
    stored = load_tensor(plan, "lm_head").dense
    assert Piece.whole(head, tuple(stored.shape)).out.total == stored.shape[0]
