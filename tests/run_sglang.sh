#!/bin/sh
# The SGLang engine's tests with the real engine's classes, in an environment of their own
# (.venv-sglang, kept between runs). Where `make setup` was run it borrows torch and our packages
# from there, else it has its own. Arguments go to pytest. SGLANG_OPTIONAL=1: not being able to install
# SGLang is no failure.
set -eu
cd "$(dirname "$0")/.."
here=tests/sglang_engine
venv=.venv-sglang
stamp=$venv/.stamp
version=0.5.23

cannot() {
  echo "test-sglang: NOT RUN: $1" >&2
  [ -n "${SGLANG_OPTIONAL:-}" ] && exit 0
  exit 1
}

failed() {
  echo "test-sglang: FAILED: $1" >&2
  exit 1
}

. tests/borrow.sh
engine_lender

install_sglang() {
  engine_torch &&
    engine_pip -c $here/constraints.txt -r $here/requirements.txt &&
    engine_pip --no-deps sglang==$version
}

[ "$(uname -sm)" = "Linux x86_64" ] || cannot "sglang $version has wheels for Linux x86_64 only"
want=$(engine_wants tests/run_sglang.sh)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "test-sglang: building $venv" >&2
  install_sglang || cannot "SGLang could not be installed, see pip's messages above"
  engine_ours || failed "our own packages could not be installed, see pip's messages above"
  echo "$want" > "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 SGLANG_USE_CPU_ENGINE=1
"$venv/bin/python" -c 'from importlib.metadata import version
print(*(f"{n} {version(n)}" for n in ("sglang", "torch", "transformers")))' ||
  failed "sglang is not in $venv; remove that folder and try again"
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider --timeout 600 $here "$@"
