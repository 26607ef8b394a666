# AGRO: set up, run, test. `make` lists the targets.
#
# Needs python3 >= 3.11 with pip and venv, nothing else. PYTHON=... chooses the interpreter. Packages come from where pip is
# told to look; PIP_FIND_LINKS is passed on to uv.
#
# Targets that train take config fields: `make quickstart run.dir=RUN_DIR run.steps=20 'eval.stop_at=[held_out/avg@4, 0.9]'`.
# ARGS="..." is given to any target's command as it stands, for the shell to take apart.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
UV_VERSION := 0.13.8
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# What this machine has; KIND=gpu says it for others, such as the nodes of a cluster that share this directory.
ifeq ($(origin KIND), undefined)
KIND := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
space := $(subst ,, )
comma := ,
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))

# Never a bare torch without a GPU: that is several GB of CUDA. Its CPU build lies where pip is told to look, or else in
# PyTorch's own index, which uv knows.
OPTIONS_cpu := --overrides requirements/overrides-cpu.txt $(if $(UV_FIND_LINKS),,--torch-backend cpu)
OPTIONS_gpu :=
COMPILE := .venv/bin/uv pip compile --quiet --upgrade --no-annotate
# The small examples share one card: a GPU install of vLLM has no CPU engine.
ON_CARD_gpu := actors.num_gpus=0.25 actors.engine_memory=0.2

# The config fields of make's own command line, as they were typed, each one word for the shell.
is_field = $(and $(findstring .,$1)$(filter environments,$1),$(filter command,$(firstword $(origin $1))))
FIELDS := $(strip $(foreach name,$(filter-out .%,$(.VARIABLES)),$(if $(call is_field,$(name)),$(name))))
as_word = '$(subst ','\'',$1)'
GIVEN = $(foreach name,$(FIELDS),$(call as_word,$(name)=$(value $(name))))
TRAINING := quickstart quickstart-tools demo-smollm2
ifneq ($(FIELDS),)
ifeq ($(filter $(TRAINING),$(MAKECMDGOALS)),)
$(error $(FIELDS): only $(TRAINING) take config fields)
endif
endif

# A quickstart takes as many steps as it needs.
UNTIL_SOLVED := run.steps=300 eval.every=20 eval.stop_at='[held_out/avg@4, 0.95]'

.PHONY: help setup quickstart quickstart-tools demo-smollm2 doctor test test-fast test-families tree figures staleness-study bench bench-buffer bench-actors bench-learner \
  bench-weights bench-trajectory bench-bound bench-reward bench-guard bench-peers bench-growth bench-soak test-gpu bench-gpu check constraints clean

help:  ## list the targets
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: .venv/.ready  ## make .venv with everything in it (a minute or two, once)

# The stamp names the kind it was made for: another one is another set of packages.
OTHER_KIND := $(if $(filter-out $(KIND),$(shell cat .venv/.ready 2>/dev/null)),other-kind)
.PHONY: other-kind

