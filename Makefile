# make setup      .venv with every dependency, from constraints.txt (a second call does nothing)
# make demo       a tiny InternVL-X trained on two CPU ranks
# make test       the suite                   make test-fast   without the slow and the parallel tests
# make test-heavy  what takes minutes: static boundaries and conversion in all layouts, the notebook, compilations
# make test-slurm  jobs on a real SLURM of two nodes (root; tests/slurm/cluster.sh install)
# make test-serving  exports in servers and evaluation harnesses, in environments that it makes; minutes
# make test-gpu   the tests that need CUDA    make lint        ruff, mypy
# make docs       the guides, the examples and the API as a site: site/index.html
# make bench      the quick benchmarks

SHELL := bash
# Another Python, such as an image's, is taken as it is: make test-gpu PYTHON=python3
PYTHON := .venv/bin/python

# Importing torch and Megatron takes 4 s with compiled files beside the sources and 18 s without them, so an
# environment that forbids them is overruled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-fast test-heavy test-slurm test-gpu test-serving lint docs bench
.DEFAULT_GOAL := setup

ifneq ($(PYTHON),.venv/bin/python)
setup: ;
else
setup: .venv/.installed
endif

.venv/.installed: setup.py constraints.txt tools/setup_env.sh
	@bash tools/setup_env.sh

demo: setup
	@bash examples/demo/run.sh

# Two processes: one for all tests that share the pool of ranks, one for the others (tests/conftest.py).
test: setup
	@$(PYTHON) -m pytest -n 2 --dist loadgroup -m "not heavy"

test-fast: setup
	@$(PYTHON) -m pytest -n 2 --dist loadgroup -m "not slow and not heavy" --ignore tests/parallel

test-heavy: setup
	@$(PYTHON) -m pytest -n 2 --dist loadgroup -m heavy

test-slurm: setup
	@$(PYTHON) -m pytest -rs tests/slurm/scenarios.py

test-gpu: setup
	@$(PYTHON) -m pytest -m gpu -rs tests/gpu

# Servers and harnesses that need other versions than this project have environments of their own, which these
# scripts make; where one cannot be made, its tests are skipped and say so.
test-serving: .venv/.serve
	@for script in tools/vllm_env.sh tools/eval_env.sh; do \
	  [ ! -f $$script ] || bash $$script || echo "test-serving: $$script failed; its tests are LEFT OUT" >&2; done
	@.venv/bin/python -m pytest -rs tests/serving

.venv/.serve: .venv/.installed
	@EXTRAS=dev,serve bash tools/setup_env.sh
	@touch $@

lint: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

# The site opens from disk. A warning, such as a link that leads nowhere, is an error (mkdocs.yml: strict).
docs: .venv/.docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build
	@echo "docs: site/index.html"

.venv/.docs: .venv/.installed
	@EXTRAS=dev,docs bash tools/setup_env.sh
	@touch $@

bench: setup
	@$(PYTHON) -m benchmarks
