"""Losing, renaming or doubling any one tensor of any checkpoint fails the load and names it.

For every checkpoint and every tensor in it, the real file is written again with that tensor
edited. What planning lets through must fail in the engine.
"""

from __future__ import annotations

import shutil

import pytest
import torch

import quant_core
from checkpoint_sets import checkpoint_dirs
from edit_files import MUTATIONS, edit_folder, other_name
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import QuantError
from quant_core.plan import plan
from test_checkpoint_weights import PREFIXES

DIRS = checkpoint_dirs(PREFIXES)


def _load(folder):
    with open_checkpoint(folder) as checkpoint:
        plan(checkpoint)
    quant_core.load_model(folder, dtype=torch.float32)


def _legally_absent(folder, stored):
    """A GGUF file without output.weight ties it; only a config.json beside it can say otherwise."""
    return stored == "output.weight" and not (folder / "config.json").is_file()


def _told(error):
    return f"{error} {error.tensor} {error.expected} {error.actual}"


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_no_tensor_can_be_lost_renamed_or_doubled(folder, mutation, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        names = {n: checkpoint.public_name(n) for n in checkpoint.tensors}
    accepted, unnamed = [], []
    for i, (stored, public) in enumerate(names.items()):
        edited = tmp_path / str(i)
        edit_folder(folder, edited, stored, mutation)
        if mutation == "dropped" and _legally_absent(folder, stored):
            continue
        told = {
            "dropped": {stored, public, public.removesuffix(".weight")},
            "renamed": {stored, public, public.removesuffix(".weight"), other_name(stored)},
            "doubled": {other_name(stored)},
        }[mutation]
        try:
            _load(edited)
        except QuantError as err:
            if not any(name in _told(err) for name in told):
                unnamed.append((stored, err.code, str(err)[:200]))
        else:
            accepted.append(stored)
        finally:
            shutil.rmtree(edited)  # thousands of them would fill a disk
    assert accepted == []
    assert unnamed == []


def test_edited_files_differ_from_the_real_one_only_where_meant(tmp_path):
    """The editor itself: an edit that changes nothing loads and gives the same weights."""
    for folder in DIRS[:1] + DIRS[-1:]:
        target = tmp_path / folder.name
        edit_folder(folder, target, "no such tensor", "dropped")
        model = quant_core.load_model(target, dtype=torch.float32)
        same = quant_core.load_model(folder, dtype=torch.float32)
        ids = torch.arange(16)[None]
        assert torch.equal(model(input_ids=ids).logits, same(input_ids=ids).logits)
