"""Opaque blocks on kernels that read codes: the blocks are taken apart while they are loaded.

    blocks [N, bytes of a row] -> codes, scales and a table of the same weights -> kernel

A block type that is no more than a few values under scales (an index into a grid of eight weights,
signs, a scale) keeps its bytes in the canonical form, since no description in codes is as small. A
kernel that reads codes can run it all the same, in more memory: the note says how much. What the
plugin of the blocks makes of them (``BlockType.codes``) is exact both ways, so ``restore`` gives
the blocks back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.measured import answer as answer_of
from quant_core.spec import CANONICAL, OpSpec, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.kernels.between import Block
    from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["BlockCodes", "Expanded", "block_codes", "with_codes"]


class BlockCodes(Protocol):
    """What ``BlockType.codes`` names: another form of the same weights.

    ``unpack`` takes blocks uint8 (N, bytes of a row) of K columns, ``pack`` is its exact inverse.
    """

    spec: QuantSpec

    def unpack(self, blocks: Tensor, k: int) -> QuantizedTensor: ...

    def pack(self, weight: QuantizedTensor) -> Tensor: ...


@functools.cache
def block_codes(name: str) -> BlockCodes | None:
    """The codes that stand for a block type; None if there are none."""
    from quant_core.registry import registry

    target = registry().block_type(name).codes
    if not target:
        return None
    module, _, attr = target.partition(":")
    found: BlockCodes = getattr(importlib.import_module(module), attr)
    return found


def with_codes(op: OpSpec) -> OpSpec:
    """``op`` on the codes that stand for its blocks."""
    codes = block_codes(op.weight.blocks)
    assert codes is not None, "asked for block types that have codes only"
    operands = tuple((r, codes.spec if r == "weight" else s) for r, s in op.operands)
    return replace(op, operands=operands, packing=CANONICAL)


class Expanded:
    """``inner`` on the codes of opaque blocks."""

    def __init__(self, inner: Kernel) -> None:
        self.inner = inner
        self.name = f"{inner.name}@codes"
        layout = str(getattr(inner, "layout", ""))
        self.layout = f"{layout}+codes" if layout else ""

    @staticmethod
    def of(inner: Kernel, op: OpSpec) -> Expanded | None:
        """The wrapped kernel where it is of use."""
        spec = op.operand("weight")
        if spec is None or not spec.blocks or spec.gather or block_codes(spec.blocks) is None:
            return None
        return Expanded(inner)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        from quant_core.registry import registry

        said = answer_of(self.inner, with_codes(op))
        if isinstance(said, Rejected):
            return said
        kind = registry().block_type(op.weight.blocks)
        spec = with_codes(op).weight
        note = (
            f"{kind.name} blocks ({8 * kind.bytes / kind.weights:.2f} bits a weight) kept as "
            f"{spec.element.bits}-bit codes with scales"
        )
        return replace(said, note=f"{said.note}; {note}" if said.note else note)

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        return self.inner.allocate(with_codes(op), device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        codes = block_codes(op.weight.blocks)
        assert codes is not None  # ``of`` has seen to it
        blocks = part.weight
        weight = codes.unpack(blocks.codes, blocks.shape[-1])
        operands = {**part.operands, "weight": weight}
        self.inner.load_(buffers, with_codes(op), replace(part, operands=operands), at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        import torch

        codes = block_codes(op.weight.blocks)
        assert codes is not None  # ``of`` has seen to it
        back = self.inner.restore(buffers, with_codes(op))
        held = back.weight
        if len(held.shape) == 2:
            blocks = codes.pack(held)
        else:
            blocks = torch.stack([codes.pack(_expert(held, e)) for e in range(held.shape[0])])
        weight = replace(
            held,
            spec=op.weight,
            codes=blocks,
            packing=op.packing,
            scales=(),
            zeros=None,
            codebook=(),
        )
        return replace(back, operands={**back.operands, "weight": weight})

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return self.inner.bind(with_codes(op))

    def bind_shared(self, ops: Sequence[OpSpec]) -> Callable[..., list[Tensor]] | None:
        """See ``quant_core.kernels.base``."""
        bind = getattr(self.inner, "bind_shared", None)
        return None if bind is None else bind([with_codes(op) for op in ops])  # type: ignore[no-any-return]

    def bind_gated(
        self, ops: Sequence[OpSpec], activation: str, up_first: bool = False
    ) -> Callable[..., Any] | None:
        """See ``quant_core.kernels.base``."""
        bind = getattr(self.inner, "bind_gated", None)
        more = (True,) if up_first else ()
        return None if bind is None else bind([with_codes(op) for op in ops], activation, *more)

    def bind_block(self, block: Block) -> Callable[..., Any] | None:
        """See ``quant_core.kernels.base``."""
        bind = getattr(self.inner, "bind_block", None)
        linears = tuple(with_codes(op) for op in block.linears)
        return None if bind is None else bind(replace(block, linears=linears))


def _expert(held: QuantizedTensor, e: int) -> QuantizedTensor:
    """One matrix of a stack; tables belong to all of them."""
    tensors = {n: t if n.startswith("codebook") else t[e] for n, t in held.tensors().items()}
    return held.with_tensors(tensors, shape=held.shape[1:])
