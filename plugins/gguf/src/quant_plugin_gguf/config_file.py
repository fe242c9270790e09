"""A small GGUF file for whoever makes a model's config of one.

transformers reads a config from a GGUF file through the gguf package, which takes a Python step for
every token, merge and score of the vocabulary: seconds, where the file's other metadata take
milliseconds. The config needs no more of the vocabulary than its size, and no more of the tensors
than their names (is there an output layer, are there biases).

    every pair but the arrays of the tokenizer | where no key states the size of the vocabulary,
                                                 tokens: one string as long as that
    the names of tensors outside layers and of the first layer, one float each

Source: transformers 5.23 ``modeling_gguf_pytorch_utils.py`` (load_gguf_checkpoint): an array of one
value is taken for the value, and the vocabulary size is ``len(tokens)`` where no key states it.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from quant_plugin_gguf.cursor import LazyArray
from quant_plugin_gguf.kv import copied_pairs, encode, string

if TYPE_CHECKING:
    from quant_plugin_gguf.checkpoint import GgufCheckpoint

__all__ = ["write_config_file"]

_TOKENS = "tokenizer.ggml.tokens"
_LATER_LAYER = re.compile(r"(.*\.)?blk\.[1-9]")
_VERSION, _ALIGNMENT, _FLOAT32 = 3, 32, 0


def write_config_file(checkpoint: GgufCheckpoint, path: Path) -> None:
    """Write to ``path`` what a config is made of."""
    arrays = {
        key
        for key, value in checkpoint.metadata.items()
        if key.startswith("tokenizer.") and isinstance(value, LazyArray | list | tuple)
    }
    dropped = {*arrays, "general.alignment"}
    kept = {key: span for key, span in checkpoint.spans.items() if key not in dropped}
    pairs = [pair for _, pair in copied_pairs(checkpoint.file, kept)]
    stated = f"{checkpoint.metadata.get('general.architecture')}.vocab_size"
    if _TOKENS in arrays and stated not in kept:
        size = len(checkpoint.metadata[_TOKENS])
        pairs.append(encode(_TOKENS, "[string]", ["x" * size])[1])
    names = [name for name in checkpoint.tensors if not _LATER_LAYER.match(name)]
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, len(names), len(pairs)) + b"".join(pairs)
    for i, name in enumerate(names):
        head += string(name) + struct.pack("<IQIQ", 1, 1, _FLOAT32, i * _ALIGNMENT)
    body = bytes(len(names) * _ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % _ALIGNMENT) + body)
