# `make demo` and `make test` need only Python 3.11+ and pip; each sets .venv up on its first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two stamps: what is installed, and this package on top of it. A stamp appears only when all went well.
REQUIREMENTS := $(VENV)/.requirements-installed
PACKAGE := $(VENV)/.package-installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:  ## this list
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z]*\):.*##/  \1\t/p' $(MAKEFILE_LIST)

demo: $(PACKAGE)  ## answer questions about two videos with the shipped checkpoint
	@$(BIN)/vot demo

# Twice, because Triton has its kernels either on the interpreter or compiled: see tests/marks.py. Both always run.
test: lint  ## lint and types, then every test that needs no GPU
	@status=0; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "interpreter and not gpu" || status=$$?; \
	$(BIN)/python -m pytest -m "not interpreter and not gpu" || status=$$?; \
	exit $$status

lint: $(PACKAGE)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(PACKAGE)  ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(PACKAGE)  ## measure the ops on this machine: the quick suite, three minutes on two cores
	@$(BIN)/python -m pytest benchmarks --quick --benchmark-json runs/bench.json
	@$(BIN)/python -m benchmarks.report runs/bench.json

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that nothing else chooses its version. The old stamp goes before anything changes:
# an environment without one was interrupted, and pip cannot tell half of a package from a whole one, so it
# is made anew. A Python without ensurepip (Debian's without python3-venv) gets pip from the one outside.
$(REQUIREMENTS): requirements.txt requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vot-kernels needs Python 3.11 or later, \
	$(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	@echo "Installing the pinned requirements into $(VENV): once, several minutes and 3 GB or more."
	@if [ -e $@ ]; then rm -f $@; \
	elif ! $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1; then \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; fi
	@grep '^torch==' requirements.txt > $(VENV)/torch.txt
	$(PIP) install -r $(VENV)/torch.txt
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -r requirements-data.txt
	@touch $@

$(PACKAGE): $(REQUIREMENTS) pyproject.toml setup.py
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
