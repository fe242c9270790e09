"""Serve a checkpoint with vLLM, and the same greedy tokens from the transformers engine."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Tokens",
    "addresses",
    "first_difference",
    "float_llama",
    "greedy",
    "model_of",
    "prompts",
    "reference",
    "served",
    "without_notes",
]

COUNT = 12


@dataclass
class Tokens:
    """Greedy tokens of one prompt and the logarithm of each one's probability."""

    ids: list[int]
    logprobs: list[float]


def prompts(vocab: int = 250) -> list[list[int]]:
    """Three prompts of unlike lengths: inside one cache block, across two, across three."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in (5, 17, 40)]


def reference(path: Path, wanted: Sequence[list[int]], **options: Any) -> list[Tokens]:
    """From ``load_model``, in float32, with transformers' own norms, without a cache."""
    from quant_core import load_model
    from quant_core.engines.transformers_swap import unswap

    model = load_model(path, dtype=torch.float32, **options)
    for module in model.modules():
        unswap(module)  # a last bit of a norm tips activations that are rounded to codes
    out = []
    with torch.no_grad():
        for prompt in wanted:
            ids, logprobs = list(prompt), []
            for _ in range(COUNT):
                row = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
                ids.append(int(row.argmax()))
                logprobs.append(float(row[ids[-1]]))
            out.append(Tokens(ids[len(prompt) :], logprobs))
    return out


def float_llama(folder: Path, seed: int = 0) -> Path:
    """A random float checkpoint, large enough for groups of 32 and blocks of 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
        dtype=torch.float32, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def served(path: Path, **settings: Any) -> Iterator[Any]:
    """An ``LLM`` in this process, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "quantization": "quant_core",
        "load_format": "quant_core",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
    }
    llm = None
    try:
        llm = LLM(model=str(path), **defaults | settings)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def model_of(llm: Any) -> Any:
    """vLLM's module, of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def addresses(llm: Any) -> dict[str, int]:
    """Where its parameters are: captured graphs know these places."""
    return {name: p.data_ptr() for name, p in model_of(llm).named_parameters() if p.numel()}


def greedy(llm: Any, wanted: Sequence[list[int]], count: int = COUNT) -> list[Tokens]:
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0, max_tokens=count, detokenize=False, ignore_eos=True, logprobs=1
    )
    asked = [{"prompt_token_ids": p} for p in wanted]
    out = []
    for answer in llm.generate(asked, settings, use_tqdm=False):
        one = answer.outputs[0]
        ids = list(one.token_ids)
        out.append(Tokens(ids, [row[t].logprob for row, t in zip(one.logprobs, ids, strict=True)]))
    return out


def first_difference(got: Sequence[Tokens], want: Sequence[Tokens], tolerance: float) -> str:
    """Where tokens or their probabilities part; "" if nowhere."""
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)):
            if x != y:
                return f"prompt {n}, token {i}: {x} and not {y}"
            if abs(a.logprobs[i] - b.logprobs[i]) > tolerance:
                return f"prompt {n}, token {i}: logprob {a.logprobs[i]} and not {b.logprobs[i]}"
    return ""


def without_notes(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint's own files: vLLM's loader reads every safetensors file there is."""
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(("expected", "reference")):
            shutil.copy(file, to / file.name)
    return to
