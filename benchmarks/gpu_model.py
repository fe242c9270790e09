"""A model of Llama-3-8B's shape on one GPU: tokens per second by how its weights are quantized.

    python benchmarks/gpu_model.py --schemes bf16,int4,fp8,mxfp4 --json out.json

Weights are random and made on the device, quantized there by the installed plugins' own online
schemes (``quant_core.live.quantize_model_``); all decoder layers hold copies of the first one's.
The output embedding is quantized by the same scheme where it is one of 4 bits, or ``SCHEME+head``
asks for it; the same model with a bf16 output embedding is the row ``SCHEME, bf16 head``. Ways to
decode, each one CUDA graph of a step over a static cache:

plain         transformers' own forward with scaled-dot-product attention, untouched; bf16 only
transformers  the same forward with the engine's kernels: packed layers run a decoder layer in ten
              launches; float ones get the kernels for norms, gates, rotation and attention
compiled      ``gpu_decoder``: a layer compiled by torch, q, k, v and gate, up one matrix each
fused         ``gpu_decoder``: the same matrices with one kernel for attention with rotation and
              cache, one for residual and norm, one for the gate
matrices      the products of a step alone: the floor

"No graph": eager steps over a dynamic cache, untouched and with the engine's kernels. The ways of
``gpu_decoder`` are the same for bf16 as for the others. Prefill runs eagerly. ``cosine`` compares
the last logits with those of the bf16 model of the same weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from source_tree import use

use()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_decoder import Decoder  # noqa: E402
from gpu_profile import charged, kernels_of, table  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.llama import modeling_llama  # noqa: E402

from quant_core.engines.transformers_attention import attach_attention  # noqa: E402
from quant_core.engines.transformers_layers import attach_blocks  # noqa: E402
from quant_core.engines.transformers_parts import attach_norms_and_mlps  # noqa: E402
from quant_core.errors import KernelError  # noqa: E402
from quant_core.kernels.between import gated_op, rotary_op  # noqa: E402
from quant_core.kernels.choose import choose  # noqa: E402
from quant_core.kernels.device import device_key  # noqa: E402
from quant_core.kernels.warmup import warmup  # noqa: E402
from quant_core.live import linear_of, quantize_model_  # noqa: E402
from quant_core.nn import QuantLinear  # noqa: E402
from quant_core.registry import registry  # noqa: E402
from quant_core.shared import share_inputs  # noqa: E402

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {"group_size": 128}),
    "fp8": ("compressed_tensors:fp8", {}),
    "fp8_block": ("compressed_tensors:fp8_block", {}),
    "int8": ("int8", {}),
    "int8a16": ("int8", {"activations": False}),
    "w4a8": ("int4", {"group_size": 128, "activations": "fp8"}),
    "w4a8-int8": ("int4", {"group_size": 128, "activations": "int8"}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
}
HEADS = ("int4", "mxfp4", "nvfp4")  # schemes that quantize the output embedding unless told
MODES = ("plain", "transformers", "compiled", "fused")
START, CACHE = 128, 512  # tokens in the cache, and room in it


def llama_8b(layers: int) -> LlamaConfig:
    """Llama-3-8B's sizes."""
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip


def tiny(layers: int) -> LlamaConfig:
    """The same, small: to try this script on a CPU."""
    return LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip


_rotate = modeling_llama.apply_rotary_pos_emb
_mlp = modeling_llama.LlamaMLP.forward


def _kernel(op: Any) -> Any:
    """What runs ``op``; a function that declines everything where nothing does."""
    try:
        choice = choose(op, registry())
    except KernelError:
        return lambda *_: None
    return choice.kernel.bind(choice.op)


