"""Which plugin owns a checkpoint. Unknown never means unquantized."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import ConfigError, FormatError, PluginError, printable, summarize
from quant_core.known import install_advice, known_formats, unread_files
from quant_core.registry import Registry
from quant_core.spec import FormatMatch

__all__ = ["FLOAT_DTYPES", "PLAIN_DTYPES", "detect", "quantization_config"]

FLOAT_DTYPES = frozenset({"float32", "float16", "bfloat16", "float64"})
PLAIN_DTYPES = FLOAT_DTYPES | {"bool", "int64"}  # masks, position ids


def quantization_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The checked ``quantization_config`` block of ``config.json``; None if there is none.

    Raises:
        ConfigError: ``Q-CFG-TYPE`` if it is no object, or its ``quant_method`` is no short string.
    """
    file = checkpoint.folder / "config.json"
    config = checkpoint.config
    block = config.get("quantization_config", config.get("compression_config"))
    if block is None and isinstance(config.get("text_config"), Mapping):
        block = config["text_config"].get("quantization_config")
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ConfigError(
            f"{file}: quantization_config is a {type(block).__name__}, expected an object. "
            "Restore the config.json that the quantization tool wrote.",
            code="Q-CFG-TYPE",
            path=file,
            tensor="quantization_config",
            expected="object",
            actual=type(block).__name__,
        )
    for key in ("quant_method", "method"):
        value = block.get(key)
        if key in block and (not isinstance(value, str) or not 0 < len(value) <= 64):
            raise ConfigError(
                f"{file}: quantization_config.{key} is {printable(repr(value), 60)}, expected a "
                "short string naming the format. Restore the value the quantization tool wrote.",
                code="Q-CFG-TYPE",
                path=file,
                tensor=f"quantization_config.{key}",
                expected="string",
                actual=type(value).__name__,
            )
    return block


def _readers(registry: Registry) -> list[str]:
    """Plugins that read a format; kernel families read none."""
    return [plugin_id for plugin_id, _ in registry.implementations("detect_format")]


def _installed(registry: Registry) -> str:
    return summarize(_readers(registry)) or "none"


def _names_beside(checkpoint: Checkpoint) -> list[str]:
    try:
        return os.listdir(checkpoint.folder)
    except OSError:  # weights that are in no folder
        return []


def _unknown(checkpoint: Checkpoint, registry: Registry, found: str, method: str) -> FormatError:
    dist = known_formats().get(method.lower()) if method else None
    if dist and dist not in {p.dist for p in registry.plugins.values()}:
        fix = f"Run `pip install {dist}`."
    else:
        beside = {} if method else unread_files(_names_beside(checkpoint), registry)
        fix = (
            install_advice(beside.values())
            or "Install the plugin that reads it, or check quantization_config."
        )
    return FormatError(
        f"{checkpoint.path}: {found}, expected a format of an installed plugin "
        f"(installed: {_installed(registry)}). {fix}",
        code="Q-FMT-UNKNOWN",
        path=checkpoint.path,
        tensor="quant_method" if method else None,
        expected=_readers(registry),
        actual=method or found,
    )


def _checked(plugin_id: str, answer: FormatMatch) -> FormatMatch:
    if answer.plugin != plugin_id:
        raise PluginError(
            f"plugin {plugin_id!r}: detect_format returned {printable(repr(answer), 80)}, expected "
            f"None or a FormatMatch with plugin={plugin_id!r}. This is a bug of the plugin.",
            code="Q-PLUGIN-RESULT",
            plugin=plugin_id,
            actual=answer.plugin,
        )
    return answer


def detect(
    checkpoint: Checkpoint, registry: Registry, *, format: str | None = None
) -> FormatMatch | None:
    """The match of the plugin that owns ``checkpoint``; None for a plain float checkpoint.

    Args:
        format: a plugin id that the user insists on.

    Raises:
        FormatError: ``Q-FMT-UNKNOWN`` if the checkpoint is quantized and nobody claims it,
            ``Q-FMT-AMBIGUOUS`` if two plugins claim it at one level, ``Q-FMT-OVERRIDE`` if
            ``format`` contradicts what the checkpoint is.
        ConfigError: a malformed ``quantization_config``.
    """
    declared_block = quantization_config(checkpoint)
    matches = [_checked(i, a) for i, a in registry.call_all("detect_format", checkpoint=checkpoint)]
    best = [m for m in matches if m.level == "declared"] or matches
    if len(best) > 1:
        claims = "; ".join(f"{m.plugin!r} ({m.level}: {m.evidence})" for m in best)
        raise FormatError(
            f"{checkpoint.path}: claimed by {len(best)} plugins: {claims}, expected one. "
            "Uninstall one of them or correct quantization_config.",
            code="Q-FMT-AMBIGUOUS",
            path=checkpoint.path,
            actual=[m.plugin for m in best],
        )
    match = best[0] if best else None
    if format is not None and (match is None or match.plugin != format):
        is_what = f"{match.plugin!r} ({match.evidence})" if match else "no known format"
        raise FormatError(
            f"{checkpoint.path}: asked to read as {format!r}, but the checkpoint is {is_what}; "
            f"expected evidence for {format!r}. Drop the override.",
            code="Q-FMT-OVERRIDE",
            path=checkpoint.path,
            expected=format,
            actual=match.plugin if match else None,
        )
    if declared_block is not None and (match is None or match.level != "declared"):
        method = declared_block.get("quant_method", declared_block.get("method"))
        if method is None and match is None:
            raise ConfigError(
                f"{checkpoint.folder / 'config.json'}: quantization_config has no quant_method, "
                f"expected a string naming the format (installed: {_installed(registry)}). "
                "Restore the config.json that the quantization tool wrote.",
                code="Q-CFG-TYPE",
                path=checkpoint.folder / "config.json",
                tensor="quantization_config.quant_method",
                expected="string",
            )
        if method is not None:
            raise _unknown(
                checkpoint, registry, f"quant_method {printable(repr(method), 70)}", str(method)
            )
    if match is None:
        odd = [t for t in checkpoint.tensors.values() if t.dtype not in PLAIN_DTYPES]
        if odd:
            found = (
                f"{len(odd)} tensors are not plain floats (first: {printable(odd[0].name)!r}, "
                f"{odd[0].dtype}) and nothing says how to read them"
            )
            raise _unknown(checkpoint, registry, found, "")
    return match
