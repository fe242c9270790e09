"""Linear layers, embeddings and output layers of vLLM, packed.

    create_weights                  which part of which member this rank holds; no memory
    weight (a ticket of one byte)   through it vLLM's own loading reaches the layer
    process_weights_after_loading   read, cut, fuse, bind; the parts become parameters
    apply                           one op

Source: vLLM 0.32.0, model_executor/layers/{linear,vocab_parallel_embedding}.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from quant_core.engines.complete import check_biases
from quant_core.engines.packed import Packed, attach, bind_embedding, bind_linear, neutral
from quant_core.engines.sharing import Piece
from quant_core.errors import LayoutError
from quant_core.ledger import missing_error
from quant_core.plan import Member
from quant_core.spec import Span

if TYPE_CHECKING:
    from quant_core.engines.vllm_config import QuantCoreConfig

__all__ = [
    "EmbeddingMethod",
    "HeadMethod",
    "LinearMethod",
    "TiedHeadMethod",
    "add_ticket",
    "drop_ticket",
    "method_for",
    "ticket",
]


def method_for(config: QuantCoreConfig, layer: Any, prefix: str) -> QuantizeMethodBase | None:
    """How vLLM is to compute a layer; None: as it does without quantization."""
    if isinstance(layer, VocabParallelEmbedding):
        return _table_method(config, layer, prefix)
    if isinstance(layer, RoutedExperts):
        from quant_core.engines.vllm_experts import experts_method

        return experts_method(config, layer, prefix)
    if isinstance(layer, LinearBase):
        members = config.names.of(prefix, config.packed_modules_mapping)
        if not any(m.quantized for m in members):
            return UnquantizedLinearMethod()
        _take(config, prefix, members)
        return LinearMethod(config, prefix, members)
    from quant_core.engines.vllm_cache import cache_method

    return cache_method(config, layer, prefix)


def _take(config: QuantCoreConfig, prefix: str, members: Sequence[Member]) -> None:
    assert config.account is not None
    config.account.take(prefix, members)
    config.held |= {f"{m.layer.name}.weight" for m in members if not m.quantized}


def _table_method(
    config: QuantCoreConfig, layer: VocabParallelEmbedding, prefix: str
) -> QuantizeMethodBase | None:
    members = config.names.of(prefix, {}) if prefix else []
    tables = [m for m in config.names.members.values() if m.layer.kind == "embedding"]
    packed = [m for m in tables if m.quantized]
    if not members and not isinstance(layer, ParallelLMHead) and len(tables) == 1:
        members = tables  # some models give their embedding no name
    if not members and isinstance(layer, ParallelLMHead) and len(packed) == 1:
        return TiedHeadMethod(config, prefix)
    if not members or not members[0].quantized:
        return None
    _take(config, prefix, members)
    cls = HeadMethod if isinstance(layer, ParallelLMHead) else EmbeddingMethod
    return cls(config, prefix or members[0].layer.name, members)


# ------------------------------------------------------------------------------------- tickets


def ticket() -> Tensor:
    """What goes through vLLM's loading in place of a packed member's tensors."""
    return torch.ones(1, dtype=torch.uint8)


def _accept(
    param: nn.Parameter, loaded_weight: Tensor, *args: Any, return_success: bool = False, **kw: Any
) -> bool | None:
    """``weight_loader`` of every ticket.

    Raises:
        LayoutError: ``Q-ENGINE-RELOAD`` for a tensor that is none of the layer's own.
    """
    if loaded_weight.dtype != torch.uint8 or loaded_weight.numel() != 1:
        raise LayoutError(
            f"a packed layer was given a {loaded_weight.dtype} tensor of shape "
            f"{tuple(loaded_weight.shape)}, expected the tensors that its checkpoint stores for "
            "it. Send those, or restart the engine with the new checkpoint.",
            code="Q-ENGINE-RELOAD",
            actual=tuple(loaded_weight.shape),
        )
    param.data[:1].copy_(loaded_weight.reshape(1))  # one element: vLLM counts them
    return True if return_success else None


def add_ticket(layer: Any, name: str, count: int = 1) -> None:
    """A parameter that waits for ``count`` tickets; all of them make vLLM process the layer."""
    param = nn.Parameter(torch.zeros(count, dtype=torch.uint8), requires_grad=False)
    param.weight_loader = _accept  # type: ignore[attr-defined]
    layer.register_parameter(name, param)


def drop_ticket(layer: Any, name: str, dtype: torch.dtype, device: str) -> None:
    """An empty weight: other code of vLLM asks it for the layer's dtype and device."""
    empty = torch.empty(0, dtype=dtype, device=device)
    layer.register_parameter(name, nn.Parameter(empty, requires_grad=False))


# ------------------------------------------------------------------------------- linear layers


