"""Stored bytes to weights and back: published values, numpy's own decoding, faults of values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import LayoutError
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import plan
from quant_core.spec import LayerDesc
from quant_plugin_fp8.config import parse_config
from quant_plugin_fp8.scheme import build_scheme

FAMILIES = ("static", "tensor", "block", "ue8m0", "fbgemm")
UP = "model.layers.0.mlp.up_proj"
DESC = LayerDesc(kind="linear", name="x", stored="x")


def scheme_of(config, shape, scale_shape, **kw):
    name = "weight_scale_inv" if config.get("weight_block_size") else "weight_scale"
    kw.setdefault("scale_name", name)
    return build_scheme(parse_config(config, "f"), shape, scale_shape=scale_shape, **kw)


# W = [[896, -2], [1, 0.5]], one scale of 2: bytes 7E B8 30 28 (worked example of the formats page)
WORKED = torch.tensor([[896.0, -2.0], [1.0, 0.5]])
BYTES = torch.tensor([[0x7E, 0xB8], [0x30, 0x28]], dtype=torch.uint8)


@pytest.mark.parametrize("block", [None, [2, 2], [128, 128]])
def test_worked_example_reads_and_quantizes_to_the_published_bytes(block):
    config = {"quant_method": "fp8", "weight_block_size": block}
    scheme = scheme_of(config, (2, 2), (1, 1) if block else ())
    scale = torch.tensor(2.0).reshape(scheme.scale_shape)
    stored = {"weight": BYTES.view(torch.float8_e4m3fn), scheme.scale_name: scale}
    lt = scheme.canonicalize(DESC, stored)
    assert torch.equal(lt.dequantize(), WORKED)
    made = scheme.serialize(DESC, scheme.quantize(DESC, WORKED))
    assert torch.equal(made["weight"].view(torch.uint8), BYTES)
    assert torch.equal(made[scheme.scale_name], scale)
    # the name says "inv", and yet it multiplies: dividing is far off
    assert not torch.allclose(BYTES.view(torch.float8_e4m3fn).float() / 2, WORKED, rtol=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_numpys_and_serialize_to_the_stored_bytes(write, made, family):
    planned = plan(write(made.model(family), made.configs[family]))
    member = planned.quantized[UP]
    lt = read_matrix(planned, member)
    _, want = made.layer(family)
    assert torch.equal(lt.dequantize().double(), torch.from_numpy(want))
    back = member.scheme.serialize(member.layer, lt)
    stored, _ = made.layer(family)
    assert back.keys() == stored.keys()
    for name, value in stored.items():
        assert back[name].shape == value.shape
        assert back[name].dtype == value.dtype
        raw = [t.reshape(-1).contiguous().view(torch.uint8) for t in (back[name], value)]
        assert torch.equal(*raw), name


def test_partial_blocks_at_both_edges_use_their_own_scales(ref):
    """130 x 130 in blocks of 128: a 2 x 2 grid."""
    scheme = scheme_of({"quant_method": "fp8", "weight_block_size": [128, 128]}, (130, 130), (2, 2))
    grid = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    codes = torch.full((130, 130), 0x38, dtype=torch.uint8)  # 1.0
    stored = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": grid}
    w = scheme.canonicalize(DESC, stored).dequantize()
    assert [w[127, 127], w[127, 128], w[128, 127], w[129, 129]] == [1, 2, 4, 8]
    back = scheme.quantize(DESC, w)
    assert torch.equal(back.weight.scales[0] * 448, grid)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_weights_are_counted(write, made, family, code):
    tensors = made.model(family)
    planned = plan(write(tensors, made.configs[family]))
    read_matrix(planned, planned.quantized[UP])
    tensors[f"{UP}.weight"].view(torch.uint8)[1, 0] = code
    planned = plan(write(tensors, made.configs[family]))
    with pytest.raises(LayoutError, match=r"up_proj\.weight: 1 of .*first at \(1, 0\)") as err:
        read_matrix(planned, planned.quantized[UP])
    assert err.value.code == "Q-VALUE-WEIGHT"


def test_minus_zero_is_a_number():
    scheme = scheme_of({"quant_method": "fp8"}, (1, 2), ())
    codes = torch.tensor([[0x80, 0x38]], dtype=torch.uint8)
    stored = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}
    assert scheme.canonicalize(DESC, stored).dequantize().tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5, 0.0])
def test_bad_weight_scales_are_refused(write, made, value):
    tensors = made.model("block")
    tensors[f"{UP}.weight_scale_inv"][1, 2] = value
    with pytest.raises(LayoutError, match=UP) as err:
        load_tensor(write(tensors, made.configs["block"]), UP)
    assert err.value.code == "Q-VALUE-SCALE"


def test_zero_scale_over_zero_weights_is_allowed(write, made):
    tensors = made.model("block")
    tensors[f"{UP}.weight_scale_inv"][0, 0] = 0.0
    tensors[f"{UP}.weight"].view(torch.uint8)[:16, :32] = 0x80
    w = load_tensor(write(tensors, made.configs["block"]), UP).dequantize()
    assert w[:16, :32].eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 0.0])
def test_bad_input_scales_are_refused(write, made, value):
    tensors = made.model("static")
    tensors[f"{UP}.input_scale"] = torch.tensor(value)
    with pytest.raises(LayoutError, match="input_scale") as err:
        load_tensor(write(tensors, made.configs["static"]), UP)
    assert err.value.code == "Q-VALUE-SCALE"


def test_exponent_byte_255_is_refused_and_0_is_not_zero(write, made):
    tensors = made.model("ue8m0")
    raw = tensors[f"{UP}.weight_scale_inv"].view(torch.uint8)
    raw[0, 0] = 0
    w = load_tensor(write(tensors, made.configs["ue8m0"]), UP).dequantize()
    assert w[:16, :32].abs().max() == 448 * 2.0**-127
    raw[0, 0] = 255
    with pytest.raises(LayoutError, match="NaN or infinite") as err:
        load_tensor(write(tensors, made.configs["ue8m0"]), UP)
    assert err.value.code == "Q-VALUE-SCALE"


# -------------------------------------------------------------------------- running the layers


def _tokens(x, family, ref):
    """x as its codes represent it, in numpy float64 on float32 scales."""
    import numpy as np

    x = x.double().numpy()

    def f32(v):
        return np.asarray(v, dtype=np.float32).astype(np.float64)

    if family == "static":
        s = f32(0.011) * np.ones((len(x), 1))
    elif family in ("tensor", "fbgemm"):
        amax = np.abs(x).max(axis=1, keepdims=True)
        s = f32(np.minimum(amax, 4.0) / 448 if family == "fbgemm" else amax / 448)
    else:
        parts = [x[:, i : i + 32] for i in range(0, x.shape[1], 32)]
        s = np.concatenate(
            [np.abs(p).max(axis=1, keepdims=True).repeat(p.shape[1], axis=1) for p in parts], axis=1
        )
        s = f32(s / 448) if family == "block" else 2.0 ** np.ceil(np.log2(s / 448))
    return ref.rounded(f32(x / s)) * s


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_multiplies_quantized_activations(write, made, ref, family):
    planned = plan(write(made.model(family), made.configs[family]))
    builder = Builder(plan=planned, dtype=torch.float32, kernels="torch_ref")
    module = builder.linear(UP, [planned.quantized[UP]])
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(2)) * 3
    x[1] *= 100
    _, w = made.layer(family)
    w = torch.from_numpy(w)
    want = torch.from_numpy(_tokens(x, family, ref)) @ w.T
    got = module(x).double()
    # float32 sums of 80 products against float64 ones
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    plain = x.double() @ w.T
    assert (got - plain).abs().max() > 1e-3 * plain.abs().max()  # negative control


def test_upper_bound_of_fbgemm_changes_the_result(write, made):
    outs = []
    for bound in (4.0, 1200.0):
        config = made.configs["fbgemm"] | {"activation_scale_ub": bound}
        planned = plan(write(made.model("fbgemm"), config))
        module = Builder(plan=planned, dtype=torch.float32).linear(UP, [planned.quantized[UP]])
        outs.append(module(torch.full((1, 80), 8.0)))
    assert not torch.allclose(*outs, rtol=0.1)


# ---------------------------------------------------------------------- quantizing and refusing


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_stays_within_half_a_step(made, family):
    config = made.configs[family]
    blocks = config.get("weight_block_size")
    n, k = 40, 80
    shape = (3, 3) if blocks else (n, 1) if family == "fbgemm" else ()
    kw = {"input_name": "input_scale"} if family == "static" else {}
    if family == "ue8m0":
        kw["scale_dtype"] = "float8_e8m0fnu"
    scheme = scheme_of(config, (n, k), shape, **kw)
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(4))
    dense[:16, :32] = 0
    dense[20, 40] = 1e4
    stats = {"input_amax": torch.tensor(44.8)}
    lt = scheme.quantize(DESC, dense, stats)
    error = (lt.dequantize() - dense).abs()
    # a normal e4m3 value is off by at most 2**-4 of itself, a subnormal one by 2**-10 steps
    from quant_core.dequantize import combine_factors

    s = combine_factors(lt.weight.scales, scheme.weight.scales, (n, k))
    assert (error <= torch.maximum(dense.abs() * 2.0**-4, s * 2.0**-10) * 1.0001).all()
    assert torch.isfinite(lt.dequantize()).all()
    back = scheme.canonicalize(DESC, scheme.serialize(DESC, lt))
    assert torch.equal(back.dequantize(), lt.dequantize())
    if family == "static":
        assert torch.equal(back.input_scale, torch.tensor([44.8]) / 448)
    else:
        assert back.input_scale is None


def test_quantizing_nan_or_without_a_measured_range_is_refused(made):
    scheme = scheme_of(made.configs["static"], (2, 2), (), input_name="input_scale")
    with pytest.raises(LayoutError, match="input_amax") as err:
        scheme.quantize(DESC, WORKED)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    with pytest.raises(LayoutError) as err:
        scheme.quantize(DESC, torch.full((2, 2), math.nan))
    assert err.value.code == "Q-VALUE-WEIGHT"


@pytest.mark.parametrize(
    "change",
    [
        lambda lt: replace(lt, acc_bias=torch.zeros(2, dtype=torch.int32)),
        lambda lt: replace(lt, input_scale=torch.ones(1)),
        lambda lt: replace(lt, operands={"weight": replace(lt.weight, shape=(2, 1))}),
    ],
    ids=["acc_bias", "input scale", "shape"],
)
def test_what_the_format_cannot_hold_is_refused(change):
    scheme = scheme_of({"quant_method": "fp8"}, (2, 2), ())
    lt = scheme.quantize(DESC, WORKED)
    with pytest.raises(LayoutError) as err:
        scheme.serialize(DESC, change(lt))
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_bias_is_kept(write, made):
    tensors = made.model("block") | {f"{UP}.bias": torch.arange(40).bfloat16()}
    planned = plan(write(tensors, made.configs["block"]))
    lt = read_matrix(planned, planned.quantized[UP])
    assert torch.equal(lt.bias, tensors[f"{UP}.bias"])
    back = planned.quantized[UP].scheme.serialize(DESC, lt)
    assert torch.equal(back["bias"], tensors[f"{UP}.bias"])
