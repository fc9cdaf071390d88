# Two commands set everything up on a machine with Python 3.10 or newer, make and git:
#   make demo   attack the bundled model on the bundled images, certify it, and say where the reports are
#   make test   check style and types, and run the tests
# For those who change the program (each takes long):
#   make test-slow    the heavier tests
#   make test-matrix  the tests with the oldest and the newest releases of torch and the rest; equality tests on every CPU
#   make coverage     which lines and branches the tests run, in the terminal and in htmlcov/
#   make docs         run the tutorials as notebooks, compare what their pages show, build the docs site into site/
#   make packaging    build wheel and sdist, look into them, resolve all extras together, try the wheel in an environment
#   make release      the same, the wheel tried on Python 3.10 to 3.13 (those that are found)
#   make upload       hand what a release has built to the package index
#   make torture      kill it, feed it nonsense, fill its disk, and count what is lost
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes with one thread each beat one process with two threads.
WORKERS ?= 2

# Pythons for the oldest and the newest releases of what the project stands on, in environments of their own.
OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= $(PYTHON)

.PHONY: demo test test-slow coverage test-matrix test-oldest test-newest test-equality packaging release upload torture docs format clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/robustvlm attack tiny --attack apgd-ce,apgd-t --steps 25 --eps 1/255,2/255 --limit 160 --name demo
	$(BIN)/robustvlm certify tiny --claim class --sigma 0.05 --samples 500 --limit 24 --name demo-certify

test: $(VENV)/.installed-test
	$(BIN)/ruff check conftest.py robustvlm tests tools benchmarks examples
	$(BIN)/ruff format --check conftest.py robustvlm tests tools benchmarks examples
	$(BIN)/mypy
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) -q

test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) -q -m slow

coverage: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pytest-cov
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) -q --cov=robustvlm --cov-branch \
		--cov-report=term:skip-covered --cov-report=html

test-matrix: test-oldest test-newest test-equality

test-oldest: pyproject.toml tools/matrix/oldest.txt
	$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c tools/matrix/oldest.txt -e '.[test]'
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-oldest/bin/python -m pytest -n $(WORKERS) -q

test-newest: pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-newest/bin/python -m pytest -n $(WORKERS) -q

test-equality: $(VENV)/.installed-test
	$(BIN)/python tools/matrix/equality.py

# PACKAGING='--no-install' leaves out the environment, which takes minutes and gigabytes.
packaging: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine uv
	$(BIN)/python -m tools.packaging $(PACKAGING)

release: PACKAGING += --every-python
release: packaging

# Refuses a release that differs from its commit or names no place of the project; see CONTRIBUTING.md.
upload: $(VENV)/.installed
	$(BIN)/python -m tools.packaging --upload

# TORTURE='--quick' for a look, or '--kills 50 --inputs 0'
torture: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.torture $(TORTURE)

# DOCS='--refresh' writes the figures of the run into the tutorials' pages.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m tools.tutorials --run $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix robustvlm tests tools benchmarks examples
	$(BIN)/ruff format robustvlm tests tools benchmarks examples

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "robustvlm needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); PyTorch and its libraries are several GB, this takes a few minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[external]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
