"""What must not start, does not, with our error; what is broken beside us does not stop vLLM."""

from __future__ import annotations

import importlib
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_serving import (
    addresses,
    first_difference,
    greedy,
    model_of,
    prompts,
    reference,
    served,
    without_notes,
)

from checkpoint_sets import FIXTURES
from quant_core.errors import QuantError

ACT_ORDER = FIXTURES / "gptqmodel-4bit-g128-asym-descact"


def edited(tmp_path: Path, edit: Any) -> Path:
    folder = without_notes(ACT_ORDER, tmp_path / "edited")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fails(folder: Path, **settings: Any) -> str:
    """The error's text; it is ours, whatever vLLM wraps it in."""
    with pytest.raises(Exception) as err, served(folder, **settings):
        pass
    text = str(err.value)
    assert isinstance(err.value, QuantError) or "ValidationError" in type(err.value).__name__
    return text


@pytest.mark.parametrize(
    "load_format", [pytest.param("quant_core", marks=pytest.mark.short), "auto"]
)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.scales",
        "model.layers.0.self_attn.k_proj.g_idx",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_dropped_tensor_stops_the_start(tmp_path: Path, name: str, load_format: str) -> None:
    text = fails(edited(tmp_path, lambda t: t.pop(name)), load_format=load_format)
    assert name in text
    assert "missing" in text


def test_renamed_tensor_stops_the_start(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.other_proj.qweight"] = tensors.pop(
            "model.layers.0.mlp.down_proj.qweight"
        )

    assert "down_proj" in fails(edited(tmp_path, rename))


def test_layer_the_model_does_not_have_stops_the_start(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.1.mlp.up_proj." in n]:
            tensors[name.replace("up_proj", "third_proj")] = tensors[name].clone()

    text = fails(edited(tmp_path, add))
    assert "third_proj" in text
    assert "unexpected" in text


def test_other_sizes_stop_the_start() -> None:
    text = fails(ACT_ORDER, hf_overrides={"intermediate_size": 1024})
    assert re.search(r"512.*1024|1024.*512", text)


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"onlin": "int8"}, "onlin"),
        ({"skip": ["lm_head"]}, "online"),
        ({"online": "int8", "skip": "lm_head"}, "list"),
        ({"online": "no_such_scheme"}, "no_such_scheme"),
    ],
)
def test_wrong_options_stop_the_start(block: dict[str, Any], found: str) -> None:
    settings = {"quantization_config": {"quant_method": "quant_core"} | block}
    assert found in fails(ACT_ORDER, hf_overrides=settings)


def test_loader_without_the_method_is_refused() -> None:
    """By vLLM itself: the load format exists only where the method is used."""
    with (
        pytest.raises(ValueError, match="quant_core"),
        served(FIXTURES / "ct-w4a16-awq-asym", quantization=None),
    ):
        pass


# ------------------------------------------------------------------------------- taking over


@pytest.mark.short
def test_method_is_ours_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_core.engines.vllm_config import TAKE_OVER, QuantCoreConfig

    ask = QuantCoreConfig.override_quantization_method
    block = {"quant_method": "some_method"}
    assert ask(block, None, hf_config=None) is None
    assert ask(block, "quant_core", hf_config=None) == "quant_core"
    assert ask(block, "other", hf_config=None) is None
    monkeypatch.setenv(TAKE_OVER, "another, some_method")
    assert ask(block, None, hf_config=None) == "quant_core"
    assert ask(block, "other", hf_config=None) is None
    assert ask({"quant_method": ""}, None, hf_config=None) is None


@pytest.mark.short
def test_config_pickles_small_and_plans_again() -> None:
    from quant_core.engines.vllm_config import QuantCoreConfig

    config = QuantCoreConfig()
    config.maybe_update_config(str(ACT_ORDER))
    members = list(config.plan.members)
    data = pickle.dumps(config)
    assert len(data) < 2000
    assert list(pickle.loads(data).plan.members) == members


