"""Keys and values rounded by a checkpoint's scales, in a tiny model made for the test.

The reference is the dense model with an attention function of its own, which rounds by torch's cast
to float8_e4m3fn.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import quant_core
from quant_core import load_model
from quant_core.checkpoint.open import open_checkpoint
from quant_core.cli.main import main
from quant_core.engines.transformers import uninstall
from quant_core.errors import ConfigError, LayoutError
from quant_core.kv_states import QuantCache

pytest.importorskip("quant_plugin_compressed_tensors")
SCALES = {(i, x): 0.001 * (1 + i) * (1 if x == "k" else 3) for i in range(2) for x in "kv"}
IDS = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(5))


def _rounded(module, query, key, value, mask, **kwargs):
    def fp8(x, scale):
        scale = torch.tensor(scale).bfloat16().float()
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    i = module.layer_idx
    key, value = fp8(key, SCALES[i, "k"]), fp8(value, SCALES[i, "v"])
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("tests_rounded", _rounded)


def _block() -> dict:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "version": "0.19.0",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    }


def _make(folder: Path, scales: dict) -> AutoModelForCausalLM:
    """A checkpoint, and the dense model of the same weights."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).float().eval()
    tensors = {}
    for name, p in dense.state_dict().items():
        if "_proj.weight" not in name:
            tensors[name] = p * 1
            continue
        p.mul_(8)  # attention that depends on its keys
        scale = p.abs().amax(1, keepdim=True) / 127
        codes = (p / scale).round().to(torch.int8)
        tensors |= {name: codes, f"{name}_scale": scale.clone()}
        p.copy_(codes.float() * scale)
    for (i, x), scale in scales.items():
        tensors[f"model.layers.{i}.self_attn.{x}_scale"] = torch.tensor([scale]).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = config.to_dict() | {"quantization_config": _block()}
    values |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(values))
    return dense


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, and the reference's logits with a rounded and a float cache."""
    folder = tmp_path_factory.mktemp("kv")
    dense = _make(folder, SCALES)
    plain = _logits(dense)
    dense.config._attn_implementation = "tests_rounded"
    return folder, _logits(dense), plain


def _logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_are_rounded_as_by_torchs_own_cast(made, attention):
    folder, rounded, plain = made
    model = load_model(folder, attn_implementation=attention)
    assert model.config._attn_implementation == f"quant_core_{attention}"
    assert (_logits(model) - rounded).abs().max() < 1e-5  # float32 sums in another order
    assert (rounded - plain).abs().max() > 1e-3  # negative control
    left = load_model(folder, kv_cache="float", attn_implementation=attention)
    assert (_logits(left) - plain).abs().max() < 1e-5
    assert not any(isinstance(m, QuantCache) for m in left.modules())


def test_padding_gets_the_same_mask(made):
    model = load_model(made[0])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), IDS], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    positions = (torch.arange(padded.shape[1])[None] - 3).clamp(min=0)
    got = _logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    # positions are the same, sums are longer by zeros
    assert (got - made[1]).abs().max() < 1e-4


def test_generation_with_a_cache_agrees_with_whole_sequences(made):
    model = load_model(made[0])
    out = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for stop in range(IDS.shape[1], out.shape[1]):
        assert _logits(model, out[:, :stop])[0, -1].argmax() == out[0, stop]


def test_plain_from_pretrained_rounds_too(made):
    quant_core.install()
    try:
        model = AutoModelForCausalLM.from_pretrained(made[0])
    finally:
        uninstall()
    assert (_logits(model) - made[1]).abs().max() < 1e-5


