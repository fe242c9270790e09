"""The transformers engine on real checkpoints: the producers' logits, and what users do.

Limits are the ``bound`` of each expected.json: float32 model, no mask, no cache.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoint_sets import checkpoint_dirs
from producers import within
from quant_core import as_config, install, load_model
from quant_core.engines.transformers import uninstall
from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError
from quant_core.nn import QuantModule

TAGGED = ("gptqmodel-2", "gptqmodel-3", "gptqmodel-4", "gptqmodel-awq", "gptqmodel-dynamic",
          "ar-w4g128-gptq", "ar-w4g128-asym-awq")  # fmt: skip
FILES = ("gguf-", "ar-gguf-")
ALL = checkpoint_dirs((*TAGGED, *FILES))
ACT_ORDER = "gptqmodel-4bit-g128-asym-descact"
DYNAMIC = "gptqmodel-dynamic-4-8bit-skip"
SECOND = "gptqmodel-awq-gemm-g128"


def _logits(model: PreTrainedModel, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        got = model(expected["input_ids"][None], use_cache=False).logits[0]
    return got, expected["logits"]


def _bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    flat = {n: t.detach().contiguous().reshape(-1) for n, t in tensors.items()}
    return {n: (t.dtype, t.view(torch.uint8).numpy().tobytes()) for n, t in flat.items()}


def _packed(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, bytes]]:
    modules = ((n, m) for n, m in model.named_modules() if isinstance(m, QuantModule))
    return _bytes({f"{n}.{leaf}": t for n, m in modules for leaf, t in m.tensors.items()})


@pytest.mark.parametrize("kernels", [None, "torch_ref"], ids=["fastest", "reference"])
@pytest.mark.parametrize("folder", ALL, ids=lambda d: d.name)
def test_logits_within_the_producers_bound(folder: Path, kernels: str | None) -> None:
    model = load_model(folder, dtype=torch.float32, kernels=kernels)
    assert within(model, folder)
    assert _packed(model), "nothing stayed packed"
    assert not [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]


def test_one_changed_scale_leaves_the_bound(checkpoints: Path) -> None:
    model = load_model(checkpoints / ACT_ORDER, dtype=torch.float32, kernels="torch_ref")
    model.model.layers[0].mlp.down_proj.scales_0.mul_(1.25)
    assert not within(model, checkpoints / ACT_ORDER)


# ------------------------------------------------------------------------------------ one path


@pytest.mark.parametrize("name", [ACT_ORDER, SECOND])
def test_installed_from_pretrained_gives_the_same_model(name: str, checkpoints: Path) -> None:
    direct = load_model(checkpoints / name, dtype=torch.float32)
    methods = install()
    try:
        assert install() == methods, "installing twice is harmless"
        model = AutoModelForCausalLM.from_pretrained(checkpoints / name, dtype=torch.float32)
    finally:
        uninstall()
    assert _bytes(model.state_dict()) == _bytes(direct.state_dict())
    assert torch.equal(*(_logits(m, checkpoints / name)[0] for m in (direct, model)))
    raw = json.loads((checkpoints / name / "config.json").read_text())
    assert model.config.to_dict()["quantization_config"] == raw["quantization_config"]
    assert model.generation_config.to_dict() == direct.generation_config.to_dict()


def test_uninstall_gives_transformers_its_own_classes_back() -> None:
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    methods = install()
    assert {"gptq", "awq"} <= set(methods)
    assert all(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[m] is not before.get(m) for m in methods)
    uninstall()
    uninstall()
    after = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert {m: after.get(m) for m in methods} == {m: before.get(m) for m in methods}


def test_as_config_routes_without_install(checkpoints: Path) -> None:
    folder = checkpoints / ACT_ORDER
    config = as_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    assert within(model, folder)


def test_as_config_survives_json(checkpoints: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(json.loads(as_config(checkpoints / ACT_ORDER).to_json_string()))
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert _packed(model)


def test_from_pretrained_logs_no_warning_of_missing_or_unexpected_keys(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install()
    root = logging.getLogger("transformers")
    root.propagate, before = True, root.propagate
    try:
        with caplog.at_level(logging.WARNING):
            AutoModelForCausalLM.from_pretrained(checkpoints / ACT_ORDER)
    finally:
        root.propagate = before
        uninstall()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []


# ----------------------------------------------------------------------------- what users do


@pytest.mark.parametrize("name", [ACT_ORDER, SECOND, "gguf-llama-q4_k_m", "gguf-moe-q4_k_m"])
def test_generate_agrees_with_greedy_steps_without_cache(name: str, checkpoints: Path) -> None:
    model = load_model(checkpoints / name, dtype=torch.float32)
    ids = torch.tensor([list(b"def main(")])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("name", [ACT_ORDER, "gguf-moe-q4_k_m"])
def test_compiled_forward_is_one_graph_and_equal(name: str, checkpoints: Path) -> None:
    model = load_model(checkpoints / name, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = compiled(ids, use_cache=False).logits
    assert (got - want).abs().max() <= 1e-5  # the same operations; fused ones may round apart


def test_default_dtype_is_the_configs_and_scales_keep_theirs(checkpoints: Path) -> None:
    model = load_model(checkpoints / ACT_ORDER)
    raw = json.loads((checkpoints / ACT_ORDER / "config.json").read_text())
    assert str(model.dtype) == f"torch.{raw.get('dtype', raw.get('torch_dtype'))}"
    exact = load_model(checkpoints / ACT_ORDER, dtype="float32")
    assert _packed(model) == _packed(exact)
    got, want = _logits(model, checkpoints / ACT_ORDER)
    assert (got.float() - want).abs().mean() < 0.1  # bfloat16 activations


@pytest.mark.parametrize("name", [ACT_ORDER, "gguf-llama-q4_k_m"])
def test_casts_and_moves_leave_packed_bytes_alone(name: str, checkpoints: Path) -> None:
    model = load_model(checkpoints / name, dtype=torch.float32)
    before = _packed(model)
    model.to(torch.float16)
    assert model.model.norm.weight.dtype == torch.float16
    assert _packed(model) == before
    assert torch.isfinite(_logits(model, checkpoints / name)[0]).all()
    with pytest.raises(ValueError, match="half"):
        model.half()  # transformers refuses it for every quantized model
    model.to("cpu", torch.float32)
    assert _packed(model) == before
    assert within(model, checkpoints / name)


@pytest.mark.parametrize("name", [ACT_ORDER, "gguf-moe-q4_k_m"])
def test_copy_and_state_dict_round_trip(name: str, checkpoints: Path) -> None:
    model = load_model(checkpoints / name, dtype=torch.float32)
    twin = copy.deepcopy(model)
    assert _bytes(twin.state_dict()) == _bytes(model.state_dict())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for t in twin.state_dict().values():
        t.zero_()
    assert _packed(twin) != _packed(model), "the copy shares memory with the original"
    twin.load_state_dict(state)
    assert torch.equal(*(_logits(m, checkpoints / name)[0] for m in (model, twin)))


# --------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("folder", checkpoint_dirs(TAGGED), ids=lambda d: d.name)
def test_save_pretrained_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "out")
    files = {f.name for f in folder.iterdir()} - {"expected.safetensors"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == files
    saved, source = (_bytes(load_file(d / "model.safetensors")) for d in (tmp_path / "out", folder))
    assert saved == source
    for name in ("config.json", "quantize_config.json"):
        if (folder / name).is_file():
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = load_model(tmp_path / "out", dtype=torch.float32)
    assert _bytes(again.state_dict()) == _bytes(model.state_dict())


def test_saving_a_copy_in_shards_and_over_the_source_works(
    checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoints / ACT_ORDER, folder)
    model = copy.deepcopy(load_model(folder, dtype=torch.float32))
    model.save_pretrained(folder, max_shard_size="300KB")
    assert not (folder / "model.safetensors").exists()
    assert within(load_model(folder, dtype=torch.float32), checkpoints / ACT_ORDER)


def test_changed_float_parameter_is_saved_exactly(checkpoints: Path, tmp_path: Path) -> None:
    model = load_model(checkpoints / ACT_ORDER, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(1 / 3)
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert (saved.dtype, float(saved[0])) == (torch.float32, float(torch.tensor(1 / 3)))


def test_container_that_cannot_be_saved_points_to_convert(
    checkpoints: Path, tmp_path: Path
) -> None:
    model = load_model(checkpoints / "gguf-llama-q4_k_m")
    with pytest.raises(LayoutError, match="quant convert") as err:
        model.save_pretrained(tmp_path / "out")
    assert err.value.code == "Q-SAVE-CONTAINER"
    assert not (tmp_path / "out").exists()


def test_saving_a_model_with_a_layer_replaced_raises(checkpoints: Path, tmp_path: Path) -> None:
    model = load_model(checkpoints / ACT_ORDER)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(256, 512, bias=False)
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp\.up_proj") as err:
        model.save_pretrained(tmp_path / "out")
    assert err.value.code == "Q-SAVE-CHANGED"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", [{"state_dict": {}}, {"max_shard_size": "5 parsecs"}])
def test_save_arguments_that_cannot_be_honoured_raise(
    argument: dict[str, object], checkpoints: Path, tmp_path: Path
) -> None:
    model = load_model(checkpoints / ACT_ORDER)
    with pytest.raises(ConfigError) as err:
        model.save_pretrained(tmp_path / "out", **argument)
    assert err.value.code == "Q-CFG-VALUE"


# --------------------------------------------------------------------------------------- errors


def test_dropping_any_tensor_of_a_real_checkpoint_raises_and_names_it(
    checkpoints: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "m"
    shutil.copytree(checkpoints / DYNAMIC, folder)
    whole = load_file(folder / "model.safetensors")
    for name in whole:
        save_file({n: t for n, t in whole.items() if n != name}, folder / "model.safetensors")
        with pytest.raises(QuantError) as err:
            load_model(folder)
        assert name.rpartition(".")[0] in str(err.value), (name, str(err.value))
    save_file(whole, folder / "model.safetensors")
    assert within(load_model(folder, dtype=torch.float32), checkpoints / DYNAMIC)


def test_strict_turns_warnings_into_an_error(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "quant_core"):
        load_model(checkpoints / DYNAMIC)
    assert "match no module" in caplog.text
    with pytest.raises(CheckpointError, match="match no module") as err:
        load_model(checkpoints / DYNAMIC, strict=True)
    assert err.value.code == "Q-STRICT"


def test_unknown_override_is_named(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="load_in_9bit") as err:
        load_model(checkpoints / ACT_ORDER, load_in_9bit=True)
    assert err.value.code == "Q-CFG-KEY"


def test_unknown_quant_method_never_loads_as_float(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / ACT_ORDER, tmp_path / "m")
    for file in ("config.json", "quantize_config.json"):
        raw = json.loads((tmp_path / "m" / file).read_text())
        raw.get("quantization_config", raw)["quant_method"] = "unheard-of"
        (tmp_path / "m" / file).write_text(json.dumps(raw))
    with pytest.raises(QuantError) as err:
        load_model(tmp_path / "m")
    assert "unheard-of" in str(err.value)
