# Every target does its own set-up in .venv, once: a step runs again when what it depends on has changed.
# On a machine without a GPU, the CPU build of torch saves gigabytes. pip's arguments may follow the name:
#   make test TORCH="torch==2.13.0 --index-url <the index of CPU builds>"
TORCH ?= torch==2.13.0
PYTHON ?= python3

# The wheel is of this machine's processor and without CUDA:
#   make wheel WHEEL_ARCH=aarch64                        for another, by g++-aarch64-linux-gnu
#   make wheel WHEEL_CUDA_ARCHS="80;90a;100;120"         with CUDA kernels, into dist/cuda
WHEEL_ARCH ?= $(shell uname -m)
WHEEL_CUDA_ARCHS ?=
# Where it is checked: releases of torch, each on a Python; .ci/run takes the oldest alone.
CHECKS ?= 2.11.0@3.12 2.13.0@3.10 2.14.1@3.13

STUDIES ?= all

VENV := .venv
BIN := $(VENV)/bin
DIST := dist$(if $(WHEEL_CUDA_ARCHS),/cuda)
RAW := build/wheel/$(DIST)
# torch's own libraries are there before ours are loaded. NVIDIA's static runtime takes the newer glibc: docs/building.md.
REPAIR := --plat manylinux_$(if $(WHEEL_CUDA_ARCHS),2_34,2_28)_$(WHEEL_ARCH) --only-plat --exclude 'libtorch*.so' --exclude 'libc10*.so' --zip-compression-level 9
CROSS := $(if $(filter-out $(shell uname -m),$(WHEEL_ARCH)),_PYTHON_HOST_PLATFORM=linux-$(WHEEL_ARCH) \
	CMAKE_ARGS="$(CMAKE_ARGS) -DCMAKE_TOOLCHAIN_FILE=csrc/toolchains/$(WHEEL_ARCH).cmake")
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
.PHONY: help build demo test test-fast mutants sanitize wheel check-wheel sdist bench guard studies docs hub gpu-check lint format clean FORCE

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

# Of the objects of `make build`: both compile in build/cmake-*, where only what has changed is compiled.
wheel: $(VENV)/.installed  ## build the wheel, for every Python and torch, into dist/
	rm -rf $(RAW) && mkdir -p $(RAW)
	$(CROSS) FORCE_CUDA=$(if $(WHEEL_CUDA_ARCHS),1,0) MI_KERNELS_CUDA_ARCHS='$(WHEEL_CUDA_ARCHS)' \
		$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w $(RAW) .
	$(if $(CROSS),$(BIN)/python tools/tag_wheel.py $(RAW)/*.whl $(DIST),\
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair $(REPAIR) -w $(DIST) $(RAW)/*.whl)
	@ls -l $(DIST)/*.whl

check-wheel: wheel  ## install the wheel beside several torches, each in an environment of its own, and test it there
	$(BIN)/python tools/check_wheel.py --wheel $(DIST) $(CHECKS)

sdist: $(VENV)/.installed  ## build the source distribution into dist/
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

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
guard: build  ## is this tree slower than BASE=<revision>? ratios in build/guard.md, status 1 if so, 2 if not judged; on a quiet machine
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

clean:  ## remove what was built and cached; the downloads in .venv and .venv-wheel stay
	rm -rf build dist *.egg-info mi_kernels/*.so mi_kernels/ops/build_facts.py .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/tutorials
	rm -f $(VENV)/.built $(VENV)/.installed
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mi_kernels needs Python 3.10 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Holds what was asked for, and changes only when that does: another TORCH is another build.
$(VENV)/.torch: $(VENV)/.created FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH)' ]; then \
		echo '==> $(TORCH)' && $(BIN)/python -m pip install $(TORCH) && echo '$(TORCH)' > $@; fi

# The package itself, without its native part, which has its own step so that ninja's progress is seen.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	@echo "==> build tools, test tools and the package, editable"
	$(BIN)/python -m pip install "setuptools>=77" cmake ninja
	MI_KERNELS_SKIP_NATIVE=1 $(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@echo "==> native libraries"
	$(BIN)/python setup.py build_ext --inplace
	@touch $@
