# Everything a person or CI does with this repository.  make quickstart | test | check | study | clean
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# bytecode is worth seconds in every process that Ray starts
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test tests test-long check lint types format study measure claims docs clean

$(BIN)/harness: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[train,dev]'
	touch $@

quickstart: $(BIN)/harness
	$(BIN)/harness run --dataset digits --variants msra --depths 20 --epochs 15 --gpus 0 --workers 2 --out runs/quickstart

check: lint types

lint: $(BIN)/harness
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/harness
	$(BIN)/mypy

# tests of Ray mostly wait: time for the types
test: lint
	$(MAKE) -j2 types tests

tests: $(BIN)/harness
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder

test-long: $(BIN)/harness
	$(BIN)/python -m pytest -q -m long

# make study DATA=data/cifar10-q75 [OUT=runs/study] [MORE='--until 9m --parts table,depth']; benchmarks/study.py says more
study: $(BIN)/harness
	$(BIN)/python benchmarks/study.py --data-dir '$(DATA)' --out '$(or $(OUT),runs/study)' $(MORE)

# make measure DATA=data/cifar10-q75 PEERS='../a ../b' [OUT=runs/measured]: every benchmark, on an otherwise idle machine;
# with SMOKE=1 in minutes, to see that each works
measure: $(BIN)/harness
	PYTHON=$(abspath $(BIN)/python) benchmarks/measure.sh '$(or $(OUT),runs/measured)' '$(DATA)' $(PEERS)

# the site in build/site; a warning is an error
docs: $(BIN)/harness
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[docs]'
	rm -rf build/docs && mkdir -p build/docs
	cp -r --parents README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs results/records cluster/README.md build/docs
	find build/docs/results -name '*.json*' -delete
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

claims: $(BIN)/harness
	$(BIN)/python benchmarks/claims.py

format: $(BIN)/harness
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
