# make run       serve the demo model, or yours: MODEL_PATH=/path/to/model.joblib make run
# make test      the tests, in a few minutes
# make test-all  those that take their time as well: gthread, failures under load, onnxruntime, torch, keras, the boosters (1.7 GB)
# make check     format, lint and types
# make bench     this server beside others, in a night; BENCH_ARGS=--quick in ten minutes
# make pictures  the README's pictures of /docs and /monitor, from the real pages; it needs /usr/bin/chromium
# make lock      write the exact, hashed requirements from the ranges in requirements.in and requirements/*.in

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test test-all check format bench pictures lock clean

run: $(VENV)/run.done
	@$(BIN)/python -m auth demo
	@test -n "$$MODEL_PATH" || $(BIN)/python -m model.demo "$${MODEL_DIR:-var/models}"
	@exec $(BIN)/gunicorn

# PYTEST_ARGS narrows the run: make test PYTEST_ARGS=tests/test_auth.py
test: $(VENV)/dev.done
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/dev.done $(VENV)/formats.done
	$(BIN)/python -m pytest -m "long or not long" $(PYTEST_ARGS)

check: $(VENV)/dev.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# It installs every server into an environment of its own under .bench; docs/performance.md says how it measures.
bench: $(VENV)/dev.done
	$(BIN)/python -m bench.compare $(BENCH_ARGS)

pictures:
	$(MAKE) -s VENV=.browser .browser/browser.done
	.browser/bin/python tests/browser/pictures.py

# One lock serves every Python from 3.11 on. Index lines are left out: where packages come from is each machine's affair.
lock: $(VENV)/dev.done
	for name in requirements requirements/dev requirements/onnx requirements/keras requirements/families requirements/browser; do $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" $$name.in -o $$name.txt || exit 1; done

	# torch without hashes, and without what only its builds for NVIDIA's GPUs need: builds differ, the version does not.
	printf '%s\n' cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13 triton | \
		$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-emit-index-url --custom-compile-command "make lock" \
		--excludes /dev/stdin requirements/torch.in -o requirements/torch.txt

clean:
	rm -rf $(VENV)

# A stamp each, so that a second run installs nothing and a changed lock is installed.
$(VENV)/run.done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing; install it: sudo apt install python3-venv" >&2; exit 1; }
	@echo "Once: a virtual environment in $(VENV), then $$(grep -c '^[a-z].*==' requirements.txt) packages, 450 MB. It takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

$(VENV)/dev.done: $(VENV)/run.done requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

# .ci/browser makes it in an environment of its own: make VENV=.browser .browser/browser.done
$(VENV)/browser.done: $(VENV)/dev.done requirements/onnx.txt requirements/browser.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/onnx.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/browser.txt
	@touch $@

# In separate calls, since one hash makes pip ask for all.
$(VENV)/formats.done: $(VENV)/dev.done requirements/onnx.txt requirements/torch.txt requirements/keras.txt requirements/families.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/onnx.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/torch.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/keras.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/families.txt
	@touch $@
