"""``diff``: two checkpoints of one model, module by module, whatever formats they have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.convert.measure import Distance, distance
from quant_core.errors import LayoutError
from quant_core.plan import Member, Plan
from quant_core.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import QuantizedTensor

__all__ = ["Diff", "LayerDiff", "Logits", "diff", "diff_logits"]


@dataclass(slots=True, kw_only=True)
class LayerDiff:
    """One weight in both checkpoints.

    Attributes:
        error: ||a - b|| / ||a||; 0 only if all weights are equal.
        largest: largest |a - b|.
        bits_a, bits_b: stored bits per weight, scales and zeros included.
    """

    name: str
    a: str
    b: str
    error: float
    largest: float
    bits_a: float
    bits_b: float


@dataclass(slots=True, kw_only=True)
class Diff:
    """All weights, largest differences first, and the names that only one of the two has.

    ``caches`` are attention modules whose keys and values are quantized otherwise, or in one only.
    """

    a: Path
    b: Path
    layers: list[LayerDiff] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        apart = self.only_a or self.only_b or self.caches
        return not (apart or any(d.error for d in self.layers))

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "equal": self.equal,
            "layers": [asdict(layer) for layer in self.layers],
            "only_a": self.only_a,
            "only_b": self.only_b,
            "caches": self.caches,
        }


# ----------------------------------------------------------------------------------- one weight


class _Side:
    """Weights of one checkpoint by public parameter name, quantized or not."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names: dict[str, Member | None] = {}
        for name, member in plan.quantized.items():
            self.names[f"{name}.weight"] = member
        for name in plan.dense:
            self.names.setdefault(name, None)

    def label(self, name: str) -> str:
        member = self.names[name]
        if member is None:
            return self._info(name).dtype
        assert isinstance(member.scheme, Scheme)
        return member.scheme.weight.label

    def shape(self, name: str) -> tuple[int, ...]:
        """[E?, N, K] of a quantized weight; a float tensor's own."""
        member = self.names[name]
        if member is None:
            return self._info(name).shape
        assert isinstance(member.scheme, Scheme)
        experts = (len(member.layer.experts),) if member.layer.experts else ()
        return (*experts, *member.scheme.shape)

    def bits(self, name: str) -> float:
        member = self.names[name]
        nbytes = self._info(name).nbytes if member is None else self.plan.member_nbytes(member)
        return 8 * nbytes / max(prod(self.shape(name)), 1)

    def _info(self, name: str) -> Any:
        return self.plan.checkpoint.tensors[self.plan.dense[name]]

    def matrix(self, name: str, index: int | None) -> QuantizedTensor | Tensor:
        """One matrix; ``index`` counts experts."""
        from quant_core.load import read_matrix, read_parameter

        member = self.names[name]
        if member is None:
            value = read_parameter(self.plan, name)
            value = value if index is None else value[index]
            return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
        expert = None if index is None else member.layer.experts[index]
        return read_matrix(self.plan, member, expert).weight


def _caches(a: Plan, b: Plan) -> Iterator[str]:
    """Attention modules whose scales of keys and values mean something else, or lie in one only."""
    from quant_core.convert.cache import check_cache
    from quant_core.kv_cache import CacheScheme
    from quant_core.load import read_matrix

    for name in sorted(a.attention.keys() | b.attention.keys()):
        found = [(p, p.attention[name]) for p in (a, b) if name in p.attention]
        sites = {m.scheme.site for _, m in found if isinstance(m.scheme, CacheScheme)}
        same = len(found) == 2 and len(sites) == 1
        if not (same and check_cache(*(read_matrix(p, m) for p, m in found))):
            yield name


def _compare(a: _Side, b: _Side, name: str) -> LayerDiff:
    shape = a.shape(name)
    if shape != b.shape(name):
        raise LayoutError(
            f"{name}: is {shape} in {a.plan.checkpoint.path} and {b.shape(name)} in "
            f"{b.plan.checkpoint.path}, expected two checkpoints of one model. Check the paths.",
            code="Q-LAYOUT-SHAPE",
            tensor=name,
            expected=shape,
            actual=b.shape(name),
        )
    total = Distance()
    stacked = len(shape) == 3
    for index in range(shape[0]) if stacked else (None,):
        distance(a.matrix(name, index), b.matrix(name, index), shape[-1] if shape else 1, total)
    return LayerDiff(
        name=name,
        a=a.label(name),
        b=b.label(name),
        error=total.relative,
        largest=total.largest,
        bits_a=round(a.bits(name), 3),
        bits_b=round(b.bits(name), 3),
    )


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    on_step: Callable[[str, int], None] | None = None,
) -> Diff:
    """Compare the dequantized weights of two checkpoints of one model.

    Reads one matrix of each at a time. ``on_step`` is called with (weight, weights in all).

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if a weight has two sizes.
        QuantError: whatever is wrong with one of them.
    """
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.plan import plan

    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        left, right = _Side(plan(first)), _Side(plan(second))
        out = Diff(a=first.path, b=second.path)
        out.only_a = sorted(left.names.keys() - right.names.keys())
        out.only_b = sorted(right.names.keys() - left.names.keys())
        out.caches = list(_caches(left.plan, right.plan))
        for name in left.names:
            if name in right.names:
                out.layers.append(_compare(left, right, name))
                if on_step is not None:
                    on_step(name, len(left.names))
    out.layers.sort(key=lambda d: (-d.error, d.name))
    return out


# --------------------------------------------------------------------------------------- logits


@dataclass(slots=True, kw_only=True)
class Logits:
    """How far the models' next-token distributions are apart on one text.

    ``kl``: mean of KL(a || b) in nats per position; ``top1``: part of positions with one argmax.
    """

    positions: int
    kl: float
    largest_kl: float
    top1: float


def diff_logits(
    a: str | os.PathLike[str], b: str | os.PathLike[str], text: str, *, max_tokens: int = 512
) -> Logits:
    """Run both models in float32 on ``text`` and compare their distributions.

    Tokens are those of ``a``'s tokenizer.

    Raises:
        PluginError: ``Q-ENGINE-MISSING``, ``Q-ENGINE-VERSION`` without a supported transformers.
        ConfigError: ``Q-ENGINE-TOKENIZER``, ``Q-CFG-VALUE`` for a text without tokens.
        LayoutError: ``Q-LAYOUT-SHAPE`` for models of unlike vocabularies.
    """
    import torch

    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.engines.tokenizer import encode, load_tokenizer
    from quant_core.engines.transformers import load_model

    with open_checkpoint(a) as checkpoint:
        ids = encode(load_tokenizer(checkpoint), text, "text").input_ids[:, :max_tokens]
    logs = []
    for path in (a, b):
        with torch.inference_mode():
            logits = load_model(path, dtype=torch.float32)(ids).logits[0].float()
        logs.append(logits.log_softmax(-1))
    first, second = logs
    if first.shape != second.shape:
        raise LayoutError(
            f"{b}: has logits for {second.shape[-1]} tokens, expected {first.shape[-1]} as {a}. "
            "Only models of one vocabulary can be compared so.",
            code="Q-LAYOUT-SHAPE",
            expected=first.shape[-1],
            actual=second.shape[-1],
        )
    kl = (first.exp() * (first - second)).sum(-1)
    same = (first.argmax(-1) == second.argmax(-1)).float()
    return Logits(
        positions=ids.shape[1],
        kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        top1=float(same.mean()),
    )
