#!/bin/sh
# The transformers engine's tests with the oldest supported transformers (or: run_transformers_low.sh 5.18.0).
# A second environment borrows everything else from the first: .venv, or $VENV.
set -eu
cd "$(dirname "$0")/.."
version=${1:-$(sed -n 's/.*transformers>=\([0-9.]*\),.*/\1/p' core/pyproject.toml).0}
main=$(cd "${VENV:-.venv}" && pwd)
low=.venv-tf-low
if ! [ -x "$low/bin/python" ]; then
  "$main/bin/python" -m venv --without-pip "$low"
  site=$("$low/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$main/bin/python" - "$site" <<'PY'
import pathlib, sys, sysconfig
here = sysconfig.get_path("purelib")
pathlib.Path(sys.argv[1], "main_environment.pth").write_text(
    f"import site; site.addsitedir({here!r})\n"
)
PY
fi
# transformers before 5.22 asks for huggingface-hub 1.x; --no-deps keeps the borrowed packages as they are
"$main/bin/python" -m pip --disable-pip-version-check --python "$low/bin/python" \
  install -q --no-deps "transformers==$version" "huggingface-hub<2" httpx httpcore
"$low/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 exec "$low/bin/python" -m pytest -q -p no:cacheprovider \
  core/tests/engines tests/test_transformers_engine.py tests/test_transformers_models.py
