"""Conversion between formats through the canonical form, and comparison of checkpoints.

    source plan -> survey (fit, serialize, read back, compare) -> target -> write -> read back

A conversion is exact, or it is refused with everything that cannot be held; losses are taken only
when asked for, and then each is named and measured. No format is named here: a plugin becomes a
target by its hooks ``fit_scheme`` and ``make_config`` or ``write_checkpoint``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.errors import CheckpointError, FormatError, printable, summarize

if TYPE_CHECKING:
    from quant_core.convert.compare import diff
    from quant_core.convert.survey import LayerReport
    from quant_core.plan import Plan
    from quant_core.registry import Registry

_CONTAINER = "write_checkpoint"  # the hook of formats whose container keeps its own metadata

__all__ = ["Result", "convert", "diff", "targets"]


@dataclass(slots=True, kw_only=True)
class Result:
    """What a conversion did.

    Attributes:
        exact: all weights are equal bit by bit, and nothing else was lost.
        layers: one report for each quantized module of the source.
    """

    source: Path
    path: Path
    format: str
    options: Mapping[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not any(layer.losses for layer in self.layers)

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "source": str(self.source),
            "path": str(self.path),
            "format": self.format,
            "options": dict(self.options),
            "exact": self.exact,
            "layers": [asdict(layer) for layer in self.layers],
            "warnings": list(self.warnings),
        }


def targets(registry: Registry) -> list[str]:
    """Ids of the formats that can be written."""
    return [i for i in registry.plugins if registry.implements(i, "fit_scheme")]


def _quantized(source: Plan) -> bool:
    return source.match is not None and bool(source.quantized or source.attention)


def _target_error(source: Plan, to: str, known: list[str]) -> FormatError:
    problem, fix = f"cannot be written as {printable(to)!r}", "Install the plugin of the format."
    if not _quantized(source):
        problem = "is not quantized and has nothing to convert"
        fix = "Quantize the model first (`online=` of load_model)."
    elif to in source.registry.plugins:
        problem += ", whose plugin has no hook fit_scheme"
        fix = "Choose another target."
    elif near := get_close_matches(to.lower().replace("-", "_"), known, n=1):
        fix = f"Its name is {near[0]!r}, or install the plugin of the format."
    return FormatError(
        f"{printable(source.checkpoint.path)}: {problem}, expected a quantized checkpoint and "
        f"one of {summarize(known) or 'no format (none installed)'}. {fix}",
        code="Q-FMT-TARGET",
        path=source.checkpoint.path,
        expected=known,
        actual=to,
    )


def _model_notes(source: Plan) -> list[str]:
    """Warnings about the source and its model.

    Raises:
        CheckpointError, LayoutError: the model has parameters that are not stored, are stored
            twice, or have other sizes. What is stored beyond it is carried along.
    """
    from quant_core.engines.transformers_skeleton import compare

    try:
        _, why = compare(source)
    except CheckpointError as err:
        if err.code != "Q-TENSOR-UNEXPECTED":
            raise
        return [f"in the source: {err}"]
    return [f"the source was not compared with its model: {why}"] if why else []


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str,
    allow_inexact: bool = False,
    unfit_as_float: bool = False,
    options: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    on_step: Callable[[str, str, int], None] | None = None,
) -> Result:
    """Write the checkpoint ``src`` in the format ``to`` at ``dst``.

    Every matrix is read twice, one at a time; memory is one matrix and one shard. ``dst`` appears
    as a whole or not at all.

    Args:
        src: folder or file of a quantized checkpoint.
        dst: a new folder; for containers of one file also the name of that file.
        to: id of the target's plugin, see ``quant formats``.
        allow_inexact: take losses instead of refusing them; each is named and measured.
        unfit_as_float: write modules that ``to`` cannot hold as floats, of the narrowest type
            that holds every weight exactly, instead of refusing them.
        options: for the target's plugin; its page in docs/formats lists them.
        max_shard_bytes: a shard is closed before it would grow beyond.
        on_step: called with ("survey" or "write", module name, modules in all) for each module.

    Raises:
        FormatError: ``Q-FMT-TARGET`` if ``to`` cannot be written, or ``src`` is not quantized.
        LayoutError: ``Q-LAYOUT-REPRESENT`` with all modules that the target cannot hold.
        ConfigError: ``Q-CFG-VALUE`` for an option with a wrong value, ``Q-CFG-MISSING``.
        CheckpointError: ``Q-CKPT-EXISTS``, ``Q-CKPT-IO``; whatever is wrong with ``src``, among
            it ``Q-TENSOR-MISSING`` if the model of its config has parameters that are not stored.
            Without a config, or where transformers has no such model, a warning says that this
            was not looked at.
    """
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.convert.cache import cache_warnings
    from quant_core.convert.side_files import model_config
    from quant_core.convert.survey import survey
    from quant_core.convert.write import check_destination, write_target
    from quant_core.plan import plan

    report = on_step or (lambda phase, name, total: None)
    path = Path(os.path.abspath(dst))
    if path.is_symlink():  # a rename would replace the link, or fail in the end
        path = path.resolve()
    with open_checkpoint(src) as checkpoint:
        source = plan(checkpoint)
        known = targets(source.registry)
        if to not in known or not _quantized(source):
            raise _target_error(source, to, known)
        check_destination(path)
        notes = _model_notes(source)
        total = len(source.quantized)
        found = survey(
            source,
            to,
            config=model_config(source, needed=not source.registry.implements(to, _CONTAINER)),
            options=dict(options or {}),
            allow_inexact=allow_inexact,
            unfit_as_float=unfit_as_float,
            step=lambda name: report("survey", name, total),
        )
        warnings = write_target(
            found.target,
            path,
            max_shard_bytes=max_shard_bytes,
            step=lambda name: report("write", name, total),
        )
        warnings += [f"in the source: {w}" for w in source.warnings]
        warnings += notes
        warnings += found.hints
        warnings += cache_warnings(source, found.target.plan.attention, to)
        return Result(
            source=checkpoint.path,
            path=path,
            format=to,
            options=found.target.options,
            layers=found.layers,
            warnings=warnings,
        )


def __getattr__(name: str) -> Any:
    if name == "diff":
        from quant_core.convert.compare import diff

        return diff
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
