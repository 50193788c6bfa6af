# make demo: train AWM on the embedded model (CPU, no download, no account); make demo METHOD=vmpo, grpo, tempflow_rsm
# or first_order_rsm: another method; PRESET=tiny: the SD3.5-type model.  make test: the test suite.
# Each works alone on a machine with Python 3.11 or newer and pip.
PYTHON ?= python3
METHOD ?= awm
PRESET ?= $(if $(filter awm,$(METHOD)),tiny-sd15-release,tiny-sd15)
BIN = .venv/bin

.PHONY: demo test torture lint reference

demo: .venv/installed
	$(BIN)/python $(METHOD).py --preset $(PRESET)

test: .venv/installed
	$(BIN)/python -m ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Kills, signals, faults, wrong inputs, several processes, 500 epochs: 75 minutes of CPU time; prints a table.
torture: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/torture --ignore tests/torture/test_full_size.py

lint: .venv/installed
	$(BIN)/python -m ruff check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is too old: give Python 3.11 or newer, make PYTHON=...")'
	@echo "installing the packages of requirements.txt into .venv: minutes (a CPU alone needs less: see that file)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

# The reference implementations in an environment of their own: rewrites tests/golden where their results changed and
# prints how far rewards.py is from them (docs/parity.md).  FULL=1: also the published sizes; 10 GB memory, 6 GB disk.
WORK = .venv-reference/work
reference: .venv/installed .venv-reference/installed
	HF_HUB_OFFLINE=1 .venv-reference/bin/python tests/reference/oracle.py --folder $(WORK) $(if $(FULL),--full)
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests $(BIN)/python -m reference.parity --folder $(WORK) $(if $(FULL),--full)
	$(BIN)/python -m pytest tests/test_golden.py
	rm -rf $(WORK)

.venv-reference/installed: tests/reference/requirements.txt
	$(PYTHON) -m venv .venv-reference
	.venv-reference/bin/python -m pip install --disable-pip-version-check -q -r tests/reference/requirements.txt
	touch $@
