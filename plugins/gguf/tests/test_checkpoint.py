"""Opening files, folders and split sets; reading parts; edits of the writer undone."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, FormatError, LayoutError
from quant_core.plan import plan
from quant_plugin_gguf.checkpoint import open_gguf

LLAMA = {
    "general.architecture": "llama",
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
}


def _f32(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _q8(rows, columns, seed=0):
    """Q8_0 bytes and their values."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=(rows, columns // 32, 1)).astype(np.float16)
    q = rng.integers(-127, 128, (rows, columns // 32, 32), dtype=np.int8)
    raw = np.concatenate([d.view(np.uint8).reshape(rows, -1, 2), q.view(np.uint8)], axis=2)
    values = (d.astype(np.float32) * q).reshape(rows, columns)
    return raw.tobytes(), torch.from_numpy(values)


# ------------------------------------------------------------------------------------ opening


def test_file_folder_and_core_opener_see_the_same(gguf):
    path = gguf.write(gguf.model([("token_embd.weight", "f32", (4, 8), bytes(128))]))
    for opened in (open_gguf(path), open_gguf(path.parent), open_checkpoint(path)):
        info = opened.tensors["token_embd.weight"]
        assert (info.shape, info.dtype, info.file) == ((4, 8), "float32", "m.gguf")
        assert opened.container == "gguf"
        assert opened.folder == path.parent
        assert opened.config == {}
        assert opened.pretrained_args() == {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": "m.gguf",
        }


def test_other_files_are_not_claimed(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"not ours")
    assert open_gguf(tmp_path / "a.bin") is None
    assert open_gguf(tmp_path) is None


def test_file_without_suffix_is_claimed_by_its_magic(gguf):
    assert open_gguf(gguf.write(gguf.model([]), "blob")).version == 3


def test_folder_with_two_models_is_ambiguous(gguf):
    gguf.write(gguf.model([]), "a.gguf")
    gguf.write(gguf.model([]), "b.gguf")
    with pytest.raises(CheckpointError, match=r"a\.gguf.*b\.gguf") as err:
        open_gguf(gguf.folder)
    assert err.value.code == "Q-CKPT-AMBIGUOUS"
    assert open_gguf(gguf.folder / "a.gguf").tensors == {}


def test_config_json_beside_the_file_is_the_config(gguf):
    path = gguf.write(gguf.model([]))
    (gguf.folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert open_gguf(path).config["model_type"] == "qwen2"


def test_opening_and_planning_imports_no_torch_numpy_or_gguf(gguf):
    path = gguf.write(gguf.model([("token_embd.weight", "q4_0", (4, 32), bytes(72))]))
    code = (
        "import sys; from quant_core.checkpoint.open import open_checkpoint as o\n"
        "from quant_core.plan import plan\n"
        f"p = plan(o({str(path)!r}))\n"
        "print(p.members['model.embed_tokens'].scheme.name,"
        " [m for m in ('torch', 'numpy', 'gguf', 'triton') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "q4_0 []"


# ---------------------------------------------------------------------------------- split sets


def _part(gguf, i, count, tensors, total, name=None, number=None):
    meta = {
        "general.architecture": "qwen2",
        "split.no": i - 1 if number is None else number,
        "split.count": count,
        "split.tensors.count": total,
    }
    name = name or f"m-{i:05d}-of-{count:05d}.gguf"
    return gguf.write(gguf.model(tensors, meta), name)


def _one(name, value):
    return (name, "f32", (2,), struct.pack("<2f", value, value))


def test_split_set_is_one_checkpoint_whatever_part_is_named(gguf):
    _part(gguf, 1, 3, [], 3)
    _part(gguf, 2, 3, [_one("a", 1.0)], 3)
    last = _part(gguf, 3, 3, [_one("b", 2.0), _one("c", 3.0)], 3)
    for path in (gguf.folder, last):
        c = open_gguf(path)
        assert list(c.tensors) == ["a", "b", "c"]
        assert c.read("c").tolist() == [3.0, 3.0]
        assert c.tensors["a"].file == "m-00002-of-00003.gguf"
        assert c.pretrained_args()["gguf_file"] == "m-00001-of-00003.gguf"


def test_split_set_missing_parts_are_all_listed(gguf):
    path = _part(gguf, 2, 4, [], 0)
    with pytest.raises(CheckpointError) as err:
        open_gguf(path)
    assert err.value.code == "Q-CKPT-MISSING-SHARD"
    for i in (1, 3, 4):
        assert f"m-0000{i}-of-00004.gguf" in str(err.value)


@pytest.mark.parametrize("number", [0, 2, 7])
def test_split_set_out_of_order_is_refused(gguf, number):
    _part(gguf, 1, 2, [], 0)
    _part(gguf, 2, 2, [], 0, number=number)
    with pytest.raises(CheckpointError, match=f"split.no {number}") as err:
        open_gguf(gguf.folder)
    assert err.value.code == "Q-CKPT-MISSING-SHARD"


def test_split_part_renamed_to_a_single_file_is_refused(gguf):
    path = _part(gguf, 1, 2, [], 0, name="whole.gguf")
    with pytest.raises(CheckpointError) as err:
        open_gguf(path)
    assert err.value.code == "Q-CKPT-MISSING-SHARD"


def test_split_set_tensor_count_disagrees(gguf):
    _part(gguf, 1, 2, [_one("a", 1.0)], 3)
    _part(gguf, 2, 2, [_one("b", 1.0)], 3)
    with pytest.raises(CheckpointError, match=r"2 tensors, expected 3") as err:
        open_gguf(gguf.folder)
    assert err.value.code == "Q-CKPT-MISSING-SHARD"


def test_split_set_same_tensor_in_two_parts(gguf):
    _part(gguf, 1, 2, [_one("a", 1.0)], 2)
    _part(gguf, 2, 2, [_one("a", 1.0)], 2)
    with pytest.raises(CheckpointError) as err:
        open_gguf(gguf.folder)
    assert err.value.code == "Q-GGUF-NAME"


# ------------------------------------------------------------------------------------- reading


def test_read_returns_dtype_and_owned_memory(gguf):
    f16 = np.arange(6, dtype=np.float16)
    f32 = _f32(2, 3)
    data = gguf.model(
        [
            ("h", "f16", (2, 3), f16.tobytes()),
            ("f", "f32", (2, 3), f32.tobytes()),
            ("b", "bf16", (4,), struct.pack("<4H", 0x3F80, 0xC000, 0, 0x7F80)),
            ("q", "q4_0", (2, 64), bytes(range(72))),
        ]
    )
    path = gguf.write(data)
    c = open_gguf(path)
    assert torch.equal(c.read("h"), torch.arange(6, dtype=torch.float16).view(2, 3))
    assert torch.equal(c.read("f"), torch.from_numpy(f32))
    assert c.read("b").tolist() == [1.0, -2.0, 0.0, float("inf")]
    q = c.read("q")
    assert q.tolist() == torch.arange(72).view(2, 36).tolist()
    assert c.tensors["q"].shape == (2, 64)
    path.write_bytes(bytes(len(data)))
    assert q.tolist() == torch.arange(72).view(2, 36).tolist()


@pytest.mark.parametrize(
    "index", [(), (1,), ((1, 3),), (2, (1, 3)), ((0, 3, 2),), ((1, 3), 2), (0, 1), ((1, 1),)]
)
def test_read_index_equals_slicing_the_whole(gguf, index):
    values = _f32(3, 4, 32)
    raw = bytes(range(256)) * 2
    c = open_gguf(
        gguf.write(
            gguf.model(
                [("f", "f32", (3, 4, 32), values.tobytes()), ("q", "q4_0", (3, 4, 32), raw[:216])]
            )
        )
    )
    cut = tuple(slice(*i) if isinstance(i, tuple) else i for i in index)
    assert torch.equal(c.read("f", index), torch.from_numpy(values)[cut])
    assert torch.equal(c.read("q", index), c.read("q")[cut])
    assert c.read("q", index).is_contiguous()


@pytest.mark.parametrize("index", [(3,), (0, 4), ((0, 4),), (-1,), (0, 0, (0, 9)), (0, 0, 0, 0)])
def test_read_index_outside_or_through_blocks_raises_layout_error(gguf, index):
    c = open_gguf(gguf.write(gguf.model([("q", "q4_0", (3, 4, 32), bytes(216))])))
    with pytest.raises(LayoutError) as err:
        c.read("q", index)
    assert err.value.code == "Q-LAYOUT-SHAPE"


def test_read_of_unknown_name_changed_or_closed_file(gguf):
    data = gguf.model([("f", "f32", (1024,), bytes(4096))])
    path = gguf.write(data)
    c = open_gguf(path)
    with pytest.raises(CheckpointError) as err:
        c.read("g")
    assert err.value.code == "Q-TENSOR-MISSING"
    os.truncate(path, len(data) - 100)
    with pytest.raises(CheckpointError) as err:
        c.read("f")
    assert err.value.code == "Q-CKPT-CHANGED"
    path.write_bytes(data)
    with open_gguf(path) as again:
        assert again.read("f").sum() == 0
    with pytest.raises(CheckpointError) as err:
        again.read("f")
    assert err.value.code == "Q-CKPT-CLOSED"


def test_read_under_meta_device_gives_real_memory(gguf):
    from quant_core.numerics import element_table

    element_table.cache_clear()  # the tables must be made here, and stay usable
    mx = bytes([127, *range(16)])
    tensors = [("q", "q8_0", (1, 32), _q8(1, 32)[0]), ("m", "mxfp4", (1, 32), mx)]
    c = open_gguf(gguf.write(gguf.model(tensors)))
    with torch.device("meta"):
        assert c.read("q").device.type == "cpu"
        assert torch.equal(c.read_parameter("q"), _q8(1, 32)[1])
        assert c.read_parameter("m").device.type == "cpu"
    assert c.read_parameter("m")[0, :4].tolist() == [0.0, 0.5, 1.0, 1.5]


# ------------------------------------------------------------------------- edits of the writer


def test_read_parameter_undoes_row_order_of_llama_q_and_k(gguf):
    q, qb, k, v = _f32(16, 4), _f32(16, seed=1), _f32(8, 4, seed=2), _f32(8, 4, seed=3)
    stored_q = q.reshape(2, 2, 4, 4).swapaxes(1, 2).reshape(16, 4)
    stored_b = qb.reshape(2, 2, 4).swapaxes(1, 2).reshape(16)
    stored_k = k.reshape(1, 2, 4, 4).swapaxes(1, 2).reshape(8, 4)
    tensors = [
        ("blk.0.attn_q.weight", "f32", (16, 4), stored_q.tobytes()),
        ("blk.0.attn_q.bias", "f32", (16,), stored_b.tobytes()),
        ("blk.0.attn_k.weight", "f32", (8, 4), stored_k.tobytes()),
        ("blk.0.attn_v.weight", "f32", (8, 4), v.tobytes()),
    ]
    c = open_gguf(gguf.write(gguf.model(tensors, LLAMA)))
    assert torch.equal(c.read_parameter("blk.0.attn_q.weight"), torch.from_numpy(q))
    assert torch.equal(c.read_parameter("blk.0.attn_q.bias"), torch.from_numpy(qb))
    assert torch.equal(c.read_parameter("blk.0.attn_k.weight"), torch.from_numpy(k))
    assert torch.equal(c.read_parameter("blk.0.attn_v.weight"), torch.from_numpy(v))
    assert not torch.equal(c.read("blk.0.attn_q.weight"), torch.from_numpy(q))
    qwen = {**LLAMA, "general.architecture": "qwen2"}
    plain = open_gguf(gguf.write(gguf.model(tensors, qwen), "qwen.gguf"))
    assert torch.equal(plain.read_parameter("blk.0.attn_q.weight"), torch.from_numpy(stored_q))


def test_read_parameter_row_order_uses_heads_of_the_layer(gguf):
    k = _f32(8, 4)
    meta = {**LLAMA, "llama.attention.head_count_kv": [1, 2]}
    tensors = [
        (
            f"blk.{i}.attn_k.weight",
            "f32",
            (8, 4),
            k.reshape(h, 2, 4 // h, 4).swapaxes(1, 2).tobytes(),
        )
        for i, h in ((0, 1), (1, 2))
    ]
    c = open_gguf(gguf.write(gguf.model(tensors, meta)))
    for i in (0, 1):
        assert torch.equal(c.read_parameter(f"blk.{i}.attn_k.weight"), torch.from_numpy(k))


@pytest.mark.parametrize("count", [None, 0, "two", [1]])
def test_row_order_without_head_count_raises_naming_the_key(gguf, count):
    meta = {"general.architecture": "llama"}
    if count is not None:
        meta["llama.attention.head_count"] = count
    tensors = [("blk.1.attn_q.weight", "f32", (8, 4), bytes(128))]
    c = open_gguf(gguf.write(gguf.model(tensors, meta)))
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count") as err:
        c.read_parameter("blk.1.attn_q.weight")
    assert err.value.code == "Q-GGUF-KV"


def test_read_parameter_subtracts_one_from_gemma_norms_only(gguf):
    w = np.array([-0.25, 0.0, 0.5, 1.75], dtype=np.float32)
    tensors = [
        ("blk.0.attn_norm.weight", "f32", (4,), (w + 1).tobytes()),
        ("output_norm.weight", "f32", (4,), (w + 1).tobytes()),
        ("token_embd.weight", "f32", (1, 4), w.tobytes()),
    ]
    for arch, shift in (("gemma3", 0), ("gemma2", 0), ("llama", 1)):
        c = open_gguf(gguf.write(gguf.model(tensors, {"general.architecture": arch})))
        for name in ("blk.0.attn_norm.weight", "output_norm.weight"):
            assert c.read_parameter(name).tolist() == (w + shift).tolist()
        assert c.read_parameter("token_embd.weight").tolist() == [w.tolist()]


def test_read_parameter_dequantizes_blocks_and_gives_the_gate_its_row(gguf):
    raw, values = _q8(3 * 4, 64)
    tensors = [
        ("blk.0.ffn_up_exps.weight", "q8_0", (3, 4, 64), raw),
        ("blk.0.ffn_gate_inp_shexp.weight", "f32", (8,), _f32(8).tobytes()),
    ]
    c = open_gguf(gguf.write(gguf.model(tensors, {"general.architecture": "qwen2moe"})))
    assert torch.equal(c.read_parameter("blk.0.ffn_up_exps.weight"), values.view(3, 4, 64))
    gate = c.read_parameter("blk.0.ffn_gate_inp_shexp.weight")
    assert torch.equal(gate, torch.from_numpy(_f32(8)).view(1, 8))


def test_rotary_factors_are_ignored_only_if_the_config_states_them(gguf):
    tensors = [
        ("rope_freqs.weight", "f32", (4,), bytes(16)),
        ("output_norm.weight", "f32", (4,), bytes(16)),
    ]
    path = gguf.write(gguf.model(tensors, LLAMA))
    bare = open_gguf(path)
    assert bare.ignored == {}
    assert "config.json" in bare.warnings[0]
    assert "rope_freqs.weight" in plan(bare).dense
    for text in ({"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default"}}):
        (gguf.folder / "config.json").write_text(json.dumps(text))
        assert open_gguf(path).ignored == {}
    (gguf.folder / "config.json").write_text('{"rope_scaling": {"rope_type": "llama3"}}')
    stated = open_gguf(path)
    assert stated.ignored == {"rope_freqs.weight": "rotary factors follow from config.json"}
    assert stated.warnings == []
    assert "rope_freqs.weight" not in plan(stated).dense


def test_refused_architecture_opens_but_is_not_planned(gguf):
    data = gguf.model(
        [("output_norm.weight", "f32", (4,), bytes(16))], {"general.architecture": "mamba"}
    )
    c = open_gguf(gguf.write(data))
    assert list(c.tensors) == ["output_norm.weight"]
    with pytest.raises(FormatError, match="'mamba'") as err:
        plan(c)
    assert err.value.code == "Q-GGUF-ARCH"
