# make train   set up, then train the bundled model without labels; make test   set up, then run the tests; make bench   measure the ops.
# make gpu-check   check and measure everything on a GPU.
# make paper   repeat the paper's findings on small models (about an hour on two cores; what is in experiments/results is not made again).
# ARGS="…" goes to the command that is run: make train ARGS="trainer.steps=50", make test ARGS="-k rewards".
BIN := .venv/bin
ARGS ?=

.PHONY: help setup setup-verl train test bench gpu-check paper lint types clean

help:
	@echo "make setup | setup-verl | train | test | bench | gpu-check | paper | lint | types | clean      (ARGS=… is passed on)"

setup:
	@sh scripts/setup.sh

# An environment of its own for the adapter for verl; the tests run its tests there once it is made.
setup-verl: setup
	@sh scripts/setup-verl.sh

train: setup
	@$(BIN)/urlvr train configs/quickstart.yaml $(ARGS)

test: setup lint types
	$(BIN)/pytest $(ARGS)

# The peers that the ops are compared with come with it. Results go to benches/results; the README's table is made from the newest.
bench: setup
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[bench]'
	$(BIN)/python -m benches $(ARGS)

# On a machine with a GPU and whatever Python has torch there: nothing is downloaded. Wheels of peers may lie in wheels/.
gpu-check:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m benches.gpu_check $(ARGS)

paper: setup
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[paper]'
	$(BIN)/python -m experiments $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Checked as it installs, kernels/ in its place as urlvr_fast.kernels, not as it lies in the checkout.
types: setup
	rm -rf build/lib build/installed
	URLVR_FAST_BUILD=0 $(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p urlvr_fast

clean:
	rm -rf .venv .venv-verl build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
