# Verbs for people and for CI; each one prepares what it needs from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
# what .venv holds: for the demo, for work on the package, and beyond that for the benchmarks and the documentation
DEMO := .venv/.demo
DEV := .venv/.ready
PEERS := .venv/.peers
DOCS := .venv/.docs
# what an installation compiles: a change of it is installed anew
CORE := $(shell find csrc -type f)
# modules are compiled when they are imported, most of what is installed never is; and once, not by each of hundreds of processes
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile
INSTALL := $(PIP) --editable
# what an extra adds to the installed package: to install that again would compile the core again
extra = $$($(BIN)/python -c 'from importlib.metadata import requires; print(*(r.partition(";")[0] for r in requires("sparse-ffn") if "$(1)" in r.partition(";")[2]))')

.PHONY: demo test exhaustive gate sanitize bench wheel lint docs format clean

demo: $(DEMO)  ## train the same small language model with each FFN; table, picture and JSON in runs/demo
	$(BIN)/python -m examples.language_model $(ARGS)

test: MARKED := not exhaustive
test: $(DEV)  ## the behaviours; the GPU kernels interpreted, or compiled where there is a GPU
	$(run-tests)

exhaustive: MARKED := exhaustive
exhaustive: $(DEV)  ## the rest of the suite: sweeps, builds, compilers
	$(run-tests)

# passive: two processes whose threads wait by spinning keep the cores from each other
define run-tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 -m '$(MARKED)' --ignore tests/gpu $(ARGS)$(chosen)
	OMP_WAIT_POLICY=passive TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m '$(MARKED)' tests/gpu $(ARGS)$(chosen)
endef
# ARGS may choose tests of one half alone: pytest's status 5 says that the other one has none
chosen = $(if $(ARGS), || test $$? -eq 5)

gate: $(DEV)  ## compile every GPU kernel for every target, without a GPU, and judge it
	$(BIN)/python tools/compile_gate.py $(ARGS)

sanitize: $(DEV)  ## the tests of the ops against a core built with ASan and UBSan
	.ci/sanitize

bench: $(PEERS)  ## time the layers against dense networks and other libraries; JSON, tables and pictures in runs/bench
	$(BIN)/python -m benchmarks.bench_layers --json runs/bench/layers.json --plot runs/bench/layers.png $(ARGS)
	$(BIN)/python -m benchmarks.bench_wide --json runs/bench/wide.json
	$(BIN)/python -m benchmarks.bench_cvmm --json runs/bench/cvmm.json --plot runs/bench/cvmm.png
	$(BIN)/python -m benchmarks.bench_topk --json runs/bench/topk.json
	$(BIN)/python -m benchmarks.sweeps --json runs/bench/sweeps.json --plot runs/bench/sweeps.png
	$(BIN)/python -m benchmarks.passes --json runs/bench/passes.json
	$(BIN)/python -m benchmarks.targets
	@echo "python -m benchmarks.publish puts these numbers into benchmarks/results and the documentation."

wheel: $(DEV)  ## sdist and wheel, in dist/; the wheel is tried in an environment of its own, without a compiler
	$(BIN)/python tools/try_wheel.py $(ARGS)

lint: $(DEV)  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation site, in site/
	$(BIN)/mkdocs build --strict

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  # not runs: it holds hours of work
	rm -rf .venv site build dist

$(DEMO): pyproject.toml $(CORE)
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[demo]'
	touch $(DEMO)

$(DEV): pyproject.toml $(CORE)
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[dev]'
	touch $(DEMO) $(DEV)

$(PEERS): $(DEV)
	$(PIP) $(call extra,peers) || echo 'The tables will say which peers are missing.'
	touch $(PEERS)

$(DOCS): $(DEV)
	$(PIP) $(call extra,docs)
	touch $(DOCS)
