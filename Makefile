# make demo | test | check need only Python 3.11+ and g++; each sets up .venv by itself. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
CXX ?= g++
# The CPU build of torch, without gigabytes of CUDA; from TORCH_INDEX where pip's own index does not have it.
# With an NVIDIA GPU: make clean-venv && make test TORCH_BUILD=
TORCH_BUILD ?= +cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)

BIN := .venv/bin
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet -c constraints.txt
PACKAGES := omnifx passes backends
SOURCES := $(shell find $(PACKAGES) -name __pycache__ -prune -o \( -type d -o -name '*.py' -o -name '*.j2' -o -name py.typed \) -print)
# Worksteal keeps neighbours on one worker, so that what a module's tests share is made once.
PYTEST_ARGS ?= -n 2 --dist worksteal
# A Triton server and its client, for tests/test_triton.py, which skips without; there is one for this platform only.
TRITON := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),.venv-triton/.installed)

.PHONY: help demo test test-slow zoo check format lint typecheck examples pages wheel wheel-venv clean clean-venv preflight

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: .venv/.installed ## run the tour; pictures and numbers go to demo-output/
	$(BIN)/omnifx demo --out demo-output

test: .venv/.installed $(TRITON) ## the fast tests; one file: make test PYTEST_ARGS=tests/passes/test_read_cuts.py
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: .venv/.installed ## the tests on real models
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

zoo: .venv/.installed ## examine every transformer of diffusers and print the table of docs/models.md; ZOO_ARGS="--shard 1/4"
	$(BIN)/python -m tests.zoo --jobs 2 --check $(ZOO_ARGS)

check: lint typecheck test examples ## what CI runs, but for the look at the installed wheel

format: .venv/.installed ## rewrite the files as lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/.installed ## format and lint, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# From inside .venv-wheel, so that mypy sees what users get and not the checkout; sed turns its paths back into ours.
typecheck: .venv/.installed .venv-wheel/.installed ## strict mypy on the installed wheel
	cd .venv-wheel && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache --python-executable bin/python \
	    | sed -E 's#^[^ ]*/site-packages/omnifx/(passes|backends)/#\1/#; s#^[^ ]*/site-packages/##'

examples: .venv/.installed ## every example, on a small model
	@scripts="$$(grep -lr --include='*.py' '__name__ == "__main__"' examples | sort)"; \
	for script in $$scripts; do \
	    module="$${script%.py}"; module="$${module//\//.}"; \
	    echo "== python -m $$module --smoke"; $(BIN)/python -m "$$module" --smoke; \
	done

pages: .venv/.installed ## explain four models at their real sizes, without weights: docs/explain/*.html, two minutes
	$(BIN)/python -m examples.explain_pages --out docs/explain

wheel: dist/.built ## sdist and wheel into dist/

wheel-venv: .venv-wheel/.installed ## the wheel and its dependencies in a clean environment, .venv-wheel/

clean: clean-venv ## remove everything that make made
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## remove the virtual environments only
	rm -rf .venv .venv-triton .venv-wheel

preflight:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: omnifx needs Python 3.11 or newer, found '$$($(PYTHON) --version 2>&1)' as PYTHON=$(PYTHON)." \
	         "Install one and name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { \
	    echo "make: Inductor compiles C++, and CXX=$(CXX) is not here. On Debian or Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	    echo "make: Inductor compiles against Python.h, and $(PYTHON) has none. On Debian or Ubuntu: apt-get install python3-dev" >&2; exit 1; }

# Of the environments beside .venv little is imported, so pip compiles nothing in them (--no-compile).
# torch goes first and alone: a CPU build that pip already knows of, or else the one of TORCH_INDEX. What follows finds it there.
define make_venv
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) $(2) '$(TORCH)$(TORCH_BUILD)' 2>/dev/null \
	    || $(1)/bin/python -m pip install --quiet $(2) --index-url '$(TORCH_INDEX)' '$(TORCH)'
endef

.venv/.installed: pyproject.toml constraints.txt | preflight
	$(call make_venv,.venv)
	$(BIN)/python $(PIP_INSTALL) -e '.[dev,examples]'
	$(BIN)/python $(PIP_INSTALL) -e '.[tensorrt-rtx]' || echo "make: no TensorRT-RTX for this machine; its tests are skipped" >&2
	touch $@

# Of nvidia-pytriton only the server is wanted, not the versions of NumPy and others that its own code asks for.
.venv-triton/.installed: constraints.txt | preflight
	rm -rf .venv-triton
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python $(PIP_INSTALL) --no-compile 'tritonclient[grpc,http]'
	.venv-triton/bin/python $(PIP_INSTALL) --no-compile --no-deps nvidia-pytriton
	touch $@

.venv-wheel/.torch: constraints.txt | preflight
	$(call make_venv,.venv-wheel,--no-compile)
	touch $@

# The first line replaces an older build of the same version, the second adds what it needs, and for mypy the stubs.
.venv-wheel/.installed: .venv-wheel/.torch dist/.built
	.venv-wheel/bin/python $(PIP_INSTALL) --force-reinstall --no-deps dist/omnifx-*.whl
	.venv-wheel/bin/python $(PIP_INSTALL) --no-compile dist/omnifx-*.whl types-networkx
	touch $@

dist/.built: pyproject.toml LICENSE $(SOURCES) | .venv/.installed
	rm -rf dist build
	$(BIN)/python -m build --quiet --outdir dist .
	touch $@
