# Every target does its own set-up in .venv, once: a step runs again when what it depends on has changed.
# On a machine without a GPU, the CPU build of torch saves gigabytes. pip's arguments may follow the name:
#   make test TORCH="torch==2.13.0 --index-url <the index of CPU builds>"
TORCH ?= torch==2.13.0
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt mi_kernels/_version.py $(shell find csrc)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test bench gpu-check lint clean FORCE

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build  ## train a model with nn.Bilinear, convert it, and compare both
	$(BIN)/python -m mi_kernels demo

test: build  ## run the whole test suite
	$(BIN)/python -m pytest tests -n 2

bench: build  ## measure against the alternatives
	$(BIN)/python -m mi_kernels bench

# No .venv: the Python that is there, with its packages, for machines without a network. PYTHON names another.
gpu-check:  ## on a GPU, with the packages of $(PYTHON): build, test, measure, within 10 minutes
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(VENV)/.built  ## set up .venv and compile the native libraries in place

clean:  ## remove what was built and cached; the downloads in .venv stay
	rm -rf build dist *.egg-info mi_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.built $(VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mi_kernels needs Python 3.11 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Holds what was asked for, and changes only when that does: another TORCH is another build.
$(VENV)/.torch: $(VENV)/.created FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH)' ]; then \
		echo '==> $(TORCH)' && $(BIN)/python -m pip install $(TORCH) && echo '$(TORCH)' > $@; fi

# The package itself, without its native part, which has its own step so that ninja's progress is seen.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	@echo "==> build tools, test tools and the package, editable"
	$(BIN)/python -m pip install "setuptools>=77" cmake ninja pybind11
	MI_KERNELS_SKIP_NATIVE=1 $(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@echo "==> native libraries"
	$(BIN)/python setup.py build_ext --inplace
	@touch $@
