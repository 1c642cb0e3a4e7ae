# Two commands do everything, from a bare Python 3.10 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The environment is made once, and again when what it is made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

PARALLEL := -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test quick check contracts pair clean
demo: $(VENV)/.ready  ## the target's own text and DFlash's beside it, on the built-in pair, offline
	@HF_HUB_OFFLINE=1 $(BIN)/dflash-hub demo

test: $(VENV)/.ready  ## the tests; less than four minutes on two cores
	@$(BIN)/python -m pytest -q $(PARALLEL)

quick: $(VENV)/.ready  ## the goldens and one test of each kind; half a minute
	@$(BIN)/python -m pytest -q $(PARALLEL) -m quick

check: $(VENV)/.ready  ## everything that CI checks
	@bash .ci/run

contracts: $(VENV)/.ready  ## vLLM, SGLang, llama.cpp, speculators and transformers read our drafts; 4 GB from PyPI at first
	@$(BIN)/python contracts/environments.py
	@$(BIN)/python -m pytest -q contracts

pair: $(VENV)/.ready  ## train the built-in pair anew, into tiny_pair/; less than an hour on two cores
	@$(BIN)/python examples/tiny_pair/train.py --output-dir tiny_pair

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .ruff_cache
