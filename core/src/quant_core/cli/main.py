"""Entry point of ``quant``: parse, run one command, turn errors into exit codes.

0 ok    1 bad input (a QuantError, or problems found)    2 usage    3 internal error
130 interrupted    143 told to end (SIGTERM); both leave nothing half-written
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from quant_core import __version__
from quant_core.answers import no_memory
from quant_core.cli.output import emit, escaped
from quant_core.errors import QuantError

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = (
    "formats", "plugins", "inspect", "explain", "verify", "run", "convert", "diff", "bench",
    "cache",
)  # fmt: skip

OK, BAD_INPUT, INTERNAL, INTERRUPTED, TERMINATED = 0, 1, 3, 130, 143


class _Terminated(BaseException):
    """SIGTERM, raised where the command is, so that its own cleaning up runs."""


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM ends the command like an interruption; signals are for the main thread only."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Loads no plugin."""
    parser = argparse.ArgumentParser(
        prog="quant", description="Inspect, check, run and convert quantized checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"quant-core {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of text")
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    for name in COMMANDS:
        command = import_module(f"quant_core.cli.{name}")
        sub = subparsers.add_parser(
            name, parents=[common], help=command.HELP, description=command.HELP
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code. Usage errors exit with 2."""
    args = build_parser().parse_args(argv)
    try:
        with _told_to_end():
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except QuantError as err:
        if args.traceback:
            traceback.print_exc()
        _fail(args, err.code, str(err), err)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("quant: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print("quant: ended by SIGTERM", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as err:
        if args.traceback:
            traceback.print_exc()
        if isinstance(err, MemoryError) or no_memory(err):
            why = str(err).partition("\n")[0] or type(err).__name__
            told = f"memory does not suffice ({why}). Free some, or use a larger machine."
            _fail(args, "Q-LIMIT-MEMORY", told, err)
            return BAD_INPUT
        kind, owner = type(err).__name__, _owner(err)
        where, bug, there = "", "a bug", ""
        if owner:
            where, bug, there = f" in plugin {owner}", "a bug of the plugin", " there"
        told = f"{kind}: {err}. This is {bug}; run again with --traceback and report it{there}."
        _fail(args, f"internal error{where}", told, err)
        return INTERNAL


_PARTS = ("path", "tensor", "expected", "actual", "plugin")


def _fail(args: argparse.Namespace, code: str, message: str, err: Exception) -> None:
    """The message on stderr; with --json the error with its parts on stdout too."""
    if getattr(args, "json", False):
        parts = {name: value for name in _PARTS if (value := getattr(err, name, None)) is not None}
        shown = {n: v if isinstance(v, int | float) else str(v)[:10_000] for n, v in parts.items()}
        stable = code if code.startswith("Q-") else "internal"
        emit(args, {"error": {"code": stable, "message": message, **shown}}, ())
    print(f"quant: {code}: {escaped(message)}", file=sys.stderr)


def _owner(err: Exception) -> str:
    """The plugin whose code was the last to run before ``err``; "" if none of it was on the way."""
    from quant_core.registry import owner_of

    plugin = owner_of(err)
    return f"{plugin.id!r} ({plugin.dist} {plugin.version})" if plugin else ""


if __name__ == "__main__":
    sys.exit(main())