class _Method(QuantizeMethodBase):  # type: ignore[misc]
    """What linear layers, embeddings and output layers have in common.

    ``members`` are kept by name: after a reload they are looked up in the new plan.
    """

    requires_device_loading = False

    def __init__(self, config: QuantCoreConfig, prefix: str, members: Sequence[Member]) -> None:
        self.config, self.prefix = config, prefix
        self.member_names = [m.layer.name for m in members]

    @property
    def members(self) -> list[Member]:
        return [self.config.plan.members[name] for name in self.member_names]

    def _pieces(self, layer: Any) -> list[Piece]:
        spans: list[tuple[int, Span, Span]] = layer.packed_spans
        members = self.members
        return [Piece(member=members[i], out=out, inp=inp) for i, out, inp in spans]

    def _place(self, layer: Any, parts: list[Any], device: str) -> None:
        packed: Packed | None = getattr(layer, "packed", None)
        if packed is None:
            layer.packed = attach(self.prefix, layer, parts)
        else:
            packed.replace(parts)  # vLLM copies them into the storage that its graphs know
        drop_ticket(layer, "weight", layer.packed_dtype, device)


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
        add_ticket(layer, "weight", sum(m.quantized for m in self.members))
        layer.packed_dtype = params_dtype
        start = layer.tp_rank * input_size_per_partition
        inp = Span.whole(input_size)
        if input_size_per_partition != input_size:
            inp = Span(start=start, stop=start + input_size_per_partition, total=input_size)
        outs = _out_spans(layer, output_partition_sizes)
        count = len(self.member_names)
        if count == len(outs):
            layer.packed_spans = [(i, out, inp) for i, out in enumerate(outs)]
            return
        total = sum(out.total for out in outs)
        if count != 1:
            raise LayoutError(
                f"{self.prefix}: {count} members for {len(outs)} parts, expected one for each or "
                "one for all. This fused layer cannot be packed; exclude it from quantization.",
                code="Q-ENGINE-MODULE",
                tensor=self.prefix,
                expected=len(outs),
                actual=count,
            )
        if all((out.start, out.stop) == (0, out.total) for out in outs):
            layer.packed_spans = [(0, Span.whole(total), inp)]
            return
        firsts = accumulate((out.total for out in outs[:-1]), initial=0)
        layer.packed_spans = [
            (0, Span(start=first + out.start, stop=first + out.stop, total=total), inp)
            for first, out in zip(firsts, outs, strict=True)
        ]

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check_taken()
        wanted = getattr(layer, "bias", None) is not None
        check_biases(self.config.plan, self.prefix, self.members, wanted=wanted)
        builder = self.config.builder(layer.packed_dtype)
        with neutral():
            parts = bind_linear(builder, self.prefix, self._pieces(layer))
        self._place(layer, parts, builder.device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.packed.call_linear(x)
        return y if bias is None else y + bias


def _out_spans(layer: Any, sizes: Sequence[int]) -> list[Span]:
    """The rank's rows of every part of a linear layer."""
    ranks = layer.tp_size if isinstance(layer, ColumnParallelLinear) else 1
    rank = layer.tp_rank if ranks > 1 else 0
    spans = []
    for i, size in enumerate(sizes):
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and i else 1
        start = rank // copies * size
        spans.append(Span(start=start, stop=start + size, total=size * ranks // copies))
    return spans


# ------------------------------------------------------------------------------------- tables


def _table_weights(layer: VocabParallelEmbedding, dtype: torch.dtype) -> None:
    """This rank's rows. Rows of padding are not stored: no id names them."""
    shard = layer.shard_indices
    out = Span(
        start=shard.org_vocab_start_index,
        stop=shard.org_vocab_end_index,
        total=layer.org_vocab_size,
    )
    layer.packed_spans = [(0, out, Span.whole(layer.embedding_dim))]
    layer.packed_dtype = dtype
    add_ticket(layer, "weight")


def _logits(
    layer: VocabParallelEmbedding, packed: Packed, x: Tensor, bias: Tensor | None
) -> Tensor:
    """Zeros for the rows of padding, which vLLM cuts off after gathering."""
    y = packed.call_linear(x)
    missing = layer.num_embeddings_per_partition - packed.rows
    if missing:
        y = nn.functional.pad(y, (0, missing))
    return y if bias is None else y + bias


class EmbeddingMethod(_Method):
    """A packed table: rows for ids, and logits for an output layer tied to it."""

    def create_weights(self, layer: Any, *args: Any, params_dtype: Any, **kw: Any) -> None:
        _table_weights(layer, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check_taken()
        builder = self.config.builder(layer.packed_dtype)
        with neutral():
            parts = [bind_embedding(builder, self.prefix, self._pieces(layer)[0])]
        self._place(layer, parts, builder.device)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        packed: Packed = layer.packed
        return packed.call_embedding(ids, layer.embedding_dim, layer.packed_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _logits(layer, layer.packed, x, bias)


class HeadMethod(_Method):
    """An output layer that the checkpoint stores by itself, whatever config.json says of ties."""

    def create_weights(self, layer: Any, *args: Any, params_dtype: Any, **kw: Any) -> None:
        _table_weights(layer, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check_taken()
        builder = self.config.builder(layer.packed_dtype)
        with neutral():
            parts = bind_linear(builder, self.prefix, self._pieces(layer), bias=True)
        self._place(layer, parts, builder.device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _logits(layer, layer.packed, x, bias)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        return layer


class TiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """An output layer that reads the packed embedding: one copy."""

    requires_device_loading = False

    def __init__(self, config: QuantCoreConfig, prefix: str) -> None:
        self.config, self.prefix = config, prefix

    def create_weights(self, layer: Any, *args: Any, params_dtype: Any, **kw: Any) -> None:
        layer.packed_dtype = params_dtype
        empty = torch.empty(0, dtype=params_dtype)
        layer.register_parameter("weight", nn.Parameter(empty, requires_grad=False))

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        object.__setattr__(layer, "packed_table", embed_tokens)  # no submodule: not walked twice
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "packed_table", None) is None:
            raise missing_error(
                self.config.plan.checkpoint, [f"{self.prefix}.weight"], f"{self.prefix}, not tied"
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _logits(layer, layer.packed_table.packed, x, bias)
