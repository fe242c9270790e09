"""Real checkpoints on the GPU against the CPU: logits, stored bits, and moving between devices.

    python benchmarks/gpu_checkpoints.py prepare CHECKPOINTS FOLDER [--megabytes 30]    # on any CPU
    python benchmarks/gpu_checkpoints.py pack FOLDER --parts 3       # FOLDER/part0.tar.xz, ...
    python benchmarks/gpu_checkpoints.py run FOLDER|part0.tar.xz [--json out.json] [--jobs 6]  # GPU

``prepare`` computes the CPU's logits (float32, reference kernels) of every checkpoint, copies those
that fit in ``--megabytes`` of model files, smallest first with every format present, and writes
``cpu.safetensors`` beside them. ``pack`` makes archives of what lies there, half as large, for
machines that take little at a time. ``run`` needs nothing else. Per checkpoint it holds that

    float32    max |gpu - cpu| <= FLOAT32 * max |cpu|, or mean |gpu - cpu| <= 3 * the mean that the
               checkpoint's own ``rounding_flip_level`` states, or a tenth of its bound's mean
               (with quantized activations the last bit of a sum flips roundings, on either device)
    bfloat16   mean |gpu - cpu| <= 2 * mean |cpu in bfloat16 - cpu| + 1e-3, the kernels chosen
    restore    the canonical tensors on the GPU are those of the CPU, bit for bit
    moved      a model loaded on the CPU and moved to the GPU gives the same logits as one loaded
               there, both with transformers' own norms: those that kernels run are found where a
               model is loaded, and a last bit of theirs tips activations that are rounded to codes
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import multiprocessing
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from source_tree import use

FLOAT32 = 2e-5  # sums of a few hundred products in another order
SKIPPED = ("expected.safetensors", "recipe.yaml", "tokenizer.json", "tokenizer_config.json")


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(ids[None].to(model.device), use_cache=False).logits[0].float().cpu()


def _kernels(model: Any) -> dict[str, int]:
    from quant_core.nn import QuantModule

    return dict(Counter(m.kernel.name for m in model.modules() if isinstance(m, QuantModule)))


def prepare(source: Path, target: Path, megabytes: float) -> None:
    """Logits of all checkpoints, and copies of those that fit."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from quant_core import load_model
    from quant_core.errors import QuantError

    torch.set_num_threads(2)
    (target / "checkpoints").mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for folder in sorted(p.parent for p in source.glob("*/expected.json")):
        expected = json.loads((folder / "expected.json").read_text())
        ids = torch.tensor(expected["input_ids"])
        try:
            model = load_model(folder, dtype=torch.float32, kernels="torch_ref")
            full = _logits(model, ids)
            low = _logits(load_model(folder, dtype=torch.bfloat16, kernels="torch_ref"), ids)
        except QuantError as err:
            print(f"{folder.name}: left out: {err.code}")
            continue
        with safe_open(folder / "expected.safetensors", "pt") as f:
            producer = f.get_tensor("logits").float()
        tensors[folder.name] = full
        files = [p for p in folder.iterdir() if p.name not in SKIPPED]
        facts[folder.name] = {
            "bf16": float((low - full).abs().mean()),
            "producer": float((full - producer).abs().mean()),
            "flips": expected.get("rounding_flip_level"),
            "mean_bound": expected.get("bound", {}).get("mean"),
            "input_ids": expected["input_ids"],
            "bytes": sum(p.stat().st_size for p in files),
        }
        print(folder.name, facts[folder.name]["bf16"], flush=True)
    first = {name.split("-")[0]: name for name in sorted(facts, key=lambda n: -facts[n]["bytes"])}
    order = [*first.values(), *sorted(facts, key=lambda n: facts[n]["bytes"])]
    used, taken = 0, []
    for name in dict.fromkeys(order):
        if used + facts[name]["bytes"] > megabytes * 1e6:
            continue
        used += facts[name]["bytes"]
        taken.append(name)
        shutil.copytree(
            source / name,
            target / "checkpoints" / name,
            ignore=shutil.ignore_patterns(*SKIPPED),
            dirs_exist_ok=True,
        )
    save_file(tensors, target / "cpu.safetensors")
    (target / "facts.json").write_text(json.dumps(facts))
    print(f"{len(taken)} of {len(facts)} checkpoints, {used / 1e6:.1f} MB")


