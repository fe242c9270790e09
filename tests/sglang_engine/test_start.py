"""Who asks for us gets us, and nobody else; what must not start, does not, with our error."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_serving import loaded, published, reference_logits, served_logits, without_notes

from checkpoint_sets import FIXTURES, SHARED
from quant_core.engines.sglang_config import TAKE_OVER, QuantCoreConfig
from quant_core.errors import ConfigError, LayoutError, QuantError
from tiny_models import make_tiny

ACT_ORDER = FIXTURES / "gptqmodel-4bit-g128-asym-descact"


def fails(folder: Path, **settings: Any) -> QuantError:
    with pytest.raises(QuantError) as err, loaded(folder, **settings):
        pass
    return err.value


def edited(tmp_path: Path, edit: Any) -> Path:
    folder = without_notes(ACT_ORDER, tmp_path / "edited")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_plugin_is_found_and_first_in_order() -> None:
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
    from sglang.srt.configs import model_config
    from sglang.srt.layers import quantization
    from sglang.srt.plugins import load_plugins_by_group

    found = load_plugins_by_group("sglang.srt.plugins")
    for _ in range(2):  # idempotent
        found["quant_core"][0]()
    methods = quantization.QUANTIZATION_METHODS
    assert next(iter(methods)) == "quant_core"
    assert model_config.QUANTIZATION_METHODS is methods
    assert quantization.get_quantization_config("quant_core") is QuantCoreConfig
    assert quantization.CPU_QUANTIZATION_METHODS["quant_core"] is QuantCoreConfig
    assert QUANTIZATION_CHOICES.count("quant_core") == 1
    assert {"awq", "fp8", "compressed-tensors"} < set(methods)


def test_plugin_registers_no_hook() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    assert not HookRegistry._hooks


@pytest.mark.parametrize(
    ("asked", "take_over", "expected"),
    [
        ("quant_core", "", "quant_core"),
        (None, "", "gptq"),
        (None, "awq, gptq", "quant_core"),
        (None, "awq", "gptq"),
    ],
)
def test_method_is_ours_only_on_request(
    asked: str | None, take_over: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TAKE_OVER, take_over)
    with published(ACT_ORDER, quantization=asked) as config:
        assert config.quantization == expected


def test_config_survives_pickle(tmp_path: Path) -> None:
    config = QuantCoreConfig.from_config(
        {"quant_method": "quant_core", "strict": True, "packed_modules_mapping": {"a": ["b"]}}
    )
    config.model = str(without_notes(ACT_ORDER, tmp_path / "model"))
    with published(ACT_ORDER):
        assert config.plan is not None
        copy = pickle.loads(pickle.dumps(config))
        assert copy.options == config.options
        assert copy.packed_modules_mapping == {"a": ["b"]}
        assert copy.plan.quantized.keys() == config.plan.quantized.keys()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.scales",
        "model.layers.0.self_attn.k_proj.g_idx",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_dropped_tensor_stops_the_start(tmp_path: Path, name: str) -> None:
    err = fails(edited(tmp_path, lambda t: t.pop(name)))
    assert err.code == "Q-TENSOR-MISSING"
    assert name in str(err)


def test_member_without_a_layer_stops_the_start(tmp_path: Path) -> None:
    folder = without_notes(ACT_ORDER, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))

    def no_layer(name: str, layers: int | None) -> str:
        return ""

    with mock.patch("quant_core.engines.sglang_config._absent", no_layer):
        err = fails(folder)
    assert err.code == "Q-TENSOR-UNEXPECTED"
    assert "model.layers.1." in str(err)


def test_layers_beyond_those_of_the_model_are_passed_over(tmp_path: Path) -> None:
    """As the layers of a draft model are stored."""
    whole = edited(tmp_path, lambda t: None)
    alone = without_notes(whole, tmp_path / "alone")
    for folder in (whole, alone):
        config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(alone / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers.1." not in n}
    assert kept.keys() < tensors.keys()
    save_file(kept, alone / "model.safetensors", metadata={"format": "pt"})
    got, want = served_logits(whole, [5, 17, 200]), reference_logits(alone, [5, 17, 200])
    assert (got - want).abs().max() <= 5e-5


def test_container_that_sglang_cannot_read_names_the_loader(tmp_path: Path) -> None:
    err = fails(without_notes(FIXTURES / "gguf-llama-q4_k_m", tmp_path / "model"))
    assert isinstance(err, ConfigError)
    assert err.code == "Q-ENGINE-CONTAINER"
    assert "--load-format private" in str(err)


def test_single_file_is_refused_and_its_folder_is_served(tmp_path: Path) -> None:
    folder = without_notes(FIXTURES / "gguf-llama-q4_k_m", tmp_path / "model")
    with loaded(folder, load_format="private") as model:
        assert model is not None
    file = next(folder.glob("*.gguf"))
    with pytest.raises(Exception, match=r"gguf|GGUF"), loaded(file, load_format="private"):
        pass


@pytest.mark.shared
def test_loader_without_our_method_is_refused() -> None:
    err = fails(SHARED / "base" / "tiny-llama", load_format="private", quantization=None)
    assert err.code == "Q-CFG-CONFLICT"
    assert "--quantization quant_core" in str(err)


def test_private_loader_of_somebody_else_stays() -> None:
    script = (
        "import sys, types; sys.path[:0] = sys.argv[1:]\n"
        "import stub_modules; stub_modules.install()\n"
        "for name in ('sglang.private', 'sglang.private.private_model_loader'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules[name].PrivateModelLoader = 'theirs'\n"
        "from quant_core.engines.sglang import register; register()\n"
        "from sglang.private.private_model_loader import PrivateModelLoader as found\n"
        "print('FOUND', found)"
    )
    here = str(Path(__file__).parent)
    out = subprocess.run([sys.executable, "-c", script, here], capture_output=True, text=True)
    assert out.stdout.rpartition("FOUND")[2].strip() == "theirs", out.stderr


def test_unknown_option_is_refused() -> None:
    block = '{"quantization_config": {"quant_method": "quant_core", "onlin": "mxfp8"}}'
    err = fails(ACT_ORDER, json_model_override_args=block)
    assert err.code == "Q-CFG-KEY"


YARN = {  # the one kind of rotary embedding that SGLang's DeepSeek has on a CPU
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0,
    "original_max_position_embeddings": 256, "mscale_all_dim": 1.0,
}  # fmt: skip
OWN = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
"""What SGLang takes from DeepSeek's own config.json and transformers' config does not have."""


def deepseek(folder: Path, kept: str) -> Path:
    """A DeepSeek-V3 that packs every layer without ``kept`` in its name."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=288, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=64, max_position_embeddings=512,
        rope_parameters=YARN,
    )  # fmt: skip
    tiny = make_tiny(
        folder, config, quantized=lambda name, kind: kind != "other" and kept not in name
    )
    return tiny.write(**OWN)


