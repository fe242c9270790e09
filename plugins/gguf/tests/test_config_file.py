"""The small file that a config is made of says what the whole file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant_core.checkpoint.open import open_checkpoint

transformers = pytest.importorskip("transformers")

WORDS = [f"word{i}" for i in range(77)]
LLAMA = {
    "general.architecture": "llama",
    "general.name": "made",
    "general.alignment": 64,
    "llama.block_count": 3,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 5e5,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [1] * len(WORDS),
    "tokenizer.ggml.merges": ["a b", "c d"],
    "tokenizer.ggml.bos_token_id": 5,
    "tokenizer.ggml.eos_token_id": 6,
}
ROW = bytes(4 * 32)


def configs(path: Path) -> tuple[dict, dict]:
    """(of the whole file, of what ``config_args`` gives), without the folder's name."""
    made = []
    with open_checkpoint(path) as checkpoint:
        with checkpoint.config_args() as small:
            for args in (checkpoint.pretrained_args(), small):
                made.append(transformers.AutoConfig.from_pretrained(**args).to_dict())
        assert not Path(small["pretrained_model_name_or_path"]).exists()
    for config in made:
        config.pop("_name_or_path", None)
    return made[0], made[1]


@pytest.mark.parametrize("head", [True, False])
def test_config_equals_that_of_the_whole_file(gguf, head):
    names = ["token_embd.weight", *(["output.weight"] if head else [])]
    path = gguf.write(gguf.model([(n, "f32", (1, 32), ROW) for n in names], LLAMA, alignment=64))
    whole, small = configs(path)
    assert whole == small
    assert small["vocab_size"] == len(WORDS)
    assert small["tie_word_embeddings"] is not head
    assert (small["bos_token_id"], small["num_hidden_layers"]) == (5, 3)


def test_stated_vocabulary_size_goes_before_that_of_the_tokens(gguf):
    stated = LLAMA | {"llama.vocab_size": 80}
    whole, small = configs(gguf.write(gguf.model([("output.weight", "f32", (1, 32), ROW)], stated)))
    assert whole == small
    assert small["vocab_size"] == 80


def test_vocabulary_is_not_copied(gguf):
    path = gguf.write(gguf.model([("token_embd.weight", "f32", (1, 32), ROW)], LLAMA, alignment=64))
    with open_checkpoint(path) as checkpoint, checkpoint.config_args() as small:
        data = Path(small["pretrained_model_name_or_path"], small["gguf_file"]).read_bytes()
    assert b"word7" not in data
    assert b"a b" not in data


def test_smollm2_in_the_wheel(smollm2):
    whole, small = configs(smollm2)
    assert whole == small
    assert small["vocab_size"] == 49152


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gguf-llama-q4_k_m", "gguf-moe-q4_k_m", "gguf-moe-mxfp4_moe"])
def test_shared_files(shared_checkpoints, name):
    whole, small = configs(shared_checkpoints / name)
    assert whole == small
