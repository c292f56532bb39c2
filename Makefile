# Two commands: `make setup`, `make demo`. Every target sets the environment up first, once.

PYTHON       ?= $(shell command -v python3.11 || command -v python3)
REQUIREMENTS ?= requirements/cpu.txt
WORKSPACE    ?= workspace
PORT         ?= 8000
ARGS         ?=

VENV := .venv
BIN  := $(VENV)/bin
DONE := $(VENV)/.installed

# An environment is what an image has (REQUIREMENTS) and the tests' packages.
INSTALLER := requirements/uv.txt
TESTS     := requirements/test.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo reproduce serve submit test test-slow test-gpu requirements sbom clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "WORKSPACE=folder (demo, reproduce, serve), PORT=8000 (serve), ARGS='--seed 1' (further flags),"
	@echo "REQUIREMENTS=requirements/gpu.txt (setup on a GPU machine), PYTHON=python3.11"

setup: $(DONE) ## make the environment in .venv

$(DONE): $(REQUIREMENTS) $(TESTS) $(INSTALLER)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("make setup needs Python 3.11, not %d.%d: make setup PYTHON=/path/to/python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --require-hashes --requirement $(INSTALLER)
	$(BIN)/uv pip sync --require-hashes --compile-bytecode --python $(BIN)/python $(REQUIREMENTS) $(TESTS)
	touch $@

demo: $(DONE) ## the whole paper in minutes: captions, pairs, dataset, editor, report
	$(BIN)/python -m jobs.reproduce --recipe recipes/miniature.yaml --workspace "$(WORKSPACE)" $(ARGS)

reproduce: $(DONE) ## the same at the size where the ablations mean something (hours)
	$(BIN)/python -m jobs.reproduce --recipe recipes/miniature_full.yaml --workspace "$(WORKSPACE)" $(ARGS)

serve: $(DONE) ## the endpoint, on the workspace's editor or the shipped one
	$(BIN)/python -m serve.app --recipe recipes/miniature.yaml --workspace "$(WORKSPACE)" --open --port $(PORT) $(ARGS)

submit: $(DONE) ## JOB=train RECIPE=… WORKSPACE=s3://…: run a job on a Ray cluster, follow its log
	@$(BIN)/python -m cluster.submit --job $(JOB) --recipe $(RECIPE) --workspace "$(WORKSPACE)" $(ARGS)

# Two at a time, a file's tests one after the other: most of the time goes into starts of Ray and of engines.
test: $(DONE) ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(DONE) ## the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout=1800 $(ARGS)

test-gpu: $(DONE) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu --timeout=1800 $(ARGS)

COMPILE := $(BIN)/uv pip compile --python-version 3.11 --override requirements/override.txt --generate-hashes \
           --no-emit-index-url --custom-compile-command "make requirements" --quiet --upgrade

# Runtime first: the tests' packages have to fit it, and never the other way round.
requirements: $(DONE) ## upgrade the pins of requirements/*.txt from the .in files
	$(COMPILE) requirements/cpu.in -o requirements/cpu.txt
	$(COMPILE) requirements/gpu.in -o requirements/gpu.txt
	$(COMPILE) requirements/uv.in -o $(INSTALLER)
	$(COMPILE) requirements/test.in $(foreach pins,cpu gpu uv,-c requirements/$(pins).txt) -o $(TESTS)

SBOM := requirements/cpu.txt requirements/gpu.txt
sbom: $(DONE) ## bills of materials of the pinned packages (CycloneDX): sbom-cpu.json, sbom-gpu.json
	$(foreach pins,$(SBOM),$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements $(pins) \
	    --pyproject pyproject.toml --output-reproducible -o sbom-$(basename $(notdir $(pins))).json &&) true

clean: ## remove the environment and the caches; workspaces stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
