# Everything starts with `make demo` or `make test`; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# A CPU build here; for an NVIDIA GPU: make TORCH=torch (or any torch >= 2.10)
TORCH ?= torch==2.13.0
# What is installed beside the package; more of pyproject.toml's extras let more tests run.
EXTRAS ?= speech,export,ctranslate2,openvino,test,lint

BIN := $(VENV)/bin
COMMA := ,
STAMP := $(VENV)/.installed-$(subst $(COMMA),-,$(EXTRAS))
CPP := $(shell git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: help setup demo test test-quick test-faults test-litert bench cuda-check lint format base-model clean

help:
	@echo "make setup       create $(VENV) and install everything into it (rebuilds when C++ sources change)"
	@echo "make demo        the main job, on speech synthesised here: adapt, quantize, serve two adapters in one batch"
	@echo "make test        the tests (half an hour on two cores)"
	@echo "make test-quick  the quick ones (under 3 minutes)"
	@echo "make test-faults C++ and kernels under sanitizers, and faults planted to be found (a quarter of an hour)"
	@echo "make test-litert those of LiteRT's export, in an environment of its own (.venv-litert)"
	@echo "make bench       benchmarks of the operators against torch and PEFT, JSON under benchmarks/results"
	@echo "make cuda-check  compile every CUDA kernel for every architecture; registers, spills, instructions (no GPU needed)"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make base-model  train the shipped base model again (more than an hour)"

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first: the build needs its headers and never fetches it, and a later install must not replace it.
$(STAMP): $(BIN)/python pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@

demo: setup
	$(BIN)/lora-speech demo --output demo_output

# Two at once: nearly all tests use one thread.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: setup
	$(PYTEST) -m "not faults"

test-quick: setup
	$(PYTEST) -m "not slow"

test-faults: setup
	$(PYTEST) -m faults

# Its converter brings torchao, which transformers and peft import wherever it is.
test-litert:
	$(MAKE) setup VENV=.venv-litert EXTRAS=speech,litert,test
	.venv-litert/bin/python -m pytest tests/speech/test_export_litert.py

bench: setup
	$(BIN)/python -m benchmarks --output benchmarks/results

# OPTIONS=--record writes csrc/cuda/resources.json anew; --changed leaves out what was compiled for it already.
cuda-check: setup
	$(BIN)/python -m pip install --quiet "nvidia-cuda-nvdisasm>=13,<14"
	$(BIN)/python tools/cuda_check.py $(OPTIONS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

base-model: setup
	$(BIN)/python -m lora_speech.pretraining --output python/lora_speech/assets/base_model

clean:
	rm -rf $(VENV) .venv-litert build dist *.egg-info lora_kernels/*.so demo_output
