# SPDX-License-Identifier: BSD-3-Clause
# make demo   builds everything and trains a small language model: start here
# make test   builds everything and runs all tests
#
# Both make their own virtual environment in .venv; nothing else on the machine is touched.
#   PYTHON  the interpreter to start from, 3.10 or newer
#   TORCH   what pip installs as torch, for example TORCH='torch==2.11.0' or a CPU-only wheel

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
PIP_QUIET := --quiet --disable-pip-version-check --no-warn-script-location

.PHONY: demo test lint kernels sdist clean

demo: $(VENV)/.built
	$(RUN) -m flash_attn_cuda --plot first_light.png

test: $(VENV)/.built
	$(RUN) -m pytest

lint: $(VENV)/.installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Every CUDA kernel for every target: fails on spills, local memory and ptxas' performance warnings.
kernels: $(VENV)/.installed
	$(RUN) .ci/check_kernels.py

clean:
	rm -rf $(VENV) build dist *.egg-info flash_attn_cuda/*.so

$(VENV)/.installed: .ci/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch and the tools into $(VENV): a few minutes'
	@$(RUN) -m pip install $(PIP_QUIET) '$(TORCH)' -r .ci/requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo 'compiling flash_attn_cuda: a minute or two on 2 cores'
	@$(RUN) -m pip install $(PIP_QUIET) --no-build-isolation --no-deps -e .
	@touch $@
