"""Linear layers, embeddings and output layers of SGLang, packed.

    create_weights                  which part of which member this rank holds; no memory
    process_weights_after_loading   read, cut, fuse, bind; the parts become parameters
    apply                           one op

Source: SGLang 0.5.23, srt/layers/{linear,vocab_parallel_embedding}.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch import Tensor, nn

from quant_core.engines.complete import check_biases
from quant_core.engines.packed import Packed, attach, bind_embedding, bind_linear, neutral
from quant_core.engines.sglang_slots import Slots
from quant_core.engines.sharing import Piece
from quant_core.engines.staged import stored_names
from quant_core.errors import LayoutError
from quant_core.ledger import missing_error
from quant_core.plan import Member
from quant_core.scheme import Scheme
from quant_core.spec import Span

if TYPE_CHECKING:
    from quant_core.build import Builder
    from quant_core.engines.sglang_config import QuantCoreConfig

__all__ = ["EmbeddingMethod", "HeadMethod", "LinearMethod", "TiedHeadMethod", "method_for"]


def method_for(config: QuantCoreConfig, layer: Any, prefix: str) -> QuantizeMethodBase | None:
    """How SGLang is to compute a layer; None: as it does without quantization."""
    if isinstance(layer, VocabParallelEmbedding):
        return _table_method(config, layer, prefix)
    if isinstance(layer, FusedMoE):
        from quant_core.engines.sglang_experts import experts_method

        return experts_method(config, layer, prefix)
    if isinstance(layer, LinearBase):
        members = config.names.of(prefix, config.fused)
        if not any(config.packs(m) for m in members):
            _take(config, prefix, [m for m in members if m.quantized])
            return UnquantizedLinearMethod()
        _take(config, prefix, members)
        return LinearMethod(config, prefix, members)
    from quant_core.engines.sglang_cache import cache_method

    return cache_method(config, layer, prefix)


def _take(config: QuantCoreConfig, prefix: str, members: Sequence[Member]) -> None:
    assert config.account is not None
    config.account.take(prefix, members)


def _table_method(
    config: QuantCoreConfig, layer: VocabParallelEmbedding, prefix: str
) -> QuantizeMethodBase | None:
    members = config.names.of(prefix, {}) if prefix else []
    tables = [m for m in config.names.members.values() if m.layer.kind == "embedding"]
    head = isinstance(layer, ParallelLMHead)
    if not members and not head and len(tables) == 1:
        members = tables  # some models give their embedding no name
    if not members and head and any(m.quantized for m in tables):
        return TiedHeadMethod(config, prefix)
    if not members or not members[0].quantized:
        return None
    _take(config, prefix, members)
    cls = HeadMethod if head else EmbeddingMethod
    return cls(config, prefix or members[0].layer.name, members)


def sources_of(
    config: QuantCoreConfig, members: Sequence[Member], shards: Sequence[Any], *, bias: bool = False
) -> dict[str, dict[Any, str]]:
    """Parameter name -> {shard id: stored name} of a layer's members."""
    out: dict[str, dict[Any, str]] = {}
    plan = config.plan
    for member, shard in zip(members, shards, strict=True):
        for name in stored_names(plan, [member], bias=bias):
            out.setdefault(name.rpartition(".")[2], {})[shard] = name
    return out


class _Method(QuantizeMethodBase):  # type: ignore[misc]
    """What linear layers, embeddings and output layers have in common."""

    bias = False  # kept with the packed part

    def __init__(self, config: QuantCoreConfig, prefix: str, members: Sequence[Member]) -> None:
        self.config, self.prefix, self.members = config, prefix, list(members)
        self.slots: Slots | None = None

    def _prepare(self, layer: Any, dtype: torch.dtype, shards: Sequence[Any]) -> None:
        sources = sources_of(self.config, self.members, shards, bias=self.bias)
        self.slots = Slots(layer, sources, self.config.round)
        keys: Mapping[Any, str] = sources.get("weight", {})
        layer.packed_device = self.slots.add_weight(layer, "weight", dtype, keys)
        layer.packed_dtype = dtype

    def _bind(self, builder: Builder, pieces: Sequence[Piece]) -> list[Any]:
        return bind_linear(builder, self.prefix, pieces, bias=self.bias)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check_taken()
        assert self.slots is not None
        first = not self.slots.loaded
        plan = self.slots.take(self.config.plan)
        if plan is None:
            return
        if first and not self.bias:
            wanted = getattr(layer, "bias", None) is not None
            check_biases(plan, self.prefix, self.members, wanted=wanted)
        builder = self.config.builder(plan, layer.packed_device, layer.packed_dtype)
        members = [plan.members[m.layer.name] for m in self.members]
        pieces = [Piece(member=members[i], out=out, inp=inp) for i, out, inp in layer.packed_spans]
        with neutral():
            parts = self._bind(builder, pieces)
        packed: Packed | None = getattr(layer, "packed", None)
        if packed is None:
            layer.packed = attach(self.prefix, layer, parts)
        else:
            packed.refill(parts)

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        assert self.slots is not None
        self.slots.restore()


# ------------------------------------------------------------------------------- linear layers


