#!/bin/sh
# The SGLang engine's tests with the real engine's classes, in an environment of their own
# (.venv-sglang, kept between runs). Arguments go to pytest. SGLANG_OPTIONAL=1: not being able to
# install SGLang is no failure.
set -eu
cd "$(dirname "$0")/.."
here=tests/sglang_engine
venv=${SGLANG_VENV:-.venv-sglang}
stamp=$venv/.stamp
version=0.5.23
pip="$venv/bin/python -m pip --disable-pip-version-check install -q"

cannot() {
  echo "test-sglang: NOT RUN: $1" >&2
  [ -n "${SGLANG_OPTIONAL:-}" ] && exit 0
  exit 1
}

failed() {
  echo "test-sglang: FAILED: $1" >&2
  exit 1
}

install_sglang() {
  python=${PYTHON:-python3}
  test -x "$venv/bin/python" || "$python" -m venv "$venv"
  $pip -c $here/constraints.txt torch==2.13.0 &&
    $pip -c $here/constraints.txt -r $here/requirements.txt &&
    $pip --no-deps sglang==$version &&
    $pip -c $here/constraints.txt hatchling editables pluggy pytest pytest-timeout
}

install_ours() {
  set -- -e ./core
  for project in plugins/*/pyproject.toml; do set -- "$@" -e "./${project%/pyproject.toml}"; done
  $pip --no-deps --no-build-isolation "$@"
}

[ "$(uname -sm)" = "Linux x86_64" ] || cannot "sglang $version has wheels for Linux x86_64 only"
want=$(cat $here/requirements.txt $here/constraints.txt core/pyproject.toml \
  plugins/*/pyproject.toml plugins/*/csrc/* tests/run_sglang.sh | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "test-sglang: building $venv" >&2
  install_sglang || cannot "SGLang could not be installed, see pip's messages above"
  install_ours || failed "our own packages could not be installed, see pip's messages above"
  echo "$want" > "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 SGLANG_USE_CPU_ENGINE=1
"$venv/bin/python" -c 'from importlib.metadata import version
print(*(f"{n} {version(n)}" for n in ("sglang", "torch", "transformers")))' ||
  failed "sglang is not in $venv; remove that folder and try again"
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider --timeout 600 $here "$@"
