# `make demo` and `make test` need only Python 3.11+ and pip; each sets .venv up on its first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles a module when it is first imported; three quarters of those that are installed never are.
INSTALL := $(PIP) install --no-compile
# Two stamps: what is installed, and this package on top of it. A stamp appears only when all went well.
REQUIREMENTS := $(VENV)/.requirements-installed
PACKAGE := $(VENV)/.package-installed
MODULES := $(VENV)/.modules-compiled

# Compiled modules and tests are kept: the tests start hundreds of processes, which would all compile them again.
export PYTHONDONTWRITEBYTECODE =
# Freed memory is kept: tests ask for large tensors again and again, and the system would clear their pages each time.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 4294967296
# Processes that share the tests; 0 runs them in one, which a debugger needs. On two cores a third works while others wait.
JOBS ?= 3
TESTS ?=
# What `make check` runs in about a minute: how each op computes, not how PyTorch registers, derives and compiles it.
CORE := tests/meta tests/docs/test_links.py tests/test_packing.py tests/test_testing.py tests/ops
LATER := opcheck or gradcheck or compiles or compiled_graph
# What `make matrix` runs, and with which torch: the oldest that pyproject.toml allows, and the newest there is.
OPS := tests/test_packing.py tests/test_testing.py tests/ops tests/tuning
TORCH ?= 2.11.0 newest
MATRIX := .venv-matrix
DOCS := .venv-docs

.DEFAULT_GOAL := help
.PHONY: help demo cpp check test suite lint format bench docs matrix fuzz seeds clean

new-venv = $(PYTHON) -m venv --clear $(1) >/dev/null 2>&1 || { \
    $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install pip; }

pytest = $(1) -m pytest --numprocesses $(JOBS)

# Two runs of pytest, because Triton has its kernels either on the interpreter or compiled: see tests/marks.py. Both
# take place, and either fails the whole. In the second the tests of a file stay together, for they share fixtures, and
# files come in the order of tests/conftest.py.
# Status 5 is "no tests", as one of the runs may well have in the paths given.
define both-runs
status=0; \
TRITON_INTERPRET=1 $(call pytest,$(1)) --dist worksteal -m "interpreter and not gpu" $(2) || status=$$?; \
$(if $(2),[ $$status -ne 5 ] || status=0;) \
$(call pytest,$(1)) --dist loadfile --no-loadscope-reorder -m "not interpreter and not gpu" $(2) || $(if $(2),[ $$? -eq 5 ] ||) status=1; \
exit $$status
endef

help:  ## this list
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z]*\):.*##/  \1\t/p' $(MAKEFILE_LIST)

demo: cpp  ## answer questions about two videos with the shipped checkpoint
	@$(BIN)/vot demo

cpp: $(PACKAGE)  ## compile the C++ kernels for this machine, half a minute; without a compiler the ops run in PyTorch
	@$(BIN)/python -m vot_kernels.cpp --optional

check: $(PACKAGE)  ## before every commit, a minute: lint, import rules, links, each op in PyTorch against its reference
	@$(MAKE) --no-print-directory --jobs 2 lint cpp
	@$(call pytest,$(BIN)/python) --dist loadfile -m "not interpreter and not gpu and not slow" \
	    -k "not ($(LATER))" $(CORE)

test: $(PACKAGE)  ## lint and, meanwhile, every test that needs no GPU; TESTS="tests/ops tests/nn" for some of them
	@$(MAKE) --no-print-directory --jobs 2 cpp $(MODULES)
	@$(MAKE) --no-print-directory --jobs 2 lint suite

suite: $(PACKAGE)  ## every test that needs no GPU, without lint
	@$(call both-runs,$(BIN)/python,$(TESTS))

lint: $(PACKAGE)  ## ruff, its format, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

matrix: $(TORCH:%=matrix/%)  ## the ops' CPU tests with other versions of torch; TORCH="2.12.0 2.13.0" names some

# pip decides where torch comes from. Triton is what torch itself asks for, else (CPU builds ask for none) its sibling.
# The interpreter of triton 3.6 fails with NumPy 2.4.
matrix/%: PIP = $(MATRIX)/$*/bin/python -m pip --disable-pip-version-check --quiet
matrix/%:
	@echo "== torch $*, in $(MATRIX)/$*"
	@[ -e $(MATRIX)/$*/bin/python ] || { $(call new-venv,$(MATRIX)/$*); }
	@$(PIP) install --upgrade $(if $(filter newest,$*),torch,torch==$*)
	@$(PIP) install $(if $(filter 2.11.%,$*),"triton==3.6.*" "numpy==2.3.*","triton" "$$(grep ^numpy== requirements.txt)") \
	    $$(grep -E '^(hypothesis|pytest|pytest-xdist|setuptools)==' requirements.txt)
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(call both-runs,$(MATRIX)/$*/bin/python,$(OPS))

format: $(PACKAGE)  ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: cpp  ## measure the ops on this machine: the quick suite, six minutes on two cores
	@$(BIN)/python -m pytest benchmarks --quick --benchmark-json runs/bench.json
	@$(BIN)/python -m benchmarks.report runs/bench.json

# The reference is read off the sources, so this environment has no torch.
docs: $(DOCS)/.installed  ## the documentation and the reference of the public names as web pages, in site/
	@$(DOCS)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

$(DOCS)/.installed: pyproject.toml
	@$(call new-venv,$(DOCS))
	@$(DOCS)/bin/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"] \
	    ["optional-dependencies"]["docs"]))' > $(DOCS)/requirements.txt
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r $(DOCS)/requirements.txt
	@touch $@

fuzz: $(PACKAGE)  ## 10,000 random calls of every op against the references, and calls with broken arguments
	@$(BIN)/python -m tests.fuzz --calls 10000

seeds: $(PACKAGE)  ## the tests under 20 seeds, with one and two threads and older CPU instructions, for hours; TESTS=tests/ops
	@$(BIN)/python -m tests.seeds --seeds 0-19 $(TESTS)

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(MATRIX) $(DOCS) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that nothing else chooses its version. The old stamp goes before anything changes:
# an environment without one was interrupted, and pip cannot tell half of a package from a whole one, so it
# is made anew. A Python without ensurepip (Debian's without python3-venv) gets pip from the one outside.
$(REQUIREMENTS): requirements.txt requirements-data.txt requirements-torchvision.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vot-kernels needs Python 3.11 or later, \
	$(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	@echo "Installing the pinned requirements into $(VENV): once, several minutes and 3 GB or more."
	@if [ -e $@ ]; then rm -f $@; else $(call new-venv,$(VENV)); fi
	@grep '^torch==' requirements.txt > $(VENV)/torch.txt
	$(INSTALL) -r $(VENV)/torch.txt
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -r requirements-data.txt
	$(INSTALL) --no-deps --target $(VENV)/torchvision -r requirements-torchvision.txt
	@touch $@

$(PACKAGE): $(REQUIREMENTS) pyproject.toml setup.py
	$(INSTALL) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Each of the processes that share the tests would compile all modules: here one does it for them, beside the linters.
$(MODULES): $(REQUIREMENTS) | $(PACKAGE)
	@$(BIN)/python -m pytest --collect-only --quiet -p no:cacheprovider >/dev/null 2>&1 || true
	@touch $@
