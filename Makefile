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
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
MODELS := $(VENV)/.models
endif

# One thread a process: the tests run side by side, and their tensors are small. A test that hangs, even with
# the GIL held, ends its process with a traceback after ten minutes.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

.PHONY: demo test lint notebooks test-models gpu plots clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(PY) -m triton_bn demo

test: $(READY)
	$(PYTEST) -n $(JOBS) -m "not models"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Runs every notebook from top to bottom and writes its outputs back.
notebooks: $(READY)
	$(PY) notebooks/execute.py

# Whole models of torchvision, timm and transformers.
test-models: $(MODELS)
	$(PYTEST) -n $(JOBS) -m models

# The tests that run kernels and the measurements, on the GPU of this machine, within ten minutes; run again, it
# goes on where it ended. PART=tests|bench|ab|search|step: that alone. SECONDS=540: for everything together.
gpu: $(READY)
	$(PY) -m perf visit $(if $(PART),--part $(PART)) $(if $(SECONDS),--seconds $(SECONDS))

# Draws what was measured (perf/results) again.
plots: $(READY)
	$(PY) -m perf plots

clean:
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
