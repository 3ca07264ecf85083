# Two commands are all a newcomer needs: make demo, make test. Each builds .venv when it is missing.
# They work from any folder: make -f /path/to/Makefile demo
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
ifneq ($(CURDIR)/,$(ROOT))
%:
	@$(MAKE) --no-print-directory -C $(ROOT) $@
.DEFAULT_GOAL := demo
else
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
.PHONY: demo test test-all lint lab notebooks samples reference install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[all,test]'
	$(BIN)/python -m kit.train.models.shipped
	@touch $@

demo: install  ## the newcomer's run: the whole chain on the sample crawl
	$(BIN)/kit run params/demo.yaml

# two processes, of which one starts Spark; the smoke chain and every notebook are among the tests
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations 30

test: install  ## lint, unit tests, every notebook, the smoke chain
	$(MAKE) lint
	$(PYTEST) -m "not slow"

test-all: install  ## the same with the slow tests, which take an hour
	$(MAKE) lint
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: install  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: install  ## run the notebooks whose code has changed on the sample; commit their outputs, cleaned
	$(BIN)/python -m kit.maintain.refresh notebooks

samples: install  ## rebuild the sample crawl, byte for byte
	$(BIN)/python data_samples/build.py

reference: install  ## after make demo: write the rates that kit estimate starts from
	$(BIN)/kit run params/smoke.yaml -p run=tiny -p max_pages=150
	$(BIN)/python -m kit.maintain.refresh reference

clean:
	rm -rf .venv .cache lake
endif
