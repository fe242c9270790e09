"""The description: how it is found, what it may say, and how it must agree with what is stored."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import quant_plugin_modelslim_npu as plugin
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, ConfigError, FormatError
from quant_core.scheme import Scheme
from quant_core.spec import Unquantized


def _plan(ms, write, kind="W8A8_DYNAMIC", tensors=None, entries=None, **keys):
    tensors = ms.named(ms.layer(kind)) if tensors is None else tensors
    entries = ms.described(ms.layer(kind), kind) if entries is None else entries
    return ms.plan(write(tensors, entries, **keys))


def test_import_of_everything_but_layout_loads_no_torch():
    names = "config detect kinds layers scheme".split()
    imports = ", ".join(f"{plugin.__name__}.{n}" for n in names)
    code = (
        f"import sys, {imports}\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_loads_no_torch(ms, write):
    kind = "W4A4_FLATQUANT_DYNAMIC"
    tensors = ms.layer(kind)
    folder = write(ms.named(tensors), ms.described(tensors, kind)).folder
    code = (
        "import sys\n"
        "from quant_core.checkpoint.open import open_checkpoint\n"
        "from quant_core.plan import plan\n"
        "from quant_core.registry import load_registry\n"
        f"p = plan(open_checkpoint({str(folder)!r}), "
        "registry=load_registry(only=['modelslim_npu']))\n"
        "assert len(p.quantized) == 1 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_file_alone_declares_the_format(ms, write):
    tensors = ms.layer("W8A8")
    entries = ms.described(tensors, "W8A8")
    found = plugin.detect_format(write(ms.named(tensors), entries))
    assert (found.level, found.evidence) == ("declared", "quant_model_description.json")


def test_a_file_with_the_type_in_its_name_is_found(ms, write):
    tensors = ms.layer("W8A8")
    file = "quant_model_description_w8a8.json"
    found = plugin.detect_format(write(ms.named(tensors), ms.described(tensors, "W8A8"), file))
    assert found.evidence == file
    assert file in plugin.plugin_info().side_files


def test_without_the_file_the_weights_are_unknown(ms, write):
    with pytest.raises(FormatError) as err:
        ms.plan(write(ms.named(ms.layer("W8A8")), None))
    assert err.value.code == "Q-FMT-UNKNOWN"


def test_a_description_of_other_weights_claims_nothing(ms, write):
    checkpoint = write({"a.weight": torch.ones(2, 2)}, {"b.weight": "W8A8"})
    assert plugin.detect_format(checkpoint) is None


def test_two_descriptions_are_refused(ms, write):
    tensors = ms.layer("W8A8")
    checkpoint = write(ms.named(tensors), ms.described(tensors, "W8A8"))
    text = (checkpoint.folder / "quant_model_description.json").read_text()
    (checkpoint.folder / "quant_model_description_w8a8.json").write_text(text)
    with pytest.raises(ConfigError, match="2 descriptions") as err:
        plugin.detect_format(checkpoint)
    assert err.value.code == "Q-CFG-CONFLICT"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("W4A4_MXFP4_DUALSCALE", "no published meaning"),
        ("W4A4_MXFP4_SVD", "low-rank"),
        ("W4A4_MXFP4_FLATQUANT", "online transforms"),
        ("W8A8S", "no known type"),
        ("w8a8", "no known type"),
    ],
)
def test_types_that_are_not_read_are_refused_by_name(ms, write, text, word):
    with pytest.raises(ConfigError, match=word) as err:
        _plan(ms, write, entries={f"{ms.NAME}.weight": text})
    assert err.value.code == "Q-CFG-VALUE"
    assert text in str(err.value)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"version": "2.0.0"}, "Q-CFG-VERSION"),
        ({"version": 1}, "Q-CFG-TYPE"),
        ({"group_size": "64"}, "Q-CFG-VALUE"),
        ({"group_size": True}, "Q-CFG-VALUE"),
        ({"group_size": -2}, "Q-CFG-VALUE"),
        ({"metadata": ["quarot"]}, "Q-CFG-TYPE"),
        ({"metadata": {"quarot": {"heads_rotation": {"layers": ["a"]}}}}, "Q-CFG-TRANSFORM"),
    ],
)
def test_bad_keys_are_named(ms, write, keys, code):
    with pytest.raises(ConfigError) as err:
        _plan(ms, write, **keys)
    assert err.value.code == code
    assert next(iter(keys)) in str(err.value)


def test_empty_quarot_block_and_rotation_merged_offline_are_fine(ms, write):
    optional = {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}
    metadata = {"quarot": {"max_tp_size": 4, "heads_rotation": {}}}
    assert _plan(ms, write, optional=optional, metadata=metadata).warnings == []


@pytest.mark.parametrize(
    "leaf", ["heads_rotation", "kronecker_rotation_m", "div.mul_scale", "svd_lowrank_l1"]
)
def test_online_transforms_are_refused_never_skipped(ms, write, leaf):
    tensors = ms.named(ms.layer("W8A8_DYNAMIC")) | {f"{ms.NAME}.{leaf}": torch.ones(4)}
    with pytest.raises(ConfigError) as err:
        _plan(ms, write, tensors=tensors)
    assert err.value.code == "Q-CFG-TRANSFORM"
    assert err.value.tensor == f"{ms.NAME}.{leaf}"


def test_unknown_keys_and_quantized_attention_are_warned_of(ms, write):
    entries = ms.described(ms.layer("W8A8_DYNAMIC"), "W8A8_DYNAMIC")
    planned = _plan(
        ms, write, entries=entries, novelty=3, **{"model.layers.0.self_attn.quant_type": "FP8"}
    )
    assert len(planned.warnings) == 2
    assert "'novelty'" in planned.warnings[0]
    assert "attention" in planned.warnings[1]


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_MIX", "W4A8_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC"])
def test_every_lost_tensor_is_named(ms, write, kind):
    tensors = ms.layer(kind)
    for leaf in tensors:
        rest = {k: v for k, v in ms.named(tensors).items() if k != f"{ms.NAME}.{leaf}"}
        with pytest.raises(CheckpointError, match=f"{ms.NAME}.{leaf}") as err:
            _plan(ms, write, kind, tensors=rest)
        assert err.value.code == "Q-TENSOR-MISSING"


def test_a_tensor_too_many_is_named(ms, write):
    tensors = ms.named(ms.layer("W8A8")) | {f"{ms.NAME}.surplus": torch.ones(1)}
    with pytest.raises(CheckpointError, match="surplus") as err:
        _plan(ms, write, "W8A8", tensors=tensors)
    assert err.value.code == "Q-TENSOR-UNEXPECTED"


def test_type_of_plain_weights_and_no_type_of_codes_are_contradictions(ms, write):
    name = f"{ms.NAME}.weight"
    codes = ms.named(ms.layer("W8A8_DYNAMIC"))
    plain = {name: torch.ones(ms.N, ms.K).bfloat16()}
    for tensors, entries, word in (
        (plain, {name: "W8A8"}, "not W8A8"),
        (codes, {name: "FLOAT"}, "but FLOAT"),
        (codes, {f"{ms.NAME}.weight_scale": "W8A8"}, "but not listed"),
    ):
        with pytest.raises(CheckpointError, match=word) as err:
            _plan(ms, write, tensors=tensors, entries=entries)
        assert err.value.code == "Q-CKPT-MISMATCH"


def test_siblings_are_told_apart_at_the_dot(ms, write):
    """formats-float.md 5.1: layers.1 must not match layers.10."""
    one, ten = "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"
    layer = ms.layer("W8A8_DYNAMIC")
    tensors = ms.named(layer, ten) | {f"{one}.weight": torch.ones(ms.N, ms.K).bfloat16()}
    entries = ms.described(layer, "W8A8_DYNAMIC", ten) | {f"{one}.weight": "FLOAT"}
    planned = _plan(ms, write, tensors=tensors, entries=entries)
    assert isinstance(planned.members[one].scheme, Unquantized)
    assert isinstance(planned.members[ten].scheme, Scheme)


def test_kv_scales_are_offered_and_those_of_the_softmax_skipped_with_one_warning(ms, write):
    path = "model.layers.0.self_attn"
    layer = ms.layer("W8A8_DYNAMIC") | {
        "kv_cache_scale": torch.ones(ms.N), "kv_cache_offset": torch.zeros(ms.N),
    }  # fmt: skip
    plain = {"weight": torch.ones(4, ms.K).bfloat16(), "kv_cache_scale": torch.ones(4)}
    tensors = ms.named(layer, f"{path}.k_proj") | ms.named(plain, f"{path}.v_proj")
    tensors[f"{path}.fa_q.scale"] = torch.ones(4, 1)
    entries = ms.described(layer, "W8A8_DYNAMIC", f"{path}.k_proj")
    entries[f"{path}.v_proj.weight"] = "FLOAT"
    planned = _plan(ms, write, tensors=tensors, entries=entries)
    assert planned.warnings == ["KV-cache scales present, not applied (1 attention modules)"]
    rules = set(planned.ledger.skipped.values())
    assert rules == {"KV-cache scales present, not applied"}
    assert list(planned.ledger.skipped) == [f"{path}.fa_q.scale"]
    scheme = planned.attention[path].scheme
    assert scheme.operands["k"].label == "int8 block(0,1):f32 code-zero"
    assert scheme.operands["v"].label == "int8 block(0,1):f32"
    assert not scheme.default


def test_experts_of_two_types_are_refused(ms, write):
    tensors, entries = {}, {}
    for e, kind in enumerate(("W8A8_DYNAMIC", "W4A8_DYNAMIC")):
        path = f"model.layers.0.mlp.experts.{e}.up_proj"
        tensors |= ms.named(ms.layer(kind), path)
        entries |= ms.described(ms.layer(kind), kind, path)
    with pytest.raises(ConfigError, match=r"experts\.1") as err:
        _plan(ms, write, tensors=tensors, entries=entries)
    assert err.value.code == "Q-CFG-CONFLICT"


def test_a_lost_expert_is_named(ms, write):
    tensors, entries = {}, {}
    for e in (0, 2):
        path = f"model.layers.0.mlp.experts.{e}.up_proj"
        tensors |= ms.named(ms.layer("W8A8"), path)
        entries |= ms.described(ms.layer("W8A8"), "W8A8", path)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj") as err:
        _plan(ms, write, tensors=tensors, entries=entries)
    assert err.value.code == "Q-TENSOR-MISSING"


def test_other_containers_are_not_claimed(ms, write, tmp_path):
    checkpoint = write(ms.named(ms.layer("W8A8")), {"b.weight": "FLOAT"})
    save_file({"c.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    assert plugin.detect_format(open_checkpoint(tmp_path / "other.safetensors")) is None
    checkpoint.container = "gguf"
    assert plugin.detect_format(checkpoint) is None
