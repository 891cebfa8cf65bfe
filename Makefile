# `make demo` and `make test` are all a newcomer needs; both install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo
SEED ?= 0
HALF = $(if $(SMALL),data.batch_size=8)
COMMA := ,
# Processes of the tests.
WORKERS ?= 2

# No network at run time: no W&B login, no update checks.
export WANDB_MODE ?= offline
export NO_ALBUMENTATIONS_UPDATE := 1
export HF_HUB_OFFLINE ?= 1
# Modules are compiled when first imported, not all of them at installation, which takes longer.
export PYTHONDONTWRITEBYTECODE :=
PIP := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help install demo test lint bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## a virtual environment in .venv with the locked versions

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:3]; sys.exit(0 if (3, 11, 4) <= v < (3, 14) else "wsss needs Python 3.11.4 to 3.13; this is %d.%d.%d: set PYTHON=python3.13" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -r requirements.lock
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# A processor that does not compute in bfloat16 takes two to three times as long: half the batch
# there, and no upper bound. `make demo SMALL=1` and `SMALL=` choose.
demo: install  ## train CoSA, its lower and its upper bound on generated images; table and pictures
	$(eval SMALL ?= $(shell $(BIN)/python -c 'from wsss.inference import find_device, has_bf16; print("" if has_bf16(find_device("auto")) else 1)'))
	$(if $(SMALL),@echo 'Small demo (half the batch and no upper bound): this processor has no bfloat16. make demo SMALL= has all.')
	$(if $(SMALL),,$(BIN)/wsss train experiment=shapes method=supervised seed=$(SEED) output_dir=$(DEMO)/supervised overwrite=true)
	$(BIN)/wsss train experiment=shapes method=cam seed=$(SEED) output_dir=$(DEMO)/cam overwrite=true $(HALF)
	$(BIN)/wsss train experiment=cosa_shapes seed=$(SEED) output_dir=$(DEMO)/cosa overwrite=true $(HALF)
	$(BIN)/wsss report 'runs=[$(if $(SMALL),,$(DEMO)/supervised$(COMMA))$(DEMO)/cam,$(DEMO)/cosa]' output_dir=$(DEMO)/report

test: install  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## time of steps, views, evaluation and single losses
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/input_pipeline.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/dense_energy.py
	$(BIN)/python benchmarks/feature_similarity.py
	$(BIN)/python benchmarks/unia.py
	$(BIN)/python benchmarks/unia_step.py

clean:  ## remove the environment, all runs and the generated data set
	rm -rf $(VENV) outputs data/shapes build dist .pytest_cache .mypy_cache .ruff_cache
