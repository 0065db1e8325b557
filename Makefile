# Verbs for people and for CI; each one prepares what it needs from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers

.PHONY: demo test gate sanitize bench lint docs format clean

demo: $(READY)  ## train the same small language model with each FFN; table, picture and JSON in runs/demo
	$(BIN)/python -m examples.language_model $(ARGS)

# passive: two processes whose threads wait by spinning keep the cores from each other
test: $(READY)  ## the whole test suite; the GPU kernels interpreted, or compiled where there is a GPU
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --ignore tests/gpu $(ARGS)
	OMP_WAIT_POLICY=passive TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/gpu $(ARGS)

gate: $(READY)  ## compile every GPU kernel for every target, without a GPU, and judge it
	$(BIN)/python tools/compile_gate.py $(ARGS)

sanitize: $(READY)  ## the tests of the ops against a core built with ASan and UBSan
	.ci/sanitize

bench: $(PEERS)  ## time the layers against dense networks and other libraries; JSON, tables and pictures in runs/bench
	$(BIN)/python -m benchmarks.bench_layers --json runs/bench/layers.json --plot runs/bench/layers.png $(ARGS)
	$(BIN)/python -m benchmarks.bench_cvmm --json runs/bench/cvmm.json --plot runs/bench/cvmm.png
	$(BIN)/python -m benchmarks.sweeps --json runs/bench/sweeps.json --plot runs/bench/sweeps.png
	$(BIN)/python -m benchmarks.passes --json runs/bench/passes.json
	@echo "python -m benchmarks.publish puts these numbers into benchmarks/results and the documentation."

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

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[bench,peers]' || echo 'The tables will say which peers are missing.'
	touch $(PEERS)
