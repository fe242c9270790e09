"""Float formats on worked vectors and made layers: values, bytes back, and what must fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError
from quant_core.load import read_matrix
from quant_core.spec import CHANNEL, TENSOR
from quant_plugin_compressed_tensors.floats import FloatScheme

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 = torch.tensor(E2M1 + [-v for v in E2M1])
NV = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
FP8 = {"num_bits": 8, "type": "float"}
E4M3 = torch.float8_e4m3fn


def octets(text):
    return torch.tensor([list(bytes.fromhex(text))], dtype=torch.uint8)


def load(ct, write, stored, config):
    planned = ct.plan(write(ct.named(stored), config))
    member = planned.members[ct.NAME]
    return member, read_matrix(planned, member)


def same_bytes(member, lt, stored):
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for name, want in stored.items():
        got = back[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        bits = [t.reshape(-1).view(torch.uint8) for t in (got, want)]
        assert torch.equal(*bits), name


# ------------------------------------------------------------------------------- worked vectors


def test_worked_row_of_nvfp4(ct, write):
    # computed alike by ModelOpt 0.47 and compressed-tensors 0.20
    stored = {
        "weight_packed": octets("90A1A2B3C4C4D5F5"),
        "weight_scale": octets("7E").view(E4M3),
        "weight_global_scale": torch.tensor([896.0]),
    }
    member, lt = load(ct, write, stored, ct.block(NV, format="nvfp4-pack-quantized"))
    want = [0, -0.25, 0.25, -0.5, 0.5, -0.5, 0.75, -0.75, 1, -1, 1, -1, 1.5, -1.5, 1.5, -3.0]
    assert lt.dequantize().tolist() == [want]
    same_bytes(member, lt, stored)


def test_worked_bytes_of_mxfp4(ct, write):
    packed = torch.zeros(2, 16, dtype=torch.uint8)
    packed[0, 0], packed[1, 0] = 0x21, 0xF7
    stored = {"weight_packed": packed, "weight_scale": torch.tensor([[127], [128]]).byte()}
    config = ct.block({"num_bits": 4} | MX, format="mxfp4-pack-quantized")
    member, lt = load(ct, write, stored, config)
    assert lt.dequantize()[:, :3].tolist() == [[0.5, 1.0, 0.0], [12.0, -12.0, 0.0]]
    same_bytes(member, lt, stored)


def test_worked_bytes_of_mxfp6(ct, write):
    packed = torch.zeros(1, 24, dtype=torch.uint8)
    packed[0, :3] = octets("8180FC")[0]
    stored = {"weight_packed": packed, "weight_scale": torch.tensor([[127]]).byte()}
    config = ct.block({"num_bits": 6} | MX, format="mxfp6-pack-quantized")
    member, lt = load(ct, write, stored, config)
    assert lt.dequantize()[0, :5].tolist() == [0.125, 0.25, 1.0, -7.5, 0.0]
    same_bytes(member, lt, stored)


def test_worked_bytes_of_fp8(ct, write):
    stored = {
        "weight": torch.tensor([[0x7E, 0xB8], [0x30, 0x28]], dtype=torch.uint8).view(E4M3),
        "weight_scale": torch.tensor([2.0]),
    }
    config = ct.block(FP8 | {"strategy": "tensor"}, format="float-quantized")
    member, lt = load(ct, write, stored, config)
    assert lt.dequantize().tolist() == [[896.0, -2.0], [1.0, 0.5]]
    same_bytes(member, lt, stored)


# ---------------------------------------------------------------------------------- made layers


def fp8_codes(n, k):
    """Every code but the two NaNs."""
    codes = torch.arange(n * k).view(n, k) % 254
    return (codes + (codes > 126)).to(torch.uint8).view(E4M3)


@pytest.mark.parametrize("fmt", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("args", "grain", "shape"),
    [
        ({"strategy": "tensor"}, TENSOR, (1,)),
        ({"strategy": "tensor"}, TENSOR, ()),
        ({"strategy": "channel"}, CHANNEL, (20, 1)),
        ({"group_size": 16}, (1, 16), (20, 3)),
        ({"strategy": "block", "block_structure": [16, 32]}, (16, 32), (2, 2)),
    ],
)
def test_fp8_layer_reads_and_writes_exactly(ct, write, fmt, dtype, args, grain, shape):
    n, k = 20, 48  # the last block is partial along both axes
    scale = (torch.rand(shape) + 0.1).to(dtype)
    stored = {"weight": fp8_codes(n, k), "weight_scale": scale, "bias": torch.randn(n).half()}
    member, lt = load(ct, write, stored, ct.block(FP8 | args, format=fmt))
    assert isinstance(member.scheme, FloatScheme)
    assert lt.weight.spec.scales[0].grain == grain
    full = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            at = (i // (grain[0] or n), j // (grain[1] or k))
            full[i, j] = float(scale[at] if scale.dim() == 2 else scale.item())
    assert torch.equal(lt.dequantize(), stored["weight"].float() * full)
    same_bytes(member, lt, stored)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8_layer_reads_and_writes_exactly(ct, write, dtype):
    n, k = 20, 96
    exponents = torch.randint(100, 140, (n, 3), dtype=torch.uint8)
    stored = {"weight": fp8_codes(n, k), "weight_scale": exponents.view(dtype)}
    config = ct.block(FP8 | MX, format="mxfp8-quantized")
    member, lt = load(ct, write, stored, config)
    scale = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(lt.dequantize(), stored["weight"].float() * scale)
    same_bytes(member, lt, stored)


def test_nvfp4_layer_reads_and_writes_exactly(ct, write):
    n, k = 20, 48
    codes = torch.arange(n * k).view(n, k) % 16
    fine = (torch.rand(n, 3) * 400 + 1).to(E4M3)
    stored = {
        "weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": fine,
        "weight_global_scale": torch.tensor([1234.5]),
    }
    member, lt = load(ct, write, stored, ct.block(NV, format="nvfp4-pack-quantized"))
    assert member.scheme.name == "wnvfp4a16"
    scale = (fine.double() / 1234.5).repeat_interleave(16, 1)
    want = FP4[codes].double() * scale
    # two float32 roundings of the scale, one of the product
    assert ((lt.dequantize() - want).abs() <= 2e-7 * want.abs()).all()
    same_bytes(member, lt, stored)


@pytest.mark.parametrize(
    ("inputs", "name", "element", "scales"),
    [
        (NV | {"dynamic": "local"}, "wnvfp4anvfp4", "fp4_e2m1",
         [("fp8_e4m3", (1, 16), False, False, ""), ("f32", TENSOR, True, True, "")]),
        ({"num_bits": 4, "dynamic": True} | MX, "wnvfp4amxfp4", "fp4_e2m1",
         [("e8m0", (1, 32), False, False, "even_m1")]),
        ({"num_bits": 6, "dynamic": True} | MX, "wnvfp4amxfp6", "fp6_e2m3",
         [("e8m0", (1, 32), False, False, "even_m1")]),
        ({"num_bits": 8, "dynamic": True} | MX, "wnvfp4amxfp8", "fp8_e4m3",
         [("e8m0", (1, 32), False, False, "even_m1")]),
        (FP8 | {"group_size": 32, "dynamic": True}, "wnvfp4afp8", "fp8_e4m3",
         [("f32", (1, 32), False, False, "")]),
        (FP8 | {"strategy": "token", "dynamic": True}, "wnvfp4afp8", "fp8_e4m3",
         [("f32", CHANNEL, False, False, "")]),
        (FP8 | {"strategy": "tensor"}, "wnvfp4afp8", "fp8_e4m3",
         [("bf16", TENSOR, True, False, "")]),
    ],
)  # fmt: skip
def test_activations_of_float_formats(ct, write, inputs, name, element, scales):
    stored = nvfp4(4, 32)
    if inputs.get("dynamic") == "local":
        stored["input_global_scale"] = torch.tensor([33.0])
    elif not inputs.get("dynamic"):
        stored["input_scale"] = torch.tensor([0.5]).bfloat16()
    member, lt = load(ct, write, stored, ct.block(NV, inputs, format="nvfp4-pack-quantized"))
    spec = member.scheme.operands["input"]
    assert (member.scheme.name, spec.element.name) == (name, element)
    found = [(s.element, s.grain, s.static, s.inverse, s.rule) for s in spec.scales]
    assert found == scales
    assert (lt.input_scale is None) == (len(stored) == 3)
    same_bytes(member, lt, stored)


# ------------------------------------------------------------------------------- what must fail


def nvfp4(n=8, k=64):
    return {
        "weight_packed": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
        "weight_scale": torch.rand(n, k // 16).add(0.5).to(E4M3),
        "weight_global_scale": torch.tensor([100.0]),
    }


def mxfp4(n=8, k=64):
    return {
        "weight_packed": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
        "weight_scale": torch.full((n, k // 32), 127, dtype=torch.uint8),
    }


def fp8(n=8, k=64):
    return {"weight": fp8_codes(n, k), "weight_scale": torch.ones(n, 1).bfloat16()}


CASES = {
    "nvfp4": (nvfp4, NV, "nvfp4-pack-quantized"),
    "mxfp4": (mxfp4, {"num_bits": 4} | MX, "mxfp4-pack-quantized"),
    "fp8": (fp8, FP8 | {"strategy": "channel"}, "float-quantized"),
}
TENSORS = [(name, leaf) for name, (make, _, _) in CASES.items() for leaf in make()]


def raises(error, code, ct, write, stored, config, match=None):
    with pytest.raises(error, match=match) as err:
        load(ct, write, stored, config)
    assert err.value.code == code
    return err.value


@pytest.mark.parametrize(("name", "leaf"), TENSORS)
def test_lost_tensor_is_named(ct, write, name, leaf):
    make, args, fmt = CASES[name]
    stored = make()
    other = ct.named(stored, "model.layers.1.mlp.up_proj")
    del stored[leaf]
    tensors = other | ct.named(stored)
    with pytest.raises(CheckpointError) as err:
        ct.plan(write(tensors, ct.block(args, format=fmt)))
    assert err.value.code == "Q-TENSOR-MISSING"
    assert err.value.tensor == f"{ct.NAME}.{leaf}"
    assert leaf in str(err.value)


@pytest.mark.parametrize(("name", "leaf"), TENSORS)
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: torch.cat([t, t]), "Q-LAYOUT-SHAPE"),
        (lambda t: t.float().to(torch.int32), "Q-LAYOUT-DTYPE"),
    ],
    ids=["shape", "dtype"],
)
def test_wrong_shape_or_dtype_names_the_layer(ct, write, name, leaf, change, code):
    make, args, fmt = CASES[name]
    stored = make()
    stored[leaf] = change(stored[leaf])
    err = raises(QuantError, code, ct, write, stored, ct.block(args, format=fmt))
    assert ct.NAME in str(err)


def test_fp8_weights_as_plain_bytes_are_refused(ct, write):
    stored = fp8()
    stored["weight"] = stored["weight"].view(torch.uint8)
    config = ct.block(FP8 | {"strategy": "channel"}, format="float-quantized")
    raises(LayoutError, "Q-LAYOUT-DTYPE", ct, write, stored, config, "uint8")


@pytest.mark.parametrize(
    ("name", "leaf", "value", "code"),
    [
        ("fp8", "weight", 0x7F, "Q-VALUE-WEIGHT"),
        ("fp8", "weight", 0xFF, "Q-VALUE-WEIGHT"),
        ("mxfp4", "weight_scale", 0xFF, "Q-VALUE-SCALE"),
        ("nvfp4", "weight_scale", 0x7F, "Q-VALUE-SCALE"),
    ],
)
def test_nan_codes_are_reported(ct, write, name, leaf, value, code):
    make, args, fmt = CASES[name]
    stored = make()
    stored[leaf].view(torch.uint8)[1, 0] = value
    err = raises(LayoutError, code, ct, write, stored, ct.block(args, format=fmt), "1 of")
    assert ct.NAME in str(err)


def test_smallest_exponent_is_no_zero(ct, write):
    stored = mxfp4() | {"weight_packed": torch.full((8, 32), 0x22, dtype=torch.uint8)}
    stored["weight_scale"][0, 0] = 0
    config = ct.block({"num_bits": 4} | MX, format="mxfp4-pack-quantized")
    _, lt = load(ct, write, stored, config)
    assert lt.dequantize()[0, 0].item() == 2.0**-127


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["weight_global_scale", "input_global_scale"])
def test_bad_global_scale_is_reported(ct, write, leaf, value):
    stored = nvfp4() | {"input_global_scale": torch.tensor([3.0])}
    stored[leaf] = torch.tensor([value])
    config = ct.block(NV, NV | {"dynamic": "local"}, format="nvfp4-pack-quantized")
    raises(LayoutError, "Q-VALUE-SCALE", ct, write, stored, config, leaf)


@pytest.mark.parametrize(
    ("name", "change", "error", "code"),
    [
        ("mxfp4", {"group_size": 16}, ConfigError, "Q-CFG-VALUE"),
        ("mxfp4", {"num_bits": 8}, ConfigError, "Q-CFG-VALUE"),
        ("mxfp4", {"symmetric": False}, ConfigError, "Q-CFG-VALUE"),
        ("nvfp4", {"group_size": 32}, ConfigError, "Q-CFG-VALUE"),
        ("nvfp4", {"dynamic": True}, ConfigError, "Q-CFG-VALUE"),
        ("fp8", {"strategy": "token"}, ConfigError, "Q-CFG-VALUE"),
        ("fp8", {"num_bits": 4}, ConfigError, "Q-CFG-VALUE"),
        ("fp8", {"strategy": "tensor"}, LayoutError, "Q-LAYOUT-SHAPE"),
        ("fp8", {"strategy": "block", "block_structure": [4, 32]}, LayoutError, "Q-LAYOUT-SHAPE"),
        ("fp8", {"strategy": "group", "group_size": 32}, LayoutError, "Q-LAYOUT-GROUP"),
    ],
)
def test_config_of_other_weights_is_refused(ct, write, name, change, error, code):
    make, args, fmt = CASES[name]
    raises(error, code, ct, write, make(), ct.block(args | change, format=fmt))


@pytest.mark.parametrize(("name", "other"), [("fp8", "mxfp4"), ("nvfp4", "fp8")])
def test_tensors_of_another_format_contradict(ct, write, name, other):
    _, args, fmt = CASES[name]
    stored = CASES[other][0]()
    raises(ConfigError, "Q-CFG-CONFLICT", ct, write, stored, ct.block(args, format=fmt))


def test_inner_size_that_groups_do_not_fill_is_refused(ct, write):
    stored = mxfp4(8, 48) | {"weight_scale": torch.full((8, 2), 127, dtype=torch.uint8)}
    config = ct.block({"num_bits": 4} | MX, format="mxfp4-pack-quantized")
    raises(LayoutError, "Q-LAYOUT-GROUP", ct, write, stored, config, "32")


def test_zero_points_of_float_weights_contradict(ct, write):
    stored = fp8() | {"weight_zero_point": torch.zeros(8, 1, dtype=torch.int8)}
    config = ct.block(FP8 | {"strategy": "channel"}, format="float-quantized")
    raises(ConfigError, "Q-CFG-CONFLICT", ct, write, stored, config, "weight_zero_point")


def test_what_the_format_cannot_hold_raises(ct, write):
    member, lt = load(ct, write, nvfp4(), ct.block(NV, format="nvfp4-pack-quantized"))
    spec = lt.weight.spec
    direct = replace(spec.scales[1], inverse=False)
    for bad in (
        replace(lt, input_scale=torch.ones(1)),
        replace(lt, operands={"weight": replace(
            lt.weight, spec=replace(spec, scales=(spec.scales[0], direct)))}),
    ):  # fmt: skip
        with pytest.raises(LayoutError) as err:
            member.scheme.serialize(member.layer, bad)
        assert err.value.code == "Q-LAYOUT-REPRESENT"
