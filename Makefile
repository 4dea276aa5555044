# One virtual environment serves every target; it is made on first use and again when the
# dependencies change.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin

# Each test process, and each command that a test starts, would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

# Two processes at a time, each on one core: torch would start a thread for every core in both.
UNIT := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
OTHERS := tests/ray tests/system tests/gpu

.PHONY: demo check test lint docs linkcheck test-slow test-gpu test-benchmarks coverage clean

demo: .venv/installed
	$(BIN)/peaknet-predict predict -c demo

# Before each commit: a tenth of the examples of each property, and no test marked `thorough`.
check: lint
	QUICK_TESTS=1 $(UNIT) -m 'not slow and not thorough' tests/unit

# What continuous integration runs, after `make lint`.
test: .venv/installed
	$(UNIT) tests/unit tests/storage_simulation
	$(BIN)/pytest $(OTHERS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/yamllint --strict .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site, in docs/_build/html. It runs the notebook, and a warning is an error.
docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -q -b html -c docs . docs/_build/html

# Other people's pages that ours link to: every night, because they come and go.
linkcheck: .venv/docs
	$(BIN)/sphinx-build -q -b linkcheck -D nb_execution_mode=off -c docs . docs/_build/linkcheck

test-slow: .venv/installed
	$(BIN)/pytest -m slow tests

test-gpu: .venv/installed
	$(BIN)/pytest -m gpu tests

test-benchmarks: .venv/installed
	$(BIN)/pytest tests/benchmarks

# The same tests as `make test`, and a floor below which it fails.
coverage: .venv/installed
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 tests/unit tests/storage_simulation
	$(BIN)/coverage run -m pytest $(OTHERS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and by its exact version: a range would take the newest release there is. Where a
	# CPU build of that version is at hand, pip takes it; otherwise the CUDA build, which works too.
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
