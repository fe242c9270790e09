"""The plugins printed in docs/plugins.md: written to disk, installed, used in a fresh process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoint_sets import REPO

PAGE = (REPO / "docs" / "plugins.md").read_text("utf-8")
_FILE = re.compile(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", re.M | re.S)

RUN = """
import sys, torch, quant_core
path, out = sys.argv[1:]
model = quant_core.load_model(path, dtype="float32", kernels=["rows8_mm"])
name = "model.layers.0.mlp.down_proj"
assert model.get_submodule(name).kernel.name == "rows8_mm", model.get_submodule(name).kernel.name
reference = quant_core.load_model(path, dtype="float32", kernels=["torch_ref"])
ids = torch.arange(8)[None]
print(float((model(ids).logits - reference(ids).logits).abs().max()))
torch.save(model(ids).logits, f"{out}.logits")
model.save_pretrained(out)
"""


def write(folder: Path) -> None:
    """The page's files as an installed site: sources, and the metadata that pip would write."""
    found = _FILE.findall(PAGE)
    assert len(found) == 7
    for name, body in found:
        if Path(name).name.startswith("test_"):
            (folder / "tests").mkdir()
            (folder / "tests" / Path(name).name).write_text(body)
            continue
        if not name.endswith("pyproject.toml"):
            file = folder / name.split("/src/")[1]
            file.parent.mkdir(exist_ok=True)
            file.write_text(body)
            continue
        project = tomllib.loads(body)["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        (points,) = project["entry-points"]["quant_core"].items()
        (info / "entry_points.txt").write_text(f"[quant_core]\n{points[0]} = {points[1]}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """(a tiny model in the format, what its dequantized weights compute)."""
    folder = tmp_path_factory.mktemp("rows8")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    tensors = {}
    for name, p in model.state_dict().items():
        module = name.removesuffix(".weight")
        if "_proj" not in name:
            tensors[name] = p
            continue
        scale = (p.abs().amax(1) / 127).half()
        codes = (p / scale.float()[:, None]).round().clamp(-128, 127)
        p.copy_(codes * scale.float()[:, None])
        tensors |= {f"{module}.q": codes.to(torch.int8), f"{module}.s": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    block = {"quantization_config": {"quant_method": "rows8"}}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | block))
    with torch.no_grad():
        return folder, model(torch.arange(8)[None]).logits


def python(site: Path, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("QUANT_")}
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, check=False,
        env=env | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stderr
    return done


def quant(site: Path, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    main = "import sys; from quant_core.cli.main import main; sys.exit(main())"
    return python(site, "-c", main, *args, check=check)


def test_plugins_are_found_and_listed(site):
    listed = json.loads(quant(site, "plugins", "--json").stdout)
    ids = {p["id"]: p["dist"] for p in listed["plugins"]}
    assert ids["rows8"] == "quant-plugin-rows8"
    assert ids["kernels_rows8"] == "quant-kernels-rows8"
    assert listed["set_aside"] == []
    formats = json.loads(quant(site, "formats", "--json").stdout)["formats"]
    assert "rows8" in {f["id"] for f in formats}


def test_explain_shows_the_kernel_and_where_it_is_from(site, checkpoint):
    quant(site, "verify", checkpoint[0])
    text = quant(site, "explain", checkpoint[0], "model.layers.0.mlp.down_proj").stdout
    assert "rows8: quant_method is rows8" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("rows8_mm")]
    assert "accepted: cost by rows <=64" in line
    assert "layout rows" in line
    assert "[kernels_rows8]" in line


def test_model_computes_what_the_dequantized_one_does_and_is_saved_back(site, checkpoint, tmp_path):
    source, expected = checkpoint
    off = float(python(site, "-c", RUN, source, tmp_path / "out").stdout)
    assert off < 1e-5  # float32 sums in another order
    logits = torch.load(tmp_path / "out.logits")
    assert (logits - expected).abs().max() < 1e-5
    saved = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[n], original[n]) for n in original)


def test_tests_of_the_page_pass_and_fail_where_they_should(site, tmp_path):
    run = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path)
    passed = python(site, *run, site / "tests").stdout
    assert "2 passed" in passed
    broken = shutil.copytree(site, tmp_path / "site")
    file = broken / "quant_plugin_rows8" / "scheme.py"
    stored = 'tensors["s"].view(-1, 1)'
    file.write_text(file.read_text().replace(stored, f"{stored} * 2"))
    failed = python(broken, *run, broken / "tests", check=False).stdout
    assert "a weight is" in failed
    assert "1 failed, 1 passed" in failed


def test_a_lost_scale_and_an_unknown_key_are_errors(site, checkpoint, tmp_path):
    tensors = load_file(checkpoint[0] / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.s"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    lost = quant(site, "verify", tmp_path, check=False)
    assert lost.returncode == 1
    assert "model.layers.0.mlp.down_proj.s" in lost.stderr
    config["quantization_config"]["bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    odd = quant(site, "verify", tmp_path, check=False)
    assert odd.returncode == 1
    assert "quantization_config: found bits" in odd.stderr


def test_a_kernel_that_breaks_is_named_with_its_package(site, checkpoint, tmp_path):
    broken = shutil.copytree(site, tmp_path / "site")
    file = broken / "quant_kernels_rows8" / "kernel.py"
    file.write_text(file.read_text().replace("codes, scales = buffers", "buffers['codes']"))
    done = quant(
        broken, "bench", checkpoint[0], "--rows", "1", "--kernels", "rows8_mm", check=False
    )
    assert done.returncode == 3
    assert "in plugin 'kernels_rows8' (quant-kernels-rows8 0.1.0): TypeError" in done.stderr
