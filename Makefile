# Every target does its own set-up: `make demo` and `make test` are all that a fresh machine needs.
#   setup   .venv with the locked dependencies and the three distributions, editable
#   demo    phantoms -> annotator -> trainer -> report, on two CPU cores (examples/demo.sh)
#   test    the tests (without the slow ones) with coverage; test-all: the slow ones too
#   check   lint, format, types
#   format  let ruff rewrite what it can
#   lock    resolve requirements.in anew into requirements.lock
#   bench-trainer      our step beside UniMatch V2's, waiting for labels, what cached labels cost; ends in JSON too
#   bench-annotator    time per image, new and seen before; the last line is one JSON object
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv, PYTEST_ARGS goes to pytest,
# ARGS to the demo and the benchmarks.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup redis demo test test-all check format lock bench-annotator bench-trainer

BIN := .venv/bin
# The stamp is named by what setup installs, so that a change of the lock is noticed and a fresh checkout's
# file times are not.
SETUP_INPUTS := requirements.lock shared/pyproject.toml services/vessa/pyproject.toml trainer/pyproject.toml \
                scripts/setup.sh scripts/install-lock.sh
STAMP := .venv/.setup-$(shell cat $(SETUP_INPUTS) | cksum | tr -d ' ')
# These carry the method and the wire format: every line and branch of them is tested.
FULLY_COVERED := shared/vessa/codec.py shared/vessa/metrics.py \
                 trainer/vessa_trainer/losses.py trainer/vessa_trainer/schedule.py trainer/vessa_trainer/views.py
comma := ,
empty :=
space := $(empty) $(empty)

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP):
	@PYTHON="$(PYTHON)" sh scripts/setup.sh $@

redis:
	@command -v redis-server >/dev/null || sh scripts/apt-install.sh redis-server

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh $(ARGS)

test: setup redis
	@ls $(FULLY_COVERED) >/dev/null  # a renamed file would leave the report, and the gate, unseen
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report= $(PYTEST_ARGS)
	$(BIN)/coverage report --include='$(subst $(space),$(comma),$(strip $(FULLY_COVERED)))' --fail-under=100

test-all: setup redis
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/uv:
	@$(MAKE) setup

# Keeps the locked versions where it can; ARGS=--upgrade takes the newest instead. Needs no finished set-up, so
# that a new dependency can be locked before it is installed.
# No index address may get into the file: whoever installs it uses the index of their own configuration.
lock: $(BIN)/uv
	$(BIN)/uv pip compile requirements.in --output-file requirements.lock --quiet --universal --generate-hashes \
	    --python-version 3.11 --fork-strategy fewest --custom-compile-command "make lock" --no-annotate --no-emit-index-url \
	    --no-emit-package vessa --no-emit-package vessa-server --no-emit-package vessa-trainer $(ARGS)

bench-annotator: setup redis
	@$(BIN)/python benchmarks/annotator.py $(ARGS)

bench-trainer: setup redis
	@$(BIN)/python benchmarks/trainer.py $(ARGS)