def pack(folder: Path, parts: int, stride: int) -> None:
    """Archives of about equal size, each complete in itself, with every ``stride``-th position."""
    from safetensors.torch import load_file, save

    facts = json.loads((folder / "facts.json").read_text())
    logits = load_file(folder / "cpu.safetensors")
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    share, taken = sum(facts[n]["bytes"] for n in names) / parts, 0
    held: list[list[str]] = [[] for _ in range(parts)]
    for name in names:  # neighbours by name have tensors in common, which are stored once
        held[min(parts - 1, int(taken / share))].append(name)
        taken += facts[name]["bytes"]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 128 << 20}]
    for i, of in enumerate(held):
        path = folder / f"part{i}.tar.xz"
        with (
            lzma.open(path, "wb", filters=filters) as out,
            tarfile.open(fileobj=out, mode="w") as tar,
        ):
            kept = {n: facts[n] | {"stride": stride} for n in of}
            values = save({n: logits[n][::stride].contiguous() for n in of})
            for name, data in (
                ("facts.json", json.dumps(kept).encode()),
                ("cpu.safetensors", values),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for name in of:
                tar.add((folder / "checkpoints" / name).resolve(), f"checkpoints/{name}")
        print(f"{path.name}: {len(of)} checkpoints, {path.stat().st_size / 1e6:.1f} MB", flush=True)


@contextmanager
def unpacked(target: Path) -> Iterator[Path]:
    """The folder of an archive while it is needed; a folder is its own."""
    if target.is_dir():
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        with tarfile.open(target) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def _same_bits(a: Any, b: Any) -> str:
    """The first buffer whose canonical tensors differ; "" if none does."""
    import torch

    from quant_core.nn import QuantModule

    theirs = dict(b.named_modules())
    for name, module in a.named_modules():
        if not isinstance(module, QuantModule) or not module.owns_buffers:
            continue
        one, two = module.restore(), theirs[name].restore()
        pairs = {k: (v, two.weight.tensors()[k]) for k, v in one.weight.tensors().items()}
        pairs |= {
            k: (v, getattr(two, k))
            for k in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
            if (v := getattr(one, k)) is not None
        }
        if one.weight.packing != two.weight.packing:
            from quant_core.packing import repack

            lt, n_k = two.weight, two.weight.shape
            if len(n_k) == 2:
                codes = repack(
                    lt.codes.cpu(), lt.spec.element.bits, n_k, lt.packing, one.weight.packing
                )
                pairs["codes"] = (one.weight.codes, codes)
            else:
                pairs.pop("codes")
        for key, (x, y) in pairs.items():
            flat = [t.cpu().contiguous().flatten().view(torch.uint8) for t in (x, y)]
            if x.shape != y.shape or not torch.equal(*flat):
                return f"{name}.{key}"
    return ""


def check(folder: str, fact: dict[str, Any], full: Any, device: str) -> dict[str, Any]:
    """All measurements of one checkpoint."""
    use()
    import torch

    from quant_core import load_model

    torch.set_num_threads(2)
    full = torch.tensor(full)
    ids = torch.tensor(fact["input_ids"])
    some = slice(None, None, fact.get("stride", 1))  # positions that were kept of the logits
    out: dict[str, Any] = {"name": Path(folder).name}
    started = time.perf_counter()

    def step(name: str, run: Any) -> None:
        try:
            out[name] = run()
        except Exception as err:  # every step is wanted, whatever happened to the others
            out[name] = {"ok": False, "error": f"{type(err).__name__}: {str(err)[:1500]}"}
            out.setdefault("traceback", traceback.format_exc()[-3000:])

    def in_float32() -> dict[str, Any]:
        model = load_model(folder, dtype=torch.float32, device=device, kernels="torch_ref")
        d = (_logits(model, ids)[some] - full).abs()
        allowed = FLOAT32 * float(full.abs().max())
        flips = max(3 * (_mean_flip(fact["flips"]) or 0.0), 0.1 * (fact["mean_bound"] or 0.0))
        ok = float(d.max()) <= allowed or float(d.mean()) <= flips
        return {"ok": ok, "max": float(d.max()), "mean": float(d.mean()), "allowed": allowed}

    models: dict[str, Any] = {}

    def in_bfloat16() -> dict[str, Any]:
        model = models["gpu"] = load_model(folder, dtype=torch.bfloat16, device=device)
        d = float((_logits(model, ids)[some] - full).abs().mean())
        allowed = 2 * fact["bf16"] + 1e-3
        return {"ok": d <= allowed, "mean": d, "allowed": allowed, "kernels": _kernels(model)}

    def restored() -> dict[str, Any]:
        models["cpu"] = load_model(folder, dtype=torch.bfloat16, kernels="torch_ref")
        where = _same_bits(models["gpu"], models["cpu"])
        return {"ok": not where, "differs": where}

    def moved() -> dict[str, Any]:
        from quant_core.engines.transformers_swap import unswap

        cpu = load_model(folder, dtype=torch.bfloat16)  # moving chooses kernels again
        for module in (*cpu.modules(), *models["gpu"].modules()):
            unswap(module)
        d = (_logits(cpu.to(device), ids) - _logits(models["gpu"], ids)).abs()
        same = _kernels(cpu) == _kernels(models["gpu"])
        return {"ok": same and float(d.max()) == 0.0, "max": float(d.max()), "same_kernels": same}

    step("float32", in_float32)
    step("bfloat16", in_bfloat16)
    step("restore", restored)
    step("moved", moved)
    out["seconds"] = round(time.perf_counter() - started, 1)
    return out


def _mean_flip(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("mean")
    return float(value) if isinstance(value, int | float) else None


def run(target: Path, device: str, jobs: int, only: str) -> list[dict[str, Any]]:
    """Check every checkpoint in ``target``, in ``jobs`` processes."""
    from safetensors.torch import load_file

    facts = json.loads((target / "facts.json").read_text())
    logits = load_file(target / "cpu.safetensors")
    names = [p.name for p in sorted((target / "checkpoints").iterdir()) if only in p.name]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [
            pool.submit(
                check, str(target / "checkpoints" / n), facts[n], logits[n].tolist(), device
            )
            for n in names
        ]
        for future in as_completed(futures):
            rows.append(future.result())
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "traceback"}), flush=True)
    return sorted(rows, key=lambda r: r["name"])


