# make demo    from a dataset to a served model on this machine: installs, starts a local Ray head, submits the job
# make down    ends what `make demo` started
# make test    the tests         make lint    ruff, mypy and the import rules         make clean    removes .venv
# make test-faults   nodes, jobs and replicas killed, full disks: ends with a table of what happened (half an hour)
# make drill   all slower tests, those of faults among them; installs DeepSpeed
#
# Options: PORT=8000 (HTTP endpoint)  DASHBOARD_PORT=8265  PYTHON=python3 (3.11 or newer)

PYTHON ?= python3
PORT ?= 8000
DASHBOARD_PORT ?= 8265
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: demo down test test-faults drill lint clean

demo: $(VENV)/.runtime
	@$(BIN)/python -m pipelines.ray_cluster.local demo --port $(PORT) --dashboard-port $(DASHBOARD_PORT)

down:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m pipelines.ray_cluster.local down; else echo "nothing to stop"; fi

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: $(VENV)/.dev
	@$(BIN)/python -m pytest -m faults -s

drill: $(VENV)/.deepspeed
	@$(BIN)/python -m pytest -m drill -s

lint: $(VENV)/.dev
	@$(BIN)/ruff check rcd_core pipelines tests cluster
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean: down
	rm -rf $(VENV) .rcd build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Stamp files: an install is repeated only when the pins or the dependencies change.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; give a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV) (minutes, once)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@# First and by exact version, so that pip takes a CPU wheel where one is provided.
	@$(PIP) install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml
	@$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.runtime $@

# For the drills only: nothing else in this repository needs it.
$(VENV)/.deepspeed: $(VENV)/.dev
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,deepspeed]"
	@touch $@
