# Each target sets up all it needs; stamp files under $(VENV) make a second call start at once.
#   PYTHON=      interpreter to build for (>= 3.10)
#   TORCH_SPEC=  torch to install, e.g. torch==2.11.0; without it a torch that PYTHON has is used, else torch==2.13.0
#   ARGS=        passed on to pytest, to the demo or to the benchmark
# TORSION_BUILD, TORSION_SANITIZE, MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX, CXXFLAGS: see setup.py.

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?=
ARGS ?=
export TORCH_SPEC

PY := $(VENV)/bin/python
STAMP := $(VENV)/stamps
MODE := $(or $(TORSION_BUILD),auto)
# Folders too: a deleted or renamed file is a change.
SOURCES := setup.py $(shell find csrc 2>/dev/null)

# A changed switch must not meet a stamp of the old one: the stamps hold the switches they were made with.
# PYTHON and TORCH_SPEC given once hold until they are given anew or `make clean`.
VENV_SWITCHES := $(PYTHON)|$(TORCH_SPEC)
BUILD_SWITCHES := $(MODE)|$(FORCE_CUDA)|$(TORSION_SANITIZE)|$(TORCH_CUDA_ARCH_LIST)|$(CXX)|$(CXXFLAGS)
ifneq ($(origin PYTHON)$(origin TORCH_SPEC),filefile)
ifneq ($(VENV_SWITCHES),$(shell cat $(STAMP)/venv 2>/dev/null))
.PHONY: $(STAMP)/venv
endif
endif
ifneq ($(BUILD_SWITCHES),$(shell cat $(STAMP)/build 2>/dev/null))
.PHONY: $(STAMP)/build
# Modules of another mode would go on being loaded.
STALE := python/torsion/*.so
endif

.DEFAULT_GOAL := help
.SECONDARY:
.PHONY: help build demo test bench lint format audit gpu clean interpreter
.DELETE_ON_ERROR:
# Two pips at once would spoil the environment; the compiler runs in parallel all the same.
.NOTPARALLEL:

help:
	@echo "make demo    train a real model with torsion and with torch, side by side"
	@echo "make test    the test suite                   ARGS=\"-k tam -x\" goes to pytest"
	@echo "make bench   time this machine                ARGS=\"tam --list resnet18\" goes to torsion bench"
	@echo "make build   virtual environment and compiled modules, nothing else"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make format  let ruff and clang-format rewrite what they would complain about"
	@echo "make audit   compile the CUDA and Triton kernels without a GPU and check the report; sanitizers"
	@echo "make gpu     on a machine with a GPU: build, tests, compute-sanitizer, benchmarks, records"
	@echo "make clean   remove what the above made, $(VENV) too"
	@echo "Variables: PYTHON=$(PYTHON) TORCH_SPEC=$(TORCH_SPEC) VENV=$(VENV) TORSION_BUILD=$(MODE) MAX_JOBS=$(MAX_JOBS)"

interpreter:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "torsion: no $(PYTHON); install it (Debian: python3 python3-venv python3-dev g++;" \
	       "Fedora: python3 python3-devel gcc-c++) or give PYTHON=" >&2; exit 1; }

$(STAMP)/venv: | interpreter
	@rm -f $@
	@$(PYTHON) scripts/setup_env.py $(VENV)
	@mkdir -p $(STAMP) && printf '%s' '$(VENV_SWITCHES)' >$@

# One recipe for every extra of pyproject.toml: env-build, env-test, env-lint, ...
$(STAMP)/env-%: pyproject.toml scripts/setup_env.py $(STAMP)/venv
	@$(PY) scripts/setup_env.py --fill $*
	@touch $@

# The editable install brings the metadata and the `torsion` command; the modules are compiled in place below,
# because pip would compile all of them anew at every change.
$(STAMP)/install: pyproject.toml $(STAMP)/env-build
	@TORSION_BUILD=none $(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(STAMP)/build: $(SOURCES) $(STAMP)/install
	@rm -f $@ $(STALE)
ifneq ($(MODE),none)
	@mkdir -p build; echo "torsion: compiling what changed ($(MODE)); log in build/build.log"
	@$(PY) setup.py --quiet build_ext --inplace >build/build.log 2>&1 || { tail -n 60 build/build.log; exit 1; }
	@grep -E '^torsion: |: warning: ' build/build.log || true
endif
	@printf '%s' '$(BUILD_SWITCHES)' >$@

build: $(STAMP)/build

demo: $(STAMP)/build $(STAMP)/env-demo
	@$(PY) -m torsion demo $(ARGS)

test: $(STAMP)/build $(STAMP)/env-test
	@$(PY) -m pytest $(ARGS)

bench: $(STAMP)/build $(STAMP)/env-bench
	@$(PY) -m torsion bench $(ARGS)

audit: $(STAMP)/build $(STAMP)/env-test
	@$(PY) scripts/audit.py $(ARGS)

gpu: $(STAMP)/build $(STAMP)/env-gpu
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash scripts/gpu_check.sh $(ARGS)

# As a module: beside an existing torch the linters may live in PYTHON's own environment, not in $(VENV)/bin.
CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'
CLANG_FORMATTED := $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

format: $(STAMP)/env-lint
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format .
	@$(CLANG_FORMAT) -i $(CLANG_FORMATTED)

lint: $(STAMP)/env-build $(STAMP)/env-lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(CLANG_FORMAT) --dry-run -Werror $(CLANG_FORMATTED)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f python/torsion/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
