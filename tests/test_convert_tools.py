"""What the formats' own tools make of converted checkpoints."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_sets import checkpoints_root
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert, targets
from quant_core.load import load_tensor
from quant_core.plan import plan
from quant_core.registry import registry

AWQ = "gptqmodel-awq-gemm-g128"
MIXED = "gptqmodel-dynamic-4-8bit-skip"
GGUF = ("gguf-llama-q4_k_m", "gguf-moe-q4_k_m", "gguf-llama-iq3_s", "gguf-llama-q4_0",
        "gguf-moe-mxfp4_moe", "gguf-llama-iq4_xs", "ar-gguf-q4_k_m")  # fmt: skip


INTEGERS = ("autoround", "compressed_tensors", "gptq", "awq")  # safetensors, with zero points


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gguf_file(folder: Path) -> Path:
    return next(f for f in folder.iterdir() if f.suffix == ".gguf")


@pytest.mark.parametrize("name", [n for n in GGUF if (checkpoints_root() / n).is_dir()])
def test_gguf_to_gguf_gives_the_same_file(name, checkpoints, tmp_path):
    source = gguf_file(checkpoints / name)
    convert(source, tmp_path / "out.gguf", to="gguf")
    assert filecmp.cmp(source, tmp_path / "out.gguf", shallow=False)
    assert [f.name for f in tmp_path.iterdir()] == ["out.gguf"]


def test_a_ring_through_all_integer_formats_gives_the_same_bytes(fixtures, tmp_path):
    at = fixtures / AWQ
    ring = [t for t in INTEGERS if t in targets(registry()) and t != "awq"] + ["awq"]
    for i, to in enumerate(ring):
        assert convert(at, tmp_path / str(i), to=to).exact
        at = tmp_path / str(i)
    a, b = load_file(fixtures / AWQ / "model.safetensors"), load_file(at / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", [AWQ, MIXED])
def test_gguf_package_reads_the_same_weights_from_our_file(name, fixtures, tmp_path):
    gguf = pytest.importorskip("gguf")
    convert(fixtures / name, tmp_path / "out.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    source = plan(open_checkpoint(fixtures / name))
    ours = plan(open_checkpoint(tmp_path / "out.gguf"))
    public = {m.layer.stored: n for n, m in ours.quantized.items()}
    seen = set()
    for tensor in reader.tensors:
        module = tensor.name.removesuffix(".weight")
        if module not in public:
            continue
        seen.add(module)
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        want = load_tensor(source, public[module]).dequantize()
        heads = {"attn_q": 4, "attn_k": 2}.get(module.rpartition(".")[2])
        if heads:  # rows as llama.cpp rotates them
            want = want.view(heads, 2, -1, want.shape[-1]).transpose(1, 2).reshape(want.shape)
        assert torch.equal(theirs, want), module
    assert len(seen) == 14


def test_gguf_metadata_describes_model_and_tokenizer(fixtures, tmp_path):
    """Against the file that llama.cpp's own converter made of the same base model."""
    convert(fixtures / AWQ, tmp_path / "out.gguf", to="gguf")
    ours = open_checkpoint(tmp_path / "out.gguf").metadata
    theirs = open_checkpoint(gguf_file(fixtures / "gguf-llama-q4_k_m")).metadata
    skipped = {"general.name", "general.file_type", "tokenizer.ggml.merges"}
    assert theirs.keys() - skipped <= ours.keys()
    for key in theirs.keys() - skipped:
        if key.endswith(("tokens", "token_type")):  # special and unused ids are named freely there
            assert len(ours[key]) == len(theirs[key]) == 288
            assert ours[key][:256] == theirs[key][:256], key
        else:
            assert ours[key] == theirs[key], key


def test_llama_cpp_generates_from_our_file_what_our_engine_generates(fixtures, tmp_path):
    lc = pytest.importorskip("cyllama.llama.llama_cpp")
    transformers = pytest.importorskip("transformers")
    from quant_core.engines.transformers import load_model

    lc.disable_logging()
    convert(fixtures / MIXED, tmp_path / "out.gguf", to="gguf")
    prompt = "Return the number of"
    tokenizer = transformers.AutoTokenizer.from_pretrained(fixtures / MIXED)
    ids = tokenizer(prompt).input_ids
    model = lc.LlamaModel(str(tmp_path / "out.gguf"), lc.LlamaModelParams())
    assert model.get_vocab().tokenize(prompt, add_special=True, parse_special=True) == ids

    params = lc.LlamaContextParams()
    params.n_ctx = params.n_batch = 128
    params.n_threads = params.n_threads_batch = 1
    context = lc.LlamaContext(model, params)
    greedy = lc.LlamaSampler(lc.LlamaSamplerChainParams())
    greedy.add_greedy()
    context.decode(lc.llama_batch_get_one(ids, 0))
    theirs = [greedy.sample(context, -1)]
    for i in range(7):
        context.decode(lc.llama_batch_get_one([theirs[-1]], len(ids) + i))
        theirs.append(greedy.sample(context, -1))

    ours = load_model(fixtures / MIXED, dtype=torch.float32)
    with torch.inference_mode():
        out = ours.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert out[0, len(ids) :].tolist() == theirs


