"""Layers that are stored alike are built once, then stamped out: same model, same refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_sets import FIXTURES
from quant_core import load_model
from quant_core.alike import Pattern, pattern_of
from quant_core.errors import LayoutError, QuantError, QuantWarning
from quant_core.nn import QuantLinear
from quant_core.plan import plan
from quant_kernels_cpu.library import unavailable

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux /proc"),
    pytest.mark.skipif(bool(unavailable()), reason="no CPU kernels"),
]

HIDDEN, INNER, LAYERS, GROUP = 128, 256, 3, 64
LINEARS = {
    **{f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
    **{f"mlp.{x}_proj": (INNER, HIDDEN) for x in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                            "group_size": GROUP},
            }
        },
    },
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A Llama in compressed-tensors, 4 bits; every layer has numbers of its own."""
    rng = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(32, HIDDEN, generator=rng).bfloat16()
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, (n, k) in LINEARS.items():
            words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), generator=rng)
            scale = torch.rand(n, k // GROUP, generator=rng) + 0.5
            tensors[f"{at}.{name}.weight_packed"] = words.int()
            tensors[f"{at}.{name}.weight_scale"] = scale.bfloat16()
            tensors[f"{at}.{name}.weight_shape"] = torch.tensor([n, k])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def stamped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Members that were built like the first of their kind."""
    names: list[str] = []
    real = Pattern.layer

    def noted(self: Pattern, stored: dict, name: str, rechoose: object) -> object:
        names.append(name)
        return real(self, stored, name, rechoose)

    monkeypatch.setattr(Pattern, "layer", noted)
    return names


def linears(model: torch.nn.Module) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def test_layers_alike_hold_their_own_tensors_and_names(path: Path, stamped: list[str]) -> None:
    placed, copied = (linears(load_model(path, mmap=m)) for m in (True, False))
    assert len(placed) == len(LINEARS) * LAYERS
    assert len(stamped) == len(placed) - 3, "one of each shape is built by itself"
    tensors = load_file(path / "model.safetensors")
    x = torch.randn(2, INNER).bfloat16()
    for name, module in placed.items():
        assert module.layer == module.members[0].name == name
        held, other = module.restore().weight, copied[name].restore().weight
        assert torch.equal(held.codes.view(torch.int32), tensors[f"{name}.weight_packed"])
        assert torch.equal(held.scales[0], tensors[f"{name}.weight_scale"])
        assert torch.equal(held.dequantize(), other.dequantize())
        assert module._parameters == {}
        assert not module.training
        given = x[:, : module.in_features]
        want = given.float() @ held.dequantize().T
        # one rounding to bfloat16 of an output, and of each of its terms
        assert (module(given).float() - want).norm() <= 2**-7 * want.norm()


def test_layers_alike_are_modules_of_their_own(path: Path) -> None:
    held = list(linears(load_model(path, mmap=True)).values())
    held[0].register_buffer("more", torch.ones(1))
    held[0].register_forward_hook(lambda *args: None)
    assert all("more" not in m._buffers and not m._forward_hooks for m in held[1:])


def test_value_that_the_scheme_looks_at_is_looked_at_in_every_layer(path: Path) -> None:
    tensors = load_file(file := path / "model.safetensors")
    tensors[bad := "model.layers.2.mlp.up_proj.weight_shape"] += 1
    save_file(tensors, file)
    with pytest.raises(LayoutError) as err:
        load_model(path, mmap=True)
    assert (err.value.code, err.value.tensor) == ("Q-LAYOUT-SHAPE", bad)


def test_scale_of_a_layer_alike_that_is_no_number_is_refused(path: Path) -> None:
    tensors = load_file(file := path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight_scale"][5, 1] = float("inf")
    save_file(tensors, file)
    with pytest.raises(LayoutError) as err:
        load_model(path, mmap=True)
    found = (err.value.code, err.value.tensor, err.value.actual)
    assert found == ("Q-VALUE-SCALE", "model.layers.2.mlp.up_proj", 1)


def test_kernel_named_for_one_layer_runs_that_layer(path: Path, stamped: list[str]) -> None:
    model = load_model(path, mmap=True, kernels=["cpu_stored", "*.1.mlp.*=torch_ref"])
    kernels = {name: m.kernel.name for name, m in linears(model).items()}
    other = {name for name, kernel in kernels.items() if kernel != "cpu_stored"}
    named = {n for n in kernels if ".1.mlp." in n}
    assert stamped
    assert not named & set(stamped) or not other  # a kind of their own, built for itself
    assert other <= named


def test_tensor_that_was_computed_shows_no_pattern(path: Path) -> None:
    module = next(iter(linears(load_model(path, mmap=True)).values()))
    lt = module.restore()  # copies
    stored = {"weight_packed": lt.weight.codes, "weight_scale": lt.weight.scales[0]}
    choice = module._rechoose(module.op)
    scheme = next(iter(plan(path).quantized.values())).scheme
    stored["weight_shape"] = torch.tensor(scheme.shape)
    assert pattern_of(module, choice, lt, stored, scheme) is None
    held = {**stored, "weight_packed": module.codes, "weight_scale": module.scales_0}
    assert pattern_of(module, choice, lt, held, scheme) is None


def test_zeros_that_are_computed_are_those_of_every_layer(stamped: list[str]) -> None:
    path = FIXTURES / "gptqmodel-awq-gemm-g128"
    placed, copied = (linears(load_model(path, mmap=m)) for m in (True, False))
    assert stamped
    for name in stamped:
        held, other = (models[name].restore().weight for models in (placed, copied))
        assert torch.equal(held.zeros, other.zeros), name
        assert len({int(z) for z in held.zeros.flatten()}) > 1
        assert torch.equal(held.scales[0], other.scales[0])
        assert torch.equal(held.dequantize(), other.dequantize())


@pytest.fixture
def gptq(path: Path) -> Path:
    """The same sizes in GPTQ, symmetric, columns in order."""
    rng = torch.Generator().manual_seed(1)
    tensors = {n: t for n, t in load_file(path / "model.safetensors").items() if "_proj." not in n}
    for layer in range(LAYERS):
        for name, (n, k) in LINEARS.items():
            at, groups = f"model.layers.{layer}.{name}", k // GROUP
            words = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), generator=rng)
            tensors[f"{at}.qweight"] = words.int()
            tensors[f"{at}.qzeros"] = torch.full((groups, n // 8), 0x77777777).int()
            tensors[f"{at}.scales"] = (torch.rand(groups, n, generator=rng) + 0.5).half()
            tensors[f"{at}.g_idx"] = (torch.arange(k) // GROUP).int()
    save_file(tensors, path / "model.safetensors")
    block = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True,
             "desc_act": False, "checkpoint_format": "gptq"}  # fmt: skip
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": block}))
    return path


def test_layers_of_usual_values_are_alike(gptq: Path, stamped: list[str]) -> None:
    placed, copied = (linears(load_model(gptq, mmap=m)) for m in (True, False))
    assert len(stamped) == len(LINEARS) * LAYERS - 3, "one of each shape is built by itself"
    tensors = load_file(gptq / "model.safetensors")
    for name, module in placed.items():
        held, other = module.restore().weight, copied[name].restore().weight
        assert torch.equal(held.codes.view(torch.int32), tensors[f"{name}.qweight"])
        assert torch.equal(held.dequantize(), other.dequantize())


ODD = "model.layers.1.mlp.up_proj"


def test_layer_whose_zeros_are_in_the_other_dialect_is_built_by_itself(
    gptq: Path, stamped: list[str]
) -> None:
    tensors = load_file(file := gptq / "model.safetensors")
    before = linears(load_model(gptq, mmap=True))[ODD].restore().weight.dequantize()
    tensors[f"{ODD}.qzeros"] += 0x11111111
    save_file(tensors, file)
    stamped.clear()
    with pytest.warns(QuantWarning, match="zeros are stored as z - 1, the values are z"):
        after = linears(load_model(gptq, mmap=True))[ODD].restore().weight.dequantize()
    assert stamped
    assert ODD not in stamped
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("leaf", "code", "told"),
    [("qzeros", "Q-CFG-CONFLICT", f"{ODD}.qzeros"), ("g_idx", "Q-VALUE-GIDX", f"{ODD}.g_idx")],
)
def test_values_of_a_layer_alike_are_looked_at(gptq: Path, leaf: str, code: str, told: str) -> None:
    tensors = load_file(file := gptq / "model.safetensors")
    value = tensors[f"{ODD}.{leaf}"].view(-1)
    value[-1] = 0x77777776 if leaf == "qzeros" else 0
    save_file(tensors, file)
    with pytest.raises(QuantError) as err:
        load_model(gptq, mmap=True)
    assert (err.value.code, err.value.tensor) == (code, told)
