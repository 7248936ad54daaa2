# `make demo` shows everything on a shipped sample; `make test` runs every check that CI runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
FAMILY ?= gemma4
PROMPT ?= In the beginning
BIN    := $(VENV)/bin
SAMPLE := samples/$(FAMILY)-kjv
BUNDLE := build/$(FAMILY)-android

.PHONY: help demo test slow fuzz lint format clean

help:
	@echo "make demo               build, verify and run the shipped Gemma 4 sample"
	@echo "make demo FAMILY=gemma3n  the same with another sample: gemma4-qat, gemma3n, rwkv7a or embformer"
	@echo "make test               lint, type check and tests, as CI runs them"
	@echo "make slow               more tests of kinds that make test has one of"
	@echo "make fuzz MINUTES=10    open mutated checkpoints and bundles; JOBS=, SEED= too"

# The environment is made once, and again when the dependencies change.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on --editable '.[export,executorch,dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/pleexport inspect $(SAMPLE)
	$(BIN)/pleexport build $(SAMPLE) --target android --out $(BUNDLE) --overwrite
	$(BIN)/pleexport verify $(BUNDLE) --checkpoint $(SAMPLE) --text samples/heldout.txt --report build/$(FAMILY)-parity.html
	$(BIN)/pleexport run $(BUNDLE) --prompt "$(PROMPT)" --max-new-tokens 90 --temperature 0.8 --top-p 0.95 --seed 7 --stats

test: $(VENV)/.installed lint
	$(BIN)/pytest -n 2 --dist worksteal

slow: $(VENV)/.installed
	$(BIN)/pytest -n 2 -m slow

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(if $(JOBS),--jobs $(JOBS)) $(if $(SEED),--seed $(SEED))

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
