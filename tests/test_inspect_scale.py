"""``quant inspect`` reads headers only: a 100,000-tensor, 400 GB checkpoint in 5 s and 500 MB.

The checkpoint is made of valid headers over sparse files, so it takes a few MB of disk. It is
inspected by a child process that reports its own processor time and peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAYERS = 3571
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
K, N, GROUP = 8192, 4096, 128
PER_SHARD = 36  # layers
MAX_SECONDS, MAX_BYTES = 5.0, 500 * 10**6
MAX_TIMES = 40  # what json takes for the same headers; 16 to 26 measured

# VmHWM and not ru_maxrss: the latter also counts the parent's memory before exec.
PROBE = """
import json, sys, time
from quant_core.cli.main import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
used = {"cpu_s": time.process_time(), "peak_bytes": int(peak) * 1024}
print(json.dumps(used | {"torch": "torch" in sys.modules}), file=sys.stderr)
sys.exit(code)
"""

LEAVES = {  # 4 bit, eight codes a word
    "qweight": ("I32", (K // 8, N)),
    "qzeros": ("I32", (K // GROUP, N // 8)),
    "scales": ("F16", (K // GROUP, N)),
    "g_idx": ("I32", (K,)),
}
WIDTH = {"I32": 4, "F16": 2, "BF16": 2}


def tensors_of(layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{layer}"
    out = {f"{prefix}.{m}.{leaf}": what for m in MODULES for leaf, what in LEAVES.items()}
    if layer < 12:  # a few floats, to make the count round
        out[f"{prefix}.input_layernorm.weight"] = ("BF16", (N,))
    return out


def write_shard(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """A valid header, and as much nothing behind it as it announces; the bytes announced."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, elements = end, 1
        for n in shape:
            elements *= n
        end += elements * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return end


def write_checkpoint(folder: Path) -> tuple[int, int]:
    """(tensors, bytes) of a sharded checkpoint with an index and a config."""
    starts = range(0, LAYERS, PER_SHARD)
    weight_map, total = {}, 0
    for number, start in enumerate(starts, 1):
        name = f"model-{number:05d}-of-{len(starts):05d}.safetensors"
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for layer in range(start, min(start + PER_SHARD, LAYERS)):
            tensors |= tensors_of(layer)
        total += write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False,
            "sym": True, "checkpoint_format": "gptq",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return len(weight_map), total


def parsing(folder: Path) -> float:
    """Processor seconds that json takes for all headers and the index."""
    start = time.process_time()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            json.loads(f.read(int.from_bytes(f.read(8), "little")))
    json.loads((folder / "model.safetensors.index.json").read_text())
    return time.process_time() - start


@pytest.mark.slow
def test_inspect_100k_tensors_400_gb_in_5_s_and_500_mb(tmp_path: Path) -> None:
    count, nbytes = write_checkpoint(tmp_path)
    assert count == 100_000
    assert nbytes > 400 * 10**9
    command = [sys.executable, "-c", PROBE, "inspect", str(tmp_path), "--json", "--tp", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data, used = json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])
    print(f"inspect of {count:,} tensors: {used}")
    assert (data["tensors"], data["stored_bytes"]) == (count, nbytes)
    assert data["quantized_modules"] == LAYERS * len(MODULES)
    assert data["schemes"][0]["weights"] == LAYERS * len(MODULES) * K * N
    assert used["torch"] is False
    # processor time: nothing else running here counts, and on a slow one parsing is slow too
    assert used["cpu_s"] < max(MAX_SECONDS, MAX_TIMES * parsing(tmp_path))
    assert used["peak_bytes"] < MAX_BYTES
