# One virtual environment serves every target; it is made on first use and again when the
# dependencies change.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin

# Each test process, and each command that a test starts, would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

# Two processes at a time, each on one core: torch would start a thread for every core in both.
UNIT := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
OTHERS := tests/ray tests/system tests/gpu

.PHONY: install demo check test lint docs linkcheck test-slow test-gpu test-benchmarks coverage clean

# Then: source .venv/bin/activate
install: .venv/installed
	@echo "Installed. Next: source .venv/bin/activate, then peaknet-predict --help"

demo: .venv/installed
	@echo "The demo: 40 simulated shots through the network, into demo_output/; about a minute on two cores."
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
	@echo "1 of 3: a virtual environment in .venv, with $(PYTHON); seconds."
	$(PYTHON) -m venv .venv
	# torch first and by its exact version: a range would take the newest release there is. Where a
	# CPU build of that version is at hand, pip takes it; otherwise the CUDA build, which works too.
	@echo "2 of 3: torch, the largest part: 200 MB without CUDA, 3 GB with it; minutes."
	$(BIN)/python -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@echo "3 of 3: everything else, some 80 packages; two or three minutes."
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
