# `make demo` shows it work, `make test` tests it, `make check` is what a change has to pass.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits

.PHONY: demo test timm-suite check format figures clean

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sola-vision needs Python 3.11 or newer; give one as: make PYTHON=python3.12 ..."; exit 2; }
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
	$(BIN)/python -m pytest

# timm's own model tests, from its source distribution, aimed at our names; TorchScript is left out: PyTorch has
# deprecated it, and a schedule's mixed layers are not its subset of Python
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
	$(BIN)/python -m pytest

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

figures: .venv/installed
	$(BIN)/python docs/figures/architecture.py

clean:
	rm -rf .venv build dist *.egg-info
