# Everything starts from a fresh clone: the first target that needs it makes .venv with pinned versions.
#
#   make test PYTHON=python3.12      another Python for the environment (>= 3.10)
#   make test PYTHON=python3 VENV=   this very interpreter, nothing installed: for a machine whose
#                                    Python already has torch for its GPU, pytest and the other extras
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# Most builds of torch pin the Triton they need; those that bring none (CPU builds) get this one.
TRITON := triton==3.9.0; platform_system == 'Linux' and python_version >= '3.11'
PINS := requirements-dev.txt

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
MODELS :=
DOCS :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
MODELS := $(VENV)/.models
DOCS := $(VENV)/.docs
endif

# One thread a process: the tests run side by side, and their tensors are small. A test that hangs, even with
# the GIL held, ends its process with a traceback after ten minutes.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

.PHONY: help demo test fuzz mutants lint notebooks docs test-models gpu plots clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "PYTHON=python3.12: another Python; PYTHON=python3 VENV=: this very Python, nothing is installed"

demo: $(READY)  ## train on scanned digits beside torch.nn.BatchNorm2d, and draw it
	$(PY) -m triton_bn demo

test: $(READY)  ## the whole suite; without a GPU in Triton's interpreter
	$(PYTEST) -n $(JOBS) -m "not models"

fuzz: $(READY)  ## compile random problems for every GPU that is known: nothing spills, nothing overflows
	PYTHONPATH=. $(PY) tests/fuzz_compile.py

# Faults put into a copy of the package, one at a time; ONLY="..." ones by parts of their names.
mutants: $(READY)  ## mutation tests: every fault of a table must be seen by the tests that it names
	PYTHONPATH=. $(PY) tests/mutants.py $(if $(ONLY),--only $(ONLY))

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

notebooks: $(READY)  ## run every notebook from top to bottom, and write its outputs back
	$(PY) notebooks/execute.py

docs: $(DOCS)  ## the API reference and the notebooks as pages: build/docs/html/index.html
	rm -rf build/docs && mkdir -p build/docs/source
	cp -r docs/. README.md CHANGELOG.md CONTRIBUTING.md notebooks examples perf build/docs/source
	$(PY) -m sphinx -q -W --keep-going build/docs/source build/docs/html

test-models: $(MODELS)  ## whole models of torchvision, timm and transformers
	$(PYTEST) -n $(JOBS) -m models

# The tests that run kernels and the measurements, on the GPU of this machine, within ten minutes; run again, it
# goes on where it ended. PART=tests|bench|ab|search|step: that alone. SECONDS=540: for everything together.
gpu: $(READY)  ## tests and measurements on the GPU of this machine, within ten minutes
	$(PY) -m perf visit $(if $(PART),--part $(PART)) $(if $(SECONDS),--seconds $(SECONDS))

plots: $(READY)  ## draw again what was measured (perf/results)
	$(PY) -m perf plots

clean:  ## remove everything that can be made again
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis triton_bn_demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "triton_bn needs Python >= 3.10; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c $(PINS) torch
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet "$(TRITON)"
	$(PY) -m pip install --quiet -c $(PINS) -e ".[dev]"
	touch $@

$(VENV)/.models: $(VENV)/.ready
	$(PY) -m pip install --quiet -c $(PINS) -e ".[models]"
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install --quiet -c $(PINS) -e ".[docs]"
	touch $@