def with_kernels(model: Any, device: str) -> None:
    """What the engine does for a model that it loads; rotation and gates of float layers too."""
    held = {"dtype": torch.bfloat16, "device": device}
    attach_attention(model, registry(), **held)
    attach_blocks(model, attach_norms_and_mlps(model, registry(), **held))
    c, key = model.config, ("bfloat16", device_key(device))
    dim = c.hidden_size // c.num_attention_heads
    rotary = _kernel(rotary_op(dim, dim, *key))
    gate = _kernel(gated_op(c.intermediate_size, "silu", *key))

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        got = rotary([], q, k, cos, sin) if unsqueeze_dim == 1 else None
        return _rotate(q, k, cos, sin, unsqueeze_dim) if got is None else got

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        g, u = self.gate_proj(x), self.up_proj(x)
        y = gate([], g, u)
        return self.down_proj(F.silu(g) * u if y is None else y)

    modeling_llama.apply_rotary_pos_emb = rotate
    modeling_llama.LlamaMLP.forward = mlp


def untouched() -> None:
    """transformers as it is."""
    modeling_llama.apply_rotary_pos_emb = _rotate
    modeling_llama.LlamaMLP.forward = _mlp


def make(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    """Random weights on the device, of one layer; the same for every call."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_hidden_layers, config._attn_implementation = 1, "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def deepen_(model: Any, layers: int) -> None:
    """Copies of the first decoder layer until there are ``layers``."""
    first = model.model.layers[0]
    for i in range(1, layers):
        layer = copy.deepcopy(first)
        layer.self_attn.layer_idx = i
        model.model.layers.append(layer)
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = layers


def _step(model: Any, batch: int, device: str) -> Any:
    """A function that runs one decode step over a filled static cache."""
    torch.manual_seed(2)  # the same prompt for all
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    ids = torch.randint(0, model.config.vocab_size, (batch, START), device=device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    at = torch.tensor([START], device=device)

    def run() -> torch.Tensor:
        return model(
            token, past_key_values=cache, position_ids=at[None].expand(batch, 1),
            use_cache=True,
        ).logits  # fmt: skip

    return run


def decode_ms(run: Any, device: str, replays: int = 20) -> tuple[float, Any, Any]:
    """(milliseconds per step, last logits, the graph) of a CUDA graph of one decode step."""
    if device == "cpu":
        for _ in range(2):
            run()
        start = time.perf_counter()
        logits = run()
        return (time.perf_counter() - start) * 1e3, logits, None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    times = []
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / replays)
    return statistics.median(times), logits.clone(), graph


def _compiled_step(decoder: Decoder, batch: int, device: str) -> Any:
    """The same for ``Decoder``."""
    torch.manual_seed(1)
    caches = decoder.caches(batch, CACHE)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    at = torch.tensor([START], device=device)
    return lambda: decoder.step(token, at, caches)


def eager_ms(model: Any, device: str, steps: int = 20) -> float:
    """Median milliseconds of a step over a dynamic cache, as ``generate`` makes it: no graph."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, model.config.vocab_size, (1, START), device=device)
    times = []
    for i in range(steps + 5):
        start = time.perf_counter()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits.argmax(-1)
        int(ids)  # waits
        times.append((time.perf_counter() - start) * 1e3)
        del logits, i
    return statistics.median(times[5:])


def prefill_ms(model: Any, tokens: int, device: str) -> float:
    """Milliseconds for one prompt, without a cache, the last logits only."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    times = []
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def _note(out: dict[str, Any], what: str, err: Exception) -> None:
    out.setdefault("problems", []).append(f"{what}: {type(err).__name__}: {err}"[:800])


def _clean(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _decode(out: dict[str, Any], mode: str, step: Any, args: Any) -> Any:
    """Figures of one way to decode, ``step`` (batch) -> a step; the logits at the first batch."""
    logits = None
    for batch in args.batches:
        start = time.perf_counter()
        try:
            ms, last, graph = decode_ms(step(batch), args.device)
        except Exception as err:
            _note(out, f"{mode} batch {batch}", err)
            continue
        out[f"{mode}_{batch}_ms"] = ms
        out[f"{mode}_{batch}_tok_s"] = batch / ms * 1e3
        out[f"{mode}_{batch}_took_s"] = time.perf_counter() - start
        out["finite"] = out.get("finite", True) and bool(last.isfinite().all())
        logits = last[:1] if logits is None else logits
        if args.profile and graph is not None and batch == args.batches[0]:
            try:
                rows = charged(kernels_of(graph, 3), 3, args.layers)
            except Exception as err:
                _note(out, f"profile of {mode}", err)
            else:
                out[f"{mode}_kernels"] = rows
                print(f"{out['scheme']}, {mode}, batch {batch}:\n{table(rows)}", flush=True)
        del graph
        print(json.dumps({k: v for k, v in out.items() if not k.endswith("_kernels")}), flush=True)
    return logits


def _quantized(model: Any, scheme: str, out: dict[str, Any]) -> None:
    online, options = SCHEMES[scheme]
    names = quantize_model_(model, online, options=options)
    layers = [model.get_submodule(n) for n in names]
    out["kernels"] = dict(Counter(m.kernel.name for m in layers if isinstance(m, QuantLinear)))


def _first_token(model: Any, out: dict[str, Any], args: Any) -> None:
    """Seconds from a built model to the first token of a prompt, compiling what it needs; again."""
    ids = torch.randint(0, model.config.vocab_size, (1, START), device=args.device)
    for name in ("first_token_s", "second_token_s"):
        start = time.perf_counter()
        int(model(ids, use_cache=False, logits_to_keep=1).logits.argmax())
        out[name] = time.perf_counter() - start


def _ways(model: Any, rows: list[dict[str, Any]], heads: list[Any], args: Any) -> dict[str, Any]:
    """Measure every way for each of ``heads``, a row each; logits of the first row."""
    logits: dict[str, Any] = {}
    untouched()
    rows[0]["eager_untouched_tok_s"] = 1e3 / eager_ms(model, args.device)
    if args.scheme == "bf16":
        logits["plain"] = _decode(rows[0], "plain", lambda b: _step(model, b, args.device), args)
    with_kernels(model, args.device)
    rows[0]["eager_tok_s"] = 1e3 / eager_ms(model, args.device)
    for row, head in zip(rows, heads, strict=True):
        model.lm_head = head
        last = _decode(row, "transformers", lambda b: _step(model, b, args.device), args)
        logits.setdefault("transformers", last)
    try:
        rows[0]["prefill_ms"] = prefill_ms(model, args.prefill, args.device)
        rows[0]["prefill_tok_s"] = args.prefill / rows[0]["prefill_ms"] * 1e3
    except Exception as err:
        _note(rows[0], "prefill", err)
    _clean(args.device)
    try:
        decoder = Decoder(model, way=args.ways[0])
    except Exception as err:
        _note(rows[0], "decoder", err)
        return logits
    rows[0]["between"] = decoder.kernels
    _clean(args.device)
    for way in args.ways:
        decoder.way = way
        for row, head in zip(rows, heads, strict=True):
            decoder.head = head
            last = _decode(row, way, lambda b: _compiled_step(decoder, b, args.device), args)
            logits.setdefault(way, last)
    if logits.get("fused") is not None and logits.get("compiled") is not None:
        pair = (logits[way].float().flatten() for way in ("fused", "compiled"))
        rows[0]["fused_to_compiled_cosine"] = float(F.cosine_similarity(*pair, dim=0))
    for row, head in zip(rows, heads, strict=True):
        decoder.head = head
        for batch in args.batches:
            ms, _, graph = decode_ms(decoder.matrices(batch), args.device)
            del graph
            row[f"matrices_{batch}_ms"] = ms
    return logits


def candidate(scheme: str, config: LlamaConfig, args: Any) -> tuple[list[dict[str, Any]], Any]:
    """All figures of one scheme, a row per output embedding; logits of the first row."""
    scheme, _, wanted = scheme.partition("+")
    args.scheme = scheme
    out: dict[str, Any] = {"scheme": scheme}
    rows = [out]
    start = time.perf_counter()
    model = make(config, args.device)
    heads: list[Any] = [model.lm_head]
    if scheme != "bf16":
        _quantized(model, scheme, out)
        if wanted or scheme in HEADS:
            online, options = SCHEMES[scheme]
            weight = model.lm_head.weight.detach()
            heads.insert(0, linear_of(online, weight, name="lm_head", options=options))
            rows.append({"scheme": f"{scheme}, bf16 head", "kernels": out["kernels"]})
    deepen_(model, args.layers)
    share_inputs(model)
    _clean(args.device)
    out["make_s"] = time.perf_counter() - start
    for row, head in zip(rows, heads, strict=True):
        model.lm_head = head
        held = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        row["weights_gb"] = sum(t.numel() * t.element_size() for t in held.values()) / 1e9
    model.lm_head = heads[0]
    if args.warmup:
        start = time.perf_counter()
        warmup(model, rows=(1, 8, 64, args.prefill), most=args.prefill)
        out["warmup_s"] = time.perf_counter() - start
    _first_token(model, out, args)
    return rows, _ways(model, rows, heads, args)


def markdown(rows: list[dict[str, Any]], batches: list[int]) -> str:
    """A table with ratios to bf16."""
    base = next((r for r in rows if r["scheme"] == "bf16"), {})
    plain = base.get("plain_1_tok_s")
    modes = [(f"{mode}_{b}_tok_s", f"{mode}, batch {b}") for mode in MODES for b in batches]
    modes += [("eager_untouched_tok_s", "no graph, untouched"), ("eager_tok_s", "no graph")]
    modes.append(("prefill_tok_s", "prefill"))
    names = [name for _, name in modes] + ["best way to plain bf16, batch 1", "kernels"]
    lines = ["| scheme | GB | " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) + 1)]
    for r in rows:
        cells = []
        for key, _ in modes:
            if key not in r:
                cells.append("-")
                continue
            ratio = f" ({r[key] / base[key]:.2f}x)" if base.get(key) and r is not base else ""
            cells.append(f"{r[key]:.0f}{ratio}")
        best = max((r.get(f"{m}_1_tok_s", 0) for m in MODES), default=0)
        cells.append(f"{best / plain:.2f}x" if plain and best else "-")
        kernels = ", ".join(f"{k} x{v}" for k, v in r.get("kernels", {}).items())
        lines.append(
            f"| {r['scheme']} | {r['weights_gb']:.1f} | " + " | ".join(cells) + f" | {kernels} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    """Measure; 1 if a candidate failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schemes", default="bf16,int4,fp8,mxfp4,int8")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warmup", action="store_true", help="time kernels.warmup, too")
    parser.add_argument("--ways", default="fused,compiled", help="of gpu_decoder")
    parser.add_argument("--profile", action="store_true", help="time a layer by kernels")
    parser.add_argument("--base", type=Path, help="results of an earlier run to compare with")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.batches = [int(b) for b in args.batches.split(",")]
    args.ways = args.ways.split(",")
    deadline = time.monotonic() + args.seconds
    config = (tiny if args.tiny else llama_8b)(args.layers)
    rows: list[dict[str, Any]] = []
    if args.base:
        rows += [r for r in json.loads(args.base.read_text()) if r["scheme"] == "bf16"]
    failed, base = 0, None
    for scheme in args.schemes.split(","):
        if time.monotonic() > deadline:
            print(f"{scheme}: out of time")
            failed += 1
            continue
        try:
            made, logits = candidate(scheme, config, args)
        except Exception as err:
            print(f"{scheme}: {type(err).__name__}: {str(err)[:1500]}", flush=True)
            failed += 1
            continue
        base = logits if scheme == "bf16" else base
        for mode, last in logits.items():
            if base is not None and last is not None and base.get(mode) is not None:
                pair = (last.float().flatten(), base[mode].float().flatten())
                made[0][f"{mode}_cosine"] = float(F.cosine_similarity(*pair, dim=0))
        failed += any(r.get("problems") for r in made)
        rows += made
        print(json.dumps(made), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
        _clean(args.device)
    print(markdown(rows, args.batches))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
