# Everything works on a machine that has only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.tested
PORT ?= 8000

.PHONY: install demo serve test quick bases test-lowest test-newest fuzz clients check format bench clean

install: $(STAMP)

# torch goes first and alone: with it in place no other requirement can pull in another build of it.
$(STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "OneBase needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -q -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar on -q -c constraints.txt -e '.[dev,demo]' -e clients/python
	touch $@
	@echo 'Installed in $(VENV). To have the onebase command on your PATH: . $(BIN)/activate'

demo: $(STAMP)
	$(BIN)/python -m examples.demo

serve: $(STAMP)
	$(BIN)/onebase serve --port $(PORT)

# What tests alone need. DeepSpeed builds from source against the torch that is there. Clients that others wrote go into
# an environment above this one: what is here already is not fetched again.
$(TESTED): $(STAMP) tests/other_clients/package.json
	test "$$(uname)" != Linux || $(BIN)/python -m pip install --progress-bar on -q -c constraints.txt --no-build-isolation deepspeed
	test -x $(VENV)/clients/bin/python || $(PYTHON) -m venv $(VENV)/clients
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(VENV)/clients/lib/python3*/site-packages)/onebase.pth
	$(VENV)/clients/bin/python -m pip install --progress-bar on -q -c constraints.txt litellm langchain-openai lm-eval tenacity 'pydantic-ai-slim[openai]'
	! command -v npm > /dev/null || npm install --silent --no-package-lock --prefix tests/other_clients
	touch $@

# Two processes with a thread each: threads that wait for one another in a loop would take both cores from it.
test: $(TESTED)
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist loadfile

# No model, no other program: a minute.
quick: $(STAMP)
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not (real or model or slow)'

# As far as other versions of what it is built on can matter, in an environment of its own for each.
test-lowest test-newest: test-%:
	$(PYTHON) tests/versions.py $*

# The default base in the layouts of GPTQ, AWQ, compressed-tensors and GGUF, for the tests that are skipped without.
bases: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/real_bases.py

clients: $(TESTED)
	$(BIN)/python -m pytest tests/other_clients


# In an environment of its own: it would load itself into every pytest run.
fuzz: $(STAMP)
	test -x $(VENV)/fuzz/bin/st || { $(PYTHON) -m venv $(VENV)/fuzz && $(VENV)/fuzz/bin/python -m pip install -q 'schemathesis>=4,<5'; }
	PYTHONPATH=tests $(BIN)/python tests/fuzz_api.py $(VENV)/fuzz/bin/st

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/module_map.py --check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.compare

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
