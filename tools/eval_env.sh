#!/usr/bin/env bash
# Create .venv-eval: lmms-eval and VLMEvalKit with this project, for tools/run_harness.py (docs/evaluation.md).
# A second call does nothing unless the list of versions has changed. Nothing of it is in the main environment.
#
# tools/eval_constraints.txt: what lmms-eval 0.7.3 and VLMEvalKit (ms-vlmeval) 0.0.20 resolve to together with the torch
# and transformers of constraints.txt, and filelock<4 (lmms-eval imports a module that 4 no longer has).
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'eval_env: %s\n' "$@" >&2; exit 1; }

versions=tools/eval_constraints.txt
log=.venv-eval/setup.log
if [ .venv-eval/.installed -nt "$versions" ] && [ .venv-eval/.installed -nt setup.py ]; then exit 0; fi

[ -x .venv/bin/uv ] || bash tools/setup_env.sh
[ -x .venv/bin/uv ] || fail "uv is missing in .venv, where make setup could not install it: .venv/bin/python -m pip install uv"
# uv does not read pip's settings, which a machine may need.
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"

echo "eval_env: making .venv-eval (230 packages, 6 GB; one to five minutes)"
.venv/bin/uv venv --quiet --allow-existing --python .venv/bin/python .venv-eval
# The project itself without its dependencies: an export is run by PyTorch and transformers, Megatron stays out.
if ! { .venv/bin/uv pip install --quiet --python .venv-eval/bin/python -c "$versions" lmms-eval ms-vlmeval &&
  .venv/bin/uv pip install --quiet --python .venv-eval/bin/python --no-deps -e .; } >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  fail "the packages could not be installed; is the network (or the package index that pip is configured with) reachable? The log is $log."
fi
touch .venv-eval/.installed
echo "eval_env: done; .venv-eval/bin/python tools/run_harness.py --help"
