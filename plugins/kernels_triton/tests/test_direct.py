"""The C launcher gets what Triton's own Python half would have given it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia.driver")

from quant_kernels_triton.direct import launcher  # noqa: E402


class _Utils:
    """In place of the driver's C functions, which need a GPU."""

    def __init__(self) -> None:
        self.filled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def fill_tma_descriptor(self, *args: Any) -> tuple[str, tuple[Any, ...]]:
        self.filled.append(args)
        return "map", tuple(tuple(a) if isinstance(a, list) else a for a in args)

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def launch(self, *args: Any) -> None:
        self.launched.append(tuple(tuple(a) if isinstance(a, list) else a for a in args))


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> _Utils:
    from triton.runtime import driver

    made = _Utils()
    active = SimpleNamespace(utils=made, allocate_default_profile_scratch=lambda *_: None)
    monkeypatch.setattr(type(driver), "active", active)
    return made


def _compiled(utils: _Utils, *, descriptor: bool, scratch: int = 0) -> Any:
    run = object.__new__(nvidia.CudaLauncher)
    kind = "tensordesc<bf16[16, 128]>" if descriptor else "*bf16"
    signature = {0: kind, 1: "*i16", 2: "i32", 3: "constexpr"}
    meta = [
        {
            "swizzle": 3,
            "elem_size": 2,
            "elem_type": next(iter(nvidia.TMA_DTYPE_DEVICE_TO_HOST)),
            "block_size": [16, 128],
            "fp4_padded": False,
        }
    ]
    run.launch = nvidia.wrap_handle_tensordesc(utils.launch, signature, meta if descriptor else [])
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
    run.global_scratch_size = run.profile_scratch_size = scratch
    run.global_scratch_align = run.profile_scratch_align = 1
    run.gsan_enabled, run.arg_annotations, run.kernel_signature = False, ("annotations",), b"kinds"
    if not hasattr(nvidia, "annotate_arguments"):  # Triton 3.6 reads no annotations
        del run.arg_annotations, run.kernel_signature
    return SimpleNamespace(run=run, function=77, packed_metadata=("meta",))


@pytest.mark.parametrize("descriptor", [True, False])
def test_same_arguments_as_through_triton(utils: _Utils, descriptor: bool) -> None:
    compiled = _compiled(utils, descriptor=descriptor)
    x = torch.zeros(5, 256, dtype=torch.bfloat16)
    desc = SimpleNamespace(
        base=x, shape=[5, 256], strides=[256, 1], padding="zero", round_f32_to_tf32=False
    )
    args = [desc if descriptor else 4096, 1234, 5]
    compiled.run(3, 2, 1, 9, 77, ("meta",), None, None, None, *args, "const")
    direct = launcher(compiled, ("const",))
    direct(3, 2, 9, args)
    direct(3, 2, 9, args)
    own, ours, again = utils.launched
    assert own == ours == again
    assert len(utils.filled) == (2 if descriptor else 0)  # Triton's, and ours once


def test_a_descriptor_of_other_rows_is_another(utils: _Utils) -> None:
    direct = launcher(_compiled(utils, descriptor=True), ())
    x = torch.zeros(8, 256, dtype=torch.bfloat16)
    for rows in (8, 4):
        desc = SimpleNamespace(base=x, shape=[rows, 256], strides=[256, 1])
        direct(1, 1, 0, [desc, 1, 2])
    assert [call[5] for call in utils.filled] == [[8, 256], [4, 256]]


def test_a_kernel_with_scratch_memory_goes_through_triton(utils: _Utils) -> None:
    calls = []
    compiled = _compiled(utils, descriptor=False, scratch=16)

    class Run(type(compiled.run)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> None:
            calls.append(args)

    compiled.run.__class__ = Run
    launcher(compiled, ("const",))(3, 2, 9, [1, 2, 3])
    assert calls == [(3, 2, 1, 9, 77, ("meta",), None, None, None, 1, 2, 3, "const")]
    assert not utils.launched
