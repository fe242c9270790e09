"""The transformers engine's own rules, on core's toy format: no plugin is needed here."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from quant_core import as_config, install, load_model
from quant_core.checkpoint.write import write_safetensors
from quant_core.engines import transformers as engine
from quant_core.engines.transformers_quantizer import (
    QuantCoreConfig,
    QuantCoreQuantizer,
    single_device,
)
from quant_core.errors import CheckpointError, ConfigError, LayoutError, PluginError
from toy import toy_layer, toy_module, toy_registry

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    dtype="float32",
)
IDS = torch.arange(12)[None] % 32


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose only plugin is the toy."""
    registry = toy_registry(toy_module())
    names = {"plan": "default_registry", "checkpoint.open": "registry"}
    for module, name in names.items():
        monkeypatch.setattr(import_module(f"quant_core.{module}"), name, lambda: registry)


def _write(folder: Path, config: LlamaConfig = CONFIG, **extra: torch.Tensor) -> LlamaForCausalLM:
    """A toy checkpoint of ``config``, and the dense model of the same weights."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for i, (name, p) in enumerate(dense.named_parameters()):
            if name.endswith("_proj.weight"):
                layer = toy_layer(*p.shape, seed=i)
                layer["s"] = (layer["s"].float() / 300).half()
                p.copy_(layer["q"].float() * layer["s"].float()[:, None])
                tensors |= {f"{name.removesuffix('weight')}{k}": t for k, t in layer.items()}
            else:
                tensors[name] = p.clone()
    write_safetensors(folder, tensors | extra, overwrite=True)
    raw = json.loads(config.to_json_string(use_diff=False))
    raw |= {"quantization_config": {"quant_method": "toy"}, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw))
    return dense


def _same(model: Any, dense: LlamaForCausalLM) -> bool:
    with torch.no_grad():
        got, want = (m(IDS, use_cache=False).logits for m in (model, dense))
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())


# ---------------------------------------------------------------------------------- one device


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("cpu", "cpu"),
        ("cuda:1", "cuda:1"),
        (2, "cuda:2"),
        (torch.device("cpu"), "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"": torch.device("cuda", 0)}, "cuda:0"),
        ({"": 0}, "cuda:0"),
    ],
)
def test_single_device_accepts_one_device(value: object, expected: str | None) -> None:
    assert single_device(value) == expected


@pytest.mark.parametrize(
    "value",
    ["auto", "balanced", "sequential", "disk", "meta", {"": "disk"}, {}, True, 1.5,
     {"model": 0, "lm_head": 1}, {"model.layers.0": "cpu"}],
)  # fmt: skip
def test_single_device_refuses_everything_else(value: object) -> None:
    with pytest.raises(ConfigError, match="one device") as err:
        single_device(value)
    assert err.value.code == "Q-ENGINE-DEVICE"
    assert err.value.actual == value


def test_device_map_over_several_devices_is_refused_before_loading(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path)
    quantizer = QuantCoreQuantizer(QuantCoreConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError):
        quantizer.validate_environment(device_map={"model": "cpu", "lm_head": "cuda:0"})
    with pytest.raises(ConfigError):
        load_model(tmp_path, device="auto")
    quantizer.validate_environment(device_map={"": "cpu"}, weights_only=True)
    assert quantizer.device == "cpu"


def test_device_map_of_transformers_is_honoured(toy: None, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate for any device_map")
    dense = _write(tmp_path)
    config = as_config(tmp_path)
    assert _same(LlamaForCausalLM.from_pretrained(tmp_path, config=config, device_map="cpu"), dense)
    with pytest.raises(ConfigError):
        LlamaForCausalLM.from_pretrained(tmp_path, config=config, device_map="auto")


# --------------------------------------------------------------------------- config and options


def test_config_block_that_is_not_ours_is_given_back() -> None:
    block = {"quant_method": "other", "bits": 4, "nested": {"a": [1]}}
    config = QuantCoreConfig.from_dict(block)
    assert config.quant_method == "quant_core"
    assert config.to_dict() == block
    assert copy.deepcopy(config).to_dict() == block
    config.to_dict()["nested"]["a"].append(2)
    assert config.to_dict() == block


def test_own_config_block_round_trips_and_refuses_unknown_keys() -> None:
    block = {"quant_method": "quant_core", "path": "x", "strict": True, "kernels": ["torch_ref"]}
    assert QuantCoreConfig.from_dict(json.loads(json.dumps(block))).to_dict() == block
    with pytest.raises(ConfigError, match="bits") as err:
        QuantCoreConfig.from_dict(block | {"bits": 4})
    assert err.value.code == "Q-CFG-KEY"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "no_such", torch.int32])
def test_dtype_that_is_no_activation_dtype_is_refused(
    dtype: object, toy: None, tmp_path: Path
) -> None:
    _write(tmp_path)
    with pytest.raises(ConfigError) as err:
        load_model(tmp_path, dtype=dtype)  # type: ignore[arg-type]
    assert err.value.code == "Q-ENGINE-DTYPE"


@pytest.mark.parametrize("found", ["4.57.6", "5.15.1", "5.24.0", "6.0.0", None])
def test_unsupported_transformers_is_refused_with_the_range(
    found: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise engine.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(engine.metadata, "version", version)
    for call in (install, lambda: load_model(tmp_path), lambda: as_config(tmp_path)):
        with pytest.raises(PluginError, match="pip install") as err:
            call()
        assert err.value.code == ("Q-ENGINE-VERSION" if found else "Q-ENGINE-MISSING")
        assert (found or "not installed") in str(err.value)


def test_supported_range_is_the_one_the_package_declares() -> None:
    low, high = engine.SUPPORTED
    pyproject = Path(engine.__file__).parents[3] / "pyproject.toml"
    assert f"transformers>={low},<{high}" in pyproject.read_text()


def test_importing_the_engine_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, quant_core.engines.transformers\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------- loading


def test_load_model_equals_dense_model(toy: None, tmp_path: Path) -> None:
    dense = _write(tmp_path)
    model = load_model(tmp_path)
    assert _same(model, dense)
    assert not model.training
    assert model.config.name_or_path == str(tmp_path)
    assert model.hf_quantizer.is_compileable
    assert not model.hf_quantizer.is_trainable


def test_error_leaves_defaults_alone_and_a_good_load_works(toy: None, tmp_path: Path) -> None:
    dense = _write(tmp_path, extra_tensor=torch.ones(3))
    dtype = torch.get_default_dtype()
    with pytest.raises(CheckpointError, match="extra_tensor") as err:
        load_model(tmp_path, dtype="bfloat16")
    assert err.value.code == "Q-TENSOR-UNEXPECTED"
    assert torch.get_default_dtype() == dtype
    assert torch.empty(1).device.type == "cpu"
    dense = _write(tmp_path)
    assert _same(load_model(tmp_path), dense)


def test_plain_float_checkpoint_loads_and_saves(toy: None, tmp_path: Path) -> None:
    dense = LlamaForCausalLM(CONFIG).eval()
    dense.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert _same(model, dense)
    model.save_pretrained(tmp_path / "out")
    assert _same(LlamaForCausalLM.from_pretrained(tmp_path / "out"), dense)


def test_model_class_that_transformers_lacks_is_named(toy: None, tmp_path: Path) -> None:
    _write(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"model_type": "clip_vision_model", "architectures": ["os.system"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"os\.system") as err:
        load_model(tmp_path)
    assert err.value.code == "Q-ENGINE-MODEL"


def test_quantized_layer_of_another_class_is_named(toy: None, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=32,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    from transformers import GPT2LMHeadModel

    tensors = {n: p.detach().clone() for n, p in GPT2LMHeadModel(config).named_parameters()}
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    bias = tensors.pop("transformer.h.0.mlp.c_fc.bias").half()
    layer = toy_layer(64, 16) | {"b": bias}
    tensors |= {f"transformer.h.0.mlp.c_fc.{k}": t for k, t in layer.items()}
    write_safetensors(tmp_path, tensors)
    raw = json.loads(config.to_json_string(use_diff=False))
    raw["quantization_config"] = {"quant_method": "toy"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(LayoutError, match=r"c_fc: is a Conv1D") as err:
        load_model(tmp_path)
    assert err.value.code == "Q-ENGINE-MODULE"


def test_announcing_code_in_the_config_runs_none(
    toy: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = _write(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with caplog.at_level(logging.WARNING):
        assert _same(load_model(tmp_path), dense)
    assert not canary.exists()


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"model_type": "no_such_model"}])
def test_config_that_transformers_rejects_names_the_checkpoint(
    change: dict[str, object], toy: None, tmp_path: Path
) -> None:
    _write(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ConfigError, match=tmp_path.name) as err:
        load_model(tmp_path)
    assert err.value.code == "Q-ENGINE-CONFIG"


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_weights_without_a_config_say_what_to_put_beside_them(
    name: str, toy: None, tmp_path: Path
) -> None:
    _write(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no config\.json.*beside the weights") as err:
        load_model(tmp_path / name)
    assert err.value.code == "Q-CFG-MISSING"
    assert err.value.path == str(tmp_path)


def test_container_states_settings_only_where_no_config_file_does(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant_core.checkpoint.safetensors import SafetensorsCheckpoint

    _write(tmp_path)
    monkeypatch.setattr(
        SafetensorsCheckpoint, "config_overrides", lambda self: {"rms_norm_eps": 2.0}
    )
    assert as_config(tmp_path).rms_norm_eps == CONFIG.rms_norm_eps
    opener = import_module("quant_core.checkpoint.open")
    open_checkpoint = opener.open_checkpoint

    def without_config(path: Path) -> Any:
        checkpoint = open_checkpoint(path)
        checkpoint.config = {}
        return checkpoint

    monkeypatch.setattr(opener, "open_checkpoint", without_config)
    assert as_config(tmp_path).rms_norm_eps == 2.0
    assert as_config(tmp_path, rms_norm_eps=3.0).rms_norm_eps == 3.0