def main() -> int:
    """Prepare, pack or run; 1 if a checkpoint fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(dest="command", required=True)
    first = sub.add_parser("prepare")
    first.add_argument("source", type=Path)
    first.add_argument("target", type=Path)
    first.add_argument("--megabytes", type=float, default=30.0)
    packed = sub.add_parser("pack")
    packed.add_argument("target", type=Path)
    packed.add_argument("--parts", type=int, default=1)
    packed.add_argument("--stride", type=int, default=4)
    second = sub.add_parser("run")
    second.add_argument("target", type=Path)
    second.add_argument("--device", default="cuda")
    second.add_argument("--jobs", type=int, default=6)
    second.add_argument("--only", default="")
    second.add_argument("--json", type=Path)
    args = parser.parse_args()
    use()
    if args.command == "prepare":
        prepare(args.source, args.target, args.megabytes)
        return 0
    if args.command == "pack":
        pack(args.target, args.parts, args.stride)
        return 0
    with unpacked(args.target) as folder:
        rows = run(folder, args.device, args.jobs, args.only)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    steps = ("float32", "bfloat16", "restore", "moved")
    failed = 0
    for r in rows:
        bad = [s for s in steps if not r[s]["ok"]]
        failed += bool(bad)
        kernels = ", ".join(f"{k} x{v}" for k, v in r["bfloat16"].get("kernels", {}).items())
        why = "; ".join(f"{s}: {r[s]}"[:300] for s in bad)
        print(f"{r['name']:<40} {'FAILED ' + why if bad else 'ok'}  [{kernels}]")
    print(f"{len(rows)} checkpoints, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
