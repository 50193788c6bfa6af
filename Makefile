# make demo: train VMPO on the embedded model (CPU, no download, no account).  make test: the test suite.
# Each works alone on a machine with Python 3.10 or newer and pip.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python vmpo.py --preset tiny-sd15

test: .venv/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/python -m ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@
