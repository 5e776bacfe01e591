# Every target works in a fresh clone: it creates .venv first. constraints.txt pins torch and explains why.
PYTHON ?= python3
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: train zoo zoo-check pages test test-all test-space package lint format

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Train, evaluate and save a local-attention classifier of 4,096-token documents. Resumes an interrupted run.
train: .venv/installed
	.venv/bin/accelerate launch --config_file configs/accelerate/one_cpu.yaml \
		--num_cpu_threads_per_process $$(getconf _NPROCESSORS_ONLN) \
		training/train.py --config configs/era.yaml --variant local --resume

# Train and publish, for every variant, a masked language model, a classifier initialised from it, and a causal language
# model if the variant supports it. Resumes an interrupted run, and skips the models that are already in model_cards.
zoo: .venv/installed
	@set -e; publish() { \
		test ! -e model_cards/$$2-$$3/README.md || return 0; \
		.venv/bin/python training/train_all.py --config configs/$$1.yaml --variants $$2; \
		.venv/bin/python training/publish.py runs/$$1-$$2 model_cards/$$2-$$3; \
	}; causal=" $$(.venv/bin/python -c 'import efficient_transformers as zoo; \
		print(*(name for name, variant in zoo.VARIANTS.items() if variant.causal))') "; \
	for config in configs/variants/*.yaml; do \
		variant=$$(basename $$config .yaml); \
		publish zoo_mlm $$variant mlm; \
		publish zoo_era $$variant era; \
		case "$$causal" in *" $$variant "*) publish zoo_clm $$variant clm;; esac; \
	done

# Export every folder of model_cards, open it without the package, and compare its outputs with its card.
zoo-check: .venv/installed
	.venv/bin/python training/publish.py --check model_cards/*/

# Update the table of variants in the README and the gallery from src/efficient_transformers/registry.py.
pages: .venv/installed
	.venv/bin/python -m efficient_transformers.pages

test: .venv/installed
	.venv/bin/python -m pytest -m "not slow and not space" -n auto --dist loadgroup

test-all: .venv/installed
	.venv/bin/python -m pytest -m "not space" -n auto --dist loadgroup

# Test the demo in a headless browser. On Debian: apt-get install chromium chromium-driver
test-space: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,space]'
	.venv/bin/python -m pytest -m space

# Build the wheel and the sdist, and test each in an empty environment.
package:
	.ci/package

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
