# make demo    the main job on MovieLens-100K, in at most a few minutes
# make test    format, lint, types, tests
# make test-faults  the fault tests in full: minutes of kills, full disks, lost servers
# make lint    format, lint, types
# make format  put the format right
# make bench-engine  the engine against its peers, on one thread, about 10 minutes
# make bench-serving   an online request, a refresh, a stream and the store, each beside its limit and its peers, about 20 minutes
# make bench-scale  ingest, training and generation out of a log of 10⁵ tasks and more, beside their limits
# make results  every method on every data set in LIMAML_DATA (default ./data), and docs/results.md: hours; goes on where it was killed
# make proto   compile gRPC's messages again, after a change of limaml/serving/protocol/*.proto
# make clean   remove the environment and what was made
# The environment is made once in .venv, and again only when pyproject.toml or constraints.txt change.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
# One thread per process: the comparison and the tests run several processes.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-faults lint format bench-engine bench-serving bench-scale results proto clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/limaml demo --out runs/demo $(DEMO)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

test-faults: $(READY)
	LIMAML_FAULTS=full $(BIN)/python -m pytest tests/faults tests/test_log_ingest.py -n 2 -rP

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-engine: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.engine

proto: $(READY)
	cd limaml/serving/protocol && $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. --descriptor_set_out=messages.binpb \
		open_inference.proto health.proto

bench-serving: $(READY)
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.refresh
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.store

bench-scale: $(READY)
	for part in ingest train generate plan page; do $(BIN)/python -m benchmarks.scale --part $$part || exit 1; done

results: $(READY)
	$(BIN)/python -m benchmarks.evidence

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache
