# make demo         install, start a local Ray head, and submit the job: from a dataset to a served model
# make down         stop everything that `make demo` started
# make test         run the tests
# make lint         run ruff, mypy and the import rules
# make test-faults  kill nodes, jobs and replicas, fill disks; prints a table of the results (half an hour)
# make drill        run all slow tests, test-faults included; installs DeepSpeed
# make docs         write the reference pages that are generated from the code
# make clean        run `make down` and remove .venv
#
# Options: RECIPE=demo  PORT=8000 (HTTP endpoint)  DASHBOARD_PORT=8265  PYTHON=python3 (3.11 or newer)

PYTHON ?= python3
RECIPE ?= demo
PORT ?= 8000
DASHBOARD_PORT ?= 8265
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

ADDRESS := http://127.0.0.1:$(DASHBOARD_PORT)
UP := rcd up --dashboard-port $(DASHBOARD_PORT) --port $(PORT)
SUBMIT := ray job submit --address $(ADDRESS) --working-dir . -- \
	python pipelines/full.py --recipe $(RECIPE) --set deploy.port=$(PORT)
# Ray's address variables would override --address, and a proxy must not be asked for a loopback address.
LOCAL := env -u RAY_ADDRESS -u RAY_API_SERVER_ADDRESS RAY_AUTH_MODE=disabled PATH="$(CURDIR)/$(BIN):$$PATH" \
	NO_PROXY="127.0.0.1,$$NO_PROXY" no_proxy="127.0.0.1,$$no_proxy"
INTERRUPTED := The job goes on. To stop it: ray job stop --address $(ADDRESS) ID (Ray printed the ID above), or: make down

.DELETE_ON_ERROR:
.PHONY: demo down test test-extras test-faults drill lint docs clean

demo: $(VENV)/.runtime
	@echo '$(UP)'
	@$(LOCAL) $(UP)
	@echo '$(SUBMIT)'
	@trap 'echo; echo "$(INTERRUPTED)"; exit 130' INT TERM HUP; $(LOCAL) $(SUBMIT)

down:
	@if [ -x $(BIN)/rcd ]; then $(BIN)/rcd down; else echo "nothing to stop"; fi

# One thread each: processes with two threads wait for one another on two cores. The tests start hundreds of processes,
# which must not compile this repository again each time.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(VENV)/.dev
	@$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder

test-extras: $(VENV)/.dev
	@$(BIN)/pip install -q -c constraints.txt -e ".[gguf,lora,quantise,wandb,mlflow,trackio,checks]"
	@$(PYTEST) -m "" tests/rcd_core/training/test_lora.py tests/rcd_core/families/test_quantise.py \
		tests/rcd_core/families/test_convert.py tests/pipelines/test_train.py tests/pipelines/test_smollm2.py \
		tests/pipelines/training/test_trackers.py \
		-k "lora or adapter or quantise or convert or smollm2 or wandb or mlflow or trackio"
	@$(PYTEST) tests/cluster/test_kuberay.py tests/cluster/test_launcher.py

test-faults: $(VENV)/.dev
	@$(PYTEST) -m faults -s

drill: $(VENV)/.deepspeed
	@$(PYTEST) -m drill -s

lint: $(VENV)/.dev
	@$(BIN)/ruff check rcd_core pipelines tests cluster
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(VENV)/.dev
	@$(BIN)/python -m tests.docs.recipes
	@$(BIN)/python -m tests.docs.http_api
	@$(BIN)/python -m tests.docs.kuberay

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