class LinearMethod(_Method, LinearMethodBase):  # type: ignore[misc]
    """One or several members as one linear layer."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        count, parts = len(self.members), len(output_partition_sizes)
        shards: list[Any] = list(range(count)) if count > 1 else [None]
        if isinstance(layer, QKVParallelLinear) and count > 1:
            shards = list("qkv")
        self._prepare(layer, params_dtype, shards)
        inp = Span.whole(input_size)
        if isinstance(layer, RowParallelLinear):
            rank, _ = get_group_rank_size(layer.tp_group)
            start = rank * input_size_per_partition
            inp = Span(start=start, stop=start + input_size_per_partition, total=input_size)
        outs = _out_spans(layer, output_partition_sizes)
        if count == parts:
            layer.packed_spans = [(i, out, inp) for i, out in enumerate(outs)]
            return
        rows = self._rows() if len(outs) == 1 and self.config.fed else []
        if len(rows) > 1 and outs[0] == Span.whole(sum(rows)):
            # one layer for SGLang, several for the checkpoint: models concatenate their tensors
            # themselves, which only our own loader keeps from them
            layer.packed_spans = [(i, Span.whole(n), inp) for i, n in enumerate(rows)]
            return
        if count != 1:
            raise LayoutError(
                f"{self.prefix}: {count} members for {parts} parts, expected one for each or "
                "one for all. This fused layer cannot be packed; exclude it from quantization.",
                code="Q-ENGINE-MODULE",
                tensor=self.prefix,
                expected=parts,
                actual=count,
            )
        total = sum(out.total for out in outs)
        if all((out.start, out.stop) == (0, out.total) for out in outs):
            layer.packed_spans = [(0, Span.whole(total), inp)]
            return
        firsts = accumulate((out.total for out in outs[:-1]), initial=0)
        layer.packed_spans = [
            (0, Span(start=first + out.start, stop=first + out.stop, total=total), inp)
            for first, out in zip(firsts, outs, strict=True)
        ]

    def _rows(self) -> list[int]:
        """Output features of each member; none if some are not quantized."""
        rows = [m.scheme.shape[0] for m in self.members if isinstance(m.scheme, Scheme)]
        return rows if len(rows) == len(self.members) else []

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.packed.call_linear(x)
        return y if bias is None else y + bias


def _out_spans(layer: Any, sizes: Sequence[int]) -> list[Span]:
    """The rank's rows of every part of a linear layer."""
    cut = not isinstance(layer, RowParallelLinear)
    rank, ranks = get_group_rank_size(layer.tp_group if cut else None)
    spans = []
    for i, size in enumerate(sizes):
        at, of, copies = rank, ranks, 1
        if isinstance(layer, QKVParallelLinear) and i:
            at, of = get_group_rank_size(layer.kv_tp_group)
            copies = layer.num_kv_head_replicas
        start = at // copies * size
        spans.append(Span(start=start, stop=start + size, total=size * of // copies))
    return spans


# ------------------------------------------------------------------------------------- tables


def _logits(layer: Any, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """Zeros for the rows of padding, which SGLang cuts off after gathering."""
    y = packed.call_linear(x)
    missing = layer.num_embeddings_per_partition - packed.rows
    if missing:
        y = nn.functional.pad(y, (0, missing))
    return y if bias is None else y + bias


class HeadMethod(_Method):
    """An output layer that the checkpoint stores by itself, whatever config.json says of ties."""

    bias = True

    def create_weights(self, layer: Any, *args: Any, params_dtype: Any, **kw: Any) -> None:
        """This rank's rows. Rows of padding are not stored: no id names them."""
        shard = layer.shard_indices
        out = Span(
            start=shard.org_vocab_start_index,
            stop=shard.org_vocab_end_index,
            total=layer.org_vocab_size,
        )
        layer.packed_spans = [(0, out, Span.whole(layer.embedding_dim))]
        self._prepare(layer, params_dtype, [None])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _logits(layer, layer.packed, x, bias)


class EmbeddingMethod(HeadMethod):
    """A packed table: rows for ids, and logits for an output layer that is this module."""

    def _bind(self, builder: Builder, pieces: Sequence[Piece]) -> list[Any]:
        return [bind_embedding(builder, self.prefix, pieces[0])]

    def create_weights(self, layer: Any, *args: Any, params_dtype: Any, **kw: Any) -> None:
        super().create_weights(layer, *args, params_dtype=params_dtype, **kw)
        self.config.table = layer

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        packed: Packed = layer.packed
        return packed.call_embedding(ids, layer.embedding_dim, layer.packed_dtype)


class TiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """An output layer of its own that reads the packed embedding: one copy."""

    def __init__(self, config: QuantCoreConfig, prefix: str) -> None:
        self.config, self.prefix = config, prefix

    def create_weights(self, layer: Any, *args: Any, params_dtype: Any, **kw: Any) -> None:
        empty = torch.empty(0, dtype=params_dtype)
        layer.register_parameter("weight", nn.Parameter(empty, requires_grad=False))

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.config.table is None:
            raise missing_error(
                self.config.plan.checkpoint, [f"{self.prefix}.weight"], f"{self.prefix}, not tied"
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        table: Any = self.config.table
        return _logits(layer, table.packed, x, bias)
