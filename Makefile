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

.PHONY: demo test lint kernels cuda_tests fuzz oldest_transformers clean FORCE

demo: $(VENV)/.built
	$(RUN) -m flash_attn_cuda --plot first_light.png

test: $(VENV)/.built
	$(RUN) -m pytest

lint: $(VENV)/.installed
	$(RUN) tests/rules/source_rules.py
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Every CUDA kernel for every target: fails on spills, local memory and ptxas' performance warnings.
kernels: $(VENV)/.installed
	$(RUN) .ci/check_kernels.py

# The tests that need a GPU compile where there is none: a minute on 2 cores.
cuda_tests: $(VENV)/.installed
	@mkdir -p build/cuda_tests
	$$($(RUN) -c 'import setup; print(setup.find_cuda_home())')/bin/nvcc -std=c++20 -O0 -arch=sm_90a -Icsrc -I. \
	  -Werror=all-warnings --threads 0 -odir build/cuda_tests -c tests/device/*.cu tests/kernels/*.cu

# More random problems than `make test` has: half a minute.
fuzz: $(VENV)/.built
	$(RUN) -m tests.fuzz --device cpu --cases 3000

# The tests of models once more, with the oldest transformers that is supported: two minutes.
oldest_transformers: $(VENV)/.built $(VENV)/.oldest_transformers
	PYTHONPATH=$(VENV)/oldest_transformers $(RUN) -m pytest tests/hf

clean:
	rm -rf $(VENV) build dist *.egg-info flash_attn_cuda/*.so

$(VENV)/.installed: .ci/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing torch and the tools into $(VENV): a few minutes'
	@$(RUN) -m pip install $(PIP_QUIET) '$(TORCH)' -r .ci/requirements.txt
	@touch $@

$(VENV)/.oldest_transformers: $(VENV)/.installed
	@rm -rf $(VENV)/oldest_transformers
	@$(RUN) -m pip install $(PIP_QUIET) --target $(VENV)/oldest_transformers transformers==4.53.3
	@touch $@

# Where there is an NVIDIA driver and no CUDA toolkit, setup.py names the packages that bring nvcc.
$(VENV)/.built: $(VENV)/.installed $(VENV)/.knobs $(SOURCES)
	@echo 'compiling flash_attn_cuda: five minutes on 2 cores'
	@missing=$$($(RUN) -c 'import setup; print(*setup.plan()[0])') && \
	  { test -z "$$missing" || $(RUN) -m pip install $(PIP_QUIET) $$missing; }
	@$(RUN) -m pip install -v --no-build-isolation --no-deps -e . >$(VENV)/build.log 2>&1 || \
	  { cat $(VENV)/build.log; exit 1; }
	@grep '^ *flash_attn_cuda:' $(VENV)/build.log
	@touch $@

# Changes when a variable that the build reads does.
KNOBS := $(FA_CUDA_ARCHS) $(FA_HEAD_DIMS) $(FA_DEBUG) $(CUDA_HOME)
$(VENV)/.knobs: $(VENV)/.installed FORCE
	@echo '$(KNOBS)' | cmp -s - $@ || echo '$(KNOBS)' >$@
