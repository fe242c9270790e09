"""``quant inspect``: what a checkpoint is, from its headers alone. Imports no torch.

format, evidence, modules by scheme with bits per weight, bytes, memory per rank, attention whose
keys and values are quantized, warnings
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from quant_core.cli.output import emit, escaped, in_range, size, table
from quant_core.memory import collector_paused

if TYPE_CHECKING:
    from quant_core.plan import Member, Plan

__all__ = ["HELP", "add_arguments", "add_path", "run", "summary"]

HELP = "say what a checkpoint is: format, schemes, bits per weight, memory"


def add_path(parser: argparse.ArgumentParser) -> None:
    """The arguments shared by all commands that plan a checkpoint."""
    parser.add_argument("path", metavar="PATH", help="checkpoint folder or file")
    parser.add_argument(
        "--format", metavar="ID", help="insist on this format; an error if it is another"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --format, --tp and --layers."""
    add_path(parser)
    ranks = in_range(1, 4096, "ranks")
    parser.add_argument("--tp", type=ranks, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--layers", action="store_true", help="list every module")


@dataclass(slots=True)
class _Sum:
    """Totals over the members of one scheme or rule."""

    modules: int = 0
    matrices: int = 0
    weights: int = 0
    stored_bytes: int = 0

    def add(self, matrices: int, weights: int, nbytes: int) -> None:
        self.modules += 1
        self.matrices += matrices
        self.weights += weights
        self.stored_bytes += nbytes

    def plain(self) -> dict[str, Any]:
        return {
            "modules": self.modules,
            "matrices": self.matrices,
            "weights": self.weights,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": _bits(self.stored_bytes, self.weights),
        }


def _bits(nbytes: float, weights: int) -> float | None:
    return round(8 * nbytes / weights, 3) if weights else None


def _describe(plan: Plan, member: Member) -> dict[str, Any]:
    """One module: its scheme or rule, its sizes and its stored bytes."""
    from quant_core.scheme import Scheme

    nbytes, scheme = plan.member_nbytes(member), member.scheme
    if isinstance(scheme, Scheme):
        matrices = len(member.layer.experts) or 1
        out: dict[str, Any] = {
            "scheme": scheme.name,
            "operands": {role: spec.label for role, spec in scheme.operands.items()},
            "shape": list(scheme.shape),
        }
        weights = matrices * prod(scheme.shape)
    else:
        infos = [plan.checkpoint.tensors[n] for n in member.stored]
        matrices, weights = len(infos), sum(prod(i.shape) for i in infos)
        out = {
            "rule": scheme.rule,
            "evidence": scheme.evidence,
            "dtypes": sorted({i.dtype for i in infos}),
        }
    return {
        "kind": member.layer.kind if member.quantized else "float",
        **out,
        "matrices": matrices,
        "weights": weights,
        "stored_bytes": nbytes,
    }


def _describe_cache(plan: Plan, member: Member) -> dict[str, Any]:
    """One attention module whose keys and values (rarely queries) are quantized."""
    from quant_core.kv_cache import CacheScheme

    scheme = member.scheme
    assert isinstance(scheme, CacheScheme)
    return {
        "scheme": scheme.name,
        "operands": {role: spec.label for role, spec in scheme.operands.items()},
        "site": scheme.site,
        "applied": scheme.default,
        "stored_bytes": plan.member_nbytes(member),
    }


def _attention(listed: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same, summed over modules that are alike."""
    sums: dict[tuple[object, ...], dict[str, Any]] = {}
    for one in listed.values():
        key = (one["scheme"], tuple(one["operands"].items()), one["site"], one["applied"])
        total = sums.setdefault(key, {**one, "modules": 0, "stored_bytes": 0})
        total["modules"] += 1
        total["stored_bytes"] += one["stored_bytes"]
    return list(sums.values())


def _tensor_parallel(plan: Plan, ranks: int) -> dict[str, Any]:
    from quant_core.cli.ranks import cut_axis, rank_bytes

    tensors = plan.checkpoint.tensors
    total = whole = 0.0
    for member in plan.members.values():
        part = rank_bytes(member, tensors, ranks)
        total += part
        whole += part if cut_axis(member.layer.name) is None else 0
    return {
        "ranks": ranks,
        "bytes_per_rank": round(total),
        "replicated_bytes": round(whole),
        "note": "estimate from the header: weights only, the usual cut, the fullest rank",
    }


def summary(plan: Plan, *, ranks: int = 1, layers: bool = False) -> dict[str, Any]:
    """Everything ``quant inspect`` says, as JSON types."""
    schemes: dict[tuple[str, tuple[tuple[str, str], ...]], _Sum] = {}
    rules: dict[str, _Sum] = {}
    everything = _Sum()
    packed = _Sum()
    listed: dict[str, dict[str, Any]] = {}
    for name, member in plan.members.items():
        one = _describe(plan, member)
        counts = (one["matrices"], one["weights"], one["stored_bytes"])
        if member.quantized:
            key = (one["scheme"], tuple(one["operands"].items()))
            schemes.setdefault(key, _Sum()).add(*counts)
            packed.add(*counts)
        else:
            rules.setdefault(one["rule"], _Sum()).add(*counts)
        everything.add(*counts)
        if layers:
            listed[name] = one
    caches = {name: _describe_cache(plan, m) for name, m in plan.attention.items()}
    checkpoint, match = plan.checkpoint, plan.match
    out: dict[str, Any] = {
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "format": None if match is None else _format(plan),
        "tensors": len(checkpoint.tensors),
        "modules": everything.modules,
        "quantized_modules": packed.modules,
        "weights": everything.weights,
        "stored_bytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "bfloat16_bytes": 2 * everything.weights,
        "bits_per_weight": {
            "quantized": _bits(packed.stored_bytes, packed.weights),
            "all": _bits(everything.stored_bytes, everything.weights),
        },
        "schemes": [
            {"scheme": name, "operands": dict(operands), **total.plain()}
            for (name, operands), total in schemes.items()
        ],
        "unquantized": [{"rule": rule, **total.plain()} for rule, total in rules.items()],
        "attention": _attention(caches),
        "skipped": dict(plan.ledger.skipped),
        "warnings": list(plan.warnings),
    }
    if ranks > 1:
        out["tensor_parallel"] = _tensor_parallel(plan, ranks)
    if layers:
        out["layers"] = listed
        out["attention_layers"] = caches
    return out


def _format(plan: Plan) -> dict[str, Any]:
    assert plan.match is not None
    owner = plan.registry.plugins[plan.match.plugin]
    return {
        "id": plan.match.plugin,
        "level": plan.match.level,
        "evidence": plan.match.evidence,
        "dist": owner.dist,
        "version": owner.version,
    }


def _render(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"{escaped(data['path'])}"
    fmt = data["format"]
    if fmt is None:
        yield "format     none: plain float tensors"
    else:
        yield (
            f"format     {fmt['id']}, {fmt['level']}: {escaped(fmt['evidence'])} "
            f"({fmt['dist']} {fmt['version']})"
        )
    yield f"container  {data['container']}, {data['tensors']:,} tensors"
    yield (
        f"modules    {data['modules']:,}, of them {data['quantized_modules']:,} quantized; "
        f"{data['weights']:,} weights"
    )
    yield f"stored     {size(data['stored_bytes'])}; as bfloat16 {size(data['bfloat16_bytes'])}"
    bits = data["bits_per_weight"]
    if bits["quantized"] is not None:
        yield (
            f"bits       {bits['quantized']:.3f} per quantized weight, {bits['all']:.3f} over all, "
            "scales and zeros included"
        )
    if tp := data.get("tensor_parallel"):
        yield (
            f"per rank   {size(tp['bytes_per_rank'])} on each of {tp['ranks']} ranks, of it "
            f"{size(tp['replicated_bytes'])} on every rank ({tp['note']})"
        )
    yield ""
    rows = [
        (s["scheme"], _operands(s["operands"]), s["modules"], s["matrices"],
         f"{s['bits_per_weight'] or 0:.3f}", size(s["stored_bytes"]))
        for s in data["schemes"]
    ]  # fmt: skip
    rows += [
        ("-", f"float: {u['rule']}", u["modules"], u["matrices"],
         f"{u['bits_per_weight'] or 0:.3f}", size(u["stored_bytes"]))
        for u in data["unquantized"]
    ]  # fmt: skip
    header = ("scheme", "stored as", "modules", "matrices", "bits/weight", "bytes")
    yield from table(header, rows, indent="")
    for kv in data["attention"]:
        roles = _roles(kv["operands"])
        use = "applied" if kv["applied"] else "applied on request (kv_cache='checkpoint')"
        what = f"{kv['modules']:,} modules, {kv['scheme']} at the {kv['site']}"
        yield f"attention: {what}: {roles}; {use}"
    for name, rule in data["skipped"].items():
        yield f"skipped: {escaped(name)}: {escaped(rule)}"
    for warning in data["warnings"]:
        yield f"warning: {escaped(warning)}"
    if layers := data.get("layers"):
        yield ""
        yield from table(
            ("module", "kind", "scheme", "stored as", "shape", "bytes"),
            [
                *(_layer_row(name, one) for name, one in layers.items()),
                *(_cache_row(name, one) for name, one in data["attention_layers"].items()),
            ],
            indent="",
        )


def _roles(operands: Mapping[str, str]) -> str:
    return "; ".join(f"{role}: {label}" for role, label in operands.items())


def _operands(operands: Mapping[str, str]) -> str:
    return "; ".join(
        label if role == "weight" else f"{role}: {label}" for role, label in operands.items()
    )


def _layer_row(name: str, one: Mapping[str, Any]) -> tuple[object, ...]:
    if "scheme" in one:
        stack = f"{one['matrices']} x " if one["kind"] == "experts" else ""
        shape = stack + " x ".join(map(str, one["shape"]))
        return (name, one["kind"], one["scheme"], _operands(one["operands"]), shape,
                one["stored_bytes"])  # fmt: skip
    stored = f"{', '.join(one['dtypes'])}: {one['rule']}"
    return (name, one["kind"], "-", stored, f"{one['weights']} values", one["stored_bytes"])


def _cache_row(name: str, one: Mapping[str, Any]) -> tuple[object, ...]:
    roles = _roles(one["operands"])
    return (name, "attention", one["scheme"], roles, f"at the {one['site']}", one["stored_bytes"])


def run(args: argparse.Namespace) -> int:
    """Plan the checkpoint and print the summary."""
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.plan import plan

    # a plan is many small objects: looking for cycles took a third of the time
    with collector_paused(), open_checkpoint(args.path) as checkpoint:
        data = summary(plan(checkpoint, format=args.format), ranks=args.tp, layers=args.layers)
    emit(args, data, _render(data))
    return 0
