# `make install` once, in an activated virtual environment; then `make lint test docs`.
# Override with e.g. `make test PYTHON=python3.12` or `make bench JAX_PLATFORMS=cuda`.
PYTHON ?= python
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS

.PHONY: install lint format test slow mutants docs bench ci clean

install:  ## the package, editable, with every tool, and the commit hooks
	$(PYTHON) -m pip install -e ".[dev]"
	$(PYTHON) -m pre_commit install

lint:  ## what CI asks of the style and of the types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

format:  ## mend what can be mended
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## the default suite, with the docstring examples
	$(PYTHON) -m pytest -n 2

slow:  ## the long-running laws, the longest too
	$(PYTHON) -m pytest -n 2 -m slow

mutants:  ## faults of one line, planted in a copy: fails where the tests see fewer than 95%
	$(PYTHON) tests/mutants/plant.py

docs:  ## the manual, in docs/_build/html; `make docs ONLINE=1` links to those of NumPyro and JAX
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html
	$(PYTHON) .ci/check_links.py docs/_build/html

bench:  ## every benchmark, one after the other
	@set -e; for script in benchmarks/[!_]*.py; do \
		echo "== $$script"; $(PYTHON) "$$script"; done

ci:  ## everything, in fresh virtual environments
	.ci/run

clean:  ## remove what the other targets leave behind
	rm -rf build dist docs/_build docs/api .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
