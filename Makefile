# `make demo` and `make test` build .venv by themselves. They need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two at a time, each with one thread: what two cores and 8 GB hold. A file's tests share what is costly to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow check audit bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/jai demo runs/demo

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) --run-slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/typing
	ln -sfn "$(CURDIR)" $(VENV)/typing/jai
	MYPYPATH=$(VENV)/typing $(BIN)/mypy

# Known vulnerabilities of the pinned packages; needs pip-audit and an index that knows them.
audit: $(STAMP)
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

bench: $(STAMP)
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/embedding_init.py

# All that needs a GPU, in the order in which it should be believed: right, tuned, fast. About 60 GiB, half an hour.
bench-gpu: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_kernels_gpu.py tests/test_kernels_experts.py tests/test_kernels_cross_entropy.py tests/test_kernels_liger.py
	$(BIN)/python benchmarks/tune_experts.py
	$(BIN)/python benchmarks/experts.py --plot docs/experts-roofline.png
	$(BIN)/python benchmarks/experts.py --tokens 16384 --skew 1
	$(BIN)/python benchmarks/experts.py --tokens 4096 16384 --lora 16
	$(BIN)/python benchmarks/cross_entropy.py

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "JAI needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)
