# Every target sets up .venv first, so each works on a fresh machine.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
KIND ?= lora
N ?= 200
JOBS ?= 2
PY := .venv/bin/python
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
ART := build/art
NPM_ART := emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 \
  @lobehub/fluent-emoji-flat@1.1.0 emojione@2.2.7 openmoji@15.0.0
# What is left of pip's output is what it downloads, what it installs, and what went wrong.
CALM := 2>&1 | { grep --line-buffered -vE '^(Requirement already|Collecting|Looking in|Using cached)|Location .* is ignored' || true; }

.PHONY: help demo test check docs fuzz soak table merge-table transfer-table attacks attacks-search patches wheel tiny clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(READY)  ## patch the embedded model and show the result
	$(PY) -m safepatch demo

test: $(READY)  ## run the tests, two files at a time; JOBS=1 for one
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

check: $(READY)  ## lint, formatting, types, layering, README tables
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	$(PY) -m pytest -q tests/unit/test_layering.py $(wildcard tests/unit/test_readme*.py)

docs: $(READY)  ## build the documentation into build/docs; any warning is an error
	@$(PY) -m pip install -q -e '.[docs]' -c constraints.txt $(CALM)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo build/docs/index.html

fuzz: $(READY)  ## mutate patch files, 3000 of them, and show them to every reader (minutes)
	$(PY) tests/stress/fuzz.py --mutants 3000

soak: $(READY)  ## 500 images drawn by threads, then 60 kills and full disks (minutes)
	$(PY) tests/stress/soak.py --images 500
	$(PY) -W ignore tests/stress/kills.py --kills 60

table: $(READY)  ## measure the shipped patches of one kind; KIND=control or lite for those, N=50 for fewer images
	$(PY) -m safepatch evaluate configs/matrices/$(KIND).yaml protocol.n=$(N)

merge-table: $(READY)  ## measure what merging them keeps, method by method; KIND=control or lite
	$(PY) -m safepatch evaluate configs/matrices/merge-$(KIND).yaml protocol.n=$(N)

transfer-table: $(READY)  ## measure what they keep on other checkpoints; KIND=control or lite
	$(PY) -m safepatch evaluate configs/matrices/transfer-$(KIND).yaml protocol.n=$(N)

attacks: $(READY)  ## attack a shipped patch of each kind in eleven ways (half an hour)
	$(PY) -m safepatch evaluate configs/matrices/attacks.yaml

attacks-search: $(READY)  ## attack the shipped lora patch by searching: evolution, gradients, an oracle (a quarter of an hour)
	$(PY) -m safepatch evaluate configs/matrices/attacks-search.yaml

patches: $(READY)  ## train the shipped patches again, all kinds, with cards, index and pictures (an hour on two cores)
	$(PY) patches/build.py --jobs $(JOBS)
	$(PY) patches/pictures.py

wheel: $(READY)  ## build a wheel into dist/, with the embedded model and the lora patches
	rm -rf build/lib build/bdist.*
	$(PY) -m pip wheel . --no-deps --no-build-isolation -w dist

tiny: $(READY) $(ART)/.ready  ## rebuild the embedded model from the vendors' emoji (needs npm and the network)
	$(PY) -m safepatch.tiny.sprites $(ART) safepatch/assets/atlas
	$(PY) -m safepatch.tiny.build

clean:  ## remove build products and caches; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find safepatch tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "safepatch needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(PY) ] || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "[1/2] installing $(TORCH), by far the largest part"
	@set -o pipefail; $(PY) -m pip install $(TORCH) -c constraints.txt $(CALM)
	@echo "[2/2] installing safepatch and the rest"
	@set -o pipefail; $(PY) -m pip install -e '.[test,dev]' -c constraints.txt $(CALM)
	@touch $@

$(ART)/.ready:
	@command -v npm >/dev/null || { echo "make tiny fetches the emoji with npm; install Node.js first" >&2; exit 1; }
	$(PY) -m pip install -q resvg-py -c constraints.txt
	mkdir -p $(ART)/google $(ART)/twitter $(ART)/fluent $(ART)/flat $(ART)/emojione $(ART)/openmoji
	cd $(ART) && npm pack --silent $(NPM_ART)
	tar -xzf $(ART)/emoji-datasource-google-16.0.0.tgz -C $(ART)/google
	tar -xzf $(ART)/emoji-datasource-twitter-16.0.0.tgz -C $(ART)/twitter
	tar -xzf $(ART)/lobehub-fluent-emoji-3d-1.1.0.tgz -C $(ART)/fluent
	tar -xzf $(ART)/lobehub-fluent-emoji-flat-1.1.0.tgz -C $(ART)/flat
	tar -xzf $(ART)/emojione-2.2.7.tgz -C $(ART)/emojione package/assets/png_128x128
	tar -xzf $(ART)/openmoji-15.0.0.tgz -C $(ART)/openmoji package/color/svg
	@touch $@
