# make demo           sets .venv up, builds, runs the demo: a real fine-tuning, stock and patched, side by side
# make test           the same environment, then everything that can be checked without a GPU
# make STAGE          one stage of it: build lint types unit oldest interpreter gate rehearsal package
# make recipes        the recipes of examples/ on the data in FASTFORMER_DATA, stock and patched, and a table of them
# make gpu            correctness, races and benchmarks on this machine's CUDA GPU, offline (STAGE=... for one stage)
# make gpu-save       files the results of make gpu under bench/results/
# make wheel          wheel and source distribution under dist/
# make clean          removes what was built, .venv included
#
# The first two need Python 3.11 or newer (PYTHON=... names one), a C++20 compiler as g++ (or CXX=...) and make.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAGES := build lint types unit oldest interpreter gate rehearsal package

.PHONY: demo recipes test wheel clean gpu gpu-rehearsal gpu-save $(STAGES)

demo: $(VENV)/.demo
	@$(BIN)/fastformer demo

test: $(VENV)/.test
	@bash tools/test.sh

$(STAGES): $(VENV)/.test
	@bash tools/test.sh $@

gpu-rehearsal: rehearsal

recipes: $(VENV)/.test
	@$(BIN)/python -m bench.recipes

# The GPU's machine may have no network and its own PyTorch: no .venv there, PYTHON's own packages.
gpu:
	@$(PYTHON) -m bench.gpu

gpu-save:
	@$(PYTHON) -m bench.gpu save

wheel: $(VENV)/.test
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist
	@ls -l dist

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastformer/tokenizer/_bpe*.so

# Empty files mark the steps done. torch comes first and alone: everything else then fits itself to it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name another with PYTHON=..." % sys.version_info[:2])'
	@echo "== environment: PyTorch and Triton into $(VENV) (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $$(grep '^torch==' constraints.txt)
	@$(PIP) $$(grep '^triton==' constraints.txt) 'setuptools>=80' ninja
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py
	@echo "== environment: fastformer and what its demo needs"
	@$(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "== environment: what the tests need"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@
