# Everything runs from a virtual environment in .venv, which the first command below sets up.
#   PYTHON=python3.12   another interpreter (3.11 or newer)     WORKDIR=DIR   where `make demo` writes
#   RECORDS=DIR          published records for `make records`
#   ARGS="-k tokenizer" further arguments for the tests         VENV=DIR      another place for the environment
#   JOBS=4              how many tests at once

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
CONFIG ?= configs/demo.py
ARGS ?=
JOBS ?= 2
RECORDS ?=

run := $(VENV)/.installed-run
tests := $(VENV)/.installed-test
python := $(VENV)/bin/python
# Two processes, a file of tests in one of them, as tests of a file share compiled programs.
pytest := JAX_PLATFORMS=cpu $(python) -m pytest --numprocesses=$(JOBS) --dist=loadfile

.PHONY: help demo screenshots records test test-slow test-newest lint clean cut-off

help:
	@echo 'make demo         train a small model through its whole life here (some 15 minutes) and write the report'
	@echo 'make screenshots  a picture of that report as PNG, if Chromium is installed'
	@echo 'make records      curate published records in the folder RECORDS=DIR, train on them, show what a step saw'
	@echo 'make test         the fast tests'
	@echo 'make test-slow    the other tests'
	@echo 'make test-newest  the fast tests on the newest Python and JAX at hand, in an environment of their own'
	@echo 'make lint         style, formatting and types'
	@echo 'make clean        remove caches (runs/ and $(VENV) stay)'

demo: $(run)
	@$(python) -m train --config=$(CONFIG) --workdir=$(WORKDIR)

# Pictures of reports for a page such as README.md; it needs Chromium.
screenshots: $(run)
	@$(python) -m train.report $(WORKDIR) --screenshot=$(WORKDIR)/report.png

# Duplicates dropped (of the encyclopaedia, one long text, in paragraphs), then what is in GSM8K's or MATH's tests.
records: $(tests)
	@test -d "$(RECORDS)" || { echo 'make records: RECORDS=DIR: expected the folder with the records' >&2; exit 1; }
	@$(call curate,c4,pretrain/c4_en_train.jsonl.gz,ODC-BY-1.0,)
	@$(call curate,wikipedia,pretrain/wikipedia_demo_30.txt.gz,CC-BY-SA,--level=paragraph)
	@$(call curate,gsm8k,midtrain/gsm8k_train.jsonl.gz,MIT,--field='{question} {answer}')
	@$(call curate,math,midtrain/math_test_5000.jsonl.gz,MIT,--field='{context} {chain_of_thought}')
	@$(call curate,oasst,sft/oasst_en_100_trees.jsonl.gz,Apache-2.0,$(tree))
	@$(python) -m train --config=configs/records.py:$(curated) --workdir=$(curated)/run
	@$(python) -m data.inspect $(curated)/run/midtrain --step=10 --rows=0,1

tree := --field='User: {prompt[text]} Assistant: {prompt[replies][0][text]}'
curated := runs/records
# $(call curate,NAME,FILE,LICENCE,OPTIONS)
define curate
set -e; \
$(python) -m data.curate dedup --input=$(RECORDS)/$(2) --licence=$(3) --output=$(curated)/unlike/$(1) $(4); \
$(python) -m data.curate decontaminate --input=$(curated)/unlike/$(1) --output=$(curated)/$(1) \
  --against $(RECORDS)/eval/gsm8k_test.jsonl.gz $(RECORDS)/eval/math500.jsonl.gz
endef

test: $(tests)
	@$(pytest) -m 'not slow' $(ARGS)

test-slow: $(tests)
	@$(pytest) -m slow $(ARGS)

# Newer Pythons take the newest versions that requirements.txt allows.
test-newest:
	@for newest in python3.13 python3.12; do \
	  if $$newest -c '' 2>/dev/null; then exec $(MAKE) --no-print-directory test PYTHON=$$newest VENV=.venv-newest; fi; \
	done; echo 'make test-newest needs Python 3.12 or 3.13; there is none here' >&2; exit 1

lint: $(tests)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

clean:
	rm -rf .cache .hypothesis
	find $(wildcard configs data model notebooks tests train) -name __pycache__ -prune -exec rm -rf {} +

# Set-up. A stamp is written only after its installation succeeded, and becomes stale when a requirement file or the
# interpreter changes. $(VENV)/.installing marks an installation under way: where one was cut off, the environment may
# hold half a package that pip takes for a whole one, so it is built afresh.

$(run): requirements.txt constraints.txt $(python) $(if $(wildcard $(VENV)/.installing),cut-off)
	@$(make_venv)
	@$(call install,requirements.txt,about a minute)

$(tests): requirements-test.txt requirements-curate.txt constraints.txt $(run)
	@$(call install,requirements-test.txt,some seconds)

# Remade, like its stamps, when it is missing or its interpreter is gone; $(run) does the work.
$(python): ;

# Without ensurepip (Debian's python3 without python3-venv) pip comes from virtualenv or from the interpreter's own pip.
define make_venv
set -e; \
if [ -e $(VENV)/.installing ]; then rm -rf $(VENV); fi; \
if ! $(python) -m pip --version >/dev/null 2>&1; then \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "Torso needs Python 3.11 or newer, and '$(PYTHON)' is not: choose one with PYTHON=python3.11" >&2; exit 1; }; \
  if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi; \
  mkdir -p $(VENV); touch $(VENV)/.installing; \
  $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
    || $(PYTHON) -m virtualenv --quiet $(VENV) >/dev/null 2>&1 \
    || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(python) install -qq pip; } 2>/dev/null \
    || { echo "'$(PYTHON)' cannot make a virtual environment: install its venv module" \
      "(Debian, Ubuntu: apt install python3-venv) or choose another with PYTHON=" >&2; exit 1; }; \
  rm -f $(VENV)/.installing; \
fi
endef

# $(call install,FILE,DURATION). Byte code is left to the first import, which halves the time an installation takes.
# constraints.txt is the tested set of Python 3.11; newer Pythons take the ranges alone.
define install
set -e; trap 'exit 130' INT; \
echo 'Installing $(1) into $(VENV) ($(2)) ...'; \
touch $(VENV)/.installing; \
exact="$$($(python) -c 'import sys; print("--constraint=constraints.txt" * (sys.version_info[:2] == (3, 11)))')"; \
$(python) -m pip install -qq --no-compile --disable-pip-version-check --requirement=$(1) $$exact || { \
  rm -f $(VENV)/.installing; echo 'The installation failed; the reason is above.' >&2; exit 1; }; \
rm -f $(VENV)/.installing; \
touch $@
endef
