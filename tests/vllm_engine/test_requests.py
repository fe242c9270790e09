"""What a user asks of vLLM besides a checkpoint: taking over, single files, redundant experts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from vllm_serving import first_difference, greedy, prompts, reference, served, without_notes

from checkpoint_sets import FIXTURES

ORDER = 5e-5  # as in test_tokens.py
AWQ = FIXTURES / "gptqmodel-awq-gemm-g128"
EXPERTS = FIXTURES / "gguf-moe-q4_k_m"


def method_of(folder: Path) -> str | None:
    """The method that vLLM chooses where the user says nothing of it."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(folder), dtype="float32", skip_tokenizer_init=True)
    found: str | None = args.create_model_config().quantization
    return found


@pytest.mark.short
def test_listed_method_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_core.engines.vllm_config import TAKE_OVER

    folder = without_notes(AWQ, tmp_path / "awq")
    monkeypatch.delenv(TAKE_OVER, raising=False)
    assert method_of(folder) not in {None, "quant_core"}
    monkeypatch.setenv(TAKE_OVER, "gptq")
    assert method_of(folder) not in {None, "quant_core"}
    monkeypatch.setenv(TAKE_OVER, "gptq,awq")
    assert method_of(folder) == "quant_core"
    with served(folder, quantization=None, load_format="auto") as llm:
        got = greedy(llm, prompts())
    assert first_difference(got, reference(AWQ, prompts()), ORDER) == ""


def test_redundant_experts_are_refused() -> None:
    """On the CPU for every method; on a GPU vLLM asks the method, whose answer is no."""
    from quant_core.engines.vllm_experts import ExpertsMethod

    with (
        pytest.raises(Exception, match="load balancing is only supported"),
        served(EXPERTS, enable_eplb=True, enable_expert_parallel=True),
    ):
        pass
    assert ExpertsMethod.supports_eplb.fget(object()) is False


def test_single_file_is_refused_by_vllm_and_its_folder_is_served(tmp_path: Path) -> None:
    """vLLM reads the path as config.json before it asks any plugin."""
    (file,) = EXPERTS.glob("*.gguf")
    with (
        pytest.raises(OSError, match="not a valid JSON file"),
        served(file, config_format="quant_core"),
    ):
        pass
    shutil.copy(file, tmp_path / file.name)
    with served(tmp_path, config_format="quant_core") as llm:
        got = greedy(llm, prompts())
    assert first_difference(got, reference(tmp_path, prompts()), ORDER) == ""


def test_one_of_several_files_is_named_by_path(tmp_path: Path) -> None:
    (file,) = EXPERTS.glob("*.gguf")
    shutil.copy(EXPERTS / "config.json", tmp_path)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).symlink_to(file)
    block = {"quant_method": "quant_core", "path": str(tmp_path / "two.gguf")}
    with served(tmp_path, hf_overrides={"quantization_config": block}) as llm:
        got = greedy(llm, prompts())
    assert first_difference(got, reference(EXPERTS, prompts()), ORDER) == ""
