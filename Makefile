# Every target does its own set-up: a virtual environment, the dependencies, the build of the compiled kernels.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test bench lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/resnet-fused bench

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-group-by=group --benchmark-sort=name

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# torch and nvcc come first, so that the build of the kernels sees the versions that will run them. The editable install is
# repeated when a native source or the build's own files change.
$(VENV)/.installed: pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" ninja wheel "torch>=2.10" "cuda-toolkit[nvcc,nvvm,crt,cccl]==13.0.*"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[bench,test,cuda,dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info resnet_fused/lib .pytest_cache .mypy_cache .ruff_cache .benchmarks
