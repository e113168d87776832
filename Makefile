# `make` on its own lists the targets. Another Python: `make test PYTHON=python3.12`.
PYTHON ?= python3
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# pytest-xdist runs one process a core, so each may have one thread.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench study-digits study-where study-cifar study-gpu test-multinode \
	test-oldest test-ecosystem clean

SUMS := learnable+rope_mixed learnable+rope_axial learnable+2D_RPE learnable+relative learnable+alibi learnable+irpe \
	learnable+peg 2D_sin+rope_axial 2D_sin+2D_RPE 2D_sin+peg rope_mixed+peg learnable+rope_mixed+peg
DIGITS := --data-set DIGITS --seeds 0 1 2 3 4 --jobs 2
NO_CLASS_TOKEN := --global-pool avg --model-kwargs class_token=False fc_norm=False
CIFAR := --data-set CIFAR10 --recipe vit2d_cifar --epochs 20 --seeds 0 1 --jobs 2 --sizes 24 32 48 64 --output-dir runs/study/cifar10
# Of study-gpu: runs at a time, its seeds, minutes until it stops (a year), and more options of compare.py.
JOBS := 5
SEEDS := 0 1 2
MINUTES := 525600
ARGS :=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed ## train with and without LaPE on real digits, compare, and draw (3 minutes on 2 cores)
	.venv/bin/python -m benchmarks.demo

test: lint ## lint, format, types, import rules and every test, on all cores
	$(ONE_THREAD) .venv/bin/python -m pytest -q tests/test_imports.py
	$(ONE_THREAD) .venv/bin/python -m pytest -n auto

lint: .venv/.installed-dev ## lint, format check and types only
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/.installed-dev ## let ruff mend what it can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

bench: .venv/.installed ## speed next to plain timm, of models, loader (of DATA=a folder of JPEGs) and start (long: it also compiles every model)
	.venv/bin/python -m benchmarks.models
	.venv/bin/python -m benchmarks.models --reference basic --join-type share unshare LaPE LaPE_share
	.venv/bin/python -m benchmarks.models --compile
	.venv/bin/python -m benchmarks.resolution
	.venv/bin/python -m benchmarks.loader $(if $(DATA),--data-path $(DATA))
	.venv/bin/python -m benchmarks.startup

study-digits: .venv/.installed ## the study of docs/results.md on digits: every encoding and join (4 hours on 2 cores; may be stopped)
	$(ONE_THREAD) .venv/bin/python compare.py $(DIGITS) --pe all --join-type all --output-dir runs/study/digits
	$(ONE_THREAD) .venv/bin/python compare.py $(DIGITS) --pe $(SUMS) --join-type basic LaPE --output-dir runs/study/digits
	$(ONE_THREAD) .venv/bin/python compare.py $(DIGITS) --pe learnable 2D_sin --join-type basic LaPE PVG MPVG $(NO_CLASS_TOKEN) \
		--output-dir runs/study/digits-no-class-token

study-where: .venv/.installed ## the study on WHERE: every encoding and join, all tasks (may be stopped)
	for task in cell direction order distance; do \
		$(ONE_THREAD) .venv/bin/python compare.py --data-set WHERE --where-task $$task --pe all --join-type all \
			--seeds 0 1 2 --jobs 2 --output-dir runs/study/where-$$task || exit; \
	done
	.venv/bin/python -m comparison.side_by_side --reached 99 runs/study/where-cell runs/study/where-direction \
		runs/study/where-order runs/study/where-distance

study-cifar: .venv/.installed ## the study on CIFAR-10 (a download; about an hour of 2 cores for each of 24 runs; may be stopped)
	.venv/bin/python compare.py $(CIFAR) --pe none learnable 2D_sin relative rope rope_mixed learnable+rope_mixed alibi irpe
	.venv/bin/python compare.py $(CIFAR) --pe learnable 2D_sin learnable+rope_mixed --join-type LaPE

