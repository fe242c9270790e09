"""Tests with SGLang's real classes; collected only where it is installed (``make test-sglang``)."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

if find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import stub_modules

    stub_modules.install()

    from quant_core.engines.sglang import register

    register()
