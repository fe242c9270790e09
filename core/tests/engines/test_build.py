"""What transformers is spared while it builds a model: nothing of it shows afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils._device import DeviceContext

pytest.importorskip("transformers")

from quant_core.engines.transformers_build import out_of_sight, without_numbers


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Dropout()) for _ in range(2))
        self.head = nn.Linear(2, 2)
        self.all_tied_weights_keys: dict[str, str] = {}


def _hidden(model: _Model, left: tuple[str, ...] = ()) -> bool:
    back = out_of_sight(model, dict(model.named_modules()), left)  # type: ignore[arg-type]
    hidden = not len(model.layers)
    back()
    assert len(model.layers) == 2
    return hidden


def test_out_of_sight_layers_that_are_done_are_marked_and_come_back() -> None:
    model = _Model()
    before = [(name, id(m)) for name, m in model.named_modules()]
    assert _hidden(model)
    assert [(name, id(m)) for name, m in model.named_modules()] == before
    assert not any(m.training for m in model.layers.modules() if m is not model.layers)
    assert all(m._is_hf_initialized for m in model.layers[1].modules())
    assert model.head.training, "what stays in sight is left to transformers"


def test_out_of_sight_layers_with_something_left_stay_in_sight() -> None:
    assert not _hidden(_Model(), left=("layers.1.0.weight",))
    tied = _Model()
    tied.all_tied_weights_keys = {"head.weight": "layers.0.0.weight"}
    assert not _hidden(tied)
    computed = _Model()
    computed.layers[1].register_buffer("inv_freq", torch.ones(1), persistent=False)
    assert not _hidden(computed)


def test_out_of_sight_module_with_its_own_train_is_asked() -> None:
    class Frozen(nn.Module):
        heard = False

        def train(self, mode: bool = True) -> Frozen:
            self.heard = True
            return super().train(mode)

    model = _Model()
    model.layers[0] = own = Frozen()
    assert _hidden(model)
    assert own.heard
    assert not own.training


def test_without_numbers_meta_is_passed_by_and_others_get_numbers() -> None:
    real = nn.init.kaiming_uniform_
    seen: list[float] = []
    with without_numbers():
        with torch.device("meta"):
            assert nn.Linear(4, 4).weight.is_meta
        other = threading.Thread(target=lambda: seen.append(float(nn.Linear(4, 4).weight.std())))
        other.start()
        other.join()
        filled = torch.full((3,), torch.nan)
        assert nn.init.ones_(filled) is filled
    assert filled.tolist() == [1.0] * 3
    assert 0 < seen[0] < 1
    assert nn.init.kaiming_uniform_ is real


class _Special(nn.Linear):
    pass


@pytest.mark.parametrize("made", [nn.Linear, _Special])
@pytest.mark.parametrize("bias", [True, False])
def test_without_numbers_linear_is_as_torch_makes_it(made: type[nn.Linear], bias: bool) -> None:
    with torch.device("meta"):
        plain = made(4, 6, bias=bias)
    with without_numbers():
        with torch.device("meta"):
            bare, other = made(4, 6, bias=bias), made(4, 6, bias=bias)
            wide, own = made(4, 6, bias, dtype=torch.float64), made(4, 6, device="cpu")
            with torch._C.DisableTorchFunction():
                here = made(4, 6)
        outside = made(4, 6)
    assert list(bare.__dict__) == list(plain.__dict__)
    assert (bare.in_features, bare.out_features, repr(bare)) == (4, 6, repr(plain))
    for name, value in plain._parameters.items():
        got = bare._parameters[name]
        assert (got is None) == (value is None)
        if got is not None and value is not None:
            assert got.is_meta
            assert got.requires_grad
            assert type(got) is nn.Parameter
            assert (got.shape, got.dtype) == (value.shape, value.dtype)
            assert got is not other._parameters[name]
    assert wide.weight.dtype == torch.float64
    assert not any(m.weight.is_meta for m in (own, here, outside))
    assert 0 < float(outside.weight.std()) < 1


def test_without_numbers_after_an_error_is_undone() -> None:
    real, made, asked = nn.init.normal_, nn.Linear.__init__, DeviceContext.__torch_function__
    with pytest.raises(KeyError), without_numbers():
        raise KeyError
    assert nn.init.normal_ is real
    assert nn.Linear.__init__ is made
    assert DeviceContext.__torch_function__ is asked


def test_without_numbers_only_what_has_none_is_not_filled() -> None:
    with without_numbers():
        with torch.device("meta"):
            bare, wide = torch.ones(3, 2), torch.zeros(3, dtype=torch.float64)
            here = torch.ones(3, device="cpu")
        with torch.device("cpu"):
            inside = torch.ones(3)
        outside = torch.zeros(2)
    assert (bare.is_meta, bare.shape, bare.dtype) == (True, (3, 2), torch.get_default_dtype())
    assert (wide.is_meta, wide.shape, wide.dtype) == (True, (3,), torch.float64)
    assert here.tolist() == inside.tolist() == [1.0] * 3
    assert outside.tolist() == [0.0] * 2
