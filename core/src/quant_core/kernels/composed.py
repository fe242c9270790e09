"""A gated MLP, and a decoder layer for one new token a sequence, of the kernels that there are.

For kernels without a call of their own for them (``bind_gated`` and ``bind_block`` of
``kernels.base``). Layers of one input are one product where they lie together (``kernels.joined``);
what is between the products runs in kernels that are asked for, and without them there is no
composition:

    norm | q k v | turn, write, attend | o | add, norm | gate up | gate | down | add

On a GPU that is ten launches where an engine's own modules make some forty, each with more host
time than the device takes for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, cat

from quant_core.errors import KernelError
from quant_core.kernels.between import Block, gated_op, update_op
from quant_core.kernels.joined import JoinedRun
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from quant_core.kernels.family import Family
    from quant_core.registry import Registry

__all__ = ["BlockRun", "GatedRun", "compose_block", "compose_gated"]

Buffers = Sequence[list[Tensor]]


class _Beside:
    """Layers of one input: one product where their buffers lie together."""

    def __init__(self, family: Family, ops: Sequence[OpSpec]) -> None:
        self.joined: JoinedRun | None = family.bind_shared(ops)
        self.runs = [family.bind(op) for op in ops] if self.joined is None else self.joined.alone
        self.rows = [op.size("n") for op in ops]

    def _joint(self, buffers: Buffers, x: Tensor) -> Tensor | None:
        held = None if self.joined is None else self.joined.buffers(buffers)
        return None if held is None or self.joined is None else self.joined.whole(held, x)

    def whole(self, buffers: Buffers, x: Tensor) -> Tensor:
        """Their outputs behind each other."""
        y = self._joint(buffers, x)
        return cat(self._each(buffers, x), -1) if y is None else y

    def parts(self, buffers: Buffers, x: Tensor) -> Sequence[Tensor]:
        """Their outputs; parts of one tensor where they were one product."""
        y = self._joint(buffers, x)
        return self._each(buffers, x) if y is None else y.split(self.rows, -1)

    def _each(self, buffers: Buffers, x: Tensor) -> list[Tensor]:
        return [run(mine, x) for run, mine in zip(self.runs, buffers, strict=True)]


class GatedRun:
    """What ``bind_gated`` gives: down(act(gate(x)) * up(x))."""

    def __init__(self, family: Family, ops: Sequence[OpSpec], gated: Callable[..., Any]) -> None:
        self.sides, self.down, self.gated = _Beside(family, ops[:2]), family.bind(ops[2]), gated

    def __call__(self, buffers: Buffers, x: Tensor) -> Tensor | None:
        y = self.gated([], *self.sides.parts(buffers[:2], x))
        return None if y is None else self.down(buffers[2], y)


class BlockRun:
    """What ``bind_block`` gives; ``kernels.between.Block``."""

    takes_position = True

    def __init__(self, family: Family, block: Block, between: Sequence[Callable[..., Any]]) -> None:
        self.rotated = block.rotated
        self.qkv, self.o = _Beside(family, block.linears[:3]), family.bind(block.linears[3])
        self.sides, self.down = _Beside(family, block.linears[4:6]), family.bind(block.linears[6])
        self.first, self.second, self.update, self.gated = between

    def __call__(
        self, buffers: Buffers, norms: Sequence[Tensor], x: Tensor, cos: Tensor, sin: Tensor,
        keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, eps: tuple[float, float],
        at: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """As the contract says; a position that was written for an answer of None shows nowhere."""
        h = self.first([norms[0]], x, eps[0])
        if h is None:
            return None
        qkv = self.qkv.whole(buffers[:3], h)
        y = self.update([], qkv, cos, sin, keys, values, mask, scale, at)
        if y is None:
            return None
        after = self.second([norms[1]], x, eps[1], self.o(buffers[3], y))
        if after is None:
            return None
        total, h = after
        y = self.gated([], *self.sides.parts(buffers[4:6], h))
        return None if y is None else total + self.down(buffers[6], y)


def _bound(*ops: OpSpec) -> list[Callable[..., Any]] | None:
    """Who runs each of ``ops``; None if nobody runs one of them."""
    from quant_core.registry import registry

    found = [_run(op, registry(), os.environ.get("QUANT_KERNELS")) for op in ops]
    runs = [run for run in found if run is not None]
    return runs if len(runs) == len(found) else None


@functools.lru_cache(maxsize=256)
def _run(op: OpSpec, registry: Registry, kernels: str | None) -> Callable[..., Any] | None:
    """The same for all layers of a model."""
    from quant_core.kernels.choose import choose

    try:
        choice = choose(op, registry, kernels=kernels)
    except KernelError:
        return None
    return choice.kernel.bind(choice.op)


def compose_gated(family: Family, ops: Sequence[OpSpec], activation: str) -> GatedRun | None:
    """gate, up and down of kernels in ``family``; None where nothing multiplies between them."""
    if len(ops) != 3:
        return None
    op = ops[0]
    found = _bound(gated_op(op.size("n"), activation, op.act_dtype, op.device))
    return None if found is None else GatedRun(family, ops, found[0])


def compose_block(family: Family, block: Block) -> BlockRun | None:
    """A decoder layer of kernels in ``family``; None where a kernel between them is missing."""
    if not block.is_plain:
        return None
    op = block.gated
    sizes = block.heads, block.kv_heads, block.head_dim, block.rotated
    update = update_op(*sizes, op.act_dtype, op.device)
    found = _bound(*block.norms, update, block.gated)
    return None if found is None else BlockRun(family, block, found)
