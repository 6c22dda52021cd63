# Everything a person does here: make install, demo, test, test-vllm, check, clean.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Two test processes: each has its own Redis, and most of a test is waiting for real servers.
JOBS ?= 2

.DELETE_ON_ERROR:
.PHONY: install demo test vllm test-vllm bench check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "Python's venv is missing: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# A whole system on this machine: make demo, or make demo TRACE=file.jsonl.gz to replay a trace.
demo: install
	$(BIN)/headgate demo $(if $(TRACE),--trace '$(TRACE)')

# make test ARGS='tests/unit -k settings' runs a part.
test: install
	$(BIN)/pytest -n $(JOBS) --dist loadgroup $(ARGS)

# The CPU build of vLLM in an environment of its own: 2.7 GB, 2 minutes; once.
vllm: install
	PYTHON=$(abspath $(BIN))/python deploy/vllm/install.sh .venv-vllm

# The same facts against real vLLM servers, and the main job through a fleet of them: some 15 minutes, 6 GB of memory.
test-vllm: VLLM_OPTIONS := -p no:xdist --tb short -o timeout=300 -o timeout_method=signal
test-vllm: install vllm
	$(BIN)/pytest $(VLLM_OPTIONS) --engine vllm tests/engine $(ARGS)
	$(BIN)/pytest $(VLLM_OPTIONS) -s tests/vllm $(ARGS)

# Some 12 minutes: what a request costs, stage by stage and beside others; what is added to an engine's latency; what
# stays behind. The figures are kept in .bench/; what others need is installed there, each in an environment of its own.
bench: install
	$(BIN)/python tests/bench/budget.py --json .bench/budget.json
	$(BIN)/python tests/bench/throughput.py --peers --json .bench/throughput.json $(ARGS)
	$(BIN)/python tests/bench/latency.py
	$(BIN)/python tests/bench/soak.py --json .bench/soak.json

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-vllm .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find dispatcher scheduler workers tests -name __pycache__ -type d -prune -exec rm -rf {} +
