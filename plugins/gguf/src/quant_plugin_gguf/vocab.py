"""``tokenizer.json`` as GGUF's tokenizer keys: byte-level BPE only.

llama.cpp splits text by a regular expression that it looks up by name (``tokenizer.ggml.pre``), so
the pre-tokenizer of the file must be one whose name is known; anything else is refused, because a
wrong name changes tokens silently. The option ``pre`` states a name where the user knows it.

Source: llama.cpp, src/llama-vocab.cpp (expressions and their names); gguf 0.19.0 (TokenType).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint.json import read_json_object
from quant_core.errors import LayoutError, printable
from quant_plugin_gguf.kv import Pairs, encode

if TYPE_CHECKING:
    from quant_core.convert.target import Target

__all__ = ["pre_tokenizer", "vocabulary"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # TokenType
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}


def _refuse(key: str, found: Any, expected: str) -> LayoutError:
    return LayoutError(
        f"tokenizer.json: {key} is {printable(repr(found), 80)}, expected {expected} to write a "
        "GGUF file. Make a GGUF file of the original model with llama.cpp's converter and convert "
        "that.",
        code="Q-LAYOUT-REPRESENT",
        tensor=key,
        expected=expected,
        actual=found,
        plugin="gguf",
    )


def _kinds(block: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if block is None:
        return []
    if block.get("type") == "Sequence":
        return list(block["pretokenizers"])
    return [block]


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer; "" if it has none that is known here."""
    kinds = _kinds(tokenizer.get("pre_tokenizer"))
    names = [k.get("type") for k in kinds]
    if not kinds or names[-1] != "ByteLevel" or kinds[-1].get("add_prefix_space"):
        return ""
    by_regex = kinds[-1].get("use_regex", True)
    if names == ["ByteLevel"]:
        # without merges every byte is a token, however the text is split
        return "gpt-2" if by_regex or not tokenizer["model"].get("merges") else ""
    if names == ["Digits", "ByteLevel"] and by_regex and kinds[0].get("individual_digits"):
        return "smollm"
    if names == ["Split", "ByteLevel"] and not by_regex:
        pattern = kinds[0].get("pattern", {}).get("Regex", "")
        isolated = kinds[0].get("behavior") == "Isolated" and not kinds[0].get("invert")
        return _SPLITS.get(pattern, "") if isolated else ""
    return ""


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]


def _tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token id below ``size``."""
    tokens: list[str | None] = [None] * size
    types = [_UNUSED] * size
    entries = [(i, text, _NORMAL) for text, i in tokenizer["model"]["vocab"].items()]
    for added in tokenizer.get("added_tokens") or ():
        kind = _CONTROL if added.get("special") else _USER_DEFINED
        entries.append((added["id"], added["content"], kind))
    for i, text, kind in entries:
        if not 0 <= i < size:
            raise _refuse(f"token {text!r}", i, f"an id below vocab_size {size}")
        tokens[i], types[i] = text, kind
    return [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)], types


def _text_of(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special(target: Target, settings: Mapping[str, Any], tokens: list[str]) -> Pairs:
    """Ids of bos, eos and padding: the config's first, else by the tokenizer's own text."""
    out: Pairs = []
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = target.config.get(f"{name}_token_id")
        if isinstance(value, list | tuple):
            value = value[0] if value else None
        text = _text_of(settings.get(f"{name}_token"))
        if value is None and text in tokens:
            value = tokens.index(str(text))
        if isinstance(value, int) and 0 <= value < len(tokens):
            out.append(encode(f"tokenizer.ggml.{key}_token_id", "u32", value))
    return out


def _adds(tokenizer: Mapping[str, Any], text: str | None, *, first: bool) -> bool:
    """Whether the post-processor puts the special token at the start (or end) of every text."""
    post = tokenizer.get("post_processor") or {}
    blocks = post.get("processors", [post]) if post.get("type") == "Sequence" else [post]
    for block in blocks:
        single = block.get("single") or ()
        if single:
            edge = single[0 if first else -1].get("SpecialToken", {}).get("id")
            return text is not None and edge == text
    return False


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def vocabulary(target: Target) -> Pairs:
    """The ``tokenizer.*`` pairs of a target, from the files beside the source's weights.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if there is no byte-level BPE tokenizer.json, or its
            pre-tokenizer has no known name.
    """
    folder = target.source.checkpoint.folder
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _refuse("file", "absent", "a tokenizer.json beside the weights")
    tokenizer = read_json_object(file)
    settings = target.source.checkpoint.side_file("tokenizer_config.json") or {}
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("vocab"):
        found = "BPE with byte_fallback" if model.get("byte_fallback") else model.get("type")
        raise _refuse("model", found, "byte-level BPE")
    pre = str(target.options.get("pre") or pre_tokenizer(tokenizer))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if not pre:
        expected = "one whose name in llama.cpp is known (or the option pre=NAME)"
        raise _refuse("pre_tokenizer", tokenizer.get("pre_tokenizer"), expected)
    if normalizer not in (None, "NFC") or (normalizer == "NFC" and pre != "qwen2"):
        raise _refuse("normalizer", normalizer, "none")
    tokens, types = _tokens(tokenizer, int(target.config["vocab_size"]))
    bos, eos = (_text_of(settings.get(f"{n}_token")) for n in ("bos", "eos"))
    adds_bos = settings.get("add_bos_token", _adds(tokenizer, bos, first=True))
    adds_eos = settings.get("add_eos_token", _adds(tokenizer, eos, first=False))
    pairs = [
        encode("tokenizer.ggml.model", "string", "gpt2"),
        encode("tokenizer.ggml.pre", "string", pre),
        encode("tokenizer.ggml.tokens", "[string]", tokens),
        encode("tokenizer.ggml.token_type", "[i32]", types),
        encode("tokenizer.ggml.merges", "[string]", _merges(model)),
        *_special(target, settings, tokens),
        encode("tokenizer.ggml.add_bos_token", "bool", bool(adds_bos)),
        encode("tokenizer.ggml.add_eos_token", "bool", bool(adds_eos)),
    ]
    template = _chat_template(folder, settings)
    if template is not None:
        pairs.append(encode("tokenizer.chat_template", "string", template))
    return pairs
