# Every target works on a fresh clone: it makes .venv first. Torch is pinned in constraints.txt (see there).
PYTHON ?= python3
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: train test test-all test-space lint format

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# A local-attention classifier on 4,096-token documents: trained, evaluated, saved. Given again it goes on where it was.
train: .venv/installed
	.venv/bin/accelerate launch --config_file configs/accelerate/one_cpu.yaml \
		--num_cpu_threads_per_process $$(getconf _NPROCESSORS_ONLN) \
		training/classify.py --config configs/era/local.yaml resume=true

test: .venv/installed
	.venv/bin/python -m pytest -m "not slow and not space" -n auto --dist loadgroup

test-all: .venv/installed
	.venv/bin/python -m pytest -m "not space" -n auto --dist loadgroup

# The demo in a headless browser, which is Debian's: apt-get install chromium chromium-driver
test-space: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,space]'
	.venv/bin/python -m pytest -m space

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
