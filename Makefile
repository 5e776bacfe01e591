# Every target works on a fresh clone: it makes .venv first. Torch is pinned in constraints.txt (see there).
PYTHON ?= python3
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: train test test-all lint format

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

train: .venv/installed  ## train a local-attention classifier on 4,096-token documents, evaluate and save it
	.venv/bin/accelerate launch --config_file configs/accelerate/one_cpu.yaml training/classify.py --config configs/era/local.yaml

test: .venv/installed
	.venv/bin/python -m pytest -m "not slow"

test-all: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
