# `make repro`: set up if needed, run the pipeline, print the table. `make test`: set up if needed, run the tests.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.PHONY: here repro test check docs format lock mutants attack
.DELETE_ON_ERROR:

repro: $(READY)
	@git rev-parse --git-dir > /dev/null || { \
		echo "DVC needs a git repository: in a ZIP download run git init, then make repro again"; exit 1; }
	@$(BIN)/lgp repro
	@$(BIN)/lgp results

# files in parallel processes of one thread each
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/generate.py --check
	@$(SITE)

# the documentation as a site, into site/; its generated pages are written anew
docs: $(READY)
	@$(BIN)/python docs/generate.py
	@$(SITE)

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# the scripts of an environment name its folder: after a move none of them starts
here:
	@[ ! -s $(READY) ] || [ "$$(cat $(READY))" = "$(CURDIR)" ] || { \
		echo "this folder was moved or copied from $$(cat $(READY)), where .venv points: rm -rf .venv, then run make again"; \
		exit 1; }

# --no-build-isolation: the lock pins setuptools too, nothing unpinned is fetched
$(READY): requirements.lock pyproject.toml | here
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "installing into .venv (once; about 3 GB to download, 6.5 GB on disk)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@echo "$(CURDIR)" > $@

# hours; MODULES="lgp.training.optimizer …" for some. The extra is in no lock: it is for this alone.
mutants: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[mutants]'
	@$(BIN)/python benchmarks/mutants.py $(MODULES)

# hours; ATTACK="--only kills --minutes 10" for a part. Leave the checkout alone meanwhile: stages digest their code.
attack: $(READY)
	@$(BIN)/python benchmarks/attacks $(ATTACK)

# pin anew what pyproject.toml allows: in a fresh environment, never the one in use. torch itself pins its CUDA
# packages to the digit, and has others on each platform, so they are left to it.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet setuptools '.[dev,docs]'
	( grep '^#' requirements.lock; .venv-lock/bin/python -m pip freeze --all --exclude lgp --exclude pip \
		| grep -v -E '^(nvidia-|cuda-|triton)' ) > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock
