"""Loading takes what the model keeps plus one matrix: peak memory of a child that loads 250 MB.

Allowed above the final size: the largest stored matrix, and SLACK for the rows of one block in
work (measured: 1 to 7 MiB). The child's allocator gives large blocks back at once: the holes that
glibc's heap keeps otherwise came to 0 to 150 MiB for one and the same load, by where small objects
lay.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux /proc"),
]

HIDDEN, INNER, LAYERS, VOCAB, GROUP = 2048, 8192, 7, 512, 128
SHAPES = {
    **{f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SLACK = 16 * 2**20

# The peak is reset after a first small load, so that imports and caches do not count.
PROBE = """
import gc, json, sys
import torch
import quant_core
from quant_core.cli.run import weight_memory

def memory(key):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])

small, large, hoard = sys.argv[1], sys.argv[2], sys.argv[3] == "hoard"
mmap = sys.argv[3] == "mmap"
torch.set_num_threads(1)
warm = quant_core.load_model(small, dtype=torch.bfloat16)  # stays: its memory is not reused
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before, own = memory("VmRSS"), memory("RssAnon")
plan = quant_core.plan(quant_core.open_checkpoint(large))
kept = [plan.checkpoint.read(n) for n in plan.checkpoint.tensors] if hoard else []
model = quant_core.load_model(large, dtype=torch.bfloat16, mmap=mmap)
print(json.dumps({
    "used": memory("VmHWM") - before,
    "own": memory("RssAnon") - own,
    "final": weight_memory(model)["model_bytes"],
    "largest": max(plan.member_nbytes(m) for m in plan.members.values()),
}))
"""


def write_model(folder: Path, layers: int) -> Path:
    """A made Llama of 4-bit layers, one shard a layer; codes and scales are random."""
    folder.mkdir()
    g = torch.Generator().manual_seed(layers)
    weight_map: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        tensors = {}
        for module, (n, k) in SHAPES.items():
            prefix = f"model.layers.{layer}.{module}"
            tensors[f"{prefix}.qweight"] = torch.randint(
                -(2**31), 2**31 - 1, (k // 8, n), generator=g, dtype=torch.int32
            )
            tensors[f"{prefix}.qzeros"] = torch.full((k // GROUP, n // 8), 0x77777777).int()
            tensors[f"{prefix}.scales"] = torch.rand(k // GROUP, n, generator=g).half()
            tensors[f"{prefix}.g_idx"] = (torch.arange(k) // GROUP).int()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        shard(f"layer-{layer}.safetensors", tensors)
    rest = {f"{n}.weight": torch.zeros(VOCAB, HIDDEN) for n in ("model.embed_tokens", "lm_head")}
    rest["model.norm.weight"] = torch.ones(HIDDEN)
    shard("rest.safetensors", {name: t.bfloat16() for name, t in rest.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True,
            "desc_act": False, "checkpoint_format": "gptq",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "small", 1), write_model(root / "large", LAYERS)


@functools.cache
def measure(models: tuple[Path, Path], kernels: str, mode: str = "load") -> dict[str, int]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    env |= {"QUANT_KERNELS": kernels} if kernels else {}
    command = [sys.executable, "-c", PROBE, *map(str, models), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    used: dict[str, int] = json.loads(done.stdout)
    print({k: f"{v / 2**20:.1f} MiB" for k, v in used.items()})
    return used


@pytest.mark.parametrize("kernels", ["", "torch_ref"], ids=["default", "torch_ref"])
def test_load_peak_is_final_plus_largest_matrix(models: tuple[Path, Path], kernels: str) -> None:
    got = measure(models, kernels)
    assert got["final"] > 200 * 2**20
    assert got["used"] <= got["final"] + got["largest"] + SLACK


def test_mapped_load_takes_hardly_memory_of_its_own(models: tuple[Path, Path]) -> None:
    got = measure(models, "", "mmap")
    assert got["final"] > 200 * 2**20
    assert got["own"] <= got["final"] // 32 + SLACK  # scales in another order; no codes
    assert measure(models, "")["own"] > got["final"] // 2


def test_load_peak_check_notices_a_second_copy(models: tuple[Path, Path]) -> None:
    got = measure(models, "", "hoard")
    assert got["used"] > got["final"] + got["largest"] + SLACK
