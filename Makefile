# make demo   create .venv, install, run a real federation and a shorter one with a mask a client beside it; write
#             runs/demo/ and runs/demo-fish/ (older ones are replaced)
# make test-containers   build the image, run federations in containers, break them (needs Docker, or Debian and root)
# make test   create .venv if need be, install the dev extra, run every check and test
# make lint   the checks alone
# make bench  the benchmarks; results go to runs/benchmarks
#
# Variables:
#   PYTHON=python3.12     the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                         where torch comes from. Empty: the package index that pip is set to. On Linux that is
#                         a CUDA build of several GB; the address above holds builds for CPUs (200 MB).
#   CONSTRAINTS=          empty: let pip choose versions, torch's too, instead of those that are tested
#                         (constraints.txt)
#   TORCH=torch==2.12.0   another torch, beside CONSTRAINTS= (which pin the tested one too)

PYTHON ?= python3
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
TORCH ?= $(if $(CONSTRAINTS),torch==2.13.0,torch>=2.6,<3)

VENV := .venv
BIN := $(VENV)/bin
# In the environment, because pip's isolated builds see no option (newer pips know the second name).
PIN := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS))

# Nothing but the package index is ever asked: no hub, no telemetry, no update check, no install at run time.
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-containers lint bench clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# The second run: a mask a client by Fisher information, with as many values as the first one sends (k / N).
demo: $(VENV)/.demo
	$(BIN)/fedmask run --config experiments/studies/demo.toml --overwrite
	$(BIN)/fedmask run --config experiments/studies/demo.toml --name demo-fish --method fish --placement client \
		--density 0.006085 --set scores.samples=32 --rounds 2 --overwrite
	$(BIN)/fedmask report runs/demo --beside runs/demo-fish

# Two processes, each with whole files: most tests keep one core busy.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# A process for each of the four files.
test-containers: $(VENV)/.dev
	FEDMASK_TEST_CONTAINERS=$${FEDMASK_TEST_CONTAINERS:-1} $(BIN)/python -m pytest -n 4 --dist loadfile \
		--durations=6 tests/end_to_end/containers

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy --strict fedmask clients server experiments
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m experiments.benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}: set PYTHON=" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIN) $(BIN)/pip install -q -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIN) $(BIN)/pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.demo
