# Every target does its own set-up in .venv, once: a step runs again when what it depends on has changed.
# On a machine without a GPU, the CPU build of torch saves gigabytes. pip's arguments may follow the name:
#   make test TORCH="torch==2.13.0 --index-url <the index of CPU builds>"
TORCH ?= torch==2.13.0
PYTHON ?= python3

# The second environment: the oldest torch that pyproject.toml promises, on Python 3.12 where there is one.
#   make test-wheel WHEEL_TORCH=torch==2.14.1 WHEEL_PYTHON=python3.11
WHEEL_TORCH ?= torch==2.11.0
WHEEL_PYTHON ?= $(shell PYENV_VERSION=3.12 python3.12 -c 'import ensurepip, sys; print(sys.executable)' 2>/dev/null \
	|| echo $(PYTHON))

STUDIES ?= all

VENV := .venv
BIN := $(VENV)/bin
WHEEL := .venv-wheel
# What depends on the release of torch: tracing, the choice of a backend, autocast, and some of the values.
WHEEL_TESTS := wheel compile gates_compile contexts backends verified autocast interaction gradients functional_transforms engine autocast_cache
# To compile faster: the kernels for any x86 CPU alone, since the others take nothing else of torch, and with fewer
# optimisations (47 s of processor time in place of 88).
WHEEL_CMAKE := -DMI_ISAS= -DCMAKE_BUILD_TYPE=MinSizeRel
WHEEL_CHOICE := not portable and not bfloat16 and (wheel or compile or backends or verified or autocast \
	or odd and float32 or jacobian or hessian or gradients_under) \
	or portable and test_values and (middle and float32 or threaded-W-expanded and bfloat16)
FAST := not (build or compile or subprocess or tools or slow)
# The CPU kernels once more, under AddressSanitizer and UBSan: of the wide sets one is enough, as they differ in width
# alone. The sanitizers come first in the process, before the interpreter, and do not look for leaks, of which it has
# many. The first report ends the process, and so the target.
SANITIZED := build/sanitized
SANITIZED_ISAS := avx2
SANITIZED_TESTS := direct_calls interaction gradients gates modulate linear packed weight_layouts_cpu by_segment few_rows biaffine
SANITIZED_CHOICE := direct_calls or cpu and float32 and not portable and not bfloat16 and not threaded and not tall and \
	(streamed or same_bits or (test_values or test_error_rule) and (odd-torch or past-powers or one-row-torch or no- or \
	nothing or offset or batch-norm or alternating)) or few_rows and float32 or by_segment and cpu and float32 and test_values \
	or weight_layouts_cpu and float32 and not threaded and (error_rule or lanes) or biaffine and cpu and float32 and error_rule \
	or test_linear and cpu and float32 and (in-place or beyond or beside)
SANITIZERS = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
NATIVE_SOURCES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE := setup.py CMakeLists.txt mi_kernels/_version.py $(shell find csrc)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test test-fast mutants sanitize wheel test-wheel bench guard studies docs hub gpu-check lint format clean FORCE

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build  ## train a model with nn.Bilinear, convert it, and compare both
	$(BIN)/python -m mi_kernels demo

test: build  ## run the whole test suite
	$(BIN)/python -m pytest tests -n logical --dist worksteal

test-fast: build  ## the inner loop, six minutes on two cores: kernels' values and gradients, on fewer samples
	MI_KERNELS_TEST_SELECTION=fast $(BIN)/python -m pytest tests -n logical --dist worksteal -m '$(FAST)'

mutants: build  ## put small faults into copies of the checkout, one at a time: the tests have to notice each
	$(BIN)/python tests/mutants.py $(MUTANTS)

