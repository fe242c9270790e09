"""Checks for the tests of plugins, through the doors that every engine uses.

    check_format("made", {"model.layers.0.mlp.down_proj": weights, ...})
    check_kernel("my_kernel", "made")

What fails is an ``AssertionError`` that names the layer. The first is worth what its weights are:
take the format's own tool's, or arithmetic written down beside the test.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.answers import ask_scheme
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.dequantize import dense_weight
from quant_core.engines.packed import Bound, bind_embedding, bind_linear, bind_stack
from quant_core.engines.sharing import Piece
from quant_core.errors import KernelError
from quant_core.load import read_matrix
from quant_core.parts import matrices
from quant_core.plan import Member, Plan, param_sources, plan
from quant_core.registry import Registry
from quant_core.scheme import Scheme

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["check_format", "check_kernel"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of sums in another order, and of one rounding of a result of that type."""


def _stored(plan: Plan, member: Member, expert: int | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for param in member.params:
        parts = [
            plan.checkpoint.read(name, index)
            for name, index in param_sources(member.layer, param, expert)
            if name in plan.checkpoint.tensors
        ]
        if parts and param.need != "ignored":
            found[param.name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def check_format(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    format: str | None = None,
    atol: float = 0.0,
    registry: Registry | None = None,
) -> int:
    """Every quantized matrix of a checkpoint equals ``weights``, and is written back bit by bit.

    Args:
        path: a checkpoint in the format.
        weights: name of each quantized module, as ``quant inspect --layers`` -> float [N, K], a
            stack of experts [E, N, K], as the format's own tool computes them.
        format: plugin id to insist on.
        atol: largest difference of a weight; 0 where both compute in float32.

    Returns:
        How many matrices were compared.

    Raises:
        AssertionError: a matrix differs, is missing on either side, is written back otherwise, or
            the stored tensors were changed.
        QuantError: the checkpoint is refused.
    """
    compared = 0
    with open_checkpoint(path) as checkpoint:
        made = plan(checkpoint, format=format, registry=registry)
        if odd := sorted(made.quantized.keys() ^ weights.keys()):
            raise AssertionError(f"{odd[0]}: expected among the weights and quantized, or neither")
        for name, member in made.quantized.items():
            experts = member.layer.experts
            wanted = weights[name] if experts else weights[name][None]
            if wanted.shape != (len(experts) or 1, *member.scheme.shape):  # type: ignore[union-attr]
                raise AssertionError(f"{name}: the weights given are {list(wanted.shape)}")
            for expert, want in zip(experts or (None,), wanted, strict=True):
                _check_matrix(made, member, expert, want.float(), atol)
                compared += 1
    return compared


def _check_matrix(
    plan: Plan, member: Member, expert: int | None, want: Tensor, atol: float
) -> None:
    stored = member.layer.stored.format(expert=expert)
    where = stored if expert is None else f"{stored} (expert {expert})"
    off = float((_dense(read_matrix(plan, member, expert), member) - want).abs().max())
    if not off <= atol:
        raise AssertionError(f"{where}: a weight is {off:.3g} off, expected {atol:g}")
    layer = replace(member.layer, stored=stored, experts=())
    own = _stored(plan, member, expert)
    kept = {n: t.clone() for n, t in own.items()}
    written = ask_scheme(
        member.scheme, "serialize", layer, ask_scheme(member.scheme, "canonicalize", layer, own)
    )
    for name in sorted(kept.keys() | written.keys()):
        if not (name in kept and name in written and _same_bytes(kept[name], written[name])):
            raise AssertionError(f"{where}: serialize gives another {name!r} than is stored")
    if not all(_same_bytes(own[n], t) for n, t in kept.items()):
        raise AssertionError(f"{where}: canonicalize or serialize changed the stored tensors")


def _bound(builder: Builder, name: str, member: Member) -> list[Bound]:
    piece = Piece.whole(member)
    if member.layer.experts:
        return [bind_stack(builder, name, piece, member.layer.experts)]
    if member.layer.kind == "embedding":
        return [bind_embedding(builder, name, piece)]
    return bind_linear(builder, name, [piece], bias=True)


def _inputs(member: Member, rows: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The same numbers on every call: x, and for a stack whose expert each row is."""
    generator = torch.Generator().manual_seed(rows)
    n, k = member.scheme.shape  # type: ignore[union-attr]
    if member.layer.kind == "embedding":
        return [torch.randint(0, n, (rows,), generator=generator).to(device)]
    x = torch.randn(rows, k, generator=generator).to(device=device, dtype=dtype)
    if not member.layer.experts:
        return [x]
    return [x, torch.randint(0, len(member.layer.experts), (rows,), generator=generator).to(device)]


def _check_layer(
    name: str, member: Member, mine: Bound, reference: Bound, inputs: list[Tensor], tolerance: float
) -> None:
    run = pickle.loads(pickle.dumps(mine.run))
    held = {n: t.clone() for n, t in mine.tensors.items()}
    given = [x.clone() for x in inputs]
    y = run(list(mine.tensors.values()), *inputs)
    want = reference.run(list(reference.tensors.values()), *inputs)
    if (y.shape, y.dtype) != (want.shape, want.dtype):
        raise AssertionError(f"{name}: gives {list(y.shape)} {y.dtype}, not {list(want.shape)}")
    off = float((y.double() - want.double()).norm() / want.double().norm())
    if not off <= tolerance:
        raise AssertionError(
            f"{name}: {inputs[0].shape[0]} rows are {off:.3g} off the reference, relatively, "
            f"expected {tolerance:g}"
        )
    same = all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True))
    if not same or not all(_same_bytes(held[n], t) for n, t in mine.tensors.items()):
        raise AssertionError(f"{name}: a call changed its input or its weights")


def check_kernel(
    name: str,
    path: str | os.PathLike[str],
    *,
    rows: Sequence[int] = (1, 7, 16, 33),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tolerance: float | None = None,
    registry: Registry | None = None,
) -> dict[str, str]:
    """A kernel beside the reference, on every layer of a checkpoint that it accepts.

    What it bound must pickle, its buffers must restore to the same weights, its results must agree
    with those of ``torch_ref``, and a call must change neither its input nor its weights.

    Args:
        name: the kernel's; its package is installed, or in ``registry``.
        rows: numbers of rows of x.
        dtype: of x.
        tolerance: largest ||y - want|| / ||want||; default by ``dtype``. A kernel that rounds
            activations itself needs a larger one.

    Returns:
        Name of each layer that it rejects -> every kernel's answer.

    Raises:
        AssertionError: a layer differs, or no layer is accepted.
    """
    most = _TOLERANCE[dtype] if tolerance is None else tolerance
    rejected: dict[str, str] = {}
    with open_checkpoint(path) as checkpoint, torch.no_grad():
        made = plan(checkpoint, registry=registry)
        for layer, member in made.quantized.items():
            mine = Builder(plan=made, dtype=dtype, device=device, kernels=[name])
            plain = Builder(plan=made, dtype=dtype, device=device, kernels=["torch_ref"])
            try:
                (part,) = _bound(mine, layer, member)
            except KernelError as err:
                if err.code == "Q-KERNEL-FAILED":
                    raise
                rejected[layer] = str(err)
                continue
            (reference,) = _bound(plain, layer, member)
            assert part.choice is not None
            assert reference.choice is not None
            back = part.choice.kernel.restore(part.tensors, part.choice.op)
            own = reference.choice.kernel.restore(reference.tensors, reference.choice.op)
            if not torch.equal(_dense(back, member), _dense(own, member)):
                raise AssertionError(f"{layer}: restore gives other weights than were loaded")
            for m in rows:
                inputs = _inputs(member, m, dtype, device)
                _check_layer(layer, member, part, reference, inputs, most)
        if len(rejected) == len(made.quantized):
            raise AssertionError(f"{name} accepts no layer of {path}: {rejected}")
    return rejected


def _dense(lt: LayerTensors, member: Member) -> Tensor:
    """All matrices of a layer or a stack, one behind another."""
    assert isinstance(member.scheme, Scheme)
    experts = lt.weight.shape[0] if len(lt.weight.shape) == 3 else 0
    parts = [part for _, part in matrices(lt, experts)]
    return torch.cat([dense_weight(part.weight, member.scheme.shape[1]) for part in parts])
