"""Every format x every kind of layer: loaded, dequantized, applied, written back, converted.

The cells are in format_table.py; docs/formats/table.md is made from them. Numbers come from the
producers (``expected.safetensors``), or from codes decoded here. A layer is applied by the oracle's
formula written out, in float64.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import edit_files
from checkpoint_sets import FIXTURES, REPO, SHARED, has_shared
from format_places import NAMES, made, place, placed_names, rename_tensor
from format_table import KINDS, OPERATIONS, TABLE, Cell, Empty, Example
from quant_core import load_model
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import targets
from quant_core.convert.survey import survey
from quant_core.dequantize import dense_weight
from quant_core.errors import QuantError
from quant_core.kernels.activations import fake_quantize
from quant_core.kv_states import QuantCache
from quant_core.load import read_matrix
from quant_core.numerics import decode_scale, element_range
from quant_core.plan import Member, Plan, plan
from quant_core.registry import registry
from test_checkpoint_weights import _expected, _parse, _weight, stored_bytes_differ

SLICES = REPO / "tests" / "slices"


def _examples(cell: Cell | Example) -> tuple[Example, ...]:
    if isinstance(cell, Empty):
        return ()
    return (cell,) if isinstance(cell, Example) else cell


def _folder(source: str) -> Path | None:
    """The whole checkpoint where it is at hand, else a slice of it."""
    for root in (FIXTURES, SHARED, SLICES):
        if (root / source).is_dir():
            return root / source
    return None


def _at_hand(example: Example, *, shipped: bool = False) -> bool:
    if example.source.startswith("made:"):
        return True
    if shipped:
        return (FIXTURES / example.source).is_dir() or (SLICES / example.source).is_dir()
    return _folder(example.source) is not None


ROWS = [
    pytest.param(kind, e, id=f"{format}-{kind}-{e.source}-{e.module.split('.', 2)[-1]}")
    for format, cells in TABLE.items()
    for kind, cell in cells.items()
    for e in _examples(cell)
    if _at_hand(e)
]
EMPTY = [
    pytest.param(format, kind, cell, id=f"{format}-{kind}")
    for format, cells in TABLE.items()
    for kind, cell in cells.items()
    if isinstance(cell, Empty)
]


@dataclass(frozen=True)
class Case:
    """A planned checkpoint and its module under test."""

    plan: Plan
    member: Member
    dense: Tensor | None  # weights from outside, where the source has no expected.safetensors


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Example -> Case, each made once."""
    root = tmp_path_factory.mktemp("table")

    @cache
    def source(name: str, module: str) -> tuple[Path, Tensor | None]:
        if not name.startswith("made:"):
            folder = _folder(name)
            assert folder is not None
            return folder, None
        folder = root / name.replace(":", "_")
        return folder, made(name.removeprefix("made:"), module, folder)

    def build(example: Example) -> Case:
        folder, dense = source(example.source, example.module)
        name = example.module
        if example.place:
            target = root / f"{example.source}_{example.place}".replace(":", "_")
            if not target.exists():
                place(folder, name, example.place, target, example.config)
            folder, name = target, NAMES[example.place].replace("{expert}.", "")
        p = plan(open_checkpoint(folder))
        return Case(p, (p.attention if name in p.attention else p.members)[name], dense)

    return build


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _matrices(case: Case) -> list[int | None]:
    return list(case.member.layer.experts) or [None]


def _dense(case: Case, expert: int | None) -> Tensor:
    lt = read_matrix(case.plan, case.member, expert)
    return dense_weight(lt.weight, case.member.scheme.shape[1])


# --------------------------------------------------------------------------------------- the table


def test_every_format_plugin_has_a_row_and_every_row_a_cell_for_each_kind():
    found = {i for i in registry().plugins if registry().implements(i, "make_scheme")}
    assert found == set(TABLE)
    for format, cells in TABLE.items():
        assert set(cells) == set(KINDS), format


def test_every_cell_is_filled_or_says_why_it_is_not():
    for format, cells in TABLE.items():
        for kind, cell in cells.items():
            where = f"{format}, {kind}"
            if isinstance(cell, Empty):
                assert cell.why, where
                assert cell.shown in SHOWN, where
            else:  # also where only the shipped files are there
                assert any(_at_hand(e, shipped=True) for e in _examples(cell)), where
                assert all(set(e.refused) <= set(OPERATIONS) for e in _examples(cell)), where


def test_with_the_full_set_every_example_is_there():
    if not has_shared():
        pytest.skip("needs the full set of checkpoints beside the repository")
    asked = sum(len(_examples(c)) for cells in TABLE.values() for c in cells.values())
    assert len(ROWS) == asked


def test_page_is_made_from_this_table():
    script = REPO / "tools" / "gen_format_table.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# -------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(("kind", "example"), ROWS)
def test_load(cases, kind, example):
    case = cases(example)
    layer = case.member.layer
    asked = {"lm_head": "linear", "stacked experts": "experts"}.get(kind, kind)
    assert layer.kind == asked
    assert ("{expert}" in layer.stored) == (kind == "experts")
    assert (layer.name.rpartition(".")[2] == "lm_head") == (kind == "lm_head")
    for expert in _matrices(case):
        lt = read_matrix(case.plan, case.member, expert)
        assert lt.operands
        if kind != "attention":
            assert lt.weight.spec == case.member.scheme.weight


@pytest.mark.parametrize(("kind", "example"), ROWS)
def test_dequantize(cases, kind, example):
    """Equal to the producer's numbers; the same tensors mean the same as another kind of layer."""
    if kind == "attention":
        pytest.skip("keys and values are not stored; see test_apply")
    case = cases(example)
    for expert in _matrices(case):
        got = _dense(case, expert)
        if example.place:
            original = cases(Example(source=example.source, module=example.module))
            assert torch.equal(got, _dense(original, None))
        elif case.dense is not None:
            assert torch.equal(got, case.dense)
    if example.place or case.dense is not None:
        return
    folder = _folder(example.source)
    weights, meta = _expected(folder) if (folder / "expected.json").is_file() else (None, None)
    if weights is None:
        tensors = open_checkpoint(folder / "expected.safetensors")
        weights = {n: tensors.read(n) for n in tensors.tensors}
    rounding = meta["reference_rounding"]["weights"] if meta else None
    stored = {case.member.layer.name, case.member.layer.stored}
    found = False
    for key, want in weights.items():
        name, expert, rows = _parse(key)
        fused = name.endswith("gate_up_proj") and example.module.rpartition(".")[2] != "down_proj"
        if name not in stored and not (fused and name.split(".experts")[0] in example.module):
            continue
        got = _weight(case.plan, name, expert)[:rows]
        dtype = getattr(torch, rounding) if rounding else torch.float32
        off = (got.to(dtype).float() - want.to(dtype).float()).abs()
        near = off <= torch.finfo(torch.float32).eps * want.abs()
        assert near.float().mean() > (0.999 if rounding else 0.9999999), key
        found = True
    if not found and folder.name.startswith("gguf-"):
        found = _as_gguf_py_reads_it(case, folder)
    assert found, f"expected.safetensors holds no rows of {example.module}"


def _as_gguf_py_reads_it(case: Case, folder: Path) -> bool:
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(folder.glob("*.gguf")))
    name = f"{case.member.layer.stored}.weight"
    tensor = next(t for t in reader.tensors if t.name == name)
    want = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    parts = [_dense(case, e) for e in _matrices(case)]
    got = torch.stack(parts) if case.member.layer.experts else parts[0]
    ulp = torch.finfo(torch.float32).eps * want.abs()
    assert ((got - want).abs() <= ulp).all()
    return True


def _product(case: Case, expert: int | None, x: Tensor) -> Tensor:
    """What the layer computes, by its formula, in float64."""
    lt = read_matrix(case.plan, case.member, expert)
    spec = case.member.scheme.operands.get("input")
    dense = _dense(case, expert).double()
    if lt.out_scale is not None:
        scale, low_high = decode_scale(lt.input_scale, "f32").double(), element_range(spec.element)
        zero = decode_scale(lt.input_zero, spec.zero.element).double()
        q = (x.double() / scale + zero).round().clamp(*low_high)
        codes = dense / lt.weight.scales[0].double()
        return (q @ codes.round().T + lt.acc_bias.double()) * lt.out_scale.double()
    for transform, (vector,) in lt.transforms:
        assert (transform.site, transform.kind) == ("input", "scale"), "formula of it needed here"
        x = x / vector.float() if transform.inverse else x * vector.float()
    if spec is not None:
        x = fake_quantize(x, spec, lt.input_scale, lt.input_zero)
    y = F.linear(x.double(), dense)
    return y if lt.bias is None else y + lt.bias.double()


def _apply(case: Case, kind: str, kernels: str | None) -> tuple[Tensor, Tensor]:
    """(what the built module gives, the same by the formula)."""
    member = case.member
    build = Builder(plan=case.plan, dtype=torch.float32, kernels=kernels)
    n, k = member.scheme.shape
    rng = torch.Generator().manual_seed(1)
    if kind == "embedding":
        ids = torch.randint(0, n, (3, 5), generator=rng)
        return build.embedding("m", member)(ids), _dense(case, None)[ids]
    x = torch.randn(7, k, generator=rng)
    if kind in ("linear", "lm_head"):
        return build.linear("m", [member])(x), _product(case, None, x)
    experts = torch.randint(0, len(member.layer.experts), (7,), generator=rng)
    got = build._stack("m", member)(x, experts)
    want = [_product(case, int(e), x[i : i + 1]) for i, e in enumerate(experts)]
    return got, torch.cat(want)


def _rounded(case: Case) -> None:
    """Keys and values by the stored scales, against torch's own cast and rounding."""
    member = case.member
    lt = read_matrix(case.plan, member)
    cache_ = QuantCache(member.layer, member.scheme, lt)
    for role, operand in lt.operands.items():
        scale = operand.scales[0].float()
        x = torch.randn(5, max(scale.numel(), 16), generator=torch.Generator().manual_seed(2))
        x = x * scale.max() * 40
        if operand.spec.element.kind == "float":
            code = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            want = code * scale
        else:
            zero = operand.zeros.float()
            want = ((x / scale + zero).round().clamp(-128, 127) - zero) * scale
        got = cache_.rounded(role, x)
        assert torch.allclose(got, want, rtol=1e-6, atol=0)
        assert not torch.equal(got, x)


@pytest.mark.parametrize("kernels", ["torch_ref", None], ids=["reference", "chosen"])
@pytest.mark.parametrize(("kind", "example"), ROWS)
def test_apply(cases, kind, example, kernels):
    case = cases(example)
    if kind == "attention":
        return _rounded(case)
    if "apply" in example.refused:
        with pytest.raises(QuantError) as caught:
            _apply(case, kind, kernels)
        assert example.refused["apply"] in str(caught.value)
        return None
    got, want = _apply(case, kind, kernels)
    assert got.dtype == torch.float32
    # float32 sums of up to 512 products, or bfloat16 blocks of a fast kernel under one float32 sum
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert want.abs().max() > 0
    return None


@pytest.mark.parametrize(("kind", "example"), ROWS)
def test_serialize(cases, kind, example):
    case = cases(example)
    if kind == "attention":
        lt = read_matrix(case.plan, case.member)
        stored = QuantCache(case.member.layer, case.member.scheme, lt).stored()
        assert stored
        for name, value in stored.items():
            want = case.plan.checkpoint.read(name)
            assert value.dtype == want.dtype
            assert value.shape == want.shape
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (value, want)))
        return
    assert stored_bytes_differ(case.plan, case.member) == []


@pytest.mark.parametrize(("kind", "example"), ROWS)
def test_convert(cases, kind, example):
    """``to`` holds the module packed, every weight bit by bit; else the reason is given."""
    case = cases(example)
    own = case.plan.match.plugin
    asked = [example.to] if example.to else [t for t in targets(registry()) if t != own]
    answers = {t: _converted(case, t) for t in asked}
    if example.to:
        assert answers == {example.to: ""}
        return
    assert all(answers.values()), f"held exactly by {[t for t, why in answers.items() if not why]}"
    why = example.refused["convert"]
    assert any(why in refusal for refusal in answers.values()), answers


def _converted(case: Case, target: str) -> str:
    """ "" if ``target`` holds the module exactly, else its reason."""
    config = {k: v for k, v in case.plan.checkpoint.config.items() if k != "quantization_config"}
    it = {case.member.layer.name: case.member}
    kept = case.member.layer.kind == "attention"
    alone = replace(case.plan, members={} if kept else it, attention=it if kept else {}, dense={})
    try:
        (layer,) = survey(alone, target, config=config, options={}).layers
    except QuantError as err:
        if err.code != "Q-LAYOUT-REPRESENT":
            raise
        return str(err)
    assert not layer.losses
    return f"written as {layer.after}" if layer.after.startswith("float") else ""


# ------------------------------------------------------------------------------------- empty cells


