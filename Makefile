# Thin targets: the commands are what a user without make types (see README.md).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINKS := build/__editable__.eplb_toolkit-0.1.0-py3-none-any

.PHONY: demo test test-engines test-kernels check format docs benchmark clean

demo: $(VENV)/.installed
	$(BIN)/eplb demo

test: $(VENV)/.tested
	$(BIN)/pytest -n auto --dist worksteal

# The engines' own code, as released, on our files: in an environment of its own, some 500 MB.
test-engines: build/engines/.installed
	build/engines/bin/pytest tests/with_engines

# GPU kernels in Triton's interpreter, on a machine without GPUs: torch for CPUs has no Triton (1 GB).
test-kernels: $(VENV)/.tested
	$(BIN)/pip install -q --group kernels
	$(BIN)/pytest tests/with_triton

check: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=$(LINKS) $(BIN)/mypy -p eplb
	MYPYPATH=$(LINKS) $(BIN)/mypy tools
	MYPYPATH=$(LINKS):benchmarks $(BIN)/mypy benchmarks

format: $(VENV)/.tested
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Warnings are errors: a link that leads nowhere, a page that no list of contents has.
docs: $(VENV)/.documented
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "Built: build/docs/index.html"

benchmark: $(VENV)/.tested
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache demo-plan.yaml demo-report.html

# The editable install links single files, so a folder that changes asks for it again.
FOLDERS := eplb eplb/engines cli cli/report cli/report/static cli/report/templates placement profiles profiles/data runtime runtime/ep runtime/requests
EDITABLE := install -q -c constraints.txt -e . --config-settings editable_mode=strict

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml constraints.txt $(FOLDERS)
	$(BIN)/pip $(EDITABLE)
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install -q "pip>=25.1"
	$(BIN)/pip install -q -c constraints.txt --group dev -e ".[runtime,plots]" --config-settings editable_mode=strict
	touch $@

$(VENV)/.documented: $(VENV)/.tested
	$(BIN)/pip install -q -c constraints.txt --group docs
	touch $@

# Wheels without what they depend on: the tests load single modules of them.
build/engines/.installed: constraints-engines.txt pyproject.toml constraints.txt $(FOLDERS)
	$(PYTHON) -m venv build/engines
	build/engines/bin/pip install -q "pip>=25.1"
	build/engines/bin/pip install -q -c constraints.txt --group test -e ".[runtime]" --config-settings editable_mode=strict
	build/engines/bin/pip install -q --no-deps --only-binary :all: -r constraints-engines.txt
	touch $@
