# Two commands do everything on a fresh machine with Python 3.11: `make study` and `make test`.
#
#   make study PROFILE=full              another profile (notebooks/profiles/)
#   make study STUDY_FLAGS=--force       options of `tlmc study`
#   make test JOBS=4                     test processes
#   make PYTHON=/path/to/python3.11 ...  the interpreter that makes .venv
#   make PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" ...
#                                        options of pip; this one takes the small torch without CUDA on Linux

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install study test test-fast test-python test-processors test-notebooks test-cluster test-dist lint bench notebooks \
	strip clean clean-runs

PROFILE ?= laptop
JOBS ?= 2
STUDY_FLAGS ?=
PIP_FLAGS ?=
PYTHON ?=

PY := .venv/bin/python
STAMP := .venv/.installed
PIP_VERSION := 26.3
# one thread per test process: two processes with two threads each are slower than either alone
TEST_ENV := OMP_NUM_THREADS=1
# the tests whose numbers depend on how a processor adds up
NUMERICAL := $(addprefix tests/,descriptors families kernel_methods networks potentials sampling training)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the pinned set (the other targets do this first)

study: $(STAMP) ## run the notebooks of a profile and leave reports/index.html
	$(PY) -m tlmc.cli study --profile $(PROFILE) $(STUDY_FLAGS)

test: lint test-python test-notebooks ## lint, the test suite, and every notebook against its stored outputs

test-fast: $(STAMP) ## ruff and the quick tests within two minutes: no mypy, no notebooks, nothing marked slow (trainings, processes)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(TEST_ENV) $(PY) -m pytest -q -n $(JOBS) --dist loadscope -m "not slow" --durations 5 tests

test-python: $(STAMP) ## the test suite alone
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadscope tests

test-processors: $(STAMP) ## the numerical tests as on processors without AVX-512, and without AVX2
	for capability in avx2 default; do \
		echo "ATEN_CPU_CAPABILITY=$$capability"; \
		$(TEST_ENV) ATEN_CPU_CAPABILITY=$$capability $(PY) -m pytest -q -n $(JOBS) --dist loadscope $(NUMERICAL) || exit 1; \
	done

test-notebooks: $(STAMP) ## the notebooks alone (smoke profile)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadscope --nbval-lax --nbval-current-env \
		--nbval-cell-timeout 600 --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

test-cluster: $(STAMP) ## a sweep through a real Slurm of one node on this machine (Debian's packages; installed if root)
	$(PY) tests/cluster/slurm_sweep.py

test-dist: ## build wheel and sdist, install the wheel into an empty environment and use it there
	$(if $(wildcard $(PY)),$(PY),python3) tests/wheel/try_wheel.py

lint: $(STAMP) ## ruff (lint and format, notebooks included) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP) ## time descriptors against DScribe and a training step against the loop of the thesis
	$(PY) tests/benchmarks/descriptors.py
	$(PY) tests/benchmarks/training_step.py

notebooks: $(STAMP) ## run the notebooks (smoke profile) and store the outputs that `make test` compares with
	reports=$$(mktemp -d) && trap 'rm -rf "$$reports"' EXIT && \
	if [ -d reports/metrics ]; then cp -r reports/metrics "$$reports"; fi && \
	$(PY) -m tlmc.cli study --profile smoke --output "$$reports" && cp "$$reports"/executed/smoke/*.ipynb notebooks
	$(MAKE) --no-print-directory strip

strip: $(STAMP) ## drop run metadata and widget state from the notebooks; outputs and execution counts stay
	$(PY) -m nbstripout --keep-output --keep-count --extra-keys "metadata.papermill metadata.widgets \
		metadata.language_info cell.metadata.papermill cell.metadata.execution" notebooks/[0-9]*.ipynb

clean: ## remove what tools left: caches and builds; runs, reports, .venv and the download cache stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find tlmc tests notebooks -name __pycache__ -prune -exec rm -rf {} +

clean-runs: ## remove executed notebooks and ALL trained models under reports/runs, those of tlmc finetune too
	rm -rf reports/executed reports/runs

# The first candidate that starts and is new enough; a pyenv shim may exist and yet not start.
$(PY):
	@for candidate in "$(PYTHON)" python3.11 python3 python3.12 python3.13; do \
		[ -n "$$candidate" ] || continue; \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making .venv with $$("$$candidate" --version)"; exec "$$candidate" -m venv .venv; \
		fi; \
		[ "$$candidate" != "$(PYTHON)" ] || { echo "$(PYTHON) does not start or is older than Python 3.11" >&2; exit 1; }; \
	done; \
	echo "tlmc needs Python 3.11 or newer; found: $$(python3 --version 2>&1). Install it, or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

# torch is named with its version: unnamed, pip may take a newer build with CUDA. The stamp is written last, so a broken
# installation is repeated; it is newer than the pins, so a second call is quick and changed pins are installed.
$(STAMP): $(PY) constraints.txt pyproject.toml
	@echo "installing the pinned packages into .venv; the first time this takes a few minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check pip==$(PIP_VERSION)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) \
		"$$(grep '^torch==' constraints.txt)" -e '.[test]'
	@touch $@
