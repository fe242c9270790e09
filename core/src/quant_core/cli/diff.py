"""``quant diff``: how far two checkpoints of one model are apart, module by module."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.cli.output import Progress, emit, escaped, in_range, table
from quant_core.errors import ConfigError

if TYPE_CHECKING:
    from quant_core.convert.compare import Diff, Logits

__all__ = ["HELP", "add_arguments", "run"]

HELP = "compare the weights of two checkpoints of one model"
_TEXT = "The quick brown fox jumps over the lazy dog. Water boils at 100 degrees Celsius."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B, --top, --logits and --text."""
    parser.add_argument("a", metavar="A", help="checkpoint folder or file")
    parser.add_argument("b", metavar="B", help="checkpoint folder or file")
    rows = in_range(0, 1_000_000, "rows")
    parser.add_argument("--top", type=rows, default=20, metavar="N", help="rows shown; default 20")
    parser.add_argument(
        "--logits", action="store_true", help="also run both models and compare distributions"
    )
    parser.add_argument("--text", metavar="TEXT", help="for --logits; @FILE reads")


def _text(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"{text[1:]}: cannot be read as text: {err}, expected a UTF-8 file. "
            "Correct the argument of --text.",
            code="Q-CFG-VALUE",
            path=text[1:],
        ) from err


def _render(found: Diff, logits: Logits | None, top: int) -> Iterator[str]:
    header = ("module", "A", "B", "relative error", "largest", "bits A", "bits B")
    rows = [
        (d.name, d.a, d.b, f"{d.error:.2e}", f"{d.largest:.2e}", d.bits_a, d.bits_b)
        for d in found.layers[:top]
    ]
    yield from table(header, rows)
    if len(found.layers) > top:
        yield f"  and {len(found.layers) - top} more, none further apart"
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names:
            yield f"only in {side}: {escaped(name)}"
    for name in found.caches:
        yield f"keys and values quantized otherwise: {escaped(name)}"
    if logits is not None:
        yield (
            f"logits: KL(A || B) mean {logits.kl:.3e}, largest {logits.largest_kl:.3e} nats; "
            f"same next token at {logits.top1:.1%} of {logits.positions} positions"
        )
    unequal = sum(d.error > 0 for d in found.layers)
    yield f"{unequal} of {len(found.layers)} weights differ"


def run(args: argparse.Namespace) -> int:
    """Compare; 0 whether they differ or not."""
    from quant_core.convert.compare import diff, diff_logits

    progress = Progress(0)

    def step(name: str, total: int) -> None:
        progress.total = total
        progress.step(name)

    if args.text is not None and not args.logits:
        raise ConfigError(
            "diff: --text is given without --logits, expected both or neither. The text is what "
            "the models are run on: add --logits.",
            code="Q-CFG-CONFLICT",
            tensor="--text",
        )
    text = _text(_TEXT if args.text is None else args.text)
    try:
        found = diff(args.a, args.b, on_step=step)
    finally:
        progress.finish()
    logits = diff_logits(args.a, args.b, text) if args.logits else None
    data = found.plain() | {"logits": None if logits is None else asdict(logits)}
    emit(args, data, _render(found, logits, args.top))
    return 0
