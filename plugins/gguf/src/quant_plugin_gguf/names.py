"""Stored names and the model's own (Hugging Face) names, and what each writer edited.

A GGUF writer renames tensors, and for some architectures also changes their values. An
architecture is listed here only if every edit is known and undone:

    permuted    q and k rows reordered for interleaved rotary embedding (llama)
    norm_shift  norms stored as weight + shift (gemma)

All others are refused by name. Tested against gguf 0.19.0, tensor_mapping.py; the edits are those
of llama.cpp's convert_hf_to_gguf.py and transformers 5.23, modeling_gguf_pytorch_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from quant_core.errors import FormatError, printable

__all__ = ["ARCHITECTURES", "REFUSED", "Architecture", "architecture"]

_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")

_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b": "mlp.gate",  # its only parameter is renamed in _LEAVES
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_PRE_NORM = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LEAVES = {("exp_probs_b", "bias"): "e_score_correction_bias"}  # (stored module, leaf) -> leaf


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Names and edits of one ``general.architecture``.

    ``layer`` maps a module inside ``blk.N.`` to one inside ``model.layers.N.``. ``factors`` are
    rotary factor tensors whose values the model computes from its config.
    """

    name: str
    layer: Mapping[str, str]
    permuted: bool = False
    norm_shift: float = 0.0
    factors: tuple[str, ...] = ()
    _public: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inverse = {v: k for k, v in self.layer.items() if k != "exp_probs_b"}
        object.__setattr__(self, "_public", inverse)

    def public_name(self, stored: str) -> str | None:
        """``blk.0.attn_q.weight`` -> ``model.layers.0.self_attn.q_proj.weight``; None: unknown."""
        module, _, leaf = stored.rpartition(".")
        if module in _MODEL:
            return f"{_MODEL[module]}.{leaf}"
        found = _BLOCK.match(module)
        if found is None or found[2] not in self.layer:
            return None
        leaf = _LEAVES.get((found[2], leaf), leaf)
        return f"model.layers.{int(found[1])}.{self.layer[found[2]]}.{leaf}"

    def stored_name(self, public: str) -> str | None:
        """The inverse of ``public_name``; None for a name this architecture does not store."""
        module, _, leaf = public.rpartition(".")
        for stored, name in _MODEL.items():
            if name == module:
                return f"{stored}.{leaf}"
        found = _LAYER.match(module)
        if found is None:
            return None
        for (stored, stored_leaf), renamed in _LEAVES.items():
            if renamed == leaf and self.layer.get(stored) == found[2]:
                return f"blk.{found[1]}.{stored}.{stored_leaf}"
        inner = self._public.get(found[2])
        return None if inner is None else f"blk.{found[1]}.{inner}.{leaf}"

    def permuted_rows(self, module: str) -> str:
        """ "q" or "k" if the rows of this stored module are reordered, else ""."""
        inner = module.rpartition(".")[2]
        return inner[-1] if self.permuted and inner in ("attn_q", "attn_k") else ""

    def shift_of(self, stored: str) -> float:
        """What the writer added to this tensor."""
        return self.norm_shift if stored.endswith("norm.weight") else 0.0


def _arch(name: str, *parts: Mapping[str, str], **edits: object) -> Architecture:
    layer: dict[str, str] = {}
    for part in parts:
        layer |= part
    return Architecture(name=name, layer=layer, **edits)  # type: ignore[arg-type]


_PLAIN = (_ATTENTION, _PRE_NORM, _MLP)
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE = ("rope_freqs.weight",)

ARCHITECTURES: Mapping[str, Architecture] = {
    a.name: a
    for a in (
        _arch("llama", *_PLAIN, _EXPERTS, permuted=True, factors=_ROPE),  # Mistral, Mixtral, SmolLM
        _arch("qwen2", *_PLAIN, factors=_ROPE),
        _arch("qwen2moe", _ATTENTION, _PRE_NORM, _EXPERTS, _SHARED_EXPERT),
        _arch("qwen3", *_PLAIN, _QK_NORM, factors=_ROPE),
        _arch("qwen3moe", _ATTENTION, _PRE_NORM, _EXPERTS, _QK_NORM),
        _arch("gemma", *_PLAIN, norm_shift=1.0),
        _arch("gemma2", _ATTENTION, _SANDWICH_NORM, _MLP, norm_shift=1.0),
        _arch("gemma3", _ATTENTION, _QK_NORM, _SANDWICH_NORM, _MLP, norm_shift=1.0),
        _arch(
            "phi3",
            _PHI3,
            _PRE_NORM,
            factors=("rope_factors_long.weight", "rope_factors_short.weight"),
        ),
    )
}

REFUSED: Mapping[str, str] = {
    "clip": "it is a vision projector and no language model",
    "deepseek2": "kv_b_proj may be stored split, with its key half transposed",
    "gpt-oss": "its fused expert matrices are split and their biases reordered",
    "llama4": "its rotary order differs from llama's",
    "mamba": "ssm_a is stored as -exp(A_log)",
    "nemotron": "its norms are shifted in a way that has not been checked",
    "qwen35": "ssm_a is stored as -exp(A_log) and value heads are tiled",
    "qwen35moe": "ssm_a is stored as -exp(A_log) and value heads are tiled",
    "qwen3next": "ssm_a is stored as -exp(A_log) and only some norms are shifted",
}
"""Known architectures with edits that are not undone here, and why."""


def architecture(name: object, path: object) -> Architecture:
    """The table of ``general.architecture``.

    Raises:
        FormatError: ``Q-GGUF-ARCH`` for an architecture that is not listed.
    """
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    why = f" ({REFUSED[name]})" if isinstance(name, str) and name in REFUSED else ""
    shown = printable(repr(name), 60)
    raise FormatError(
        f"{path}: general.architecture is {shown}{why}, expected one of "
        f"{', '.join(sorted(ARCHITECTURES))}. Names and value edits of other architectures are "
        "not known; use the model's safetensors files.",
        code="Q-GGUF-ARCH",
        path=path,
        tensor="general.architecture",
        expected=sorted(ARCHITECTURES),
        actual=name,
    )
