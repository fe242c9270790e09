"""``quant convert``: write a checkpoint in another format, exactly or with measured losses."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quant_core.cli.output import Progress, emit, escaped, table

if TYPE_CHECKING:
    from quant_core.convert import Result
    from quant_core.convert.survey import LayerReport

__all__ = ["HELP", "add_arguments", "run"]

HELP = "write a checkpoint in another format"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC, DST, --to, --allow-inexact, --float-unfit, --option and --max-shard-size."""
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or file")
    parser.add_argument("destination", metavar="DST", help="new folder (or file) to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="id of the target format")
    parser.add_argument(
        "--allow-inexact", action="store_true", help="take losses; each is named and measured"
    )
    parser.add_argument(
        "--float-unfit", action="store_true", help="write modules that do not fit as floats"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="option of the target format; may be repeated",
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="default: 5GB"
    )


def _option(text: str) -> tuple[str, int | str | bool]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"{text!r}, expected KEY=VALUE")
    if value in ("true", "false"):
        return key, value == "true"
    return key, int(value) if value.lstrip("-").isdigit() else value


def _size(text: str) -> int:
    number = text.upper().rstrip("KMGB")
    unit = text.upper()[len(number) :]
    if not number.isdigit() or unit not in _UNITS or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a size such as 5GB or 500MB")
    return int(number) * _UNITS[unit]


def _kinds(layers: list[LayerReport]) -> Iterator[tuple[str, str, int, str, str]]:
    """Rows: modules that went the same way, with their largest loss."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[LayerReport]] = defaultdict(list)
    for layer in layers:
        groups[layer.before, layer.after, layer.losses].append(layer)
    for (before, after, losses), same in groups.items():
        error = max(layer.error for layer in same)
        what = f"{'; '.join(losses)}" if losses else "exact"
        yield before, after, len(same), f"{error:.2e}" if losses else "0", what


def _render(result: Result) -> Iterator[str]:
    header = ("from", "to", "modules", "largest error", "loss")
    yield from table(header, _kinds(result.layers))
    for warning in result.warnings:
        yield f"warning: {escaped(warning)}"
    for key, value in result.options.items():
        yield f"option {escaped(key)}={escaped(value)}"
    word = "exact" if result.exact else "inexact"
    yield f"{escaped(result.path)}: {result.format}, {len(result.layers)} modules, {word}"


def run(args: argparse.Namespace) -> int:
    """Convert; errors and refusals are exit code 1."""
    from quant_core.convert import convert

    progress = Progress(0)

    def step(phase: str, name: str, total: int) -> None:
        progress.total = total
        progress.done %= total  # the survey, perhaps again, then the writing
        progress.step(f"{phase} {name}")

    try:
        result = convert(
            args.source,
            args.destination,
            to=args.to,
            allow_inexact=args.allow_inexact,
            unfit_as_float=args.float_unfit,
            options=dict(args.option),
            max_shard_bytes=args.max_shard_size,
            on_step=step,
        )
    finally:
        progress.finish()
    emit(args, result.plain(), _render(result))
    return 0
