"""Load a checkpoint with SGLang's real classes, in one process, without its servers.

``loaded`` publishes real server arguments, sets up the groups of one rank, and loads through the
loader that SGLang picks by them. ``forward`` runs a loaded model with causal attention in plain
torch: SGLang's attention reads its cache through kernels that its CPU wheels would bring.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

__all__ = [
    "forward",
    "loaded",
    "published",
    "reference_logits",
    "reference_model",
    "served_logits",
    "without_notes",
]


@contextmanager
def published(path: Path, **settings: Any) -> Iterator[Any]:
    """SGLang's ``ModelConfig`` of real server arguments, and the groups of one rank."""
    from sglang.srt.distributed import parallel_state as groups
    from sglang.srt.runtime_context import SpawnRanks, process_model_config, publish, reset_context
    from sglang.srt.server_args import ServerArgs

    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    defaults = {"quantization": "quant_core", "device": "cpu", "dtype": "float32"}
    reset_context()
    args = ServerArgs(model_path=str(path), skip_tokenizer_init=True, **(defaults | settings))
    try:
        publish(args, role="test", ranks=SpawnRanks(world_rank=0))
        groups.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
        groups.initialize_model_parallel(backend="gloo")
        yield process_model_config()
    finally:
        groups.destroy_model_parallel()
        groups.destroy_distributed_environment()
        reset_context()


@contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[Any]:
    """The model of a checkpoint, by the loader that SGLang has for ``load_format``."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import get_model_loader

    with published(path, **settings) as config:
        load = LoadConfig(load_format=settings.get("load_format", "auto"))
        loader = get_model_loader(load, config)
        yield loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))


def _attend(
    self: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any, *args: Any, **kw: Any
) -> Tensor:
    """Stands for ``RadixAttention.forward``: one sequence, all tokens, causal."""
    tokens = q.shape[0]

    def heads(x: Tensor, count: int) -> Tensor:
        return x.reshape(tokens, count, -1).transpose(0, 1)[None]

    out = nn.functional.scaled_dot_product_attention(
        heads(q, self.tp_q_head_num), heads(k, self.tp_k_head_num), heads(v, self.tp_v_head_num),
        is_causal=True, scale=self.scaling, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1).reshape(tokens, -1)


def forward(model: Any, ids: list[int]) -> Tensor:
    """Logits of all tokens: the model's own layers, and its output layer's own method."""
    from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    batch = mock.MagicMock(name="ForwardBatch")
    batch.num_token_non_padded, batch.can_run_tbo = None, False
    tokens = torch.tensor(ids)
    context = forward_context(ForwardContext(attn_backend=mock.MagicMock()))
    with torch.no_grad(), context, mock.patch.object(RadixAttention, "forward", _attend):
        hidden = model.model(tokens, torch.arange(len(ids)), batch)
        head = model.lm_head
        if should_apply_lm_head_quant_method(head, head.quant_method):
            logits = head.quant_method.apply(head, hidden)
        else:
            logits = hidden @ head.weight.T
    return logits[:, : model.config.vocab_size].float()


def served_logits(path: Path, ids: list[int], **settings: Any) -> Tensor:
    with loaded(path, **settings) as model:
        return forward(model, ids)


def reference_model(path: Path, **options: Any) -> Any:
    """From ``load_model``, in float32, with transformers' own norms."""
    from quant_core import load_model
    from quant_core.engines.transformers_swap import unswap

    model = load_model(path, dtype=torch.float32, **options)
    for module in model.modules():
        unswap(module)  # a last bit of a norm tips activations that are rounded to codes
    return model


def reference_logits(path: Path, ids: list[int], **options: Any) -> Tensor:
    with torch.no_grad():
        return reference_model(path, **options)(torch.tensor([ids])).logits[0].float()


def without_notes(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint's own files: SGLang reads every safetensors file there is."""
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(("expected", "reference")):
            shutil.copy(file, to / file.name)
    return to
