# Two commands matter: `make serve` and `make test`. Everything they need is made in .venv on first use.
PYTHON ?= python3
PORT ?= 8998
MODEL ?= auto

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install serve test test-unit test-slow test-service test-tools test-chart test-browser test-clients test-talk
.PHONY: load observe check bench format clean

install: $(STAMP)

# A second call finds the stamp newer than pyproject.toml and does nothing.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "This project needs Python 3.10 to 3.13; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("opus") is None)' \
	  || $(MAKE) --no-print-directory libopus
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip # an old one takes twice as long to choose versions
	$(BIN)/pip install --quiet -e '.[all]'
	$(BIN)/pip install --quiet --no-deps 'moshi==0.2.13' # its client, for the tests
	$(BIN)/python -c 'import personaplex.kernels.numba_codec' # compiles the CPU's kernels, once for this machine
	@touch $@

# The one thing outside .venv: the Opus codec, a system library.
.PHONY: libopus
libopus:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get install -y -q libopus0 || { apt-get update -q && apt-get install -y -q libopus0; }; \
	else \
	  echo "The Opus library is missing. Install it, then run make again:"; \
	  echo "  Debian, Ubuntu:  sudo apt-get install libopus0"; \
	  echo "  Fedora:          sudo dnf install opus"; \
	  echo "  macOS:           brew install opus"; \
	  exit 1; \
	fi

serve: install
	$(BIN)/python -m personaplex.server --model $(MODEL) --port $(PORT)

# Everything but the browser and the GPU; CONTRIBUTING.md tells the folders apart.
test: install promtool decoder
	$(BIN)/python tests/suite.py

# Each folder alone. Unit tests start no Ray and no helm and take less than a minute on two cores.
test-unit: install
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/slow

test-service: install decoder
	$(BIN)/python -m pytest tests/service

test-tools: install
	$(BIN)/python -m pytest tests/tools

test-chart: install promtool
	$(BIN)/python -m pytest tests/chart

# What the embedded talking model does with recorded callers: offline, over a socket and in the page. Whisper judges.
test-talk: install
	$(BIN)/python -m pytest tests/talk tests/service/test_serve_talk.py tests/service/test_web_page_talk.py

# Clients that others wrote, each in an environment of its own, against a service here; writes docs/clients.md.
CLIENTS = PYTHONPATH=.:tests $(BIN)/python -m clients.matrix
test-clients: install
	$(CLIENTS)

# The decoder of NVIDIA's page, from npm, for its test; where there is no npm or no network the test is skipped.
.PHONY: decoder
decoder:
	@test -d .cache/clients/npm/node_modules || ! command -v npm >/dev/null || $(CLIENTS) --decoder-only || true

# Prometheus' own checker, for the tests of the alerts; without it they are skipped by name.
.PHONY: promtool
promtool:
	@command -v promtool >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get install -y -q prometheus || { apt-get update -q && apt-get install -y -q prometheus; }; \
	else \
	  echo "promtool is missing (Debian: apt-get install prometheus): the tests of the alerts are skipped"; \
	fi

# The web page in a headless Chromium, which this needs and does not install; in Firefox where there is one.
test-browser: install axe
	$(BIN)/python -m pytest -m browser tests/browser

# The pictures of the documentation, made by the test that looks at every screen.
page-images: install axe
	PAGE_IMAGES=docs/images $(BIN)/python -m pytest -m browser tests/browser/test_looks.py

# axe-core, which finds barriers for people with disabilities; without it that test is skipped.
.PHONY: axe page-images
axe:
	@test -d .cache/browser/node_modules/axe-core || ! command -v npm >/dev/null || \
	  npm install --silent --no-fund --no-audit --prefix .cache/browser axe-core@4.14.1 || true

# Lint, format, types, import rules: the gate beside `make test`, without tests.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A load test against a running service, by default `make serve` on this machine; see loadtest/locustfile.py.
HOST ?= ws://localhost:$(PORT)
LOAD ?= --arrivals 60@0.5 --lengths exponential:20
load: install
	$(BIN)/locust -f loadtest/locustfile.py --headless --host $(HOST) $(LOAD) --output load

# A real Prometheus over the service that runs on this machine: prints the main series and their values.
observe: install promtool
	$(BIN)/python -m loadtest.observe --once

# The embedded talking model from nothing, and what it is worth; see docs/talk.md. Stages that are done are skipped.
TALK ?= talk-training
.PHONY: train-talk score-talk
train-talk: install
	$(BIN)/pip install --quiet -e '.[train]'
	OMP_NUM_THREADS=1 $(BIN)/python -m personaplex.training $(TALK)

score-talk: install
	$(BIN)/pip install --quiet -e '.[train]'
	OMP_NUM_THREADS=1 $(BIN)/python -m personaplex.training.score $(TALK)

# The figures the documentation names; on an idle machine, please.
bench: install
	$(BIN)/python -m benchmarks.engine --output benchmarks/results/engine-cpu.json
	$(BIN)/python -m benchmarks.codec --output benchmarks/results/codec.json
	$(BIN)/python -m benchmarks.bursts --gateways 2 --output benchmarks/results/bursts.json
	$(BIN)/python -m benchmarks.recording --output benchmarks/results/recording.json

# The first thing to run on a machine with a GPU: is everything right, and how fast is it? Leaves one JSON file,
# and step-time tables for planners, which belong into the repository.
GPU_RESULTS ?= benchmarks/results/gpu.json
.PHONY: gpu
gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m benchmarks.gpu --output $(GPU_RESULTS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