@pytest.mark.parametrize("to", [t for t in INTEGERS if t in targets(registry())])
def test_transformers_reads_config_and_tokenizer(to, fixtures, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert(fixtures / AWQ, tmp_path / "out", to=to)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"]
    assert config.hidden_size == 256
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [97, 98]


def test_converted_model_gives_the_same_logits(fixtures, tmp_path):
    pytest.importorskip("transformers")
    from quant_core.engines.transformers import load_model

    convert(fixtures / AWQ, tmp_path / "out", to="gptq")
    ids = torch.arange(64).view(1, 64) + 32
    with torch.inference_mode():
        a = load_model(fixtures / AWQ, dtype=torch.float32)(ids).logits
        b = load_model(tmp_path / "out", dtype=torch.float32)(ids).logits
    # the same weights; kernels may add in another order: a few float32 ulp of logits near 10
    assert (a - b).abs().max() < 1e-4


# ------------------------------------------------------------------------- what is refused clearly


def edited(folder: Path, tmp_path: Path, file: str, change) -> Path:
    """A copy of ``folder`` with one JSON file changed."""
    copy = shutil.copytree(folder, tmp_path / "source")
    data = json.loads((folder / file).read_text())
    change(data)
    (copy / file).write_text(json.dumps(data))
    return copy


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", lambda c: c.update(model_type="none_such"), "model_type is 'none_such'"),
        (
            "config.json",
            lambda c: c["rope_parameters"].update(rope_type="yarn", factor=4.0),
            "rope_type 'default'",
        ),
        ("config.json", lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu'"),
        ("tokenizer.json", lambda t: t["model"].update(type="Unigram"), "byte-level BPE"),
        ("tokenizer.json", lambda t: t["model"].update(byte_fallback=True), "byte-level BPE"),
        (
            "tokenizer.json",
            lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
            "name in llama.cpp is known",
        ),
    ],
    ids=["arch", "rope", "activation", "unigram", "byte_fallback", "pre_tokenizer"],
)
def test_gguf_refuses_what_it_cannot_describe(fixtures, tmp_path, file, change, reason):
    from quant_core.errors import LayoutError

    source = edited(fixtures / AWQ, tmp_path, file, change)
    with pytest.raises(LayoutError) as caught:
        convert(source, tmp_path / "out", to="gguf")
    assert caught.value.code == "Q-LAYOUT-REPRESENT"
    assert reason in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("pre_tokenizer", "merges", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, ["a b"], "gpt-2"),
        ({"type": "ByteLevel", "use_regex": False}, ["a b"], ""),
        ({"type": "ByteLevel", "use_regex": False}, [], "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True}, [], ""),
        (None, [], ""),
    ],
)
def test_pre_tokenizer_names(pre_tokenizer, merges, name):
    from quant_plugin_gguf.vocab import pre_tokenizer as name_of

    found = name_of({"pre_tokenizer": pre_tokenizer, "model": {"merges": merges}})
    assert found == name


# --------------------------------------------------------------------------------------- memory

_PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from quant_core.convert import convert
small, large, out = sys.argv[1:]
convert(small, out + "-small", to="awq", max_shard_bytes=4 << 20)  # imports, allocator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(large, out, to="awq", max_shard_bytes=4 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def made(folder: Path, layers: int) -> Path:
    """A symmetric 4-bit GPTQ checkpoint of ``layers`` matrices of 4 MiB."""
    from safetensors.torch import save_file

    n, k, g = 2048, 4096, 128
    words = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int32)
    tensors = {}
    for i in range(layers):
        name = f"model.layers.{i}.mlp.down_proj"
        tensors[f"{name}.qweight"] = words.clone()
        tensors[f"{name}.qzeros"] = torch.full((k // g, n // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.full((k // g, n), 0.01, dtype=torch.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    block = {"quant_method": "gptq", "bits": 4, "group_size": g, "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    return folder


def test_memory_follows_one_matrix_and_one_shard(tmp_path):
    small, large = made(tmp_path / "small", 3), made(tmp_path / "large", 20)
    size = (large / "model.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, small, large, tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(run.stdout.split()[-1]) * 1024
    assert size > 80 << 20
    assert grown < 40 << 20  # some shards and matrices of 4 MiB, half of the whole