def test_gradients_pass_the_rounding(made):
    model = load_model(made[0])
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
    cache = model.model.layers[0].self_attn.quant_cache
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    cache.rounded_heads("k", x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_copies_casts_and_compiled_models_keep_the_scales(made):
    model = load_model(made[0])
    twin = copy.deepcopy(model)
    cache = twin.model.layers[1].self_attn.quant_cache
    cache.k_scale.mul_(4)  # of the copy alone
    assert (_logits(model) - made[1]).abs().max() < 1e-5
    assert (_logits(twin) - made[1]).abs().max() > 1e-3
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (_logits(compiled) - made[1]).abs().max() < 1e-5
    before = cache.k_scale.clone()
    cache.to(torch.float16)
    assert cache.k_scale.dtype == torch.bfloat16
    assert torch.equal(cache.k_scale, before)


@pytest.mark.parametrize("mode", [None, "float"])
def test_saving_gives_the_stored_bytes_back(made, mode, tmp_path):
    load_model(made[0], kv_cache=mode).save_pretrained(tmp_path / "saved")
    old, new = open_checkpoint(made[0]), open_checkpoint(tmp_path / "saved")
    assert old.tensors.keys() == new.tensors.keys()
    for name in old.tensors:
        a, b = old.read(name), new.read(name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert (_logits(load_model(tmp_path / "saved")) - made[1]).abs().max() < 1e-5


def test_another_implementation_set_later_is_an_error_not_a_float_cache(made):
    model = load_model(made[0])
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="quant_core_eager") as err:
        _logits(model)
    assert err.value.code == "Q-ENGINE-CACHE"
    model.set_attn_implementation("quant_core_eager")
    assert (_logits(model) - made[1]).abs().max() < 1e-5


def test_implementation_that_is_not_supported_is_refused_while_loading(made):
    with pytest.raises(LayoutError, match="flex_attention") as err:
        load_model(made[0], attn_implementation="flex_attention")
    assert err.value.code == "Q-ENGINE-CACHE"
    assert load_model(made[0], attn_implementation="flex_attention", kv_cache="float") is not None


def test_layers_that_the_model_leaves_out_take_their_scales_along(made):
    model = load_model(made[0], num_hidden_layers=1)
    assert sum(isinstance(m, QuantCache) for m in model.modules()) == 1


def test_wrong_setting_is_refused(made):
    with pytest.raises(ConfigError, match="'checkpoint'") as err:
        load_model(made[0], kv_cache="fp8")
    assert err.value.code == "Q-CFG-VALUE"


def test_asking_for_scales_that_are_not_there_is_an_error(tmp_path):
    _make(tmp_path, {})
    with pytest.raises(ConfigError, match="holds no scales") as err:
        load_model(tmp_path, kv_cache="checkpoint")
    assert err.value.code == "Q-ENGINE-CACHE"


CONVERTED = {"compressed_tensors": "k_scale", "quark": "k_proj.output_scale",
             "nvfp4": "k_proj.k_scale"}  # fmt: skip


@pytest.mark.parametrize("to", CONVERTED)
def test_conversion_carries_the_scales_over(made, to, tmp_path):
    folder, rounded, plain = made
    result = quant_core.convert(folder, tmp_path / "out", to=to)
    assert result.exact
    assert quant_core.diff(folder, tmp_path / "out").equal
    source, out = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    for i in range(2):
        value = out.read(f"model.layers.{i}.self_attn.{CONVERTED[to]}")
        want = source.read(f"model.layers.{i}.self_attn.k_scale")
        assert value.dtype == want.dtype
        assert torch.equal(value.flatten(), want)
    model = load_model(tmp_path / "out", kv_cache="checkpoint")
    assert (_logits(model) - rounded).abs().max() < 1e-5
    # a format that only offers them gives a float cache unasked, and the result says so
    asked = to == "nvfp4"
    assert any("on demand in the result" in w for w in result.warnings) == asked
    default = _logits(load_model(tmp_path / "out"))
    assert (default - (plain if asked else rounded)).abs().max() < 1e-5
    model.model.layers[1].self_attn.quant_cache.k_scale.mul_(2)
    assert (_logits(model) - rounded).abs().max() > 1e-3  # negative control


def test_a_ring_of_conversions_gives_the_same_scales(made, tmp_path):
    at, said = made[0], []
    for i, to in enumerate(("nvfp4", "quark", "compressed_tensors")):
        result = quant_core.convert(at, tmp_path / str(i), to=to)
        assert result.exact
        said += result.warnings
        at = tmp_path / str(i)
    assert any("as soon as the result is loaded" in w for w in said)
    old, new = open_checkpoint(made[0]), open_checkpoint(at)
    for i, x in SCALES:
        name = f"model.layers.{i}.self_attn.{x}_scale"
        assert (old.tensors[name].shape, old.tensors[name].dtype) == ((1,), "bfloat16")
        assert (new.tensors[name].shape, new.tensors[name].dtype) == ((1,), "bfloat16")
        assert torch.equal(old.read(name), new.read(name))


def test_target_without_such_scales_is_refused_unless_the_loss_is_taken(made, tmp_path):
    with pytest.raises(LayoutError, match="no scales of keys and values in 'torchao'") as err:
        quant_core.convert(made[0], tmp_path / "out", to="torchao")
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    assert "--allow-inexact" in str(err.value)
    assert list(tmp_path.iterdir()) == []
    result = quant_core.convert(made[0], tmp_path / "out", to="torchao", allow_inexact=True)
    lost = {r.name: r.losses for r in result.layers if r.losses}
    left = "keys and values are no longer quantized"
    assert lost == {f"model.layers.{i}.self_attn": (left,) for i in range(2)}
    assert (_logits(load_model(tmp_path / "out")) - made[2]).abs().max() < 1e-5
    apart = quant_core.diff(made[0], tmp_path / "out")
    assert apart.caches == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert not apart.equal


def test_diff_sees_one_changed_scale(made, tmp_path, capsys):
    shutil.copytree(made[0], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"] *= 2
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert quant_core.diff(made[0], tmp_path / "other").caches == ["model.layers.1.self_attn"]
    assert main(["diff", str(made[0]), str(tmp_path / "other")]) == 0
    said = "keys and values quantized otherwise: model.layers.1.self_attn"
    assert said in capsys.readouterr().out


@pytest.mark.shared
def test_scales_that_nobody_applies_are_named_by_the_conversion(checkpoints, tmp_path):
    source = checkpoints / "modelopt-nvfp4-kvnvfp4"
    result = quant_core.convert(source, tmp_path / "out", to="nvfp4")
    said = "in the source: KV-cache scales present, not applied (2 attention modules)"
    assert result.warnings == [said]


@pytest.mark.shared
@pytest.mark.parametrize("to", ["quark", "nvfp4"])
def test_converted_checkpoint_gives_the_producers_logits(checkpoints, to, tmp_path):
    """The producer's own logits, whose bound a float cache misses."""
    source = checkpoints / "ct-kvfp8-w4a16"
    expected = open_checkpoint(source / "expected.safetensors")
    ids, want = expected.read("input_ids").view(1, -1), expected.read("logits")
    bound = json.loads((source / "expected.json").read_text())["bound"]
    assert quant_core.convert(source, tmp_path / "out", to=to).exact
    off = {}
    for mode in ("checkpoint", "float"):
        model = load_model(tmp_path / "out", dtype=torch.float32, kv_cache=mode)
        off[mode] = (_logits(model, ids)[0] - want).abs()
    assert off["checkpoint"].max() <= bound["max"]
    assert off["checkpoint"].mean() < 1e-5  # the same codes; float32 sums in another order
    assert off["float"].mean() > bound["mean"]


@pytest.mark.shared
def test_keys_before_the_rotary_embedding_go_elsewhere_as_a_loss(checkpoints, tmp_path):
    source = checkpoints / "quark-fp8-kvfp8"
    with pytest.raises(LayoutError, match="quantized before the rotary embedding"):
        quant_core.convert(source, tmp_path / "out", to="compressed_tensors")
    result = quant_core.convert(
        source, tmp_path / "out", to="compressed_tensors", allow_inexact=True
    )
    lost = {loss for r in result.layers for loss in r.losses}
    assert lost == {"keys quantized after the rotary embedding"}


def test_scale_of_zero_is_refused_by_load_and_found_by_verify(tmp_path, capsys):
    from quant_core.cli.main import main

    _make(tmp_path, SCALES | {(1, "v"): 0.0})
    with pytest.raises(LayoutError, match=r"layers\.1\.self_attn\.v_scale") as err:
        load_model(tmp_path)
    assert err.value.code == "Q-VALUE-SCALE"
    assert main(["verify", str(tmp_path), "--json"]) == 1
    assert "Q-VALUE-SCALE" in capsys.readouterr().out
    assert load_model(tmp_path, kv_cache="float") is not None


def test_inspect_lists_attention_whose_keys_and_values_are_quantized(made, capsys):
    assert main(["inspect", str(made[0]), "--layers", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (kv,) = data["attention"]
    assert (kv["scheme"], kv["modules"], kv["site"]) == ("kv_fp8_e4m3", 2, "cache")
    assert kv["applied"]
    assert set(kv["operands"]) == {"k", "v"}
    assert kv["stored_bytes"] == 2 * len(SCALES)  # one bfloat16 each
    names = {f"model.layers.{i}.self_attn" for i, _ in SCALES}
    assert set(data["attention_layers"]) == names
    assert main(["inspect", str(made[0]), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "attention: 2 modules, kv_fp8_e4m3 at the cache: k: fp8_e4m3" in text
    assert all(name in text for name in names)
