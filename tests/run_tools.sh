#!/bin/sh
# The tests that need the formats' own tools, with these installed, so that none is skipped for want
# of one: what each tool makes of converted checkpoints. The tools lie in an environment of their
# own (.venv-tools, kept between runs), which borrows everything else from .venv, or $VENV.
# Arguments go to pytest. TOOLS_OPTIONAL=1: not being able to build, or not within
# $TOOLS_BUILD_S seconds, is no failure.
set -eu
cd "$(dirname "$0")/.."
here=tests/tools
venv=.venv-tools
stamp=$venv/.stamp
log=$venv/build.log

cannot() {
  echo "test-tools: NOT RUN: $1" >&2
  [ -n "${TOOLS_OPTIONAL:-}" ] && exit 0
  exit 1
}

. tests/borrow.sh
main=$(lender) || cannot "no environment at ${VENV:-.venv}; run make setup first"

build() {
  borrow "$main" $venv || return 1
  # timeout runs programs only, so pip_into is written out
  timeout "${TOOLS_BUILD_S:-600}" "$main/bin/python" -m pip \
    --disable-pip-version-check --python $venv/bin/python install -q --no-compile --no-deps \
    -r $here/requirements.txt >$log 2>&1
}

want=$({ cat $here/requirements.txt tests/run_tools.sh tests/borrow.sh; echo "$main"; "$main/bin/python" -V; } | cksum)
if [ "$(cat $stamp 2>/dev/null)" != "$want" ]; then
  echo "test-tools: building $venv" >&2
  build || {
    tail -n 5 $log >&2 2>/dev/null || true
    cannot "the tools could not be installed within ${TOOLS_BUILD_S:-600} s, see pip's words above"
  }
  echo "$want" >$stamp
fi
$venv/bin/python - $here/requirements.txt <<'PY' || cannot "not all tools are installed; remove $venv and try again"
import importlib.metadata as m, pathlib, sys
pins = [l.split("==") for l in pathlib.Path(sys.argv[1]).read_text().splitlines() if "==" in l]
print(*(f"{name} {m.version(name)}" for name, _ in pins), sep=", ")
sys.exit(any(m.version(name) != version for name, version in pins))
PY
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec $venv/bin/python -m pytest -q -p no:cacheprovider --timeout 600 -rs \
  tests/test_convert_tools.py tests/test_convert_float_tools.py tests/test_convert_tokens.py \
  core/tests/engines/test_transformers.py "$@"