# From another directory: an interpreter that is started here would import the package of the checkout.
test-wheel: wheel  ## run part of the suite on the installed wheel and the oldest torch, in an environment of its own
	cd $(WHEEL) && bin/python -m mi_kernels doctor
	cd $(WHEEL) && MI_KERNELS_TEST_WHEEL=1 bin/python -m pytest -n 2 $(foreach test,$(WHEEL_TESTS),$(addprefix ../,$(wildcard tests/*/test_$(test).py))) -k '$(WHEEL_CHOICE)'

sanitize: $(VENV)/.installed  ## run the CPU kernels and their checks under AddressSanitizer and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-DMI_CUDA=OFF -DMI_SANITIZE=address,undefined "-DMI_ISAS=$(SANITIZED_ISAS)" "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -g1 -DNDEBUG"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED) --target mi_kernels_cpu
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		MI_KERNELS_CPU_LIBRARY="$(CURDIR)/$(SANITIZED)/libmi_kernels_cpu.so" OMP_NUM_THREADS=2 \
		$(BIN)/python -m pytest -p no:xdist -p no:cacheprovider $(foreach test,$(SANITIZED_TESTS),$(wildcard tests/*/test_$(test).py)) -k '$(SANITIZED_CHOICE)'

bench: build  ## measure against the alternatives
	$(BIN)/python -m mi_kernels bench

# BASE: where this branch left main, or, on main, the commit before (benchmarks/harness/base.py).
guard: build  ## is this tree slower than BASE=<revision>? ratios in build/guard.md, status 1 if so; on a quiet machine
	$(BIN)/python benchmarks/run.py --guard $(BASE) --shortest 50 --page build/guard.md

studies: build  ## what multiplicative interactions are good for: STUDIES="compact attention" (all); see docs/studies.md
	$(BIN)/python -m studies $(STUDIES)

# The tutorials run; what stands in docs/tutorials afterwards is made of them.
docs: build  ## build the documentation site in build/docs, without a network; a warning is an error
	OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)" $(BIN)/python -m sphinx -b html --keep-going -W docs build/docs

hub: build  ## lay out the package for the kernels hub, in build/hub: HUB=--compile for the CPU kernels too
	$(BIN)/python tools/hub.py build/hub $(HUB)

# No .venv: the Python that is there, with its packages, for machines without a network. PYTHON names another.
gpu-check:  ## on a GPU, with the packages of $(PYTHON): build, test, measure, within 10 minutes
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK)

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed  ## write the style that lint checks
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

build: $(VENV)/.built  ## set up .venv and compile the native libraries in place

wheel: $(WHEEL)/.installed

clean:  ## remove what was built and cached; the downloads in .venv and .venv-wheel stay
	rm -rf build dist *.egg-info mi_kernels/*.so mi_kernels/native_skipped.txt .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/tutorials
	rm -f $(VENV)/.built $(VENV)/.installed $(WHEEL)/.installed
	rm -rf $(WHEEL)/src
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(WHEEL)/*' -prune -exec rm -rf {} +

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

# Another torch or Python is another environment.
$(WHEEL)/.torch: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != '$(WHEEL_TORCH), $(WHEEL_PYTHON)' ]; then \
		echo '==> $(WHEEL_TORCH), $(WHEEL_PYTHON)' && rm -rf $(WHEEL) && $(WHEEL_PYTHON) -m venv $(WHEEL) && \
		$(WHEEL)/bin/python -m pip install $(WHEEL_TORCH) "setuptools>=77" cmake ninja pybind11 && \
		echo '$(WHEEL_TORCH), $(WHEEL_PYTHON)' > $@; fi

# Built from a copy of the sources, so that it can be built while .venv is, and gets nothing that lies in the
# checkout.
$(WHEEL)/.installed: $(WHEEL)/.torch pyproject.toml MANIFEST.in $(NATIVE) $(shell find mi_kernels -name '*.py')
	@echo "==> the wheel"
	rm -rf $(WHEEL)/*.whl $(WHEEL)/src/mi_kernels $(WHEEL)/src/csrc $(WHEEL)/src/build/lib*
	mkdir -p $(WHEEL)/src
	cp -pR setup.py pyproject.toml CMakeLists.txt MANIFEST.in README.md LICENSE csrc mi_kernels $(WHEEL)/src
	rm -f $(WHEEL)/src/mi_kernels/*.so
	cd $(WHEEL) && FORCE_CUDA=0 CMAKE_ARGS='$(WHEEL_CMAKE)' bin/python -m pip wheel --no-build-isolation --no-deps -w . ./src
	cd $(WHEEL) && bin/python -m pip install --force-reinstall --no-deps mi_kernels-*.whl
	cd $(WHEEL) && bin/python -m pip install "$$(echo mi_kernels-*.whl)[test]"
	@touch $@
