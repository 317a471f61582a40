#!/usr/bin/env bash
# Make .venv-vllm: vLLM for CPUs with this package as its plugin. A second call does nothing.
# vLLM wants another transformers than .venv has, so it gets an environment of its own.
#
# With CUDA, vLLM's own wheel brings its own torch. There, instead of this script:
#   python3.12 -m venv .venv-vllm
#   .venv-vllm/bin/pip install "vllm>=0.32,<0.33"
#   .venv-vllm/bin/pip install --no-deps -e .
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'vllm_env: %s\n' "$@" >&2; exit 1; }

target=${VLLM_ENV:-.venv-vllm}
list=tools/vllm_constraints.txt
[ "$target/.installed" -nt "$list" ] && exit 0
[ -x .venv/bin/python ] || fail "no .venv: run make setup first"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the list is for Linux on x86_64; found $(uname -sm)"

# uv does not read pip's settings, which a machine may need.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"

echo "vllm_env: installing $(grep -c == "$list") packages into $target (first time: half a minute to some minutes)"
[ -x "$target/bin/python" ] || .venv/bin/python -m venv --without-pip "$target" || fail "python -m venv failed"
# The list is complete, so nothing is resolved: vLLM pins a torch of another index.
if [ -x .venv/bin/uv ]; then
  install() { .venv/bin/uv pip install --quiet --no-deps --python "$target/bin/python" "$@"; }
else
  install() { .venv/bin/python -m pip --python "$target/bin/python" install --quiet --no-deps "$@"; }
fi
install -r "$list" || fail "the packages could not be installed; is the package index reachable?"
install -e .
"$target/bin/python" -c 'import vllm, megatron_internvlx.serving.plugin' >/dev/null ||
  fail "vLLM cannot be imported in $target"
touch "$target/.installed"
echo "vllm_env: done; $target/bin/python -m vllm.entrypoints.openai.api_server --model DIR --enforce-eager, or vllm.LLM"