def test_packed_latent_attention_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    folder = deepseek(tmp_path / "model", kept="_a_proj")
    loader = "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_and_postprocess"
    with mock.patch(loader) as loading:
        err = fails(folder)
    assert not loading.called
    assert err.code == "Q-ENGINE-MODULE"
    for part in ("model.layers.0.self_attn.kv_b_proj", "model.layers.1.", "--load-format private"):
        assert part in str(err)


def absorbed(layer: Any) -> torch.Tensor:
    """What SGLang made of ``kv_b_proj``: [heads * (keys + values), rank]."""
    both = torch.cat([layer.self_attn.w_kc, layer.self_attn.w_vc.transpose(1, 2)], dim=1)
    return both.reshape(-1, both.shape[-1])


@pytest.mark.parametrize("kept", ["_a_proj", "no such layer"])
def test_packed_latent_attention_is_loaded_by_our_own_loader(kept: str, tmp_path: Path) -> None:
    """``kv_b_proj`` dequantized and split by SGLang, all other layers packed."""
    from quant_core import load_tensor

    folder = deepseek(tmp_path / "model", kept=kept)
    with loaded(folder, load_format="private") as model:
        for number, layer in enumerate(model.model.layers):
            at = f"model.layers.{number}.self_attn."
            assert torch.equal(absorbed(layer), load_tensor(folder, f"{at}kv_b_proj").dequantize())
            assert hasattr(layer.self_attn.o_proj, "packed")
            first = layer.self_attn.fused_qkv_a_proj_with_mqa
            assert hasattr(first, "packed") == (kept != "_a_proj")
            x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
            parts = [load_tensor(folder, at + n) for n in ("q_a_proj", "kv_a_proj_with_mqa")]
            want = x @ torch.cat([p.dequantize() for p in parts]).T
            assert (first(x)[0] - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.shared
def test_latent_attention_of_a_real_checkpoint_is_loaded(tmp_path: Path) -> None:
    from quant_core import load_tensor

    folder = without_notes(SHARED / "ct-mla-fp8-block", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    edit = {"rope_parameters": YARN, **OWN}
    (folder / "config.json").write_text(json.dumps(config | edit))
    with loaded(folder, load_format="private") as model:
        for number, layer in enumerate(model.model.layers):
            name = f"model.layers.{number}.self_attn.kv_b_proj"
            assert torch.equal(absorbed(layer), load_tensor(folder, name).dequantize())


@pytest.mark.shared
def test_latent_attention_of_a_real_checkpoint_is_refused_by_other_loaders(tmp_path: Path) -> None:
    err = fails(without_notes(SHARED / "ct-mla-fp8-block", tmp_path / "model"))
    assert err.code == "Q-ENGINE-MODULE"
    assert "model.layers.1.self_attn.kv_b_proj" in str(err)
    assert "model.layers.2." not in str(err)  # the draft's


def test_latent_attention_stored_as_floats_is_loaded_beside_packed_layers(tmp_path: Path) -> None:
    """SGLang's own absorption of the float weight; running it needs SGLang's kernels."""
    folder = deepseek(tmp_path / "model", kept="self_attn")
    stored = load_file(folder / "model.safetensors")
    with loaded(folder) as model:
        for number, layer in enumerate(model.model.layers):
            weight = stored[f"model.layers.{number}.self_attn.kv_b_proj.weight"].view(4, 128, 128)
            assert torch.equal(layer.self_attn.w_kc, weight[:, :64])
            assert torch.equal(layer.self_attn.w_vc, weight[:, 64:].transpose(1, 2))
        assert type(model.model.layers[0].mlp.down_proj.quant_method).__name__ == "LinearMethod"


def test_dropped_float_of_latent_attention_stops_the_start(tmp_path: Path) -> None:
    """SGLang has written its own name of a rotary embedding into the config by then."""
    folder = deepseek(tmp_path / "model", kept="self_attn")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.kv_a_layernorm.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    err = fails(folder)
    assert err.code == "Q-TENSOR-MISSING"
    assert name in str(err)


def test_draft_model_is_refused(tmp_path: Path) -> None:
    from sglang.srt.layers.moe.utils import draft_model_build_scope

    config = QuantCoreConfig(model=str(ACT_ORDER))
    with published(ACT_ORDER), draft_model_build_scope(), pytest.raises(ConfigError) as err:
        assert config.plan is None
    assert err.value.code == "Q-ENGINE-DRAFT"
    assert "--speculative-draft-model-quantization unquant" in str(err.value)


@pytest.mark.shared
def test_adapters_on_experts_are_refused(tmp_path: Path) -> None:
    folder = without_notes(SHARED / "ar-moe-w4g64", tmp_path / "model")
    with loaded(folder) as model:
        experts = model.model.layers[0].mlp.experts
        with pytest.raises(LayoutError) as err:
            experts.quant_method.get_triton_quant_info(experts)
    assert err.value.code == "Q-ENGINE-MODULE"


@pytest.mark.shared
def test_balanced_experts_are_refused(tmp_path: Path) -> None:
    folder = without_notes(SHARED / "ar-moe-w4g64", tmp_path / "model")
    with mock.patch("quant_core.engines.sglang_experts.get_exec") as asked:
        asked.return_value.moe.enable_eplb = True
        err = fails(folder)
    assert err.code == "Q-ENGINE-MODULE"
    assert "--enable-eplb" in str(err)


def test_registering_imports_nothing_that_sglang_has_not_imported() -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import stub_modules; stub_modules.install()\n"
        "import sglang.srt.configs.model_config\n"
        "from quant_core.engines.sglang import register\n"
        "before = set(sys.modules); register(); print('NEW', sorted(set(sys.modules) - before))"
    )
    here = str(Path(__file__).parent)
    out = subprocess.run([sys.executable, "-c", script, here], capture_output=True, text=True)
    new = out.stdout.rpartition("NEW")[2].strip()
    ours = ("quant_core.engines.sglang_config", "quant_core.engines.sglang_parser")
    standing_for = ("sglang.private", "sglang.private.private_model_loader")  # of no import
    assert new == str([*ours, *standing_for]), out.stderr
