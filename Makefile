# Two commands for a fresh machine: `make demo` shows what foveate does, `make test` that it works.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-timm lint bench clean

demo: $(INSTALLED)
	$(BIN)/foveate demo demo

test: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	$(BIN)/python -m pytest -n 2

# timm's models as hosts, in an environment of their own beside the other: see scripts/timm_env.sh.
test-timm: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	scripts/timm_env.sh $(VENV) $(VENV)-timm
	$(VENV)-timm/bin/python -m pytest tests/timm

lint: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

bench: $(INSTALLED)
	$(BIN)/foveate prove --all

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache
