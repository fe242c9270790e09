"""A checkpoint's tokenizer, by transformers, and what it makes of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quant_core.errors import ConfigError, PluginError, printable

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint

__all__ = ["encode", "load_tokenizer"]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that belongs to a checkpoint.

    Raises:
        PluginError: ``Q-ENGINE-MISSING`` if transformers is not installed.
        ConfigError: ``Q-ENGINE-TOKENIZER`` if the checkpoint holds none that it can build.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as err:
        raise PluginError(
            f"{checkpoint.path}: running a model needs transformers, which cannot be imported "
            f"({err}). Run `pip install quant-core[transformers]`.",
            code="Q-ENGINE-MISSING",
            path=checkpoint.path,
            expected="transformers",
        ) from err
    try:
        return AutoTokenizer.from_pretrained(**checkpoint.pretrained_args())
    except Exception as err:  # tokenizers raises plain Exception
        raise ConfigError(
            f"{checkpoint.path}: transformers cannot make a tokenizer from this checkpoint: "
            f"{printable(err, 300)}; expected tokenizer files beside the weights. "
            "Copy those of the original model into the folder.",
            code="Q-ENGINE-TOKENIZER",
            path=checkpoint.path,
            expected="a tokenizer",
            actual=type(err).__name__,
        ) from err


def encode(tokenizer: Any, text: str, what: str) -> Any:
    """The tokenizer's tensors for ``text``, one sequence of one token or more.

    Args:
        what: where the text is from, for the message.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for a text without tokens.
    """
    inputs = tokenizer(text, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ConfigError(
            f"{what}: {printable(text)!r} has no tokens, expected one or more. Give some text.",
            code="Q-CFG-VALUE",
            tensor=what,
            actual=text,
        )
    return inputs
