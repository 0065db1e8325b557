# Verbs for people and for CI; each one prepares what it needs from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test gate lint docs format clean

demo: $(READY)  ## train the same small language model with each FFN; table, picture and JSON in runs/demo
	$(BIN)/python -m examples.language_model $(ARGS)

test: $(READY)  ## the whole test suite; the GPU kernels interpreted, or compiled where there is a GPU
	$(BIN)/python -m pytest -n 2 $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/gpu $(ARGS)

gate: $(READY)  ## compile every GPU kernel for every target, without a GPU, and judge it
	$(BIN)/python tools/compile_gate.py $(ARGS)

lint: $(READY)  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## the documentation site, in site/
	$(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv site runs build dist

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)
