"""vLLM on the CPU: our W4A16 against vLLM's own on the same checkpoint, bf16 beside it.

    .venv-vllm/bin/python benchmarks/vllm_cpu.py [--rounds 5] [--hidden 1024] [--layers 8] [--eager]

A random Llama is written once as bf16 and once rounded to int4 in groups of 128. Three engines of
one process each hold it; they are asked in turn, round by round, so that whatever else the machine
does meets all of them. Best and median of all rounds, in tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS = {"decode x1": (1, 8, 64), "decode x8": (8, 8, 32), "prefill 1024": (1, 1024, 1)}
"""Name -> (requests, tokens of each prompt, tokens made)."""


def make(folder: Path, hidden: int, layers: int) -> dict[str, Path]:
    """The same random weights as bf16 and as int4."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from quant_core import load_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 3,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    packed = load_model(folder / "bf16", online="int4", online_options={"group_size": 128})
    packed.save_pretrained(folder / "int4")
    return {"bf16": folder / "bf16", "vLLM W4A16": folder / "int4", "ours W4A16": folder / "int4"}


def worker(path: str, ours: bool, eager: bool) -> None:
    """An engine that answers one line of standard input with one line of JSON."""
    from vllm import LLM, SamplingParams

    own = {"quantization": "quant_core", "load_format": "quant_core"} if ours else {}
    llm = LLM(
        model=path, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2048,
        enable_prefix_caching=False, enforce_eager=eager, disable_log_stats=True,
        distributed_executor_backend="uni", **own,
    )  # fmt: skip
    print("READY", flush=True)
    for line in sys.stdin:
        requests, prompt, count = TASKS[line.strip()]
        asked = [
            {"prompt_token_ids": [(7 * i + j) % 8000 for j in range(prompt)]}
            for i in range(requests)
        ]
        settings = SamplingParams(
            temperature=0, max_tokens=count, detokenize=False, ignore_eos=True
        )
        start = time.perf_counter()
        llm.generate(asked, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = requests * (count if count > 1 else prompt)
        print("RATE", json.dumps(tokens / seconds), flush=True)


class Engine:
    """A worker process."""

    def __init__(self, name: str, path: Path, eager: bool) -> None:
        self.name = name
        command = [sys.executable, __file__, "--worker", str(path), "--ours"]
        if "ours" not in name:
            command.remove("--ours")
        env = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [*command, *(["--eager"] if eager else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self._wait("READY")

    def _wait(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"{self.name}: the engine ended; run its worker by hand to see why")

    def rate(self, task: str) -> float:
        assert self.process.stdin is not None
        print(task, file=self.process.stdin, flush=True)
        return float(json.loads(self._wait("RATE")))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def table(rates: dict[str, dict[str, list[float]]]) -> str:
    names = list(rates)
    native = "vLLM W4A16"
    lines = ["| tokens/s, median (best) | " + " | ".join(names) + " | ours / vLLM |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for task in TASKS:
        cells = [
            f"{statistics.median(rates[n][task]):.1f} ({max(rates[n][task]):.1f})" for n in names
        ]
        pairs = zip(rates["ours W4A16"][task], rates[native][task], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        lines.append(f"| {task} | " + " | ".join(cells) + f" | {ratio:.2f} |")
    return "\n".join(lines)


def main(options: Any) -> None:
    import torch
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), options.hidden, options.layers)
        engines = [Engine(name, path, options.eager) for name, path in paths.items()]
        rates: dict[str, dict[str, list[float]]] = {
            e.name: {task: [] for task in TASKS} for e in engines
        }
        for number in range(options.rounds + 1):
            for task in TASKS:
                for engine in engines:
                    rate = engine.rate(task)
                    if number:  # the first round warms up
                        rates[engine.name][task].append(rate)
        for engine in engines:
            engine.close()
    print(
        f"vLLM {vllm.__version__}, torch {torch.__version__}, {platform.processor() or 'cpu'}, "
        f"{len(os.sched_getaffinity(0))} cores, hidden {options.hidden}, {options.layers} layers, "
        f"{options.rounds} rounds in turn, {'eager' if options.eager else 'compiled'}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    print(table(rates))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.ours, given.eager)
    else:
        main(given)
