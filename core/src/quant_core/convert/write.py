"""The second pass: write a ``Target`` into a fresh folder and put it in place as a whole.

    .NAME.<pid>.tmp/   everything is written here, read back by its own plugin, then renamed

Whatever stops the run, an error, a signal or a full disk, ``NAME`` does not exist or is what it
was; the temporary folder is removed, that of a process killed outright by the next run
(``convert.workplace``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.checkpoint.files import io_error
from quant_core.checkpoint.open import open_checkpoint
from quant_core.checkpoint.write import write_safetensors
from quant_core.convert.side_files import copy_side_files, write_json
from quant_core.convert.stacks import Stack
from quant_core.convert.target import Target
from quant_core.convert.workplace import workplace
from quant_core.describe import Extras
from quant_core.errors import CheckpointError, LayoutError, PluginError, printable, summarize
from quant_core.kv_cache import CacheScheme
from quant_core.plan import Member, param_sources
from quant_core.plan import plan as make_plan
from quant_core.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_destination", "write_target"]


def _single_file(target: Target, path: Path) -> bool:
    """Whether ``path`` names one file of the target's own container."""
    suffixes = target.source.registry.plugins[target.format].info.containers
    return bool(suffixes) and path.name.endswith(suffixes)


def check_destination(path: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        CheckpointError: ``Q-CKPT-EXISTS``, or ``Q-CKPT-IO``.
    """
    try:
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as err:
        raise io_error(path, err, "cannot be written") from err
    if taken:
        raise CheckpointError(
            f"{printable(path)}: exists already, expected a new name or an empty folder. "
            "Choose another destination or remove this one.",
            code="Q-CKPT-EXISTS",
            path=path,
        )


def _tensors(target: Target, step: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
    """All tensors under the names they are stored by, one matrix at a time.

    A tensor that holds several matrices is collected until it is whole.
    """
    stacks: dict[str, Stack] = {}
    for name, member in target.plan.quantized.items():
        for expert in member.layer.experts or (None,):
            stored = target.matrix(name, expert)
            for param in member.params:
                if param.name not in stored:
                    continue
                sources = param_sources(member.layer, param, expert)
                if len(sources) != 1:
                    raise _apart(target, f"{name}.{param.name}", f"{len(sources)} tensors")
                ((tensor, index),) = sources
                if not index:
                    yield tensor, stored[param.name]
                    continue
                stack = stacks.setdefault(tensor, Stack(target.plan.checkpoint.tensors[tensor]))
                if stack.put(index, stored[param.name]):
                    yield tensor, stacks.pop(tensor).whole
        step(name)
    for tensor, stack in stacks.items():
        raise _apart(target, tensor, f"parts, {stack.missing} values of which nothing holds")
    for name in target.plan.attention:
        yield from target.cache(name).items()
    for name in target.plan.dense:
        yield name, target.parameter(name)


def _apart(target: Target, tensor: str, what: str) -> LayoutError:
    return LayoutError(
        f"{tensor}: would be stored as {what}, expected one whole tensor. Choose another target.",
        code="Q-LAYOUT-REPRESENT",
        tensor=tensor,
        plugin=target.format,
    )


def _write_safetensors(
    target: Target, folder: Path, max_shard_bytes: int, step: Callable[[str], None]
) -> list[str]:
    registry = target.source.registry
    block = registry.call_one(target.format, "make_config", plan=target.plan)
    extras = registry.call_one(target.format, "make_extras", plan=target.plan)
    if (block is None and extras is None) or not isinstance(extras, Extras | None):
        raise PluginError(
            f"plugin {target.format!r}: describes nothing (make_config and make_extras returned "
            f"{type(block).__name__}, {type(extras).__name__}), expected a block or Extras beside "
            "fit_scheme. Choose another target format.",
            code="Q-PLUGIN-RESULT",
            plugin=target.format,
        )
    warnings = copy_side_files(target.source, folder)
    config = dict(target.config)
    if block is not None:
        config["quantization_config"] = dict(block)
    extras = extras or Extras()
    for file, content in {"config.json": config, **extras.files}.items():
        write_json(folder / file, content)
    write_safetensors(
        folder,
        _tensors(target, step),
        max_shard_bytes=max_shard_bytes,
        metadata={"format": "pt", **extras.metadata},
        stem="model",
    )
    return warnings


def _check_result(target: Target, path: Path) -> list[str]:
    """Plan what was written by its own plugin: names, shapes, config and schemes agree."""
    with open_checkpoint(path) as checkpoint:
        result = make_plan(checkpoint, format=target.format, registry=target.source.registry)
        want, have = target.plan.quantized, result.quantized
        odd = sorted(want.keys() ^ have.keys())
        odd += [n for n in want.keys() & have.keys() if _label(want[n]) != _label(have[n])]
        kept, found = target.plan.attention, result.attention
        odd += sorted(kept.keys() ^ found.keys())
        odd += [n for n in kept.keys() & found.keys() if _cache(kept[n]) != _cache(found[n])]
        if odd:
            raise PluginError(
                f"plugin {target.format!r}: what it wrote reads back differently in {len(odd)} "
                f"modules: {summarize(odd)}; expected the same schemes. "
                "This is a bug of the plugin; nothing was written.",
                code="Q-PLUGIN-RESULT",
                plugin=target.format,
                tensor=odd[0],
            )
        return list(result.warnings)


def _label(member: object) -> object:
    scheme = getattr(member, "scheme", None)
    return scheme.shape if isinstance(scheme, Scheme) else None


def _cache(member: Member) -> object:
    scheme = member.scheme
    assert isinstance(scheme, CacheScheme)
    return scheme.operands, scheme.site, scheme.default


def write_target(
    target: Target, path: Path, *, max_shard_bytes: int, step: Callable[[str], None]
) -> list[str]:
    """Write everything, check it, and rename it to ``path``.

    Args:
        path: a folder that is absent or empty; for containers of one file also the file.

    Returns:
        Warnings.

    Raises:
        CheckpointError: ``Q-CKPT-EXISTS``, ``Q-CKPT-IO``.
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the config or the container cannot hold the whole.
    """
    check_destination(path)
    registry = target.source.registry
    with workplace(path) as folder:
        if registry.implements(target.format, "write_checkpoint"):
            files = registry.call_one(
                target.format, "write_checkpoint", target=target, folder=folder
            )
            if not files:
                raise PluginError(
                    f"plugin {target.format!r}: hook write_checkpoint named no file, expected the "
                    "paths of the files written. This is a bug of the plugin; report it there.",
                    code="Q-PLUGIN-RESULT",
                    plugin=target.format,
                )
            if _single_file(target, path):
                warnings = _check_result(target, Path(files[0]))
                _place(Path(files[0]), path)
                return warnings
            warnings = copy_side_files(target.source, folder, tokenizer=False)
            if target.config:
                write_json(folder / "config.json", target.config)
        else:
            warnings = _write_safetensors(target, folder, max_shard_bytes, step)
        warnings += _check_result(target, folder)
        _place(folder, path)
    return warnings


def _place(found: Path, path: Path) -> None:
    try:
        os.replace(found, path)
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:
        raise io_error(path, err, "cannot be written") from err
