# Everything happens in .venv. `make install PYTHON=python3.12` picks another interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed
DEV := $(VENV)/.developed
SITE := $(VENV)/.documented

# One thread per test process: two of them share the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install demo federation test quick accountant check docs format clean

help:
	@echo "make demo     make .venv with what a user needs, and train the quickstart federation"
	@echo "make install  add what Flower, privacy, serving, tests and checks need to .venv"
	@echo "make federation  a coordinator and three sites as processes, with TLS and keys"
	@echo "make test     run the tests"
	@echo "make quick    the tests that take less than a minute together"
	@echo "make accountant  epsilon beside dp-accounting's, in an environment of its own"
	@echo "make check    style, types, import rules, generated pages"
	@echo "make docs     build the documentation site into site/, strictly"
	@echo "make format   put the style right"
	@echo "make clean    remove .venv and caches; runs/ stays"

install: $(DEV)

# Builds happen in environments of their own, which only see constraints through the environment.
$(BASE) $(DEV) $(SITE): export PIP_CONSTRAINT := constraints.txt
$(BASE) $(DEV) $(SITE): export PIP_BUILD_CONSTRAINT := constraints.txt
$(BASE) $(DEV) $(SITE): export PIP_DISABLE_PIP_VERSION_CHECK := 1
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("fedclip needs Python 3.11 or newer; name one by PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,flower,privacy,serve]'
	@touch $@

$(SITE): $(BASE)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(BASE)
	$(BIN)/fedclip run configs/quickstart.yaml

federation: install
	$(TEST_ENV) $(BIN)/python scripts/federation.py

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

quick: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow and not federation"

# dp-accounting does not go with our pins, so it has an environment of its own; where it cannot be
# installed the test says that it was skipped.
accountant: install
	@$(PYTHON) -m venv $(VENV)-accountant && \
		$(VENV)-accountant/bin/python -m pip install -q dp-accounting==0.6.0 || \
		{ echo "dp-accounting could not be installed; its test is skipped"; rm -rf $(VENV)-accountant; }
	@if [ -x $(VENV)-accountant/bin/python ]; then \
		export FEDCLIP_DP_ACCOUNTING=$(abspath $(VENV)-accountant)/bin/python; fi; \
		$(TEST_ENV) $(BIN)/python -m pytest -rs -k dp_accounting tests/federated/test_privacy_accounting.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/reference.py --check
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python benchmarks/claims.py

docs: $(SITE)
	$(BIN)/python scripts/site.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-accountant site .cache .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
