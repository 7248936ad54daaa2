# `make demo` shows everything on a shipped sample; `make test` runs every check that CI runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
FAMILY ?= gemma4
PROMPT ?= In the beginning
MINUTES ?= 60
BIN    := $(VENV)/bin
SAMPLE := samples/$(FAMILY)-kjv
BUNDLE := build/$(FAMILY)-android

.PHONY: help demo web-demo test slow fuzz kills soak runtimes apk screens arm64 audit lock lint format clean

help:
	@echo "make demo               build, verify and run the shipped Gemma 4 sample"
	@echo "make demo FAMILY=gemma3n  the same with another sample: gemma4-qat, gemma3n, rwkv7a or embformer"
	@echo "make web-demo           serve a chat page with the sample, for a browser; needs Node and npm"
	@echo "make test               lint, type check and tests, as CI runs them"
	@echo "make slow               more tests of kinds that make test has one of"
	@echo "make fuzz MINUTES=10    open mutated checkpoints and bundles; JOBS=, SEED= too"
	@echo "make kills              kill builds, fill their disk and let it fail, 300 times; BACKEND= too; needs cc"
	@echo "make soak MINUTES=60    generate in one process, and watch its memory"
	@echo "make runtimes           run the conformance vectors with older runtimes"
	@echo "make apk                build the Android app without Gradle, and take it apart"
	@echo "make screens            run the Android app's screens on the JVM, and draw them"
	@echo "make arm64              run the conformance vectors on emulated ARM processors; an hour"
	@echo "make audit              ask for known weaknesses of the locked packages; needs the internet"
	@echo "make lock               lock the newest packages that pyproject.toml allows; needs uv"

# The environment is made once, and again when the dependencies change. What is installed is locked
# with its checksums, so that everybody tests the same.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/pleexport inspect $(SAMPLE)
	$(BIN)/pleexport build $(SAMPLE) --target android --out $(BUNDLE) --overwrite
	$(BIN)/pleexport verify $(BUNDLE) --checkpoint $(SAMPLE) --text samples/heldout.txt --report build/$(FAMILY)-parity.html
	$(BIN)/pleexport run $(BUNDLE) --prompt "$(PROMPT)" --max-new-tokens 90 --temperature 0.8 --top-p 0.95 --seed 7 --stats

# The bundle is built once. What stands in its place later is used as it is.
WEB_BUNDLE := build/$(FAMILY)-web
$(WEB_BUNDLE)/manifest.json: | $(VENV)/.installed
	$(BIN)/pleexport build $(SAMPLE) --target web --out $(WEB_BUNDLE)

web-demo: $(VENV)/.installed $(WEB_BUNDLE)/manifest.json
	@node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 20 || (a == 20 && b >= 10) ? 0 : 1)' || { echo "Node 20.10 or newer is needed, with npm: https://nodejs.org" >&2; exit 1; }
	$(BIN)/pleexport package $(WEB_BUNDLE) --target web --out build/web-demo/model --text samples/heldout.txt --overwrite
	cd web-demo/pleexport-web && npm ci --ignore-scripts --no-audit --no-fund --silent && npm run --silent build && npm run --silent build:page
	@node web-demo/serve.mjs build/web-demo $(PORT)

test: $(VENV)/.installed lint
	$(BIN)/pytest -n 2 --dist worksteal

slow: $(VENV)/.installed
	$(BIN)/pytest -n 2 -m slow

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(if $(JOBS),--jobs $(JOBS)) $(if $(SEED),--seed $(SEED))

kills: $(VENV)/.installed
	$(BIN)/python tests/kills.py $(if $(BACKEND),--backend $(BACKEND))

soak: $(VENV)/.installed
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

# PYTHONPATH comes before the environment: the oldest of all that a runner needs, then single runtimes.
# What builds bundles wants newer ones, so nothing of that is loaded.
runtimes: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/oldest --requirement tests/oldest.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/onnxruntime-1.26 onnxruntime==1.26.0
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/onnxruntime-1.29 onnxruntime==1.29.0
	for packages in oldest onnxruntime-1.26 onnxruntime-1.29; do \
		PYTHONPATH=build/$$packages $(BIN)/pytest -q --noconftest -k 'not made_again and not such_a_graph' tests/test_conformance.py || exit 1; \
	done

# Needs tools of Debian, which it names where one is missing, and fetches 280 MB once.
apk: $(VENV)/.installed
	$(BIN)/python android-demo/apk/make_apk.py
	PYTHONPATH=android-demo/apk $(BIN)/pytest -q -s -p no:cacheprovider -c /dev/null --rootdir android-demo/apk android-demo/apk/test_apk.py

# Needs what `make apk` needs, and fetches some 300 MB more once.
screens: $(VENV)/.installed
	$(BIN)/python android-demo/apk/screens.py

arm64: $(VENV)/.installed
	$(BIN)/python tests/arm64.py

# A package that cannot be asked about is a failure too.
audit: requirements.lock
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit
	build/audit/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

lock:
	uv pip compile pyproject.toml --all-extras --universal --generate-hashes --upgrade \
		--no-emit-index-url --custom-compile-command "make lock" --quiet --output-file requirements.lock

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
