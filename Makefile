# `make help` lists the targets. Each makes .venv first if it is missing, out of date or half made.

PYTHON ?= python3
WORKERS ?= 2

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Written last, removed first: without it the environment was left half made. It holds the folder it
# belongs to, as an environment does not survive a move or a copy.
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
# One thread per worker: more would fight over the same cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# The other libraries live in an environment of their own.
PEERS_VENV := .venv-peers
PEERS_PIP := $(PEERS_VENV)/bin/python -m pip --quiet --disable-pip-version-check
PEERS_STAMP := $(PEERS_VENV)/.installed
PEERS := diffusers azula torchdiffeq torchsde torchode 'jax[cpu]' diffrax

ifneq ($(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): remake
endif
ifneq ($(shell cat $(PEERS_STAMP) 2>/dev/null),$(CURDIR))
$(PEERS_STAMP): moved
endif

# Extras that only one target needs, put in .venv by that target.
DOCS_STAMP := $(VENV)/.docs
BROWSER_STAMP := $(VENV)/.browser

.PHONY: help venv bench peers test test-slow test-browser test-oldest test-newest docs lint format clean chromium remake moved

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '  %-12s %s\n' "$$target" "$$text"; done

venv: $(STAMP) ## make .venv with the project (editable) and everything it needs

bench: $(STAMP) ## run the quick benchmark; report in results/quick/report.html
	$(BIN)/sdeflow bench --suite quick --out results/quick

peers: $(PEERS_STAMP) ## compare with other libraries in .venv-peers; tables in docs/peers.md
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PEERS_VENV)/bin/python -m benchmarks.peers \
		--json results/peers.json --markdown docs/peers.md

test: lint ## lint, types, then every test that is not slow
	$(PYTEST)

test-slow: $(STAMP) ## the slow tests
	$(PYTEST) -m slow --timeout 1800

test-browser: chromium $(BROWSER_STAMP) ## the report in a headless Chromium, which must be installed
	$(PYTEST) -m browser

chromium:
	@command -v chromium >/dev/null || { echo "make test-browser needs Chromium: apt-get install chromium" >&2; exit 1; }

test-oldest: ## the tests with the lowest versions of pyproject.toml (torch of that age brings gigabytes)
	$(call test_with,.venv-oldest,-c constraints-oldest.txt)

test-newest: ## the tests with the newest versions there are (gigabytes too)
	$(call test_with,.venv-newest,--upgrade)

# What is optional and not in these environments is skipped by its tests.
define test_with
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) -e '.[bench,cli,peers,train]' \
		hypothesis pytest pytest-timeout pytest-xdist
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS)
endef

docs: $(DOCS_STAMP) ## run every code block of the documentation, build it strictly in site/
	$(PYTEST) --quiet tests/test_docs.py tests/test_docs_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	@$(BIN)/python docs/hooks/blocks.py
	@$(BIN)/python docs/hooks/api.py

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(wildcard sdeflow benchmarks)

format: $(STAMP) ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what these targets made: environments, results/quick, results/peers.json, caches
	rm -rf $(VENV) $(PEERS_VENV) .venv-oldest .venv-newest results/quick results/peers.json build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

remake:
	@rm -rf $(VENV)

moved:

# The pinned torch goes first and alone: a looser request, ours or a dependency's, may bring another
# build with gigabytes of accelerator libraries. The pinned build backend then builds the project. k-diffusion asks for
# a hundred packages and an old numpy: the tests use two of its files, which need none of them.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (about a minute on a new machine)"
	@rm -f $@
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt '$(TORCH)'
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps k-diffusion
	@echo '$(CURDIR)' > $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

$(BROWSER_STAMP): $(STAMP)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[browser]'
	@touch $@

# Every other library is optional: one that does not install costs a line here and its rows there.
# The constraints keep torch and numpy where they are.
$(PEERS_STAMP): pyproject.toml constraints.txt
	@echo "Installing the other libraries into $(PEERS_VENV) (some minutes on a new machine)"
	@rm -rf $(PEERS_VENV)
	@$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_PIP) install -c constraints.txt '$(TORCH)'
	$(PEERS_PIP) install -c constraints.txt hatchling editables
	$(PEERS_PIP) install -c constraints.txt --no-build-isolation -e .
	@for peer in $(PEERS); do \
		$(PEERS_PIP) install -c constraints.txt "$$peer" || echo "$$peer did not install: its rows are left out"; \
	done
	@echo '$(CURDIR)' > $@
