"""Config, tokenizer and the other files beside the weights of a converted model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint.base import no_config
from quant_core.errors import printable

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint
    from quant_core.plan import Plan

__all__ = ["copy_side_files", "model_config", "write_json"]

_BLOCKS = ("quantization_config", "compression_config")
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pkl|h5|msgpack|onnx)(\.index\.json)?$|\.tmp$|\.lock$"
)
_MAX_BYTES = 64 << 20  # larger files beside the weights are not configuration
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def model_config(source: Plan, *, needed: bool = True) -> dict[str, Any]:
    """The model's config without any quantization block.

    Without a config.json, transformers makes one from the container's own metadata; if it is not
    ``needed``, the answer is empty then.

    Raises:
        ConfigError: ``Q-CFG-MISSING`` if neither gives a config.
    """
    checkpoint = source.checkpoint
    config = _plain(checkpoint.config)
    if needed and not config:
        config = _converted_config(checkpoint)
    for block in (config, config.get("text_config")):
        if isinstance(block, dict):
            for key in _BLOCKS:
                block.pop(key, None)
    return dict(config)


def _converted_config(checkpoint: Checkpoint) -> dict[str, Any]:
    if len(checkpoint.pretrained_args()) < 2:
        raise no_config(checkpoint, "there is no config.json")
    try:
        from transformers import AutoConfig

        with checkpoint.config_args() as args:
            settings = {**args, **checkpoint.config_overrides()}
            config: dict[str, Any] = AutoConfig.from_pretrained(**settings).to_dict()
    except MemoryError:
        raise
    except Exception as err:  # transformers raises a dozen types here
        raise no_config(checkpoint, f"transformers cannot make one ({printable(err)})") from err
    return json.loads(json.dumps(config, default=str))  # type: ignore[no-any-return]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as the field's tools do: two spaces, a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def copy_side_files(source: Plan, folder: Path, *, tokenizer: bool = True) -> list[str]:
    """Copy tokenizer, generation config, templates, code and licences into ``folder``.

    Weights, config.json and the config files of format plugins are left out. If a ``tokenizer``
    is wanted and there are no files of one, transformers converts that of the container's own
    metadata.

    Returns:
        Warnings, one sentence each.
    """
    checkpoint = source.checkpoint
    skipped = {"config.json"}
    suffixes: tuple[str, ...] = ()
    for plugin in source.registry.plugins.values():
        skipped |= set(plugin.info.side_files)
        suffixes += plugin.info.containers
    names = []
    for file in sorted(checkpoint.folder.iterdir()):
        name = file.name
        weights = _WEIGHTS.search(name) or name.endswith(suffixes)
        code = name.endswith(".py") and "auto_map" not in checkpoint.config
        if name[0] == "." or name in skipped or weights or code or not file.is_file():
            continue
        if file.stat().st_size <= _MAX_BYTES and not (folder / name).exists():
            shutil.copyfile(file, folder / name)
            names.append(name)
    if not tokenizer or any(n in names for n in _TOKENIZER):
        return []
    return _convert_tokenizer(checkpoint, folder)


def _convert_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    args = dict(checkpoint.pretrained_args())
    if len(args) < 2:
        return [f"{printable(checkpoint.folder)}: holds no tokenizer, none was written"]
    try:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(**args).save_pretrained(folder)
    except Exception as err:  # the tokenizer library raises bare Exceptions
        return [
            f"{printable(checkpoint.path)}: transformers cannot convert the tokenizer "
            f"({printable(err)}); put the model's tokenizer files beside the result"
        ]
    return []
