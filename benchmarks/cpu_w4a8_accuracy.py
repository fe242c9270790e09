"""What rounding activations to int8 costs on a real model: ``cpu_w4a8`` beside the exact kernel.

    python benchmarks/cpu_w4a8_accuracy.py --text README.md docs/hooks.md --windows 8

SmolLM2-135M-Instruct in Q4_1 predicts every next token of windows of ``--tokens`` of the texts, in
bfloat16 with the kernels of each row, and in float32 with the reference. Reported are bits per byte
of text, and from the reference's distributions: KL divergence (mean, 99th percentile, largest) and
how often the likeliest token is the same. Exact kernels say what bfloat16 alone costs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from bench import smollm2

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.tokenizer import encode, load_tokenizer
from quant_core.engines.transformers import load_model

CANDIDATES = (
    ("reference, float32", "torch_ref", torch.float32),
    ("cpu_wna16, float32", "cpu_wna16", torch.float32),
    ("cpu_wna16, bfloat16", "cpu_wna16", torch.bfloat16),
    ("cpu_w4a8, bfloat16", "linear=cpu_w4a8", torch.bfloat16),
)


def _windows(texts: list[Path], tokens: int, count: int) -> tuple[torch.Tensor, int]:
    """(ids [W, tokens], bytes of text that their predicted tokens stand for)."""
    with open_checkpoint(smollm2()) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    text = "\n".join(p.read_text(encoding="utf-8") for p in texts)
    ids = encode(tokenizer, text, "text").input_ids[0]
    count = min(count, ids.shape[0] // tokens)
    if not count:
        raise SystemExit(f"{len(ids)} tokens of text, expected {tokens} at least")
    ids = ids[: count * tokens].view(count, tokens)
    return ids, sum(len(tokenizer.decode(w[1:]).encode()) for w in ids)


@torch.inference_mode()
def _logs(kernel: str, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities [W * (tokens - 1), vocabulary] of every next token."""
    model = load_model(smollm2(), dtype=dtype, kernels=kernel)
    rows = [model(w[None]).logits[0, :-1].float().log_softmax(-1) for w in ids]
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    ids, size = _windows(args.text, args.tokens, args.windows)
    answers = ids[:, 1:].reshape(-1, 1)
    print(
        f"{ids.shape[0]} windows of {ids.shape[1]} tokens, {size} bytes; torch {torch.__version__}"
    )
    print("| kernels | bits per byte | KL, mean | 99 % | largest | likeliest token the same |")
    print("|---|---|---|---|---|---|")
    base: torch.Tensor | None = None
    for name, kernel, dtype in CANDIDATES:
        logs = _logs(kernel, dtype, ids)
        base = logs if base is None else base
        bits = -float(logs.gather(1, answers).double().sum()) / math.log(2) / size
        kl = (base.exp() * (base - logs)).sum(-1).sort().values
        same = float((base.argmax(-1) == logs.argmax(-1)).float().mean())
        high = kl[int(0.99 * (len(kl) - 1))]
        print(f"| {name} | {bits:.4f} | {kl.mean():.1e} | {high:.1e} | {kl[-1]:.1e} | {same:.1%} |")


if __name__ == "__main__":
    main()
