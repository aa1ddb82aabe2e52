# `make demo` runs a demonstration, `make test` the tests, `make check` all checks that a change must pass.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits
# one single-threaded process per core: nearly all tests are too small for several threads
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test sanitize oldest timm-suite check format figures docs clean

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sola-vision needs Python 3.11 or newer; select one with: make PYTHON=python3.12 ..."; exit 2; }
	@echo "Installing into .venv, which takes some minutes (torch is a large download) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: .venv/installed
	rm -rf $(RUN)
	$(BIN)/sola train digits --out $(RUN)
	$(BIN)/sola eval --checkpoint $(RUN) --data digits
	$(BIN)/python -c "from sola_vision.data.digits import write_folder; write_folder('$(RUN)/samples', 10)"
	$(BIN)/sola predict $(RUN)/samples --checkpoint $(RUN)
	@echo
	@echo "Look at $(RUN)/curve.png (learning curve), $(RUN)/eval/predictions.png (right and wrong) and $(RUN)/eval/confusion.png."
	@echo "Next, your own folder with train/CLASS/*.jpg and val/CLASS/*.jpg:  $(BIN)/sola train few_images --data FOLDER"

test: .venv/installed
	$(TESTS)

# builds the CPU kernel with GCC's address and undefined-behaviour sanitizers in a separate copy of the package and runs
# its tests (-s: pytest does not capture the reports); leaks are not detected, because torch has some. PYTHONSAFEPATH
# prevents the package in this folder from being imported
SANITIZED := build/sanitize
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: .venv/installed
	rm -rf $(SANITIZED)
	CXXFLAGS="$(SANITIZE)" SOLA_REQUIRE_KERNEL=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib \
		$(BIN)/python -m pytest -s $(addprefix tests/ops/test_,wkv.py cpu.py passes.py linear.py attention.py arguments.py)

# runs the tests with the oldest versions that pyproject.toml allows
OLDEST := .venv/oldest
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[dev]"
	$(MAKE) test BIN=$(OLDEST)/bin -o .venv/installed

# runs timm's own model tests, from its source distribution, on our models; TorchScript is skipped: PyTorch has
# deprecated it, and it does not support the mixed layers of a schedule
timm-suite: .venv/installed
	rm -rf .venv/timm && mkdir -p .venv/timm
	$(BIN)/pip install --quiet pdm-backend
	$(BIN)/pip download --quiet --no-deps --no-binary timm --no-build-isolation --dest .venv/timm \
		timm==$$($(BIN)/python -c 'import timm; print(timm.__version__)')
	tar xzf .venv/timm/timm-*.tar.gz -C .venv/timm --strip-components 1
	cd .venv/timm && PYTHONPATH=$(CURDIR)/tests ../bin/python -m pytest tests/test_models.py -q -p timm_plugin \
		-k "(sola or vrwkv) and not torchscript"

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TESTS)

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

figures: .venv/installed
	$(BIN)/python docs/figures/architecture.py
	$(BIN)/python docs/figures/layers.py

# docstrings are parsed without importing the package, so the site is built without torch
.venv/docs: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $@.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement $@.txt
	@touch $@

docs: .venv/docs
	rm -rf site
	$(BIN)/zensical build --strict --clean
	@echo "Open site/index.html; it needs no server and no network."

clean:
	rm -rf .venv .cache build dist site *.egg-info
