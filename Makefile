# The same few words everywhere. `make demo` and `make test` set everything up by themselves.
PYTHON := .venv/bin/python
.PHONY: setup setup-dev demo test check lint format types docs clean

setup:
	@scripts/setup.sh run

setup-dev:
	@scripts/setup.sh dev

demo: setup
	@$(PYTHON) recipes/demo.py

test: setup-dev lint types
	@scripts/test.sh

check: setup-dev lint types
	$(PYTHON) -m pytest tests -m "not slow and not render and not browser"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:
	$(PYTHON) -m mypy

docs: setup-dev
	$(PYTHON) scripts/build_docs.py

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
