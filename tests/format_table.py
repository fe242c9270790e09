"""Formats x layer kinds x what can be done with them: the data of test_format_table.py and of
docs/formats/table.md.

A cell is filled by examples: a module of a real checkpoint, or the tensors of one under another
module's name (``place``), because a file names its modules and a format's layout does not depend
on them. What fails for an example is named with a part of the error. An empty cell says why it is
empty, and how that is shown (``Empty.shown``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["KINDS", "OPERATIONS", "TABLE", "Empty", "Example"]

KINDS = ("linear", "lm_head", "embedding", "experts", "stacked experts", "attention")
"""``experts``: each stored by itself. ``stacked experts``: one tensor for all. ``attention``:
scales of keys and values."""

OPERATIONS = ("load", "dequantize", "apply", "serialize", "convert")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One module that fills a cell.

    Attributes:
        source: folder in tests/fixtures, tests/slices or the full set, or ``made:<name>``.
        module: public name of a module of it.
        place: the kind as which its tensors are stored again; "" = where they are.
        to: a format that holds it exactly.
        refused: operation -> part of the error, for what cannot be done.
        config: changes to ``quantization_config`` that go with ``place``.
    """

    source: str
    module: str
    place: str = ""
    to: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Empty:
    """Why there is nothing in a cell.

    ``shown`` names the check in test_format_table.py, ``error`` a part of what it meets.
    """

    why: str
    shown: str
    error: str = ""


Cell = tuple[Example, ...] | Empty

_Q0 = "model.layers.0.self_attn.q_proj"
_Q1 = "model.layers.1.self_attn.q_proj"
_O1 = "model.layers.1.self_attn.o_proj"
_GATE0 = "model.layers.0.mlp.gate_proj"
_DOWN0 = "model.layers.0.mlp.down_proj"
_DOWN1 = "model.layers.1.mlp.down_proj"
_EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
_ATTENTION = "model.layers.0.self_attn"

_ONE_BY_ONE = "its tools store experts one by one"
_NO_CACHE = "no tensor of the format describes a cache"
_TOKENS = {"apply": "operands"}
"""An embedding is looked up by token numbers: there are no activations to quantize."""


_TABLES = {"convert": "weights are nf4"}
_MINIMA = {"convert": "no multiple of their scale"}
_RULE = {"convert": "activations rounded by another rule"}
_SUMS = {"convert": "has acc_bias, out_scale"}
_AS_FLOAT = {"convert": "written as float"}
"""The other formats hold no packed head or embedding of this kind; both go over as floats."""


def _stack(error: str) -> Empty:
    return Empty(why=_ONE_BY_ONE, shown="a stack is refused", error=error)


def _no_cache(error: str = "unexpected") -> Empty:
    return Empty(why=_NO_CACHE, shown="scales are refused", error=error)


def _placed(
    source: str,
    module: str,
    kinds: tuple[str, ...] = ("lm_head", "embedding", "experts"),
    *,
    to: str = "",
    refused: Mapping[str, str] | None = None,
    embedding: Mapping[str, str] | None = None,
    embedding_to: str = "",
    heads_as_float: bool = False,
    config: Mapping[str, object] | None = None,
) -> dict[str, Example]:
    """The same tensors as other kinds; ``embedding``: what is refused there besides."""
    out = {}
    for kind in kinds:
        extra, goes = (embedding, embedding_to) if kind == "embedding" else ({}, to)
        no = {**(refused or {}), **(extra or {})}
        if (heads_as_float and kind != "experts") or (kind == "embedding" and not goes):
            goes, no = "", no | _AS_FLOAT
        out[kind] = Example(
            source=source, module=module, place=kind, to=goes, refused=no, config=config or {}
        )
    return out


def _weights_alone(placed: Mapping[str, Example], source: str, module: str, to: str) -> Cell:
    """The embedding of a file without quantized activations, beside one with them."""
    plain = Example(source=source, module=module, place="embedding", to=to)
    return placed["embedding"], plain


