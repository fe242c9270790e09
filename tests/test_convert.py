"""Conversion keeps bits, writes whole checkpoints or nothing, and says what it cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert, targets
from quant_core.errors import CheckpointError, ConfigError, FormatError, LayoutError, PluginError
from quant_core.load import load_tensor
from quant_core.plan import plan
from quant_core.registry import registry

AWQ = "gptqmodel-awq-gemm-g128"
ACT_ORDER = "gptqmodel-4bit-g128-asym-descact"
MIXED = "gptqmodel-dynamic-4-8bit-skip"


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def test_awq_to_gptq_and_back_gives_the_same_bytes(fixtures, tmp_path):
    there = convert(fixtures / AWQ, tmp_path / "gptq", to="gptq")
    back = convert(tmp_path / "gptq", tmp_path / "awq", to="awq")
    assert there.exact
    assert back.exact
    assert_equal_bytes(stored(fixtures / AWQ), stored(tmp_path / "awq"))


def test_a_changed_zero_point_would_be_seen(fixtures, tmp_path):
    """Negative control of the comparison above."""
    a = stored(fixtures / AWQ)
    b = dict(a)
    name = next(n for n in b if n.endswith("qzeros"))
    b[name] = b[name] ^ 1
    with pytest.raises(AssertionError):
        assert_equal_bytes(a, b)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_versions_of_zeros_hold_the_same_weights(fixtures, tmp_path, version):
    convert(fixtures / AWQ, tmp_path / "out", to="gptq", options={"checkpoint_format": version})
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["checkpoint_format"]) == ("gptq", version)
    name = "model.layers.0.mlp.down_proj"
    a, b = load_tensor(fixtures / AWQ, name), load_tensor(tmp_path / "out", name)
    assert torch.equal(a.dequantize(), b.dequantize())


def test_gptq_v1_and_v2_differ_only_in_zeros(fixtures, tmp_path):
    for version in ("gptq", "gptq_v2"):
        options = {"checkpoint_format": version}
        convert(fixtures / AWQ, tmp_path / version, to="gptq", options=options)
    a, b = stored(tmp_path / "gptq"), stored(tmp_path / "gptq_v2")
    unlike = {n.rpartition(".")[2] for n in a if not torch.equal(a[n], b[n])}
    assert unlike == {"qzeros"}


def test_activation_order_survives_where_the_target_has_g_idx(fixtures, tmp_path):
    result = convert(fixtures / ACT_ORDER, tmp_path / "out", to="gptq")
    assert result.exact
    a, b = stored(fixtures / ACT_ORDER), stored(tmp_path / "out")
    g_idx = [n for n in a if n.endswith("g_idx")]
    assert g_idx
    assert any(not torch.equal(a[n], a[n].sort().values) for n in g_idx)
    for name in a:
        if name.endswith(("g_idx", "qweight", "scales")):
            assert torch.equal(a[name], b[name]), name


def test_activation_order_to_a_target_without_it_is_refused_in_one_report(fixtures, tmp_path):
    with pytest.raises(LayoutError) as caught:
        convert(fixtures / ACT_ORDER, tmp_path / "out", to="awq")
    assert caught.value.code == "Q-LAYOUT-REPRESENT"
    text = str(caught.value)
    assert "14 of 14 quantized modules" in text
    assert "activation order" in text
    assert "and 4 more" in text
    assert "model.layers.0.self_attn.q_proj" in caught.value.actual
    assert list(tmp_path.iterdir()) == []


def test_dynamic_rules_describe_layers_of_several_widths(fixtures, tmp_path):
    convert(fixtures / MIXED, tmp_path / "out", to="gptq")
    a, b = plan(open_checkpoint(fixtures / MIXED)), plan(open_checkpoint(tmp_path / "out"))
    labels = {n: m.scheme.weight.label for n, m in a.quantized.items()}
    assert len(set(labels.values())) == 3
    assert {n: m.scheme.weight.label for n, m in b.quantized.items()} == labels


def test_modules_that_do_not_fit_become_floats_only_on_request(fixtures, tmp_path):
    with pytest.raises(LayoutError, match="2 of 14"):
        convert(fixtures / MIXED, tmp_path / "no", to="awq")
    result = convert(fixtures / MIXED, tmp_path / "out", to="awq", unfit_as_float=True)
    assert result.exact
    assert result.options == {"group_size": 32}
    made = {layer.name: layer.after for layer in result.layers}
    assert made["model.layers.0.mlp.down_proj"].startswith("float")
    for name in made:
        a, b = load_tensor(fixtures / MIXED, name), load_tensor(tmp_path / "out", name)
        assert torch.equal(a.dequantize(), b.dequantize()), name


def test_shards_index_and_side_files_are_written(fixtures, tmp_path):
    convert(fixtures / AWQ, tmp_path / "out", to="gptq", max_shard_bytes=300_000)
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert "model.safetensors.index.json" in names
    assert len([n for n in names if n.endswith(".safetensors") and n.startswith("model-")]) >= 3
    assert {"tokenizer.json", "config.json"} <= names
    assert "quantize_config.json" not in names  # it describes the source
    assert load_tensor(tmp_path / "out", "lm_head").dense is not None


# ------------------------------------------------------------------------------ nothing half-done


class Stop(BaseException):
    """What a signal handler may raise."""


@pytest.mark.parametrize("phase", ["survey", "write"])
def test_interrupted_run_leaves_nothing(fixtures, tmp_path, phase):
    seen = []

    def stop(now: str, name: str, total: int) -> None:
        seen.append(name)
        if now == phase and len(seen) > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert(fixtures / AWQ, tmp_path / "deep" / "out", to="gptq", on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_destination_is_refused_and_untouched(fixtures, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        convert(fixtures / AWQ, target, to="gptq")
    assert caught.value.code == "Q-CKPT-EXISTS"
    assert [f.name for f in target.iterdir()] == ["notes.txt"]


def test_empty_destination_is_used(fixtures, tmp_path):
    (tmp_path / "out").mkdir()
    convert(fixtures / AWQ, tmp_path / "out", to="gptq")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# -------------------------------------------------------------------------------- wrong requests


def test_unknown_target_lists_the_known_ones(fixtures, tmp_path):
    with pytest.raises(FormatError) as caught:
        convert(fixtures / AWQ, tmp_path / "out", to="nonsense")
    assert caught.value.code == "Q-FMT-TARGET"
    assert "gptq" in str(caught.value)
    assert "Install the plugin" in str(caught.value)


@pytest.mark.parametrize("name", ["GPTQ", "compressed-tensors", "auto-round"])
def test_target_by_another_spelling_gets_its_name(name, fixtures, tmp_path):
    ids = {"GPTQ": "gptq", "compressed-tensors": "compressed_tensors", "auto-round": "autoround"}
    if ids[name] not in targets(registry()):
        pytest.skip(f"{ids[name]} is not installed")
    with pytest.raises(FormatError, match=f"Its name is '{ids[name]}'"):
        convert(fixtures / AWQ, tmp_path / "out", to=name)


def test_installed_plugin_that_writes_nothing_is_said_to_be_one(fixtures, tmp_path):
    with pytest.raises(FormatError, match="'kernels_torch', whose plugin has no hook fit_scheme"):
        convert(fixtures / AWQ, tmp_path / "out", to="kernels_torch")


def test_float_checkpoint_has_nothing_to_convert(write, tmp_path):
    source = write({"m.weight": torch.zeros(2, 2)})
    with pytest.raises(FormatError, match=r"nothing to convert.*Quantize the model") as caught:
        convert(source.path, tmp_path / "out", to="gptq")
    assert caught.value.code == "Q-FMT-TARGET"


@pytest.mark.parametrize(
    "options", [{"no_such": 1}, {"checkpoint_format": "gptq_v9"}], ids=["name", "value"]
)
def test_wrong_option_is_a_config_error(fixtures, tmp_path, options):
    with pytest.raises(ConfigError) as caught:
        convert(fixtures / AWQ, tmp_path / "out", to="gptq", options=options)
    assert caught.value.code == "Q-CFG-VALUE"


def test_a_plugin_that_hides_a_loss_is_caught(fixtures, tmp_path, monkeypatch):
    import quant_plugin_gptq.fit as gptq

    honest = gptq.fit

    def dishonest(layer, tensors, operands, options, allow_inexact):
        found = honest(layer, tensors, operands, options, allow_inexact)
        weight = found.tensors.weight
        worse = replace(weight, scales=(weight.scales[0] * 1.01,))
        return replace(found, tensors=replace(found.tensors, operands={"weight": worse}))

    monkeypatch.setattr(gptq, "fit", dishonest)
    with pytest.raises(PluginError) as caught:
        convert(fixtures / AWQ, tmp_path / "out", to="gptq")
    assert caught.value.code == "Q-PLUGIN-RESULT"
    assert list(tmp_path.iterdir()) == []
