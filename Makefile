# Each target makes what it needs: the virtual environment in .venv, with the pinned versions of constraints.txt.
# Another interpreter: make test PYTHON=python3.12. Other arguments for pytest: make test ARGS="-k scheduler -x".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two pytest workers with one torch thread each beat one worker with two threads: these networks are tiny.
WORKERS ?= 2
LOWEST := $(VENV)/lowest
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help sample test test-slow test-lowest test-browser browser docs docs-links release lint format evaluation card clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

sample: $(VENV)/base.stamp  ## draw a grid of digits with the shipped weights: samples.png
	$(BIN)/mini-ddpm sample $(ARGS)

test: $(VENV)/dev.stamp  ## run the tests (minutes)
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/dev.stamp  ## run the slow tests too (many minutes)
	$(PYTEST) -m "slow or not slow" $(ARGS)

# Deprecations that old releases meet in new ones of what they build on are not ours.
test-lowest: $(LOWEST)/stamp  ## run the tests with the lowest versions that pyproject.toml declares (minutes)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) \
	  -W ignore::DeprecationWarning -W ignore::FutureWarning $(ARGS)

# Without npm there is no page, and its tests are skipped; without Chromium all are.
test-browser: $(VENV)/browser.stamp $(VENV)/space.stamp $(if $(shell command -v npm),browser)  ## run the tests in Chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -rs tests/test_browser.py $(ARGS)

browser: $(VENV)/page.stamp  ## build the page that draws digits in the browser: dist/browser (needs npm)

SPHINX := OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet
docs: $(VENV)/docs.stamp  ## build the documentation: docs/_build/html
	$(SPHINX) -b html docs docs/_build/html

docs-links: $(VENV)/docs.stamp  ## visit the addresses that the documentation links to (needs a network)
	$(SPHINX) -b linkcheck docs docs/_build/links

lint: $(VENV)/dev.stamp  ## ruff check, ruff format --check, mypy --strict, zizmor (the workflows)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --no-progress --offline --strict-collection .github

format: $(VENV)/dev.stamp  ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# FID of the weights that ship, and how many are read as the class asked for; hours on a CPU.
SHIPPED := mnist mnist-class-conditional mnist-distilled mnist-one-step
EVALUATE := $(BIN)/mini-ddpm evaluate $(ARGS)
evaluation: $(VENV)/dev.stamp runs/mnist-classifier/config.json  ## measure the weights that ship: model_card/*/evaluation.json
	$(EVALUATE) mnist --output-dir model_card/mnist
	for name in mnist-class-conditional mnist-distilled mnist-one-step; do \
	  $(EVALUATE) $$name --classifier runs/mnist-classifier --output-dir model_card/$$name || exit; done
	for name in $(SHIPPED); do cp model_card/$$name/evaluation.json src/mini_ddpm/pretrained/$$name/ || exit; done

runs/mnist-classifier/config.json: | $(VENV)/dev.stamp
	$(BIN)/python benchmarks/train_classifier.py --output-dir $(@D)

card: $(VENV)/base.stamp  ## render model_card/ anew from the weights that ship and their facts
	for name in $(SHIPPED); do \
	  $(BIN)/mini-ddpm card $$name --repo-id user/$$name --out model_card/$$name || exit; done

# What a stranger gets: the wheel alone, with the newest of what it needs, in a new environment and an empty folder.
# torch has the version of constraints.txt, since the newest may be a build of several GB. Or: make release TORCH=torch.
TORCH ?= $(shell grep '^torch==' constraints.txt)
ALONE := $(abspath $(VENV)/alone/bin)
release: docs $(VENV)/release.stamp  ## build sdist and wheel, install the wheel alone, draw with it: dist/release
	rm -rf dist/release dist/drawn && mkdir -p dist/drawn
	$(VENV)/release/bin/python -m build --outdir dist/release
	$(VENV)/release/bin/python -m twine check --strict dist/release/*
	$(PYTHON) -m venv --clear $(VENV)/alone
	$(ALONE)/python -m pip install --quiet --disable-pip-version-check $(TORCH) dist/release/*.whl
	cd dist/drawn && $(ALONE)/mini-ddpm sample --out digits.png
	cd dist/drawn && $(ALONE)/python -c "from mini_ddpm import load_pipeline; \
	  load_pipeline('mnist-distilled')([3, 1, 4]).images[0].save('three.png')"
	@echo; echo "Ready to publish:" dist/release/*
	@echo "Drawn with it:" dist/drawn/*
	@echo "Its documentation: docs/_build/html/index.html"

clean:  ## remove .venv and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist docs/_build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the packages after it then find it there, and none of them can pull another build.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	@echo "installing torch into $(VENV) ..."
	@$(PIP_INSTALL) torch
	@touch $@

$(VENV)/base.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "installing mini-ddpm and what it needs into $(VENV) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "installing mini-ddpm with everything its tests need into $(VENV) ..."
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/base.stamp

$(VENV)/docs.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "installing mini-ddpm with everything its documentation needs into $(VENV) ..."
	@$(PIP_INSTALL) --editable ".[docs]"
	@touch $@ $(VENV)/base.stamp

$(VENV)/release.stamp: constraints.txt
	@$(PYTHON) -m venv --clear $(VENV)/release
	@$(VENV)/release/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine
	@touch $@

$(VENV)/browser.stamp: $(VENV)/dev.stamp
	@$(PIP_INSTALL) --editable ".[browser]"
	@touch $@

PAGE := $(wildcard examples/browser/*)
$(VENV)/page.stamp: $(PAGE) src/mini_ddpm/export.py $(VENV)/dev.stamp
	$(BIN)/python examples/browser/build.py dist/browser
	@touch $@

# Gradio does not take the Pillow of constraints.txt. In an environment of its own it gets another; the rest is ours.
$(VENV)/space.stamp: examples/space/requirements.txt $(VENV)/dev.stamp
	@echo "installing Gradio into $(VENV)/space ..."
	@$(PYTHON) -m venv --clear $(VENV)/space
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(VENV)/space/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth"
	@grep -v '^pillow==' constraints.txt > $(VENV)/space.txt
	@$(VENV)/space/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/space.txt \
	  --requirement examples/space/requirements.txt
	@touch $@

# uv chooses the lowest versions of what pyproject.toml names; what pip has put there before it, torch alone, stays.
$(LOWEST)/stamp: pyproject.toml constraints.txt
	@echo "installing the lowest versions into $(LOWEST) ..."
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt torch uv
	@grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  --constraint $(LOWEST)/torch.txt --editable ".[test]"
	@touch $@
