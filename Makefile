# Every verb works from a clean checkout: the first one builds .venv, later ones reuse it.
# Extra words for a verb go through ARGS: make test ARGS="-k wings", make train ARGS="training.seed=3".

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# One thread a worker: with two workers on two cores, more would only fight for them, and a fixed
# thread count keeps the order of float sums, and so the bits, the same from run to run.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1 \
            TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help train compare test test-lowest test-engines engines check bench gpu dist docs clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.ok ## fine-tune the embedded model on the embedded data, into a new folder under runs/
	$(BIN)/drlora train embedded output_dir=runs/embedded-$(shell date +%Y%m%d-%H%M%S) $(ARGS)

compare: $(VENV)/.ok ## compare methods as experiments/quick.yaml says; goes on where it was stopped
	$(BIN)/drlora compare experiments/quick.yaml $(ARGS)

test: $(VENV)/.ok ## run the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal $(ARGS)

# A venv of its own, with the lowest versions that pyproject.toml allows: some 5 GB, for torch 2.11 has
# no small build on every index. PYTHON=python3.13 with `make test` tries another Python.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.ok ## run the tests at the lowest versions that are allowed (downloads 3 GB)
	$(TEST_ENV) PYTHONPATH=src $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist=worksteal $(ARGS)

$(LOWEST)/.ok: requirements/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lowest.txt
	touch $@

# DeepSpeed, bitsandbytes and others in a venv of its own, which sees the packages of .venv beside its
# own. Tests that these packages are for are skipped by `make test`; the files that have some are run
# here. A C++ compiler is used at the first run.
ENGINES := .venv-engines
WITH_ENGINES = tests/trainer/test_deepspeed.py \
	$(shell grep -rlE 'importorskip.*(bitsandbytes|compressed_tensors|torchao|tensorboard|optuna)' tests)
test-engines: $(ENGINES)/.ok ## run the tests that want DeepSpeed, bitsandbytes, ... (five minutes)
	PATH="$(CURDIR)/$(ENGINES)/bin:$$PATH" $(TEST_ENV) PYTHONPATH=src \
		$(ENGINES)/bin/python -m pytest $(WITH_ENGINES) $(ARGS)

$(ENGINES)/.ok: $(VENV)/.ok requirements/engines.txt
	$(BIN)/python -m venv --without-pip $(ENGINES)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$($(ENGINES)/bin/python -c "import site; print(site.getsitepackages()[0])")/beside.pth
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation -r requirements/engines.txt
	touch $@

# Each in an environment of its own; one that cannot be had is said to be missing. llama.cpp is built
# from source, with two jobs. ARGS="--engines llama.cpp" compares it alone; SERVING="llama" builds it alone.
SERVING ?= llama vllm sglang mlx mistral
engines: $(VENV)/.ok ## compare exports in llama.cpp, vLLM, mlx-lm, mistral.rs with our logits (an hour, 8 GB)
	for name in $(SERVING); do bash experiments/serving/install.sh $$name || true; done
	$(TEST_ENV) $(BIN)/python experiments/serving/compare.py $(ARGS)

check: $(VENV)/.ok ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ok ## measure speed and memory on this machine
	$(BIN)/python -m benchmarks $(ARGS)

# The tools of a release live in an environment of their own.
DIST := .venv-dist
dist: ## build the wheel and the source archive into dist/, and try both in clean environments
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dist.txt
	PATH="$(CURDIR)/$(DIST)/bin:$$PATH" $(DIST)/bin/python tools/release.py $(ARGS)

# On a machine that brings its own torch, transformers, peft and triton: nothing is installed.
gpu: ## measure what a GPU is to say, in eight minutes; goes on where it was cut (ARGS=--toy: on a CPU)
	PYTHONPATH="src:$$PYTHONPATH" $(PYTHON) -m benchmarks.gpu $(ARGS)

docs: $(VENV)/.docs-ok ## build the documentation into site/
	$(BIN)/mkdocs build --strict $(ARGS)

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks experiments examples -name __pycache__ -type d -prune \
		-exec rm -rf {} + 2>/dev/null || true

# torch goes first and alone, so that the build of torch is chosen by torch.txt (and by the pip
# settings of the machine: CPU or a CUDA version) and by nothing that merely depends on torch.
$(VENV)/.ok: pyproject.toml requirements/torch.txt requirements/lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/torch.txt
	$(PIP) -r requirements/lock.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.docs-ok: $(VENV)/.ok requirements/docs.txt
	$(PIP) -r requirements/docs.txt
	touch $@