# ------------------------------------------------------------------------------ loading again


def reload(llm: Any, path: Path | None = None) -> None:
    llm.collective_rpc(
        "reload_weights", kwargs={"weights_path": None if path is None else str(path)}
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(ACT_ORDER.name, marks=pytest.mark.short), "gguf-moe-q4_k_m", "bnb-nf4-dq"],
)
def test_reload_fills_the_same_storage(name: str, tmp_path: Path) -> None:
    """Weights are overwritten, then read from a copy elsewhere: the tokens come back."""
    wanted = prompts()
    copy = without_notes(FIXTURES / name, tmp_path / "copy")
    with served(FIXTURES / name) as llm:
        want, before = greedy(llm, wanted), addresses(llm)
        with torch.no_grad():
            for parameter, value in model_of(llm).named_parameters():
                if "packed" in parameter:
                    value.zero_()
        assert first_difference(greedy(llm, wanted), want, 1e-3)
        reload(llm, copy)
        assert first_difference(greedy(llm, wanted), want, 0.0) == ""
        assert addresses(llm) == before


# ---------------------------------------------------------------------------------- neighbours

BROKEN = """
import quant_core
@quant_core.hookimpl
def plugin_info():
    raise RuntimeError("this plugin is broken")
"""


@pytest.mark.short
def test_broken_plugin_of_somebody_else_does_not_stop_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is installed as any other, by an entry point, and vLLM runs in a process of its own."""
    (tmp_path / "broken_plugin.py").write_text(BROKEN)
    info = tmp_path / "broken_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[quant_core]\nbroken = broken_plugin\n")
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\n"
        "from vllm_serving import greedy, prompts, served\n"
        "from quant_core.registry import registry\n"
        "with served(Path(sys.argv[3])) as llm:\n"
        "    print('TOKENS', [t.ids for t in greedy(llm, prompts())])\n"
        "assert 'broken' not in registry().plugins\n"
    )
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), here, str(ACT_ORDER)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    want = [t.ids for t in reference(ACT_ORDER, prompts())]
    assert f"TOKENS {want}" in run.stdout, run.stderr[-2000:]
    assert "broken" in run.stderr


UNUSED = """
import sys, json
import vllm.plugins
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
before = set(sys.modules)
vllm.plugins.load_general_plugins()
print("NEW", json.dumps(sorted(set(sys.modules) - before)))
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
assert "quant_core" in QUANTIZATION_METHODS
"""


@pytest.mark.short
def test_entry_point_imports_next_to_nothing_when_unused() -> None:
    """Counted, not timed: no torch, triton or plugin code of ours, and few modules at all."""
    run = subprocess.run(
        [sys.executable, "-c", UNUSED], capture_output=True, text=True, timeout=120, check=True
    )
    line = next(x for x in run.stdout.splitlines() if x.startswith("NEW "))
    ours = {
        n for n in re.findall(r'"([^"]+)"', line) if n.startswith(("quant_", "triton", "torch"))
    }
    assert {n for n in ours if not n.startswith("quant_core")} == set()
    assert not ours & {
        "quant_core.build",
        "quant_core.nn",
        "quant_core.load",
        "quant_core.registry",
    }
    assert len(ours) <= 16, sorted(ours)


def test_copy_of_a_fixture_is_whole(tmp_path: Path) -> None:
    """The faults above come from the edit, not from copying."""
    folder = edited(tmp_path, lambda t: None)
    shutil.copy(ACT_ORDER / "config.json", folder)
    with served(folder) as llm:
        got = greedy(llm, prompts())
    assert first_difference(got, reference(ACT_ORDER, prompts()), 5e-5) == ""


@pytest.mark.parametrize(
    "name",
    ["", "_cache", "_config", "_experts", "_layers", "_loader", "_parser", "_refit"],
    ids=lambda n: f"vllm{n}",
)
def test_all_names_of_the_adapter_exist(name: str) -> None:
    module = importlib.import_module(f"quant_core.engines.vllm{name}")
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