# From nothing every time: a set-up that was cut short leaves no stamp, and what it left is not to be trusted. Removed first,
# so that $(PYTHON) is never the one in .venv itself.
# Compiling to bytecode takes half a minute once, and saves ten seconds at every start of an engine where Python may not
# write bytecode itself.
.venv/.ready: requirements/common.txt requirements/no-deps.txt $(wildcard requirements/*$(KIND).txt) $(OTHER_KIND)
	@rm -f $@ && rm -rf .venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "AGRO needs Python 3.11 or newer, $(PYTHON) is not. Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode $(OPTIONS_$(KIND)) \
	  --constraints requirements/constraints-$(KIND).txt --requirements requirements/$(KIND).txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --requirements requirements/no-deps.txt
	@echo $(KIND) > $@

quickstart: setup  ## train a tiny model on sums, minutes on two cores
	.venv/bin/python launch.py train configs/quickstart.yaml $(UNTIL_SOLVED) $(ON_CARD_$(KIND)) $(GIVEN) $(ARGS)

quickstart-tools: setup  ## train a tiny model to use a calculator in two turns, minutes on two cores
	.venv/bin/python launch.py train configs/quickstart_tools.yaml $(ON_CARD_$(KIND)) $(GIVEN) $(ARGS)

demo-smollm2: setup  ## three steps of a real 135M model on sums
	.venv/bin/python launch.py train configs/smollm2_sums.yaml run.steps=3 $(ON_CARD_$(KIND)) $(GIVEN) $(ARGS)

doctor: setup  ## check this machine
	.venv/bin/python launch.py doctor

# Most start processes that import for ten seconds on one core: two files at a time. Those with deadlines are
# among themselves, and mostly wait: three at a time. Whole runs with deadlines come last, one at a time.
AT_A_TIME := --dist loadfile --no-loadscope-reorder --numprocesses

test: setup  ## all tests, the slow ones too (25 minutes on two cores)
	@status=0; set -x; \
	.venv/bin/python -m pytest -q --durations=15 -m "not timed and not alone" $(AT_A_TIME) 2 $(ARGS) || status=1; \
	.venv/bin/python -m pytest -q --durations=15 -m "timed and not alone" $(AT_A_TIME) 3 $(ARGS) || status=1; \
	.venv/bin/python -m pytest -q --durations=15 -m alone $(ARGS) || status=1; \
	exit $$status

test-fast: setup  ## tests without engines, ranks and clusters (two minutes on two cores)
	@status=0; set -x; \
	.venv/bin/python -m pytest -q -m "not slow and not timed" $(AT_A_TIME) 2 $(ARGS) || status=1; \
	.venv/bin/python -m pytest -q -m "not slow and timed" $(AT_A_TIME) 3 $(ARGS) || status=1; \
	exit $$status

test-families: setup  ## every family of models that transformers and vLLM share, tiny; writes docs/models.md (half an hour)
	.venv/bin/python -m tests.system.test_families

tree: setup  ## print every file with what it is
	@.venv/bin/python -m tests.support.house

figures: setup  ## the paper's figures: tabular (a minute), then the language model's missing runs (an hour on two cores)
	.venv/bin/python -m benchmarks.studies.tabular_figures
	.venv/bin/python -m benchmarks.studies.figures run

staleness-study: setup  ## held-out reward against an enforced lag, all methods: the missing runs (an hour on two cores)
	.venv/bin/python -m benchmarks.studies.staleness_study run

bench: bench-buffer bench-actors bench-learner bench-weights bench-trajectory  ## all benchmarks: ratios against the bare libraries (half an hour on two cores)

bench-buffer: setup  ## durable inserts and samples against bare sqlite, latency by size, recovery
	.venv/bin/python -m benchmarks.buffer
	.venv/bin/python -m benchmarks.durability

bench-actors: setup  ## actors against bare vLLM, update pause, scaling, a straggler
	.venv/bin/python -m benchmarks.actors $(ARGS)

bench-learner: setup  ## trained tokens against a plain PyTorch loop, packing, memory
	.venv/bin/python -m benchmarks.learner $(ARGS)

bench-weights: setup  ## publish and apply against memcpy and gathers one by one
	.venv/bin/python -m benchmarks.weights

bench-trajectory: setup  ## bytes a token, memory and decoding of a batch of long samples
	.venv/bin/python -m benchmarks.trajectory

bench-bound: setup  ## training and generation at once against the slower of the two alone (six minutes on two quiet cores)
	.venv/bin/python -m benchmarks.bound $(ARGS)

bench-reward: setup  ## seconds to a reward, asynchronously and synchronously, where both halves take as long (nine minutes on two quiet cores)
	.venv/bin/python -m benchmarks.bound.reward $(ARGS)

bench-guard: setup  ## five shares of what is bare, against the committed ones (two minutes on two quiet cores; never fails)
	.venv/bin/python -m benchmarks.guard $(ARGS)

bench-peers: .cache/peers/.ready  ## TRL and a plain loop against this system on three jobs (25 minutes on two cores)
	.venv/bin/python -m benchmarks.peers $(ARGS)

# TRL asks for what `make setup` has, but in versions of its own: it gets a virtual environment of its own.
.cache/peers/.ready: .venv/.ready requirements/peers.txt requirements/constraints-peers.txt
	@rm -rf .cache/peers && mkdir -p .cache/peers
	$(PYTHON) -m venv .cache/peers/venv
	.venv/bin/uv pip install --quiet --python .cache/peers/venv/bin/python --compile-bytecode $(if $(UV_FIND_LINKS),,--torch-backend cpu) \
	  --constraints requirements/constraints-peers.txt --requirements requirements/peers.txt
	@touch $@

bench-growth: setup  ## calls, bytes and CPU time a trained group, for 1 to 256 actors and 64 to 4,096 groups a step (3 minutes)
	.venv/bin/python -m benchmarks.growth.growth $(ARGS)

bench-soak: setup  ## 20,000 steps of the services of a run: memory and step time at the end, files it leaves (ten minutes at most)
	.venv/bin/python -m benchmarks.growth.soak

test-gpu: setup  ## what only a GPU can prove, in pieces of nine minutes; without a GPU it says what
	.venv/bin/python -m benchmarks.gpu test $(ARGS)

bench-gpu: setup  ## engine, updates, learner and time to a reward on a GPU against bare ones, in pieces of nine minutes
	.venv/bin/python -m benchmarks.gpu bench $(ARGS)

check: setup  ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

constraints: setup  ## resolve the requirements anew: newer versions of what they bring along
	$(COMPILE) $(OPTIONS_cpu) requirements/cpu.txt --output-file requirements/constraints-cpu.txt
	$(COMPILE) $(if $(UV_FIND_LINKS),,--torch-backend cpu) requirements/peers.txt --output-file requirements/constraints-peers.txt
# For every Python that vLLM's CUDA wheels are for, one version of each: a plain list holds them all ([tool.uv] in
# pyproject.toml says for which).
	UV_FIND_LINKS= $(COMPILE) $(OPTIONS_gpu) --universal --python-version 3.11 requirements/gpu.txt --output-file requirements/constraints-gpu.txt
	sed -i 's/ ;.*//' requirements/constraints-gpu.txt

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
