# Everything a developer or an operator types. The environment lives in .venv and is made on first use.
#
#   make serve [MODEL=path] [ARGS="..."] [HOST=...] [PORT=...]      serve; without a model, the demo model
#   make test        the suite: no root, no system packages, says what it skipped
#   make test-all    and what is slow or needs more: sanitizers, fuzzing
#   make check       ruff, mypy --strict, clang-format, Dockerfile lint
#   make cuda        compile the CUDA kernels for every supported architecture (needs nvcc, no GPU)
#   make dist        wheel and sdist
#   make format      what check wants of layout, done
#   make clean       remove .venv and what was built
#
# TORCH is what pip installs first, options and all: on a machine with a GPU, the build that fits its driver.
# CUDA=ON|OFF|AUTO builds the CUDA library; AUTO does where nvcc and a GPU are present. Both count when .venv is made.

PYTHON ?= python3
# From the command line alone: a shell may have a HOST of its own, and what is not given is for the server to say.
HOST  =
PORT  =
MODEL =
ARGS  =
TORCH  ?= $(shell grep '^torch' constraints.txt)
CUDA   ?= AUTO
CUDA_ARCHITECTURES ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -type f -not -name '*.md' 2>/dev/null)

.PHONY: serve test test-all check format cuda dist clean
.DELETE_ON_ERROR:

# `exec` leaves the server as make's own child, so that Ctrl-C and SIGTERM reach it directly.
serve: $(STAMP)
	@exec $(BIN)/halfbyte serve $(MODEL) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.c' '*.cu' '*.cuh')
	$(BIN)/hadolint Dockerfile

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.c' '*.cu' '*.cuh')

cuda: $(STAMP)
	$(BIN)/cmake -S csrc -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=Release -DHALFBYTE_CUDA=ON $(if $(CUDA_ARCHITECTURES),"-DHALFBYTE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)")
	$(BIN)/cmake --build build/cuda --target halfbyte_cuda

dist: $(STAMP)
	$(BIN)/python -m build --outdir build/dist .

clean:
	rm -rf build dist $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that nothing else decides which build of it is installed.
$(STAMP): pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt "scikit-build-core>=0.11" "cmake>=3.25" ninja
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/torch.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/torch.txt --no-build-isolation \
	    --config-settings=cmake.define.HALFBYTE_CUDA=$(CUDA) --editable ".[dev]"
	@touch $@