TABLE: dict[str, dict[str, Cell | Example]] = {
    "autoround": {
        "linear": (
            Example(source="ar-mixed-bits", module=_GATE0, to="gptq"),
            Example(source="ar-mixed-bits", module=_DOWN1, to="gptq"),  # 4 bit beside 8 and 2
            Example(source="ar-nvfp4", module=_O1, to="compressed_tensors"),
        ),
        **_placed("ar-mixed-bits", _GATE0, to="gptq", embedding_to="gguf"),
        "stacked experts": _stack("expected qweight, qzeros and scales"),
        "attention": _no_cache(),
    },
    "awq": {
        "linear": (Example(source="gptqmodel-awq-gemm-g128", module=_Q1, to="gptq"),),
        **_placed("gptqmodel-awq-gemm-g128", _Q1, to="gptq", embedding_to="gguf"),
        "stacked experts": _stack("expected two dimensions"),
        "attention": _no_cache(),
    },
    "bitsandbytes": {
        "linear": (
            Example(source="bnb-nf4-dq", module=_Q1, refused=_TABLES),
            Example(source="bnb-int8", module=_Q1, to="torchao"),
        ),
        **_placed("bnb-nf4-dq", _Q1, refused=_TABLES, heads_as_float=True),
        "stacked experts": _stack("is no description of a 4-bit weight"),
        "attention": _no_cache(),
    },
    "compressed_tensors": {
        "linear": (
            Example(source="ct-w4a16-awq-asym", module=_O1, to="awq"),
            Example(source="ct-nvfp4", module=_O1, to="autoround"),
            Example(source="ct-w8a8-int8-dynamic-gptq", module=_O1, to="quark"),
            Example(source="ct-fp8-block128", module=_O1, to="quark"),
        ),
        **_placed(
            "ct-w4a16-awq-asym",
            _O1,
            to="awq",
            embedding_to="gguf",
            config={"config_groups.group_0.targets": ["Linear", "Embedding"]},
        ),
        "stacked experts": _stack("expected a matrix"),
        "attention": (Example(source="ct-kvfp8-w4a16", module=_ATTENTION, to="nvfp4"),),
    },
    "fp8": {
        "linear": (Example(source="hf-fp8-block128", module=_DOWN0, refused=_RULE),),
        **_placed("hf-fp8-block128", _DOWN0, refused=_RULE, embedding=_TOKENS, heads_as_float=True),
        "stacked experts": _stack("expected two dimensions"),
        "attention": (Example(source="made:fp8-kv", module=_ATTENTION, to="nvfp4"),),
    },
    "gguf": {
        "linear": (
            Example(source="gguf-llama-q4_k_m", module=_DOWN1, to="compressed_tensors"),
            Example(source="gguf-llama-q4_0", module=_DOWN1, to="gptq"),
        ),
        "lm_head": (
            Example(source="gguf-llama-q4_k_m", module="lm_head", to="compressed_tensors"),
        ),
        "embedding": (
            Example(
                source="gguf-llama-q4_k_m",
                module="model.embed_tokens",
                refused=_AS_FLOAT,
            ),
        ),
        "experts": Empty(
            why="its tools store a stack as one tensor",
            shown="a single expert is refused",
            error="mlp.down_proj.weight",
        ),
        "stacked experts": (
            Example(source="gguf-moe-q4_k_m", module=_EXPERTS.format(1, "down"), to="gptq"),
            Example(source="gguf-moe-q4_k_m", module=_EXPERTS.format(0, "gate"), refused=_MINIMA),
        ),
        "attention": _no_cache(),
    },
    "gptq": {
        "linear": (
            Example(source="gptqmodel-dynamic-4-8bit-skip", module=_Q0, to="awq"),
            Example(source="gptqmodel-4bit-g128-asym-descact", module=_Q1, to="compressed_tensors"),
        ),
        **_placed("gptqmodel-dynamic-4-8bit-skip", _Q0, to="awq", embedding_to="gguf"),
        "stacked experts": _stack("expected qweight, qzeros and scales"),
        "attention": _no_cache(),
    },
    "hqq": {
        "linear": (Example(source="hqq-4bit-g64", module=_Q1, refused=_MINIMA),),
        **_placed("hqq-4bit-g64", _Q1, refused=_MINIMA, embedding={"convert": "written as float"}),
        "stacked experts": _stack("expected an integer from 0 to 1"),
        "attention": _no_cache(),
    },
    "modelslim_npu": {
        "linear": (
            Example(source="msmodelslim-w8a8", module=_Q1, refused=_SUMS),
            Example(source="msmodelslim-w4a8-g64", module=_Q1, refused=_RULE),
        ),
        **_placed("msmodelslim-w8a8", _Q1, refused=_SUMS, embedding=_TOKENS, heads_as_float=True),
        "embedding": _weights_alone(
            _placed("msmodelslim-w8a8", _Q1, refused=_SUMS, embedding=_TOKENS, heads_as_float=True),
            "msmodelslim-w8a16",
            _Q1,
            to="gguf",
        ),
        "stacked experts": _stack("expected two axes"),
        "attention": (
            Example(
                source="msmodelslim-w8a8-kvc8",
                module=_ATTENTION,
                refused={"convert": "have scales per feature"},
            ),
        ),
    },
    "mxfp4": {
        "linear": Empty(why="holds experts only", shown="a layer is refused"),
        "lm_head": Empty(why="holds experts only", shown="a layer is refused"),
        "embedding": Empty(why="holds experts only", shown="a layer is refused"),
        "experts": Empty(why="a stack is one tensor", shown="a layer is refused"),
        "stacked experts": (
            Example(source="hf-gptoss-mxfp4", module=_EXPERTS.format(0, "down"), to="gguf"),
            Example(source="hf-gptoss-mxfp4", module=_EXPERTS.format(0, "gate"), to="gguf"),
            Example(source="hf-gptoss-mxfp4", module=_EXPERTS.format(0, "up"), to="gguf"),
        ),
        "attention": _no_cache(),
    },
    "mxfp8": {
        "linear": (Example(source="made:mxfp8", module=_GATE0, to="autoround"),),
        **_placed("made:mxfp8", _GATE0, to="autoround", embedding=_TOKENS),
        "stacked experts": _stack("expected [out, in]"),
        "attention": (Example(source="made:mxfp8-kv", module=_ATTENTION, to="quark"),),
    },
    "nvfp4": {
        "linear": (
            Example(source="modelopt-nvfp4", module=_DOWN0, refused=_RULE),
            Example(
                source="modelopt-int4-awq", module=_DOWN0, refused={"convert": "has transforms"}
            ),
            Example(source="modelopt-fp8-pb-wo", module=_DOWN0, to="compressed_tensors"),
        ),
        **_placed("modelopt-nvfp4", _DOWN0, refused=_RULE, embedding=_TOKENS, heads_as_float=True),
        "embedding": _weights_alone(
            _placed(
                "modelopt-nvfp4", _DOWN0, refused=_RULE, embedding=_TOKENS, heads_as_float=True
            ),
            "modelopt-w4a16-nvfp4",
            _DOWN0,
            "gguf",
        ),
        "stacked experts": _stack("expected a matrix"),
        "attention": (Example(source="modelopt-fp8-kvfp8", module=_ATTENTION, to="quark"),),
    },
    "quark": {
        "linear": (
            Example(source="quark-mxfp4", module=_Q1, refused=_RULE),
            Example(source="quark-uint4-g128-awq", module=_Q1, to="awq"),
        ),
        **_placed("quark-mxfp4", _Q1, refused=_RULE, embedding=_TOKENS, heads_as_float=True),
        "embedding": _weights_alone(
            _placed("quark-mxfp4", _Q1, refused=_RULE, embedding=_TOKENS, heads_as_float=True),
            "quark-uint4-g128-awq",
            _Q1,
            to="gguf",
        ),
        "stacked experts": _stack("expected a matrix"),
        "attention": (
            Example(
                source="quark-fp8-kvfp8",
                module=_ATTENTION,
                refused={"convert": "before the rotary embedding"},
            ),
        ),
    },
    "torchao": {
        "linear": (
            Example(source="torchao-int8wo", module=_Q1, to="gptq"),
            Example(source="torchao-intx4-g32", module=_Q1, to="awq"),
        ),
        **_placed("torchao-int8wo", _Q1, to="gptq", embedding_to="gguf"),
        "stacked experts": _stack("expected a matrix"),
        "attention": _no_cache(),
    },
}
