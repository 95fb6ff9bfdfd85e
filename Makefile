# Every target does its own set-up: `make demo` and `make test` are all that a fresh machine needs.
#   setup            .venv with the locked dependencies and the three distributions, editable
#   demo             phantoms, annotator, trainer and report on two CPU cores (examples/demo.sh)
#   test             the tests without the slow ones, with coverage
#   test-all         the slow tests too
#   check            lint, format, spelling and types
#   check-prose      the rules of prose (tests/test_prose.py) and spelling
#   format           let ruff rewrite what it can
#   sbom             CycloneDX bill of materials of the images in build/sbom.cdx.json; ends in JSON
#   audit            pip-audit of the lock, where a service with vulnerability data answers
#   docs             build the documentation site into site/, strictly
#   docs-serve       show the documentation site on http://127.0.0.1:8000
#   layout           modules per folder, longest functions, import circles; ends in JSON
#   lock             resolve requirements.in into requirements.lock
#   dist             build the wheels, check them, and run the README with them outside the checkout
#   bench-annotator  time per image, new and cached; ends in JSON
#   bench-service    HTTP against the bare model, batches, LitServe, overload; ends in JSON
#   bench-trainer    our step against UniMatch V2's, waiting for labels, cost of cached labels; ends in JSON
#   bench-student    a student against VESSA alone and UniMatch V2: ARGS="--data FOLDER"; resumed; ends in JSON
#   bench-scale      two replicas behind nginx against one, and kill -9 under load; ends in JSON
#   bench-suggest    suggested patients against random ones: ARGS="--data FOLDER"; minutes, resumed
#   proving          all attacks, with PROVING_EFFORT=20 times the inputs (docs/explanation/reliability.md); ends in JSON
#   soak             20 minutes of mixed load and the slope of memory: ARGS="--minutes N"; ends in JSON
#   test-browser     the console in chromium, with its unit tests and types; ends in JSON
#   test-viewers     real clients of 3D Slicer, Label Studio, CVAT, OHIF and Orthanc; ends in JSON
#   test-files       test files of pydicom, nibabel, Pillow and highdicom beside reference readers; ends in JSON
#   test-compose     the compose stack: users and limits, offline, killed, profiles; needs docker and root; ends in JSON
#   test-ray         replicas under Ray Serve; installs Ray into .venv and changes no locked package
#   test-vllm        our language model in a real vLLM on the CPU; ends in JSON
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv. PYTEST_ARGS goes to pytest, ARGS to the demo and
# the benchmarks. WORKERS=4 runs the tests in four processes.
SHELL := /bin/sh
.DEFAULT_GOAL := help
# The proving ground: each test is an attack of docs/explanation/reliability.md. `test` runs all of it too, with
# fewer inputs.
PROVING := $(addprefix tests/e2e/,test_openapi.py test_bombs.py test_faults.py test_overload.py test_sick.py test_bulk.py) \
           $(addprefix tests/server/,serialization/test_decoders.py api/test_bad_input.py api/test_limits.py auth \
             api/test_erasure.py api/test_console.py template_bank volume_jobs worklists cli/test_store_cli.py \
             observability adaptation serving/test_annotation_cache.py) \
           $(addprefix tests/shared/,test_redaction.py test_redis_url.py test_cli.py bulk/test_manifest.py \
             volumes/test_volumes_refused.py volumes/test_dicom_pixels.py) \
           tests/trainer/students/test_checkpoint.py tests/trainer/test_user_reports.py tests/test_deploy.py
.PHONY: help proving soak setup redis demo test test-all check format lock bench-annotator bench-suggest bench-service bench-trainer bench-student bench-scale test-browser test-viewers test-compose test-files test-vllm test-ray nginx docs docs-serve dist layout check-prose sbom audit

BIN := .venv/bin
# The stamp is named by a checksum of its inputs: a changed lock is noticed, and the file times of a fresh
# checkout do not matter.
SETUP_INPUTS := requirements.lock shared/pyproject.toml services/vessa/pyproject.toml trainer/pyproject.toml \
                scripts/setup.sh scripts/install-lock.sh
