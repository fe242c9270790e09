"""Operations between a model's linear layers: what kernels are asked, and what they answer.

They have no quantized weights. A kernel offers them by the ``apply`` hook and derives from
``Weightless``; an engine replaces a module's own arithmetic only after it has proved, on random
input, that the kernel's equals it (``engines.transformers_parts``). In each of them ``run`` may
answer None for what it does not take (a dtype, a stride, a device): the module's own code runs
then. Inputs are never written to.

    rms_norm   run([weight [K]], x [..., K], eps) -> y
               run([weight [K]], x, eps, delta) -> (x + delta, y of that sum); delta like x
                   h = x / sqrt(mean(x^2) + eps), all in float32;  x + delta is rounded first
                   y = weight * (h rounded to x's dtype)
               feature "round_last"    y = (weight * h) rounded once, the product in float32
               feature "unit_offset"   1 + weight in place of weight, in float32 with round_last
               size "k"; weight is of x's dtype

    rotary     run([], q [B, H, T, D], k [B, Hkv, T, D], cos, sin) -> (q', k'), new tensors
                   cos, sin [B or 1, T, R] of q's dtype, R <= D even, both halves of R alike
                   first R features: x cos + (-second half, first half) sin; the rest as it is.
                   Products and their sum are rounded to the dtype, as torch's operators do.
               size "k" is D, "rotated" is R

    gated      run([], gate [..., K], up [..., K]) -> act(gate) * up; act(gate) is rounded first
               feature "silu": x * sigmoid(x);  "gelu_tanh": the tanh form
               size "k"

    attention_update
               run([], qkv [B, 1, (H + 2 Hkv) D], cos, sin, keys, values, mask, scale, at)
                   -> y [B, 1, H D]
                   q, k, v of one new token a sequence; q and k are turned as by ``rotary`` (cos,
                   sin [B or 1, 1, R]), then as ``attention`` of one token. keys, values
                   [B, Hkv, L, D]: the cache, in which the call WRITES the new token's at position
                   ``at`` (int64 [1], on the device), or at L - 1 where that is None; later
                   positions are not read
               sizes "k" (D), "rotated" (R), "heads", "kv_heads"

``act_dtype`` is the dtype of x. Where all the pieces of a gated MLP, or of a decoder layer, were
chosen from kernels, and the kernel of its linear layers can, the whole is one call: ``bind_gated``
and ``bind_block`` (``kernels.base``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_core.errors import KernelError
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Block",
    "Weightless",
    "gated_op",
    "norm_op",
    "rotary_op",
    "update_op",
]

NORMS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"round_last"}),
    frozenset({"round_last", "unit_offset"}),
    frozenset({"unit_offset"}),
)
"""Forms of ``rms_norm`` that an engine asks for."""

ACTIVATIONS = ("silu", "gelu_tanh")
"""Forms of ``gated``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A decoder layer of two residual branches, for one new token a sequence.

        a = attention(rotary(q(n1), k(n1)), v(n1)),  n1 = norm1(x)
        s = x + o(a)
        y = s + down(act(gate(n2)) * up(n2)),        n2 = norm2(s)

    q, k, v may be one layer, their outputs behind each other (``qkv`` is 1 then, else 3), as may
    gate and up (``sides`` 1, else 2; with ``up_first`` up's outputs come before gate's). Where
    there are four ``norms``, each head of queries and of keys goes through the last two before it
    is turned.

    ``bind_block`` answers run(buffers, norms, x, cos, sin, keys, values, mask, scale, eps) -> y or
    None for what it does not take; nothing was written then.

        buffers  of q, k, v, o, gate, up, down, or of fewer layers: a list for each
        norms    [weight [K], weight [K]], and [weight [D], weight [D]];  eps of each
        x        [B, 1, K];  cos, sin [B or 1, 1, R] as for ``rotary``
        keys     [B, Hkv, L, D], values likewise: the cache with room for the new token at L - 1,
                 which the call WRITES; positions before it are read
        mask     as for ``attention``

    A run with the attribute ``takes_position`` takes a last argument ``at`` as "attention_update"
    does, for caches with room for more than one token.

    A run that can be recorded in a graph has two methods besides. ``table(values)`` makes an object
    whose ``tensor`` stands for the buffers there: ``values()`` gives them as ``run`` takes them,
    and is asked again after ``shared.weights_changed``; it pickles if ``values`` does.
    ``traced(table.tensor, norms, x, cos, sin, keys, values, mask, scale, eps, at)`` is the call as
    one operator of torch: with a mask, which it obeys whatever it says, and ``at`` (one int64),
    both read when the operator runs; None where the layer's own code is to be recorded.

    Where it can have handles for lists of tensors (``held``, which says None where it cannot), a
    graph needs no input for each of them. ``kind`` is the same for layers that differ in weights
    only. ``held(values, places)`` makes an object whose ``tensor`` stands for what ``values()``
    lists, and whose ``another(values, places)`` makes more of them. ``places()`` lists where all
    that was found, as (a dict or a list, key or index, what is there): on every call the kernel
    sees whether it still is, and asks both again where it is not.
    ``traced_held(layers, of, cache, to, room, x, cos, sin, mask, first, scale, eps)`` is the call
    with ``layers`` standing for a table and the norms of each layer behind each other, of which it
    takes number ``of``, and ``cache`` for keys, values and position of layer after layer, of which
    it writes number ``to``; keys have the sizes ``room``. It counts all positions but ``first``,
    that of number 0, which is the caller's to count. None where tensors are to be inputs.

    Every intermediate result is rounded as by the single operations.
    """

    linears: tuple[OpSpec, ...]  # q, k, v, o, gate, up, down
    norms: tuple[OpSpec, ...]
    gated: OpSpec
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    qkv: int = 3
    sides: int = 2
    up_first: bool = False

    @property
    def is_plain(self) -> bool:
        """Seven layers and two norms."""
        return (self.qkv, self.sides, len(self.norms)) == (3, 2, 2)


def norm_op(k: int, form: frozenset[str], dtype: str, device: tuple[str, str]) -> OpSpec:
    """The operation "rms_norm" over ``k`` features in one of ``NORMS``."""
    return OpSpec(
        op="rms_norm",
        operands=(),
        sizes=(("k", k),),
        act_dtype=dtype,
        device=device,
        features=form,
    )


def rotary_op(dim: int, rotated: int, dtype: str, device: tuple[str, str]) -> OpSpec:
    """The operation "rotary" on heads of ``dim`` features, ``rotated`` of them turned."""
    sizes = (("k", dim), ("rotated", rotated))
    return OpSpec(op="rotary", operands=(), sizes=sizes, act_dtype=dtype, device=device)


def gated_op(k: int, activation: str, dtype: str, device: tuple[str, str]) -> OpSpec:
    """The operation "gated" over ``k`` features, ``activation`` one of ``ACTIVATIONS``."""
    return OpSpec(
        op="gated",
        operands=(),
        sizes=(("k", k),),
        act_dtype=dtype,
        device=device,
        features=frozenset({activation}),
    )


def update_op(
    heads: int, kv_heads: int, dim: int, rotated: int, dtype: str, device: tuple[str, str]
) -> OpSpec:
    """The operation "attention_update"."""
    sizes = (("k", dim), ("rotated", rotated), ("heads", heads), ("kv_heads", kv_heads))
    return OpSpec(op="attention_update", operands=(), sizes=sizes, act_dtype=dtype, device=device)


class Weightless:
    """Base of kernels for operations without quantized weights: no buffers of their own."""

    name = ""

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        return {}

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        raise self._none()

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        raise self._none()

    def _none(self) -> KernelError:
        return KernelError(
            f"{self.name}: was asked for weights, expected to be asked to run only. This operation "
            "has no quantized weights.",
            code="Q-KERNEL-NONE",
        )
