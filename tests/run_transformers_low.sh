#!/bin/sh
# The transformers engine's tests with the oldest supported transformers (or: run_transformers_low.sh 5.18.0).
# A second environment borrows everything else from the first: .venv, or $VENV.
set -eu
cd "$(dirname "$0")/.."
version=${1:-$(sed -n 's/.*transformers>=\([0-9.]*\),.*/\1/p' core/pyproject.toml).0}
. tests/borrow.sh
main=$(lender) || { echo "no environment at ${VENV:-.venv}; run make setup first" >&2; exit 1; }
low=.venv-tf-low
[ -x "$low/bin/python" ] || borrow "$main" "$low"
# transformers before 5.22 asks for huggingface-hub 1.x; --no-deps keeps the borrowed packages as they are
pip_into "$main" "$low" --no-deps "transformers==$version" "huggingface-hub<2" httpx httpcore
"$low/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 exec "$low/bin/python" -m pytest -q -p no:cacheprovider \
  core/tests/engines tests/test_transformers_engine.py tests/test_transformers_models.py
