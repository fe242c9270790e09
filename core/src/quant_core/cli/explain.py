"""``quant explain``: every decision taken for one module, down to the kernels' answers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_core.cli.inspect import add_path
from quant_core.cli.output import emit, escaped, size, table

if TYPE_CHECKING:
    from quant_core.kernels.choose import Choice
    from quant_core.plan import Member, Plan

__all__ = ["HELP", "add_arguments", "run"]

HELP = "explain one module: rule, stored tensors, meaning, kernel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --format, NAME, --device and --mmap."""
    add_path(parser)
    parser.add_argument(
        "name", metavar="NAME", help="module as `quant inspect --layers`, or one of its tensors"
    )
    parser.add_argument(
        "--device", default="cpu", help="whose kernels answer (default cpu); need not be there"
    )
    parser.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        help="as a load with mmap=True or False: weights in place if they can be, or copied",
    )


def _rules(plan: Plan, name: str) -> list[dict[str, str]]:
    """The config's name patterns that match this module."""
    patterns = getattr(plan.match.config, "name_patterns", tuple) if plan.match else tuple
    return [
        {"key": p.purpose, "kind": p.kind, "pattern": p.label}
        for p in patterns()
        if p.matches(name)
    ]  # fmt: skip


def _params(plan: Plan, member: Member) -> list[dict[str, Any]]:
    from quant_core.plan import param_sources

    expert = member.layer.experts[0] if member.layer.experts else None
    out = []
    for param in member.params:
        stored = []
        for name, index in param_sources(member.layer, param, expert):
            info = plan.checkpoint.tensors.get(name)
            stored.append(
                {
                    "name": name,
                    "part": [list(i) if isinstance(i, tuple) else i for i in index],
                    "shape": None if info is None else list(info.shape),
                    "dtype": None if info is None else info.dtype,
                    "file": None if info is None else info.file,
                    "nbytes": None if info is None else info.nbytes,
                }
            )
        out.append(
            {
                "param": param.name,
                "role": param.role,
                "need": param.need,
                "rule": param.rule,
                "stored": stored,
            }
        )
    return out


def _in_place(plan: Plan, member: Member, device: str, mmap: bool | None) -> Choice | None:
    """Who runs this member on the file's own pages, in a load with that ``mmap``; see there."""
    from quant_core.mapped import PRICE, MappedBuilder, placed_by_default

    layer = member.layer
    wanted = device == "cpu" if mmap else mmap is None and placed_by_default(plan, device)
    if not wanted or layer.kind == "experts":
        return None
    builder = MappedBuilder(plan=plan, device=device, most=None if mmap else PRICE)
    return builder.place_of(layer.name, member)


def _kernel(plan: Plan, member: Member, device: str, mmap: bool | None) -> dict[str, Any]:
    """Who would run this member on ``device``, and what every candidate said. Reads one matrix."""
    from quant_core.build import Builder
    from quant_core.errors import KernelError
    from quant_core.kernels.base import Rejected
    from quant_core.kernels.choose import choose
    from quant_core.kernels.device import check_device
    from quant_core.load import read_matrix

    check_device(device, here=False)
    layer = member.layer
    ops = {"embedding": "embedding", "experts": "grouped_linear"}
    sizes = {"experts": len(layer.experts)} if layer.experts else {}
    matrix = read_matrix(plan, member, layer.experts[0] if layer.experts else None)
    op = Builder(plan=plan, device=device).op_for(
        ops.get(layer.kind, "linear"), matrix, member, **sizes
    )
    try:
        found = _in_place(plan, member, device, mmap)
        choice, in_place = found or choose(op, plan.registry, module=layer.name), found is not None
        kernel, trace, rows = choice.kernel.name, choice.trace, choice.buckets
    except KernelError as err:
        kernel, trace, rows, in_place = None, err.trace, (), False
    return {
        "op": op.op,
        "sizes": dict(op.sizes),
        "features": sorted(op.features),
        "device": op.device[0],
        "act_dtype": op.act_dtype,
        "kernel": kernel,
        "in_place": in_place,
        "rows": [str(b) for b in rows],
        "trace": [
            {
                "kernel": d.kernel,
                "provider": d.provider,
                "accepted": not isinstance(d.answer, Rejected),
                "other_operation": isinstance(d.answer, Rejected) and d.answer.axis == "op",
                "decision": str(d),
            }
            for d in trace
        ],
    }


