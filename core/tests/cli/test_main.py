"""Exit codes, and that the command line stays light."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from quant_core import __version__
from quant_core.cli import main as cli
from quant_core.errors import ConfigError


def answers(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    """Let every command end in ``result``: an exit code, or an exception to raise."""

    def run(args: argparse.Namespace) -> int:
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, int)
        return result

    parser = argparse.ArgumentParser()
    parser.add_argument("--traceback", action="store_true")
    parser.set_defaults(run=run)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (0, 0),
        (1, 1),
        (ConfigError("config.json: bits is 5", code="Q-CFG-VALUE"), 1),
        (ZeroDivisionError("oops"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_main_result_becomes_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    result: object,
    code: int,
) -> None:
    answers(monkeypatch, result)
    assert cli.main([]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_main_traceback_flag_shows_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, ConfigError("config.json: bits is 5", code="Q-CFG-VALUE"))
    assert cli.main(["--traceback"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "quant: Q-CFG-VALUE: config.json: bits is 5" in err


@pytest.mark.parametrize(
    "argv",
    [[], ["no-such-command"], ["inspect"], ["inspect", "x", "--tp", "0"], ["run", "x"]],
)
def test_main_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_main_version_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"quant-core {__version__}"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


PROBE = """
import sys
from quant_core.cli.main import main
try:
    main({argv!r})
except SystemExit:
    pass
print("\\n".join(m for m in sys.modules if m.split(".")[0].startswith({names!r})), file=sys.stderr)
"""


def test_help_loads_no_plugin_and_no_registry() -> None:
    names = ("torch", "triton", "quant_plugin_", "transformers")
    probe = PROBE.format(argv=["--help"], names=names)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "COMMAND" in done.stdout
    assert done.stderr.split() == []