STAMP := .venv/.setup-$(shell cat $(SETUP_INPUTS) | cksum | tr -d ' ')
# These files carry the method and the wire format, so every line and branch of them must be tested.
FULLY_COVERED := shared/vessa/codec.py shared/vessa/metrics.py \
                 $(addprefix trainer/vessa_trainer/,semi_supervised/losses.py semi_supervised/schedule.py data/augmentation.py)
COVERING_TESTS := tests/shared/test_codec.py tests/shared/test_metrics.py \
                  $(addprefix tests/trainer/,semi_supervised/test_losses.py semi_supervised/test_schedule.py data/test_augmentation.py)
# Each worker runs whole files with one computing thread; more threads would wait for each other. Compiled modules
# are kept, also where the environment says otherwise: tests start fifty processes, and each would compile them again.
WORKERS ?= 2
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
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

# First the gate: these modules are covered completely, lines and branches, by their own tests. The other tests run
# without coverage, which would take a third of their time.
test: setup redis nginx
	$(BIN)/python -m pytest -q --cov --cov-report= $(COVERING_TESTS)
	$(BIN)/coverage report --include='$(subst $(space),$(comma),$(strip $(FULLY_COVERED)))' --fail-under=100
	$(PYTEST) -m "not slow and not vllm and not browser and not viewer" $(addprefix --deselect=,$(COVERING_TESTS)) $(PYTEST_ARGS)

test-all: setup redis nginx
	$(PYTEST) -m "not vllm and not browser and not viewer" --cov --cov-report=term $(PYTEST_ARGS)

# VLLM_ENV=FOLDER is the place of vLLM's own environment (2.5 GB), because its pins differ from ours.
VLLM_ENV ?= .venv-vllm
test-vllm: setup
	@if scripts/vllm/env.sh "$(VLLM_ENV)"; then \
	    VLLM_ENV="$(abspath $(VLLM_ENV))" $(BIN)/python -m pytest -q -m vllm tests/vllm $(PYTEST_ARGS); \
	else echo "skipped: the environment of vLLM cannot be made on this machine"; fi

test-ray: setup redis
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --no-build-isolation \
	    --editable './services/vessa[ray]'
	$(BIN)/python -m pytest -q tests/server/replicas/test_replicas.py $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/uv:
	@$(MAKE) setup

# The target needs no finished set-up, so that a new dependency can be locked before it is installed.
lock: $(BIN)/uv
	@scripts/lock.sh $(ARGS)

bench-annotator: setup redis
	@$(BIN)/python benchmarks/annotator.py $(ARGS)

bench-service: setup
	@$(BIN)/python benchmarks/service.py $(ARGS)

bench-trainer: setup redis
	@$(BIN)/python benchmarks/trainer.py $(ARGS)

bench-student: setup
	@$(BIN)/python benchmarks/student.py $(ARGS)

bench-scale: setup redis nginx
	@$(BIN)/python benchmarks/scale.py $(ARGS)

test-browser: setup
	@command -v chromium >/dev/null || sh scripts/apt-install.sh chromium
	@$(BIN)/python scripts/test_browser.py $(ARGS)

test-viewers: setup
	@command -v chromium >/dev/null || sh scripts/apt-install.sh chromium
	@PATH="$$PATH:/usr/sbin" command -v Orthanc >/dev/null || sh scripts/apt-install.sh orthanc orthanc-dicomweb
	@$(BIN)/python scripts/test_viewers.py $(ARGS)

test-files: setup
	$(BIN)/python tests/files/run.py $(ARGS)

# The test needs a Python alone, so a machine for containers needs no set-up.
test-compose:
	@python3 tests/compose/run.py $(ARGS)

# Takes minutes: the wheels are installed into a fresh environment, which runs the README.
dist: setup redis
	$(BIN)/python scripts/dist.py

sbom: setup
	@$(BIN)/python scripts/sbom.py $(ARGS)

audit: setup
	@$(BIN)/python scripts/audit_dependencies.py

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
	PROVING_JSON=1 PROVING_EFFORT=$(or $(PROVING_EFFORT),20) $(PYTEST) $(PROVING) $(PYTEST_ARGS)

soak: setup
	@$(BIN)/python benchmarks/soak.py $(ARGS)

bench-suggest: setup
	@$(BIN)/python benchmarks/suggest.py $(ARGS)
