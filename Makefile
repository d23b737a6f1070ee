# Set-up and the names of the pipelines; what they do stands in dvc.yaml and lib.
PYTHON ?= python3.11
JOBS ?= 1
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
# pip compiles nothing beforehand: what is imported must be compiled once, not at every start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup test test-code test-notebooks repro study lite store check bench lab lint

help: ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/ready ## build .venv from environment.yml

$(VENV)/ready: environment.yml pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile \
		-r <(sed -n '/^ *- pip:/,$$s/^ \{6\}- *//p' environment.yml)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

test: setup ## run the tests: code and notebooks side by side
	@echo "code and notebooks side by side; each reports when it is done"
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-code test-notebooks

test-code:
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

test-notebooks:
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
		-p tests.notebooks notebooks

# From nothing, stages run side by side: those that train, then their tables; the last of dvc.yaml
# first, since short ones then end the row. Whatever is missing after that is the last command's.
# DVC gives up on its lock after 3 s unless told to wait, and with --quiet it does not even say so.
TABLES := ^(generation|sets|supervised|adversarial|svm_features|single_image|latent_space)
repro: STAGES = dvc stage list --name-only | grep quick | grep -Ev "^(data|report)" | tac
repro: SIDE_BY_SIDE = xargs -n 1 -P $(JOBS) dvc --wait-for-lock repro --single-item >/dev/null
repro: JOBS := 2
repro: setup ## profile quick: the whole study from nothing, offline
	if [ ! -d results/quick/notebooks ]; then dvc repro data@quick >/dev/null; \
		$(STAGES) | grep -Ev "$(TABLES)" | $(SIDE_BY_SIDE); \
		$(STAGES) | grep -E "$(TABLES)" | $(SIDE_BY_SIDE); fi
	dvc repro --glob '*quick*'

lite: setup ## profile lite: from the artifact store, then whatever is stale

study: setup ## profile study: from the artifact store, then whatever is stale

# With JOBS=2 and more, stale runs are repeated side by side first: none depends on another.
lite study: RUNS = dvc stage list --name-only | grep "@$@-"
lite study: ALONE = dvc --wait-for-lock repro --single-item --allow-missing
lite study:
	$(BIN)/python -m lib check --store
	dvc pull --quiet --allow-missing --with-deps report@$@
	if [ -f data/raw/modelnet10.npz ]; then dvc repro data@study; fi
	if [ $(JOBS) -gt 1 ]; then $(RUNS) | xargs -r -n 1 -P $(JOBS) $(ALONE); fi
	dvc repro --allow-missing report@$@

store: setup ## put lite and study into the artifact store and prune it
	dvc push --with-deps report@lite report@study
	dvc gc --force --workspace --cloud

check: setup ## are results in place, and do they agree with the committed ones?
	$(BIN)/python -m lib check

bench: setup ## speed and memory, ours against the plain alternative
	$(BIN)/python -m benchmarks

lab: setup ## explore in JupyterLab
	$(BIN)/jupyter lab notebooks/00_tour.ipynb

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check lib notebooks
