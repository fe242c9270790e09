"""Tests with the real vLLM; collected only where it is installed (``make test-vllm``)."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: quick, and debuggable
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
