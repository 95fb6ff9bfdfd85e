# Every target does its own set-up: `make demo` and `make test` are all that a fresh machine needs.
#   setup   .venv with the locked dependencies and the three distributions, editable
#   demo    phantoms -> annotator -> trainer -> report, on two CPU cores (examples/demo.sh)
#   test    the tests (without the slow ones) with coverage; test-all: the slow ones too
#   check   lint, format, types
#   format  let ruff rewrite what it can
#   lock    resolve requirements.in anew into requirements.lock
#   bench-trainer      our step beside UniMatch V2's, waiting for labels, what cached labels cost; ends in JSON too
#   bench-scale        two replicas behind nginx over one, what a kill -9 under load loses; ends in JSON
#   test-vllm   our language model in the real vLLM, on the CPU, beside the one in process; ends in JSON
#   test-ray    replicas under Ray Serve: brings Ray into .venv, changes nothing that is locked
#   test-compose       the compose stack: its job, offline, with each container killed; needs docker and root
#   bench-service      HTTP beside the bare model, batches, LitServe, overload; the last line is one JSON object
#   bench-suggest      suggested patients against random ones: ARGS="--data FOLDER"; minutes, taken up where it stopped
#   proving     the proving ground with many more inputs than CI's: PROVING_EFFORT=20; docs/explanation/reliability.md
#   soak        20 minutes of mixed load, slope of the service's memory: ARGS="--minutes N"; ends in JSON
#   bench-annotator    time per image, new and seen before; the last line is one JSON object
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv, PYTEST_ARGS goes to pytest, WORKERS=4 runs the
# tests by four processes, ARGS goes to the demo and the benchmarks.
SHELL := /bin/sh
.DEFAULT_GOAL := help
# What the proving ground is made of; all of it is in `test` too, with fewer inputs.
PROVING := tests/e2e/test_openapi.py tests/e2e/test_bombs.py tests/e2e/test_faults.py tests/e2e/test_overload.py \
           tests/e2e/test_sick.py tests/server/serialization/test_decoders.py tests/server/api/test_bad_input.py \
           tests/server/auth/test_security.py tests/server/auth/test_keys.py tests/server/template_bank/test_permissions.py
.PHONY: help proving soak setup redis demo test test-all check format lock bench-annotator bench-suggest bench-service bench-trainer bench-scale test-compose test-vllm test-ray nginx docs docs-serve dist layout check-prose

BIN := .venv/bin
# The stamp is named by what setup installs, so that a change of the lock is noticed and a fresh checkout's
# file times are not.
SETUP_INPUTS := requirements.lock shared/pyproject.toml services/vessa/pyproject.toml trainer/pyproject.toml \
                scripts/setup.sh scripts/install-lock.sh
STAMP := .venv/.setup-$(shell cat $(SETUP_INPUTS) | cksum | tr -d ' ')
# These carry the method and the wire format: every line and branch of them is tested.
FULLY_COVERED := shared/vessa/codec.py shared/vessa/metrics.py \
                 $(addprefix trainer/vessa_trainer/,semi_supervised/losses.py semi_supervised/schedule.py data/augmentation.py)
# Files side by side; each worker computes with one thread, or they would wait for each other's.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
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

nginx:
	@command -v nginx >/dev/null || PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null || sh scripts/apt-install.sh nginx-light

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh $(ARGS)

test: setup redis nginx
	@ls $(FULLY_COVERED) >/dev/null  # a renamed file would leave the report, and the gate, unseen
	$(PYTEST) -m "not slow and not vllm" --cov --cov-report= $(PYTEST_ARGS)
	$(BIN)/coverage report --include='$(subst $(space),$(comma),$(strip $(FULLY_COVERED)))' --fail-under=100

test-all: setup redis nginx
	$(PYTEST) -m "not vllm" --cov --cov-report=term $(PYTEST_ARGS)

# VLLM_ENV=FOLDER is where vLLM's own environment is or will be made; 2.5 GB, its pins are not ours.
VLLM_ENV ?= .venv-vllm
test-vllm: setup
	@if scripts/vllm/env.sh "$(VLLM_ENV)"; then \
	    VLLM_ENV="$(abspath $(VLLM_ENV))" $(BIN)/python -m pytest -q -m vllm tests/vllm $(PYTEST_ARGS); \
	else echo "skipped: the environment of vLLM cannot be made on this machine"; fi

test-ray: setup redis
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --no-build-isolation \
	    --editable './services/vessa[ray]'
	$(BIN)/python -m pytest -q tests/server/serving/test_replicas.py $(PYTEST_ARGS)

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

bench-service: setup
	@$(BIN)/python benchmarks/service.py $(ARGS)

bench-trainer: setup redis
	@$(BIN)/python benchmarks/trainer.py $(ARGS)

bench-scale: setup redis nginx
	@$(BIN)/python benchmarks/scale.py $(ARGS)

test-compose: setup
	@$(BIN)/python tests/compose/run.py $(ARGS)

# Takes minutes: the wheels are installed into a fresh environment, which runs the README.
dist: setup redis
	$(BIN)/python scripts/dist.py

layout: setup
	@$(BIN)/python scripts/layout.py

check-prose: setup
	$(BIN)/python -m pytest -q tests/test_prose.py
	$(BIN)/codespell

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

proving: setup redis
	PROVING_EFFORT=$(or $(PROVING_EFFORT),20) $(PYTEST) $(PROVING) $(PYTEST_ARGS)

soak: setup
	@$(BIN)/python benchmarks/soak.py $(ARGS)

bench-suggest: setup
	@$(BIN)/python benchmarks/suggest.py $(ARGS)
