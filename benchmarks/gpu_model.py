"""A model of Llama-3-8B's shape on one GPU: tokens per second by how its weights are quantized.

    python benchmarks/gpu_model.py --schemes bf16,int4+head,fp8,mxfp4 --json out.json

Weights are random and made on the device, quantized there by the installed plugins' own online
schemes (``quant_core.live.quantize_model_``); all decoder layers hold copies of the first one's.
The output embedding stays bf16; ``SCHEME+head`` measures the scheme, then quantizes that too and
decodes again. Two ways to decode, each one CUDA graph of a step over a static cache:

transformers  the model's own forward; normalization, rotation, gating and attention fused, q, k, v
              and gate, up joined as ``quant_core.shared`` does it
compiled      ``gpu_decoder``: the layer compiled, for bf16 as for all others

Prefill runs eagerly. ``cosine`` compares the last logits with those of the bf16 model of the same
weights.
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
from gpu_decoder import Decoder, grouped_attention  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from quant_core.kernels.warmup import warmup  # noqa: E402
from quant_core.live import linear_of, quantize_model_  # noqa: E402
from quant_core.nn import QuantLinear  # noqa: E402
from quant_core.shared import share_inputs  # noqa: E402

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {"group_size": 128}),
    "fp8": ("compressed_tensors:fp8", {}),
    "fp8_block": ("compressed_tensors:fp8_block", {}),
    "int8": ("int8", {}),
    "int8a16": ("int8", {"activations": False}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
}
MODES = ("decode", "compiled")
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


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def fuse_small_ops(compiled: bool) -> None:
    """Fewer launches per layer, for every candidate alike."""
    wrap = torch.compile if compiled else lambda f: f
    decode_attention = (
        torch.compile(grouped_attention, dynamic=False) if compiled else grouped_attention
    )

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        scaling: float, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        if q.shape[2] == 1 and mask is not None:
            y = decode_attention(q, k, v, ~mask, scaling)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        return y.transpose(1, 2).contiguous(), None

    AttentionInterface.register("grouped", attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    gated, rotate = wrap(_gated), wrap(modeling_llama.apply_rotary_pos_emb)
    modeling_llama.LlamaRMSNorm.forward = _norm
    modeling_llama.apply_rotary_pos_emb = rotate

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

    modeling_llama.LlamaMLP.forward = mlp


def make(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    """Random weights on the device, of one layer; the same for every call."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_hidden_layers, config._attn_implementation = 1, "grouped"
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
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    ids = torch.randint(0, model.config.vocab_size, (batch, START), device=device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    at = torch.tensor([START], device=device)

    def run() -> torch.Tensor:
        return model(
            token, past_key_values=cache, cache_position=at, position_ids=at[None].expand(batch, 1),
            use_cache=True,
        ).logits  # fmt: skip

    return run


def decode_ms(run: Any, device: str, replays: int = 20) -> tuple[float, Any]:
    """(milliseconds per step, last logits) of a CUDA graph of one decode step."""
    if device == "cpu":
        for _ in range(2):
            run()
        start = time.perf_counter()
        logits = run()
        return (time.perf_counter() - start) * 1e3, logits
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
    return statistics.median(times), logits.clone()


def _compiled_step(decoder: Decoder, batch: int, device: str) -> Any:
    """The same for ``Decoder``."""
    torch.manual_seed(1)
    caches = decoder.caches(batch, CACHE)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    at = torch.tensor([START], device=device)
    return lambda: decoder.step(token, at, caches)


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
            ms, last = decode_ms(step(batch), args.device)
        except Exception as err:
            _note(out, f"{mode} batch {batch}", err)
            continue
        out[f"{mode}_{batch}_ms"] = ms
        out[f"{mode}_{batch}_tok_s"] = batch / ms * 1e3
        out[f"{mode}_{batch}_took_s"] = time.perf_counter() - start
        out["finite"] = out.get("finite", True) and bool(last.isfinite().all())
        logits = last[:1] if logits is None else logits
        print(json.dumps(out), flush=True)
    return logits


def _quantized(model: Any, scheme: str, out: dict[str, Any]) -> None:
    online, options = SCHEMES[scheme]
    names = quantize_model_(model, online, options=options)
    layers = [model.get_submodule(n) for n in names]
    out["kernels"] = dict(Counter(m.kernel.name for m in layers if isinstance(m, QuantLinear)))


def candidate(scheme: str, config: LlamaConfig, args: Any) -> tuple[list[dict[str, Any]], Any]:
    """All figures of one scheme; logits at batch 1 of each way to decode, for comparison."""
    scheme, _, head = scheme.partition("+")
    out: dict[str, Any] = {"scheme": scheme}
    rows = [out]
    start = time.perf_counter()
    model = make(config, args.device)
    if scheme != "bf16":
        _quantized(model, scheme, out)
    deepen_(model, args.layers)
    share_inputs(model)
    _clean(args.device)
    out["make_s"] = time.perf_counter() - start
    held = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    out["weights_gb"] = sum(t.numel() * t.element_size() for t in held.values()) / 1e9
    if args.warmup:
        start = time.perf_counter()
        warmup(model, rows=(1, 8, 64, args.prefill), most=args.prefill)
        out["warmup_s"] = time.perf_counter() - start
    logits = {"decode": _decode(out, "decode", lambda b: _step(model, b, args.device), args)}
    try:
        out["prefill_ms"] = prefill_ms(model, args.prefill, args.device)
        out["prefill_tok_s"] = args.prefill / out["prefill_ms"] * 1e3
    except Exception as err:
        _note(out, "prefill", err)
    _clean(args.device)
    try:
        decoder = Decoder(model, compiled=args.compiled)
    except Exception as err:
        _note(out, "compiled", err)
        return rows, logits
    _clean(args.device)
    logits["compiled"] = _decode(
        out, "compiled", lambda b: _compiled_step(decoder, b, args.device), args
    )
    if head:
        online, options = SCHEMES[scheme]
        more: dict[str, Any] = {"scheme": f"{scheme}+head"}
        weight = model.lm_head.weight
        decoder.head = linear_of(online, weight.detach(), name="lm_head", options=options)
        saved = weight.nbytes - decoder.head.nbytes
        more |= {"weights_gb": out["weights_gb"] - saved / 1e9, "kernels": out["kernels"]}
        model.lm_head = None
        _clean(args.device)
        _decode(more, "compiled", lambda b: _compiled_step(decoder, b, args.device), args)
        rows.append(more)
    return rows, logits


def markdown(rows: list[dict[str, Any]], batches: list[int]) -> str:
    """A table with ratios to bf16."""
    base = next((r for r in rows if r["scheme"] == "bf16"), {})
    modes = [(f"{mode}_{b}_tok_s", f"{mode}, batch {b}") for mode in MODES for b in batches]
    modes.append(("prefill_tok_s", "prefill"))
    lines = ["| scheme | GB | " + " | ".join(name for _, name in modes) + " | kernels |",
             "|---|" + "---|" * (len(modes) + 2)]  # fmt: skip
    for r in rows:
        cells = []
        for key, _ in modes:
            if key not in r:
                cells.append("-")
                continue
            ratio = f" ({r[key] / base[key]:.2f}x)" if base.get(key) and r is not base else ""
            cells.append(f"{r[key]:.0f}{ratio}")
        kernels = ", ".join(f"{k} x{v}" for k, v in r.get("kernels", {}).items())
        lines.append(
            f"| {r['scheme']} | {r['weights_gb']:.1f} | " + " | ".join(cells) + f" | {kernels} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    """Measure; 1 if a candidate failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schemes", default="bf16,int4+head,fp8,mxfp4,int8")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warmup", action="store_true", help="time kernels.warmup, too")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--base", type=Path, help="results of an earlier run to compare with")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.batches = [int(b) for b in args.batches.split(",")]
    deadline = time.monotonic() + args.seconds
    fuse_small_ops(args.device != "cpu")
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
