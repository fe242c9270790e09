"""Float weights rounded as the producer rounds them: its own bytes from its own source weights."""

from __future__ import annotations

import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import LayoutError
from quant_core.plan import plan
from quant_plugin_nvfp4.algos import ALGOS

O_PROJ = "model.layers.1.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"
ROW = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0, 1.1, -1.2, 1.3, -1.4, 1.5, -3.0]


@pytest.fixture
def scheme(mo, write):
    """(scheme, layer) of one made layer, and its statistics."""

    def make(algo, n=16, k=256, **extra):
        planned = mo.plan(write(mo.named(mo.stored(algo, n, k) | extra), mo.block(algo)))
        member = planned.members[mo.NAME]
        return member.scheme, member.layer

    return make


def test_nvfp4_example_of_the_producer(scheme):
    s, layer = scheme("W4A16_NVFP4", 1, 16)
    stored = s.serialize(layer, s.quantize(layer, torch.tensor([ROW])))
    assert bytes(stored["weight"][0].tolist()).hex() == "90a1a2b3c4c4d5f5"
    assert stored["weight_scale"].view(torch.uint8).item() == 0x7E
    assert stored["weight_scale_2"].item() == torch.tensor(3.0 / 2688).item()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("modelopt-nvfp4", O_PROJ),
        ("modelopt-nvfp4", DOWN),
        ("modelopt-w4a16-nvfp4", DOWN),
        ("modelopt-mxfp8", DOWN),
        ("modelopt-fp8-pc-pt", DOWN),
        ("modelopt-fp8-pb-wo", O_PROJ),
    ],
)
def test_bytes_of_the_producer_from_its_source_weights(checkpoints, name, module):
    """Layers whose scales the exporter did not merge with a neighbour's."""
    source = open_checkpoint(checkpoints / "base" / "tiny-llama")
    planned = plan(open_checkpoint(checkpoints / name))
    member = planned.members[module]
    stats = {"input_amax": torch.tensor(1.0)}  # of the activations; weights do not depend on it
    got = member.scheme.quantize(member.layer, source.read(f"{module}.weight"), stats)
    stored = member.scheme.serialize(member.layer, got)
    for leaf in ("weight", "weight_scale", "weight_scale_2"):
        if f"{module}.{leaf}" not in planned.checkpoint.tensors:
            continue
        want = planned.checkpoint.read(f"{module}.{leaf}")
        assert (stored[leaf].dtype, stored[leaf].shape) == (want.dtype, want.shape)
        a, b = (t.reshape(-1).view(torch.uint8) for t in (stored[leaf], want))
        assert torch.equal(a, b), leaf


@pytest.mark.parametrize("algo", ALGOS)
def test_rounding_is_as_near_as_its_codes_allow(scheme, algo):
    s, layer = scheme(algo)
    dense = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    dense[0, 0] = 10.0
    lt = s.quantize(layer, dense, {"input_amax": torch.tensor(8.0)})
    error = (lt.dequantize() - dense).abs()
    # half a step at the largest magnitude under one scale; powers of two may be twice too large
    halves = {"int4": 1 / 14, "int8": 1 / 254, "nvfp4": 1 / 6, "mxfp4": 1 / 3, "mxfp8": 1 / 14}
    step = halves.get(s.algo.weight, 1 / 28)
    assert bool((error <= dense.abs().max() * step * 1.07).all())
    assert float(error.norm() / dense.norm()) < {4: 0.16, 8: 0.06}[s.algo.element.bits]
    back = s.canonicalize(layer, s.serialize(layer, lt))
    assert torch.equal(back.dequantize(), lt.dequantize())


@pytest.mark.parametrize("algo", ALGOS)
def test_zeros_stay_zeros_under_finite_scales(scheme, algo):
    s, layer = scheme(algo)
    for dense in (torch.zeros(16, 256), torch.eye(16, 256)):
        lt = s.quantize(layer, dense, {"input_amax": torch.tensor(1.0)})
        assert torch.equal(lt.dequantize() == 0, dense == 0)
        back = s.canonicalize(layer, s.serialize(layer, lt))  # refuses scales that are not finite
        assert torch.equal(back.dequantize(), lt.dequantize())


def test_smoothed_weights_are_divided_by_what_the_input_is_multiplied_with(scheme):
    smooth = torch.rand(256).add(0.5)
    s, layer = scheme("W4A16_AWQ", pre_quant_scale=smooth)
    dense = torch.randn(16, 256)
    lt = s.quantize(layer, dense, {"pre_quant_scale": smooth})
    s_plain, _ = scheme("W4A16_AWQ")
    want = s_plain.quantize(layer, dense / smooth)
    assert torch.equal(lt.dequantize(), want.dequantize())
    assert torch.equal(lt.transforms[0][1][0], smooth)


def test_what_was_not_measured_is_named(scheme):
    s, layer = scheme("NVFP4")
    with pytest.raises(LayoutError, match="input_amax") as err:
        s.quantize(layer, torch.zeros(16, 256))
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    s, layer = scheme("W4A16_AWQ", pre_quant_scale=torch.ones(256))
    with pytest.raises(LayoutError, match="pre_quant_scale"):
        s.quantize(layer, torch.zeros(16, 256), {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(scheme, bad):
    s, layer = scheme("W4A16_NVFP4")
    dense = torch.zeros(16, 256)
    dense[3, 4] = bad
    with pytest.raises(LayoutError, match="1 of 4096") as err:
        s.quantize(layer, dense)
    assert err.value.code == "Q-VALUE-WEIGHT"