def _collect(
    plan: Plan, name: str, device: str = "cpu", mmap: bool | None = None
) -> dict[str, Any]:
    from quant_core.load import no_such_name
    from quant_core.scheme import Scheme

    member = plan.members.get(name) or plan.members.get(name.rpartition(".")[0])
    if member is None:
        raise no_such_name(plan, name)
    name = member.layer.name
    layer, scheme = member.layer, member.scheme
    out: dict[str, Any] = {
        "name": name,
        "kind": layer.kind,
        "stored": layer.stored,
        "experts": len(layer.experts),
        "format": plan.match.plugin if plan.match else None,
        "evidence": plan.match.evidence if plan.match else "no quantization config, only floats",
        "patterns": _rules(plan, name),
        "stored_bytes": plan.member_nbytes(member),
    }
    if not isinstance(scheme, Scheme):
        tensors = plan.checkpoint.tensors
        out |= {
            "scheme": None,
            "rule": scheme.rule,
            "rule_evidence": scheme.evidence,
            "tensors": [
                {"name": n, "shape": list(tensors[n].shape), "dtype": tensors[n].dtype}
                for n in member.stored
            ],
        }
        return out
    return out | {
        "scheme": scheme.name,
        "shape": list(scheme.shape),
        "operands": {role: spec.label for role, spec in scheme.operands.items()},
        "transforms": [f"{t.site}: {t.kind} {t.key}" for t in scheme.transforms],
        "params": _params(plan, member),
        "kernel": _kernel(plan, member, device, mmap),
    }


def _render(data: Mapping[str, Any]) -> Iterator[str]:
    kind = "float" if data["scheme"] is None else data["kind"]
    yield f"{escaped(data['name'])}: {kind}, stored as {escaped(data['stored'])}"
    yield f"format     {data['format'] or 'none'}: {escaped(data['evidence'])}"
    for p in data["patterns"]:
        yield f"matched by {escaped(p['key'])}: {p['kind']} pattern '{escaped(p['pattern'])}'"
    if data["scheme"] is None:
        evidence = f" ({escaped(data['rule_evidence'])})" if data["rule_evidence"] else ""
        yield f"scheme     none: {escaped(data['rule'])}{evidence}"
        rows = [(t["name"], t["dtype"], _shape(t["shape"])) for t in data["tensors"]]
        yield from table(("stored tensor", "dtype", "shape"), rows)
        return
    stack = f"{data['experts']} experts of " if data["experts"] else ""
    yield f"scheme     {data['scheme']}: {stack}{_shape(data['shape'])}, " + size(
        data["stored_bytes"]
    )
    for role, label in data["operands"].items():
        yield f"{role:<10} {label}"
    for text in data["transforms"]:
        yield f"transform  {escaped(text)}"
    yield from table(
        ("param", "role", "need", "stored tensor", "dtype", "shape"),
        [
            (
                p["param"],
                p["role"],
                f"{p['need']}: {p['rule']}" if p["rule"] else p["need"],
                s["name"] + (f" {s['part']}" if s["part"] else ""),
                s["dtype"] or "absent",
                _shape(s["shape"] or ()),
            )
            for p in data["params"]
            for s in p["stored"]
        ],
    )
    k = data["kernel"]
    sizes = " ".join(f"{name}={value}" for name, value in k["sizes"].items())
    wanted = f"{k['op']} {sizes} {k['act_dtype']} on {k['device']}"
    place = ", on the file's own pages" if k["in_place"] else ""
    yield f"kernel     {k['kernel'] or 'none'} for {wanted}{place}"
    for d in k["trace"]:
        if not d["other_operation"]:
            yield f"  {escaped(d['decision'])} [{d['provider']}]"
    if others := sum(d["other_operation"] for d in k["trace"]):
        yield f"  and {others} kernels of other operations"
    for line in k["rows"]:
        yield f"  -> {line}"


def _shape(sizes: object) -> str:
    return " x ".join(map(str, sizes))  # type: ignore[call-overload]


def run(args: argparse.Namespace) -> int:
    """Plan the checkpoint and explain one module."""
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.plan import plan

    with open_checkpoint(args.path) as checkpoint:
        data = _collect(plan(checkpoint, format=args.format), args.name, args.device, args.mmap)
    emit(args, data, _render(data))
    return 0
