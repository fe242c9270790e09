"""Real files: SmolLM2 as published, and checkpoints made by llama.cpp and AutoRound."""

from __future__ import annotations

import json
import time

import gguf as oracle
import pytest
import torch
from safetensors.torch import load_file

from quant_core.checkpoint.open import open_checkpoint
from quant_core.plan import member_parts, plan
from quant_core.scheme import Scheme
from quant_plugin_gguf.reader import read_header
from quant_plugin_gguf.rows import to_public_rows

NAMES = [
    "ar-gguf-q4_k_m",
    "gguf-llama-iq3_s",
    "gguf-llama-iq4_nl",
    "gguf-llama-iq4_xs",
    "gguf-llama-q2_k",
    "gguf-llama-q4_0",
    "gguf-llama-q4_k_m",
    "gguf-llama-q5_k_m",
    "gguf-llama-q6_k",
    "gguf-llama-q8_0",
    "gguf-moe-mxfp4_moe",
    "gguf-moe-q4_k_m",
]


def _canonical(checkpoint, member):
    """(expert, stored tensors, canonical tensors) of every matrix of a member."""
    matrices: dict[int | None, dict] = {}
    for param, name, index, _ in member_parts(member):
        expert = index[0] if index else None
        matrices.setdefault(expert, {})[param.name] = checkpoint.read(name, index)
    for expert, tensors in matrices.items():
        yield expert, tensors, member.scheme.canonicalize(member.layer, tensors)


def _stored_of(checkpoint, public: str) -> str:
    return next(s for s in checkpoint.tensors if checkpoint.public_name(s) == public)


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_weights_equal_the_producers_values(shared_checkpoints, name):
    folder = shared_checkpoints / name
    checkpoint = open_checkpoint(folder)
    members = {m.layer.name: m for m in plan(checkpoint).members.values()}
    expected = load_file(folder / "expected.safetensors")
    checked = 0
    for key, want in expected.items():
        if not key.startswith("weight."):
            continue
        stored, *marks = key.removeprefix("weight.").split("#")
        public_order = stored.startswith("model.")
        stored = _stored_of(checkpoint, stored) if public_order else stored
        public = checkpoint.public_name(stored)
        expert = next((int(m[1:]) for m in marks if m.startswith("e")), None)
        rows = next((int(m) for m in marks if m.isdigit()), None)
        matrices = {e: lt for e, _, lt in _canonical(checkpoint, members[public[:-7]])}
        have = matrices[expert].dequantize()
        heads = checkpoint.permuted_heads(stored)
        if heads and not public_order:  # the producer kept the file's row order
            order = to_public_rows(torch.arange(len(have)), heads)
            assert not torch.equal(have[:rows], want)
            have = torch.empty_like(have).index_copy_(0, order, have)
        assert torch.equal(have[:rows], want), key
        checked += 1
    assert checked >= 3


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_goes_back_to_its_stored_bytes(shared_checkpoints, name):
    checkpoint = open_checkpoint(shared_checkpoints / name)
    quantized = [m for m in plan(checkpoint).members.values() if isinstance(m.scheme, Scheme)]
    assert len(quantized) > 10
    for member in quantized:
        for _, stored, lt in _canonical(checkpoint, member):
            back = member.scheme.serialize(member.layer, lt)
            assert back.keys() == stored.keys()
            assert all(torch.equal(back[n], stored[n]) for n in stored), member.layer.name


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gguf-llama-q4_k_m", "gguf-moe-q4_k_m"])
def test_transformers_finds_the_config_in_the_file(shared_checkpoints, name):
    from transformers import AutoConfig

    folder = shared_checkpoints / name
    config = AutoConfig.from_pretrained(**open_checkpoint(folder).pretrained_args())
    stated = json.loads((folder / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(config, key) == stated[key]


@pytest.mark.shared
def test_transformers_finds_the_tokenizer_in_the_file(shared_checkpoints):
    from transformers import AutoTokenizer

    args = open_checkpoint(shared_checkpoints / "ar-gguf-q4_k_m").pretrained_args()
    ids = AutoTokenizer.from_pretrained(**args)("Hello").input_ids
    assert ids == list(b"Hello")  # a byte-level vocabulary


def test_smollm2_header_opens_fast_and_agrees_with_gguf_package(smollm2):
    start = time.perf_counter()
    header = read_header(smollm2)
    assert time.perf_counter() - start < 0.5
    reader = oracle.GGUFReader(smollm2)
    assert len(header.tensors) == len(reader.tensors) == 272
    for theirs in reader.tensors:
        ours = header.tensors[theirs.name]
        assert ours.shape == tuple(int(d) for d in reversed(theirs.shape))
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.type.name == theirs.tensor_type.name
    for key in ("general.name", "llama.rope.freq_base", "tokenizer.ggml.token_type"):
        assert header.metadata[key] == reader.fields[key].contents()
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == reader.fields["tokenizer.ggml.tokens"].contents()


def test_smollm2_plan_and_first_layer(smollm2):
    checkpoint = open_checkpoint(smollm2)
    p = plan(checkpoint)
    assert len(p.quantized) == 211
    assert p.ledger.unclaimed() == []
    assert p.warnings == []
    member = p.members["model.layers.0.self_attn.k_proj"]
    assert member.scheme.heads == 3
    ((_, stored, lt),) = _canonical(checkpoint, member)
    assert torch.equal(member.scheme.serialize(member.layer, lt)["weight"], stored["weight"])
    rows = oracle.quants.dequantize(stored["weight"].numpy(), oracle.GGMLQuantizationType.Q4_1)
    want = torch.from_numpy(rows).view(3, 32, 2, 576).transpose(1, 2).reshape(192, 576)
    assert torch.equal(lt.dequantize(), want)
