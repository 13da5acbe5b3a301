# setup makes .venv; everything else needs it and makes it when it is not there.
# Only relative paths, so that the directory's own path may hold a space.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.octify-ready
EXTRAS := dev,export
TESTS ?=
ZOO ?=
BENCH ?=

.PHONY: setup demo test lint fidelity paper compconv zoo bench clean

setup: $(READY)

# Done again only when pyproject.toml is newer than the last install.
$(READY): pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
		{ test -x $(VENV)/bin/python || uv venv --quiet --python '>=3.10' $(VENV); } && \
		uv pip install --python $(VENV)/bin/python -e '.[$(EXTRAS)]'; \
	else \
		"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "octify needs Python 3.10 or newer, found %d.%d: make setup PYTHON=python3.12" % v[:2])' && \
		"$(PYTHON)" -m venv $(VENV) && \
		$(RUN) pip install --disable-pip-version-check --progress-bar off -e '.[$(EXTRAS)]'; \
	fi
	@touch $(READY)

demo: setup
	$(VENV)/bin/octify convert resnet50 --alpha 0.25

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

# One thread per worker: two workers on two cores, and sums in the same order on every machine.
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) pytest -q -n 2 $(TESTS)

# The paper's networks, the paper's cost beside octify's; written into the README as well.
paper: setup
	$(RUN) tests.paper_table

# CompConv in thirty networks: convert, run at odd sizes, train a step, save, load, export.
compconv: setup
	$(RUN) tests.compconv_nets

# Every network of torchvision and timm, one row each; rows that are there are kept (ZOO=--fresh measures all again).
zoo: setup
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) tests.zoo.census $(ZOO)

# Trains five small nets (cached), converts them step by step and measures what they keep; into the README as well.
fidelity: setup
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) tests.fidelity.run --seed 0 --seed 1 --seed 2

# Dense against octave on this machine, into the README; BENCH=--quick takes minutes instead of an hour.
bench: setup
	$(RUN) tests.bench_table $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
