#!/usr/bin/env bash
# Create .venv with Python 3.12 and the versions of constraints.txt. Called by `make setup`.
# EXTRAS=dev,gpu adds Transformer Engine, for machines with CUDA only.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() {
  # pyenv's python3 follows .python-version here instead of the machine's default.
  for candidate in python3 python3.12 python; do
    if command -v "$candidate" >/dev/null && is_312 "$candidate"; then echo "$candidate"; return; fi
  done
  fail "Python 3.12 is missing (Megatron-Core 0.19 needs it); found: $(python3 --version 2>/dev/null || echo none)." \
    "Get it with one of:  pyenv install 3.12   |   apt install python3.12-venv   |   uv python install 3.12"
}

if [ ! -x .venv/bin/python ] || ! is_312 .venv/bin/python; then
  python=$(find_python)
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv || fail "python -m venv failed; on Debian and Ubuntu: apt install python3.12-venv"
fi

# uv does not read pip's settings, which a machine may need.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"

target=".[${EXTRAS:-dev}]"
log=.venv/setup.log
no_network="is the network (or the package index that pip is configured with) reachable? The log is $log."

echo "setup: installing $target (first time: 6 GB, half a minute to some minutes)"
if [ ! -x .venv/bin/uv ]; then
  .venv/bin/python -m pip install --quiet -c constraints.txt uv >"$log" 2>&1 ||
    echo "setup: uv could not be installed; going on with pip, which is slower"
fi
if [ -x .venv/bin/uv ] && .venv/bin/uv pip install --quiet --python .venv/bin/python \
    -c constraints.txt -e "$target" >>"$log" 2>&1; then
  :
elif .venv/bin/python -m pip install --quiet -c constraints.txt -e "$target" >>"$log" 2>&1; then
  :
else
  tail -n 15 "$log" >&2
  fail "the packages could not be installed; $no_network"
fi
touch .venv/.installed
echo "setup: done; activate with 'source .venv/bin/activate' or use .venv/bin/python"
