# Every target works on a fresh clone: it makes .venv first. Torch is pinned in constraints.txt (see there).
PYTHON ?= python3
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: train zoo zoo-check test test-all test-space lint format

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# A local-attention classifier on 4,096-token documents: trained, evaluated, saved. Given again it goes on where it was.
train: .venv/installed
	.venv/bin/accelerate launch --config_file configs/accelerate/one_cpu.yaml \
		--num_cpu_threads_per_process $$(getconf _NPROCESSORS_ONLN) \
		training/classify.py --config configs/era/local.yaml resume=true

# Every variant of configs/zoo_mlm: masked language model, classifier of it, causal model if it has one, and
# model_cards/<variant> of these. Given again it goes on where it was; what is in model_cards is not made again.
zoo: .venv/installed
	@set -e; for config in configs/zoo_mlm/*.yaml; do \
		variant=$$(basename $$config .yaml); \
		test $$variant != base || continue; \
		test ! -e model_cards/$$variant/README.md || continue; \
		causal=$$(ls configs/zoo_clm/$$variant.yaml 2>/dev/null || true); \
		.venv/bin/python training/train_all.py --configs $$config configs/zoo_era/$$variant.yaml $$causal; \
		.venv/bin/python training/publish.py runs/zoo_era-$$variant model_cards/$$variant \
			--also runs/zoo_mlm-$$variant $${causal:+runs/zoo_clm-$$variant}; \
	done

# Opens every folder of model_cards without the package, and compares it with what its card says.
zoo-check: .venv/installed
	.venv/bin/python training/publish.py --check model_cards/*/

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
