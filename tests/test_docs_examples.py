"""The examples of README and docs run as they are printed, on checkpoints shipped here.

Commands: blocks with "$ quant ..." whose paths are in tests/fixtures; what they print is compared
line by line. Python: the blocks of a page one after another in one namespace; "path..." stands for
a quantized checkpoint, "path/to/float/model" for a float one, "cuda:0" for the CPU.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from checkpoint_sets import FIXTURES, REPO
from quant_core.cli.main import main
from quant_core.engines.transformers import uninstall

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def _commands() -> list[tuple[str, str, list[str]]]:
    """(page, command, lines printed) of every example on shipped files."""
    out = []
    for page in PAGES:
        for _, body in _BLOCK.findall(page.read_text("utf-8")):
            for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
                command, *printed = part.rstrip("\n").split("\n")
                if command.startswith("quant ") and "tests/fixtures/" in command:
                    shown = [line for line in printed if line]
                    out.append((page.name, command, shown))
    return out


COMMANDS = _commands()


@pytest.mark.parametrize(("page", "command", "printed"), COMMANDS, ids=[c for _, c, _ in COMMANDS])
def test_command_prints_what_the_page_shows(page, command, printed, tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    got = capsys.readouterr().out.replace(f"{tmp_path}/", "").replace(f"{FIXTURES}/", "")
    lines = [line for line in got.splitlines() if line and not line.startswith("warning: ")]
    assert lines[: len(printed)] == printed  # a page may leave out the end


def test_commands_with_output_are_found():
    assert len(COMMANDS) >= 2
    assert all(printed for _, _, printed in COMMANDS)


def _python(page: Path) -> list[str]:
    return [body for kind, body in _BLOCK.findall(page.read_text("utf-8")) if kind == "python"]


RUN = [REPO / "README.md", REPO / "docs/convert.md", REPO / "docs/engines/transformers.md"]


@pytest.fixture
def float_model(tmp_path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_python_of_a_page_runs(page, tmp_path, float_model, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = _python(page)
    assert blocks
    try:
        for body in blocks:
            code = body.replace('"path/to/float/model"', repr(str(float_model)))
            code = re.sub(r'"path[\w/]*"', repr(str(FIXTURES / "gptqmodel-awq-gemm-g128")), code)
            exec(compile(code.replace("cuda:0", "cpu"), page.name, "exec"), names)
    finally:
        uninstall()
    if "model" in names:
        assert names["model"](torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_somewhere(page):
    targets = [t for t in _LINK.findall(page.read_text("utf-8")) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []
