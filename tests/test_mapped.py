"""``load_model(mmap=True)``: weights are pages of the checkpoint's files, the model is the same."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoint_sets import FIXTURES, checkpoint_dirs
from producers import expected, within
from quant_core import as_config, load_model
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, ConfigError, LayoutError
from quant_core.kernels.choose import accepting
from quant_core.mapped import PRICE
from quant_core.nn import QuantModule
from quant_core.registry import registry
from quant_core.row_order import head_of, in_model_order
from quant_kernels_cpu.library import ISAS, library, unavailable

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux /proc"),
    pytest.mark.skipif(bool(unavailable()), reason="no CPU kernels"),
]

IN_PLACE = (
    *("ar-w4", "ct-w4a16", "ct-w8a16", "gptqmodel-4bit-g128-sym", "gptqmodel-4bit-g64"),
    *("gptqmodel-awq", "gguf-llama-q4_0", "gguf-llama-q8_0", "torchao-int8wo", "quark-uint4"),
    *("ct-w8a8", "quark-int8", "msmodelslim-w8a8"),
)
"""Prefixes of checkpoints whose layers are used as they are stored."""
STORED = ("cpu_stored", "cpu_stored_w8a8")
OTHERS = ("ar-mixed", "gguf-llama-q4_k_m", "gptqmodel-4bit-g128-asym-descact", "hqq")
AWQ = FIXTURES / "gptqmodel-awq-gemm-g128"
ROWS = FIXTURES / "ct-w4a16-awq-asym"


def load(path: Path, **options: object) -> PreTrainedModel:
    return load_model(path, dtype=options.pop("dtype", torch.float32), **options)


def packed(model: PreTrainedModel) -> dict[str, QuantModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantModule)}


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0].split("-") for line in lines if str(folder.resolve()) in line]
    return [(int(first, 16), int(last, 16)) for first, last in found]


def in_file(tensor: torch.Tensor, folder: Path) -> bool:
    at = tensor.data_ptr()
    return any(first <= at and at + tensor.nbytes <= last for first, last in mapped_ranges(folder))


@pytest.mark.parametrize("path", checkpoint_dirs(IN_PLACE), ids=lambda p: p.name)
def test_codes_are_pages_of_the_file_and_logits_the_producers(path: Path) -> None:
    model = load(path, mmap=True)
    kernels = {name: m.kernel.name for name, m in packed(model).items()}
    stored = [m for m in packed(model).values() if m.kernel.name in STORED]
    assert stored, kernels
    assert all(in_file(m.codes, path) for m in stored)
    assert within(model, path)
    turned = [n for n, m in packed(model).items() if head_of(m.op)]
    llama = "gguf-llama" in path.name  # its queries and keys have rows in another order
    assert len(turned) == (2 * model.config.num_hidden_layers if llama else 0), turned


@pytest.mark.parametrize("path", checkpoint_dirs(OTHERS), ids=lambda p: p.name)
def test_what_no_kernel_reads_in_place_is_loaded_as_ever(path: Path) -> None:
    assert within(load(path, mmap=True), path)


@pytest.mark.parametrize("path", checkpoint_dirs(IN_PLACE), ids=lambda p: p.name)
def test_bfloat16_decoding_is_that_of_packed_weights(path: Path) -> None:
    models = [load(path, dtype=torch.bfloat16, mmap=m) for m in (False, True)]
    ids = expected(path).ids[None, :24]
    made = [m.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                       output_logits=True) for m in models]  # fmt: skip
    want, got = (torch.stack(m.logits[:1]).float() for m in made)
    # sums in another order, then roundings of bfloat16 (2**-8) through the layers of the model
    assert (got - want).norm() <= 0.02 * want.norm()


def test_float_parameters_are_pages_of_the_file() -> None:
    model = load(ROWS, dtype=None, mmap=True)
    stored = open_checkpoint(ROWS).tensors
    dtype = str(model.dtype).removeprefix("torch.")
    large = [n for n, t in stored.items() if t.nbytes >= 1 << 16 and t.dtype == dtype]
    assert large
    held = dict(model.named_parameters())
    assert all(in_file(held[n].data, ROWS) for n in large if n in held)


def test_weights_are_their_own_memory_where_that_is_asked_for() -> None:
    model = load(ROWS, dtype=None, mmap=False)
    assert not any(in_file(t, ROWS) for t in [*model.buffers(), *model.parameters()])


@pytest.mark.parametrize("price", [0.5, float("inf")])
@pytest.mark.parametrize("path", [AWQ, ROWS], ids=lambda p: p.name)
def test_default_takes_the_place_in_the_file_if_it_costs_little(
    path: Path, price: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_core.mapped.PRICE", price)
    monkeypatch.setattr("quant_core.mapped.SMALL", 0)
    model = load(path)
    placed = [in_file(m.codes, path) for m in packed(model).values() if hasattr(m, "codes")]
    assert all(placed) if price > 1 else not any(placed)
    assert within(model, path)


@pytest.mark.parametrize("path", checkpoint_dirs(IN_PLACE), ids=lambda p: p.name)
def test_default_is_never_dearer_than_its_price(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_core.mapped.SMALL", 0)
    model = load(path, dtype=torch.bfloat16)
    for name, module in packed(model).items():
        if not module.tensors or not in_file(next(iter(module.tensors.values())), path):
            continue
        ours = module.kernel.accepts(module.op)
        others = accepting(in_model_order(module.op), registry())
        assert ours.cost_at(1) <= PRICE * min(answer.cost_at(1) for _, _, answer in others), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("path", [AWQ, ROWS], ids=lambda p: p.name)
def test_default_stays_in_the_file_where_codes_are_used_as_they_lie(
    path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load(path, dtype=dtype)
    monkeypatch.setattr("quant_core.mapped.SMALL", 0)
    large = load(path, dtype=dtype)
    used = ISAS[library().isa] == "bf16" and dtype == torch.bfloat16
    for model, expected_there in ((small, False), (large, used)):
        held = [m.codes for m in packed(model).values() if hasattr(m, "codes")]
        assert [in_file(t, path) for t in held] == [expected_there] * len(held)


@pytest.mark.parametrize("failing", ["nfs", "no address space"])
def test_default_copies_where_files_are_not_mapped(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("quant_core.mapped.PRICE", float("inf"))
    monkeypatch.setattr("quant_core.mapped.SMALL", 0)
    if failing == "nfs":
        monkeypatch.setattr("quant_core.prepared.pages._file_system", lambda folder: "nfs4")
    else:
        monkeypatch.setattr("quant_core.checkpoint.mapped.map_file", refuse)
    gc.collect()  # models of other tests
    model = load(AWQ)
    assert not mapped_ranges(AWQ)
    assert within(model, AWQ)


def test_model_saved_where_it_was_loaded_from_is_the_same(tmp_path: Path) -> None:
    shutil.copytree(ROWS, path := tmp_path / ROWS.name)
    want = load_file(next(path.glob("model*.safetensors")))
    model = load(path, mmap=True)
    model.save_pretrained(path)
    got = load_file(next(path.glob("model*.safetensors")))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], t) for n, t in want.items())
    assert within(model, ROWS)
    assert within(load(path, mmap=True), ROWS)


def test_saved_model_holds_what_the_checkpoint_holds(tmp_path: Path) -> None:
    for path in (AWQ, ROWS):
        load(path, dtype=None, mmap=True).save_pretrained(tmp_path / path.name)
        want = load_file(next(path.glob("model*.safetensors")))
        got = load_file(next((tmp_path / path.name).glob("model*.safetensors")))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], t) for n, t in want.items())


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ["gptqmodel-awq-gemm-g128", "ct-w4a16-awq-asym"])
def test_scale_that_is_no_number_is_refused_and_named(name: str, place: str, tmp_path) -> None:
    shutil.copytree(FIXTURES / name, path := tmp_path / name)
    file = next(path.glob("model*.safetensors"))
    tensors = load_file(file)
    scales = [n for n in tensors if n.endswith((".scales", ".weight_scale"))]
    bad = scales[0 if place == "first" else -1]
    tensors[bad].view(-1)[-1] = float("nan")
    save_file(tensors, file)
    with pytest.raises(LayoutError, match=r"1 of \d+ scale values are NaN") as err:
        load(path, mmap=True)
    assert err.value.code == "Q-VALUE-SCALE"
    assert bad.startswith(str(err.value.tensor))


@pytest.mark.parametrize("leaf", ["attn_q", "attn_k", "ffn_down"])
@pytest.mark.parametrize(
    "path", checkpoint_dirs(("gguf-llama-q4_0", "gguf-llama-q8_0")), ids=lambda p: p.name
)
def test_scale_in_a_block_is_looked_at_where_it_lies(path: Path, leaf: str, tmp_path) -> None:
    shutil.copytree(path, copied := tmp_path / path.name)
    file = next(copied.glob("*.gguf"))
    with open_checkpoint(copied) as checkpoint:
        info = checkpoint.tensors[f"blk.1.{leaf}.weight"]
    block = {"q4_0": 18, "q8_0": 34}[info.dtype]
    data = bytearray(file.read_bytes())
    at = info.offset + info.nbytes - block  # the last block: a float16, then codes
    for value, refused in ((0x7BFF, False), (0xFC00, True), (0x7E01, True)):
        data[at : at + 2] = value.to_bytes(2, "little")
        file.write_bytes(data)
        if not refused:
            load(copied, mmap=True)
            continue
        with pytest.raises(LayoutError) as err:
            load(copied, mmap=True)
        assert (err.value.code, err.value.actual) == ("Q-VALUE-SCALE", 1)
        assert leaf in str(err.value.tensor)


@pytest.mark.parametrize("path", checkpoint_dirs(("gguf-llama-q4_0",)), ids=lambda p: p.name)
def test_rows_in_another_order_are_restored_in_the_models(path: Path) -> None:
    want, got = packed(load(path)), packed(load(path, mmap=True))
    assert any(head_of(m.op) for m in got.values())
    for name, module in want.items():
        a, b = module.restore(), got[name].restore()
        assert torch.equal(a.dequantize(), b.dequantize()), name
        assert head_of(in_model_order(got[name].op)) == 0


def test_copies_pickles_and_casts_are_the_same_model() -> None:
    model = load(AWQ, mmap=True)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load(AWQ, mmap=True).to("cpu"),
    ]
    for twin in twins:
        assert within(twin, AWQ)
    assert not any(in_file(m.codes, AWQ) for m in packed(twins[0]).values())


def test_what_is_written_into_weights_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(AWQ, path)
    before = (file := next(path.glob("model*.safetensors"))).read_bytes()
    model = load(path, mmap=True)
    for module in packed(model).values():
        module.codes.zero_()
    assert not within(model, path)
    assert file.read_bytes() == before
    assert within(load(path, mmap=True), path)


def test_file_may_be_deleted_or_replaced_while_it_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(ROWS, path)
    want, model = expected(path), load(path, mmap=True)
    file = next(path.glob("model*.safetensors"))
    other = {n: torch.zeros_like(t) for n, t in load_file(file).items()}
    save_file(other, tmp_path / "other")
    (tmp_path / "other").replace(file)
    assert within(model, want)
    shutil.rmtree(path)
    assert within(model, want)


def test_file_that_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(ROWS, path)
    file = next(path.glob("model*.safetensors"))
    name = next(iter(open_checkpoint(path).tensors))
    with open_checkpoint(path) as checkpoint:
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(CheckpointError) as err:
            checkpoint.mapped(name)
    assert err.value.code == "Q-CKPT-CHANGED"


def test_file_that_the_system_does_not_map_says_what_works_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("quant_core.checkpoint.mapped.map_file", refuse)
    with pytest.raises(CheckpointError, match=r"No such device.*load with mmap=False") as err:
        load(AWQ, mmap=True)
    assert err.value.code == "Q-CKPT-IO"
    assert Path(err.value.path).name == "model.safetensors"
    assert within(load(AWQ), AWQ)


def test_mmap_goes_neither_with_prepared_weights_nor_with_another_device(tmp_path: Path) -> None:
    for options in ({"prepared": tmp_path}, {"device": "meta"}):
        with pytest.raises(ConfigError) as err:
            load(AWQ, mmap=True, **options)
        assert err.value.code in ("Q-CFG-CONFLICT", "Q-ENGINE-DEVICE"), options


def test_from_pretrained_takes_it_in_a_config() -> None:
    config = as_config(AWQ, mmap=True)
    model = AutoModelForCausalLM.from_pretrained(AWQ, config=config, dtype=torch.float32)
    assert all(in_file(m.codes, AWQ) for m in packed(model).values())
    assert within(model, AWQ)