study-gpu: .venv/.installed ## the published CIFAR protocols on a GPU (186 runs; MINUTES=9 stops in time, the same command continues)
	@ends=$$(($$(date +%s) + 60 * $(MINUTES))); \
	compare() { \
		left=$$((ends - $$(date +%s))); \
		.venv/bin/python compare.py --minutes $$(((left > 0 ? left : 0) / 60)) --jobs $(JOBS) --share-batches \
			--seeds $(SEEDS) $(ARGS) "$$@" || exit; \
	}; \
	for data in CIFAR10 CIFAR100; do \
		compare --data-set $$data --recipe vit2d_cifar --pe none learnable 2D_sin relative rope --output-dir runs/study/gpu-$$data; \
	done; \
	for data in CIFAR10 CIFAR100; do \
		compare --data-set $$data --recipe vit2d_cifar --pe learnable 2D_sin --join-type LaPE --output-dir runs/study/gpu-$$data; \
		compare --data-set $$data --recipe vit2d_cifar --pe learnable 2D_sin --join-type basic LaPE PVG MPVG $(NO_CLASS_TOKEN) \
			--output-dir runs/study/gpu-$$data-no-class-token; \
		compare --data-set $$data --recipe vit2d_cifar --pe $(SUMS) --output-dir runs/study/gpu-$$data; \
	done; \
	for data in CIFAR10:5.5e-4 CIFAR100:6e-4; do \
		for model in vit_lite_7_patch4_32 cct_7_3x1_32; do \
			compare --data-set $${data%:*} --lr $${data#*:} --recipe cct_cifar --model $$model --pe learnable \
				--join-type basic LaPE --output-dir runs/study/gpu-$${data%:*}-$$model; \
		done; \
	done

test-multinode: .venv/.installed-dev ## two hosts train together and one is killed; needs root and iproute2 (5 minutes)
	$(ONE_THREAD) .venv/bin/python -m pytest -x -m multinode tests/test_multinode.py

test-oldest: .venv-oldest/.installed-dev ## every test, with the oldest releases that requirements.txt admits
	$(ONE_THREAD) .venv-oldest/bin/python -m pytest -n auto

test-ecosystem: .venv-ecosystem/timm-tests ## our models in peft, captum, grad-cam, torchao, transformers, and timm's own tests on them
	$(ONE_THREAD) .venv-ecosystem/bin/python -m pytest -m ecosystem tests/test_ecosystem.py

clean: ## remove the virtual environments and every cache; runs and figures stay
	rm -rf .venv .venv-oldest .venv-ecosystem .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	rm -rf __pycache__ */__pycache__ */*/__pycache__

# A stamp is touched only after its installation succeeded. An environment that was left half made, or that belongs to
# another Python than $(PYTHON), has no such .python-* and is made anew.
.venv/.python-$(PYTHON_VERSION) .venv-oldest/.python-$(PYTHON_VERSION) .venv-ecosystem/.python-$(PYTHON_VERSION):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(@D)
	touch $@

.venv/.installed: requirements.txt pyproject.toml .venv/.python-$(PYTHON_VERSION)
	.venv/bin/python -m pip install -r requirements.txt
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@

.venv-oldest/.installed-dev: requirements-dev.txt requirements.txt pyproject.toml .venv-oldest/.python-$(PYTHON_VERSION)
	sed -En 's/^([A-Za-z-]+)>=([0-9.]+).*/\1==\2.*/p' requirements.txt > $(@D)/oldest.txt
	$(@D)/bin/python -m pip install -r requirements-dev.txt -c $(@D)/oldest.txt
	touch $@

# timm's tests come with its sources alone; of the release that is installed.
.venv-ecosystem/timm-tests: .venv-ecosystem/.installed
	rm -rf $@ $(@D)/timm-*.tar.gz
	$(@D)/bin/python -m pip download --no-deps --no-binary timm -d $(@D) \
		timm==$$($(@D)/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("timm"))')
	mkdir $@
	tar -xzf $(@D)/timm-*.tar.gz -C $@ --strip-components=2 --wildcards '*/tests/test_models.py' '*/tests/test_model_input.py'

.venv-ecosystem/.installed: requirements-ecosystem.txt requirements-dev.txt requirements.txt .venv-ecosystem/.python-$(PYTHON_VERSION)
	$(@D)/bin/python -m pip install -r requirements-ecosystem.txt
	touch $@
