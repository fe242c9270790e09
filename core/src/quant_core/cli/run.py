"""``quant run``: generate text with the weights kept packed, and say how fast and how large."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_core.cli.output import emit, escaped, in_range, size

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HELP", "add_arguments", "generate", "run", "weight_memory"]

HELP = "generate text from a checkpoint, its weights kept packed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --prompt, --max-new-tokens, --dtype, --device, --mmap, --online and --skip."""
    parser.add_argument("path", metavar="PATH", help="checkpoint folder or file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    tokens = in_range(1, 1_000_000, "tokens")
    parser.add_argument("--max-new-tokens", type=tokens, default=32, metavar="N")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16",
        help="type of activations and of unquantized weights",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", metavar="DEVICE")
    parser.add_argument(
        "--mmap", action=argparse.BooleanOptionalAction,
        help="use weights where the files have them, or copy them; default: where it costs little",
    )  # fmt: skip
    parser.add_argument(
        "--online", metavar="NAME",
        help="quantize a float checkpoint while loading it; `quant formats` lists the names",
    )  # fmt: skip
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN",
        help="with --online: modules that stay floats; may be repeated",
    )  # fmt: skip


def weight_memory(model: nn.Module) -> dict[str, int]:
    """Bytes of all parameters and buffers as they are, and as if every weight were dense.

    A layer that shares the buffers of another one counts once, in both numbers.
    """
    from quant_core.nn import QuantModule

    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t.numel()}
    now = sum(t.numel() * t.element_size() for t in tensors.values())
    packed = dense_weights = 0
    for module in model.modules():
        if isinstance(module, QuantModule) and module.tensors:
            packed += module.nbytes
            op = module.op
            dense_weights += op.size("n") * op.size("k") * max(op.size("experts", 0), 1)
    width = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 2)
    return {
        "packed_bytes": packed,
        "dense_bytes": dense_weights * width,
        "model_bytes": now,
        "dense_model_bytes": now - packed + dense_weights * width,
    }


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    """Greedy continuation of ``prompt``; the time of the first token counts on its own."""
    import torch

    from quant_core.engines.tokenizer import encode

    inputs = encode(tokenizer, prompt, "prompt").to(model.device)
    ask = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    times: list[float] = []
    never = torch.zeros(1, dtype=torch.bool, device=model.device)

    def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Asked after every token whether to stop."""
        times.append(time.perf_counter())
        return never

    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, **ask)  # the first calls: lazy set-up
        start = time.perf_counter()
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, stopping_criteria=[note], **ask
        )
    given = inputs["input_ids"].shape[1]
    new = out[0, given:]
    decoding_s = times[-1] - times[0]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": given,
        "new_tokens": len(new),
        "first_token_s": round(times[0] - start, 4),
        "decode_tok_s": round((len(times) - 1) / decoding_s, 2) if len(times) > 1 else None,
    }


def _collect(args: argparse.Namespace) -> dict[str, Any]:
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.engines.tokenizer import load_tokenizer

    with open_checkpoint(args.path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    import torch

    from quant_core.engines.transformers import load_model

    start = time.perf_counter()
    model = load_model(
        args.path,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        mmap=args.mmap,
        online=args.online,
        skip=args.skip,
    )
    load_s = time.perf_counter() - start
    return {
        "path": args.path,
        "dtype": args.dtype,
        "device": args.device,
        "online": args.online,
        "threads": torch.get_num_threads(),
        "load_s": round(load_s, 3),
        **generate(model, tokenizer, args.prompt, args.max_new_tokens),
        "memory": weight_memory(model),
    }


def _render(data: Mapping[str, Any]) -> Iterator[str]:
    yield escaped(data["prompt"]) + escaped(data["text"])
    yield ""
    rate = data["decode_tok_s"]
    yield (
        f"{data['new_tokens']} token{'' if data['new_tokens'] == 1 else 's'}"
        + (f", {rate:.1f} tokens/s decoding" if rate is not None else "")
        + f", first token after {data['first_token_s']:.2f} s, loaded in {data['load_s']:.1f} s "
        f"({data['device']}, {data['threads']} threads, {data['dtype']})"
    )
    m = data["memory"]
    yield (
        f"weights: {size(m['packed_bytes'])} packed, {size(m['dense_bytes'])} if dequantized; "
        f"whole model: {size(m['model_bytes'])} against {size(m['dense_model_bytes'])}"
    )


def run(args: argparse.Namespace) -> int:
    """Load, generate, report."""
    data = _collect(args)
    emit(args, data, _render(data))
    return 0
