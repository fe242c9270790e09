"""How vLLM may run a packed model: in processes of its own, compiled, on several ranks, with LoRA.

Settings that start workers run in a process of their own, as they do for a user.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm_serving import COUNT, first_difference, greedy, prompts, reference, served

from checkpoint_sets import FIXTURES, SHARED
from engine_table import served as served_names

CACHES = served_names(
    "tests/vllm_engine/test_modes.py::test_cache_scales_of_the_file_reach_the_attention_layers"
)
WEIGHTS_ONLY = FIXTURES / "ct-w4a16-awq-asym"

SERVE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from vllm_serving import greedy, prompts, served

if __name__ == "__main__":
    with served(Path(sys.argv[2]), **json.loads(sys.argv[3])) as llm:
        print("TOKENS", [t.ids for t in greedy(llm, prompts())])
"""


def elsewhere(tmp_path: Path, folder: Path, **settings: Any) -> list[list[int]]:
    """Tokens from an engine with processes of its own."""
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    here = str(Path(__file__).parent)
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in settings else {}
    run = subprocess.run(
        [sys.executable, str(script), here, str(folder), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | threads,
    )
    lines = [x for x in run.stdout.splitlines() if x.startswith("TOKENS ")]
    assert lines, run.stderr[-3000:]
    found: list[list[int]] = ast.literal_eval(lines[0].removeprefix("TOKENS "))
    return found


def expected(folder: Path) -> list[list[int]]:
    return [t.ids for t in reference(folder, prompts())]


@pytest.mark.slow
def test_own_processes_and_compiled_gives_the_same_tokens(tmp_path: Path) -> None:
    got = elsewhere(tmp_path, WEIGHTS_ONLY, enforce_eager=False, distributed_executor_backend="mp")
    assert got == expected(WEIGHTS_ONLY)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each rank")
@pytest.mark.parametrize(
    ("folder", "more"),
    [
        (FIXTURES / "gptqmodel-4bit-g128-asym-descact", {}),
        (FIXTURES / "gguf-moe-q4_k_m", {}),
        (FIXTURES / "gguf-moe-q4_k_m", {"enable_expert_parallel": True}),
    ],
    ids=["act-order", "experts cut", "expert parallel"],
)
def test_two_ranks_give_the_same_tokens(tmp_path: Path, folder: Path, more: dict[str, Any]) -> None:
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert elsewhere(tmp_path, folder, **settings, **more) == expected(folder)


def adapter(folder: Path, hidden: int) -> torch.Tensor:
    """A LoRA of rank 4 on the first o_proj; returns what it adds to the weight."""
    folder.mkdir()
    a, b = torch.randn(4, hidden) * 0.2, torch.randn(hidden, 4) * 0.2
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return b @ a


def test_lora_on_a_packed_base_adds_what_it_says(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from quant_core import load_model

    change = adapter(tmp_path / "lora", 256)
    model = load_model(WEIGHTS_ONLY, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.o_proj
    layer.register_forward_hook(lambda module, x, y: y + x[0] @ change.T)
    prompt = prompts()[1]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(COUNT):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    with served(WEIGHTS_ONLY, enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        plain = greedy(llm, [prompt])
        settings = SamplingParams(
            temperature=0, max_tokens=COUNT, detokenize=False, ignore_eos=True
        )
        answer = llm.generate(
            [{"prompt_token_ids": prompt}],
            settings,
            use_tqdm=False,
            lora_request=LoRARequest("one", 1, str(tmp_path / "lora")),
        )
    assert list(answer[0].outputs[0].token_ids) == ids[len(prompt) :]
    assert plain[0].ids != ids[len(prompt) :]


# ---------------------------------------------------------------------------- quantized caches


@pytest.mark.shared
@pytest.mark.parametrize("name", CACHES)
def test_cache_scales_of_the_file_reach_the_attention_layers(name: str) -> None:
    """vLLM's CPU attention has no quantized cache; so the values are compared, not tokens."""
    from quant_core.engines.packed import neutral
    from quant_core.engines.sharing import Options, open_plan
    from quant_core.engines.vllm_cache import CacheMethod

    plan = open_plan(str(SHARED / name), Options())
    assert plan.attention
    with served(SHARED / name) as llm:
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "_k_scale")}
        assert len(layers) == len(plan.attention)
        for path, layer in layers.items():
            assert isinstance(layer.quant_method, CacheMethod)
            with neutral():
                got = layer.quant_method._scales()
            stored = plan.attention[path.rpartition(".")[0]].scheme.tensors
            want = {t.role: float(plan.checkpoint.read(t.stored)) for t in stored}
            assert got == want


@pytest.mark.short
def test_float_and_packed_members_of_one_fused_layer(tmp_path: Path) -> None:
    """v_proj stays float, q and k are packed: vLLM itself refuses such a layer."""
    from transformers import LlamaConfig

    from tiny_models import make_tiny

    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip

    def quantized(name: str, kind: str) -> bool:
        return kind != "other" and "v_proj" not in name and "up_proj" not in name

    skip = {"-:.*v_proj": {}, "-:.*up_proj": {}}
    tiny = make_tiny(tmp_path / "mixed", config, quantized=quantized, dynamic=skip)
    want = reference(tiny.folder, prompts())
    for load_format in ("quant_core", "auto"):
        with served(tiny.folder, load_format=load_format) as llm:
            assert first_difference(greedy(llm, prompts()), want, 5e-5) == ""
