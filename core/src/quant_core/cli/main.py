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
from quant_core.cli.output import escaped
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
        print(f"quant: {err.code}: {escaped(err)}", file=sys.stderr)
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
        kind, owner = type(err).__name__, _owner(err)
        where, bug, there = "", "a bug", ""
        if owner:
            where, bug, there = f" in plugin {owner}", "a bug of the plugin", " there"
        print(
            f"quant: internal error{where}: {kind}: {escaped(err)}. This is {bug}; "
            f"run again with --traceback and report it{there}.",
            file=sys.stderr,
        )
        return INTERNAL


def _owner(err: Exception) -> str:
    """The plugin whose code was the last to run before ``err``; "" if none of it was on the way."""
    from quant_core.registry import owner_of

    plugin = owner_of(err)
    return f"{plugin.id!r} ({plugin.dist} {plugin.version})" if plugin else ""


if __name__ == "__main__":
    sys.exit(main())