def _a_stack_is_refused(format, kind, cell, cases, tmp_path):
    source = next(e for e in _examples(TABLE[format]["linear"]) if _at_hand(e, shipped=True))
    cases(source)  # writes a made one
    folder = _folder(source.source) or Path(cases(source).plan.checkpoint.path)
    place(folder, source.module, "stacked experts", tmp_path / "c", {})
    with pytest.raises(QuantError) as caught:
        plan(open_checkpoint(tmp_path / "c"))
    assert cell.error in str(caught.value)


def _a_single_expert_is_refused(format, kind, cell, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(edit_files, "other_name", lambda name: "blk.0.ffn_down.0.weight")
    source = FIXTURES / "gguf-llama-q4_k_m"
    edit_files.edit_folder(source, tmp_path / "c", "blk.0.ffn_down.weight", "renamed")
    with pytest.raises(QuantError) as caught:
        load_model(tmp_path / "c")
    assert cell.error in f"{caught.value} {caught.value.actual}"


def _a_layer_is_refused(format, kind, cell, cases, tmp_path):
    """Blocks of a stack's expert under the name of a plain layer are no member of the format."""
    (name, *_) = placed_names(kind)
    rename_tensor(
        FIXTURES / "hf-gptoss-mxfp4", tmp_path / "c",
        "model.layers.0.mlp.experts.down_proj_blocks", f"{name}_blocks",
    )  # fmt: skip
    with pytest.raises(QuantError) as caught:
        plan(open_checkpoint(tmp_path / "c"))
    assert "down_proj_blocks" in f"{caught.value} {caught.value.actual}"


def _with_cache_scale(format, cases, tmp_path, monkeypatch) -> Path:
    name = "model.layers.0.self_attn.k_scale"
    source = next(e for e in _first_examples(format) if _at_hand(e, shipped=True))
    folder = _folder(source.source)
    if folder is None:
        folder = Path(cases(source).plan.checkpoint.path)
    if format == "gguf":
        name = "blk.0.attn_k.k_scale"
    monkeypatch.setattr(edit_files, "other_name", lambda _: name)
    donor = next(n for n, t in open_checkpoint(folder).tensors.items() if t.nbytes < 1 << 16)
    edit_files.edit_folder(folder, tmp_path / "c", donor, "doubled")
    return tmp_path / "c"


def _first_examples(format):
    return [e for kind in KINDS for e in _examples(TABLE[format][kind]) if not e.place]


def _scales_are_refused(format, kind, cell, cases, tmp_path, monkeypatch):
    """Refused by the plan, or handed to the engine as a tensor that no model has."""
    assert not registry().implements(format, "attention_schemes")
    folder = _with_cache_scale(format, cases, tmp_path, monkeypatch)
    try:
        p = plan(open_checkpoint(folder))
    except QuantError as err:
        told = str(err)
    else:
        told = ""
    if told:
        assert "k_scale" in told
        return
    name = "model.layers.0.self_attn.k_scale"
    assert p.dense[name] == name
    assert name not in p.ledger.skipped
    if "lm_head.weight" in p.dense:  # a whole model, not a slice
        with pytest.raises(QuantError, match="k_scale"):
            load_model(folder)


SHOWN = {
    "a stack is refused": _a_stack_is_refused,
    "a single expert is refused": _a_single_expert_is_refused,
    "a layer is refused": _a_layer_is_refused,
    "scales are refused": _scales_are_refused,
}


@pytest.mark.parametrize(("format", "kind", "cell"), EMPTY)
def test_an_empty_cell_is_empty_for_the_reason_given(
    format, kind, cell, cases, tmp_path, monkeypatch
):
    check = SHOWN[cell.shown]
    extra = (monkeypatch,) if "monkeypatch" in check.__code__.co_varnames else ()
    check(format, kind, cell, cases, tmp_path, *extra)
    shutil.rmtree(tmp_path / "c", ignore_errors=True)


def test_a_changed_byte_is_seen(cases, tmp_path):
    """Negative control: other codes give other weights, another result, other stored bytes."""
    example = TABLE["awq"]["lm_head"]
    good = cases(example)
    folder = tmp_path / "c"
    shutil.copytree(good.plan.checkpoint.path, folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-5000] ^= 0xFF
    (folder / "model.safetensors").write_bytes(raw)
    p = plan(open_checkpoint(folder))
    bad = Case(p, p.members["lm_head"], None)
    assert not torch.equal(_dense(good, None), _dense(bad, None))
    (got, _), (_, want) = _apply(bad, "lm_head", None), _apply(good, "lm_head", None)
    assert (got - want).abs().max() > 2e-5 * want.abs().max()
