# The two commands are `make bench` and `make test`. Each makes .venv, installs what requirements.txt
# pins, builds the extension and runs; a second run redoes only what changed.
#
#     make test PYTHON=python3.12            the interpreter .venv is made with
#     make test PYTEST="-k lstm -x"          arguments for pytest
#     make bench BENCH="--help"              arguments for python -m benchmarks

PY := .venv/bin/python
PYTHON ?=
PYTEST ?=
BENCH ?=
export PYTHON

# Some tools behave otherwise where CI is set (Hypothesis draws other examples). Ours do not.
unexport CI

CXX_SOURCES = find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
CLANG_FORMAT = $(CXX_SOURCES) | xargs .venv/bin/clang-format

.DEFAULT_GOAL := help
.PHONY: help env build bench test lint format wheel sdist clean
.NOTPARALLEL:

help:  ## say what there is
	@sed -nE 's/^([a-z]+):.*## (.*)/    make \1	\2/p' Makefile

env:
	@tools/setup_env.sh

build: env  ## make .venv and compile the extension
	@$(PY) setup.py -q build_ext --inplace

bench: build  ## measure against torch.nn, into build/bench
	@$(PY) -m benchmarks $(BENCH)

# Files are shared out among processes, one a core: the fixtures of a file are built once.
test: lint build  ## check the style, run all the tests
	@$(PY) -m pytest -n auto --maxprocesses=8 --dist loadfile $(PYTEST)

lint: env  ## ruff and clang-format, changing nothing
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@$(CLANG_FORMAT) --dry-run -Werror

format: env  ## ruff and clang-format, changing files
	@.venv/bin/ruff check --fix-only
	@.venv/bin/ruff format
	@$(CLANG_FORMAT) -i

# With the CUDA library wherever nvcc is: that needs no GPU, nor a torch with CUDA, and a wheel is for
# other machines. FUSED_RNN_CUDA=0 leaves it out.
# build/lib* would carry modules into the wheel that are no longer in the source.
wheel: env  ## dist/*.whl, for any Python >= 3.10 and torch >= 2.10
	@rm -rf build/lib* build/bdist*
	@FUSED_RNN_CUDA="$${FUSED_RNN_CUDA:-$$($(PY) tools/build_cuda.py)}" \
		$(PY) -m build --wheel --no-isolation

sdist: env  ## dist/*.tar.gz
	@$(PY) -m build --sdist --no-isolation

clean:  ## remove .venv and all that was built
	rm -rf .venv build dist *.egg-info fused_rnn/_C.* fused_rnn/libfused_rnn_cuda.so
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
