# Needs make and Python 3.12, nothing else: everything is installed into .venv, and only when the requirements changed.

VENV := .venv
PYTHON := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help run test lint conformance bench soak clean FORCE

help:
	@echo "make run    serve on http://127.0.0.1:8000 (PORT=...): your bucket if R2_* is set, else four demo models"
	@echo "make test   install what the tests need, then run them (ARGS='-k storage -x' goes to pytest)"
	@echo "make lint   formatting, rules, types; unsafe code and known vulnerabilities, where they can be looked for"
	@echo "make conformance  the tests of the storage against Ceph's radosgw and Cloudflare's R2 emulator, where they can be had"
	@echo "make bench  measure loads and predictions, beside other servers (half an hour), into bench/RESULTS.md"
	@echo "make soak   ten minutes of load, swaps, faults and killed workers; then whether anything failed or grew"
	@echo "make clean  remove .venv, .bench, .demo, .conformance, .lint and caches"

run: $(VENV)/installed
	@$(PYTHON) -m demo

test: $(VENV)/installed-dev
	@$(PYTHON) -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m mypy
	@$(PYTHON) -m lint $(ARGS)

# radosgw comes from apt (as root), everything else goes into .conformance
conformance: $(VENV)/installed-dev
	@$(PYTHON) -m conformance $(ARGS)

bench: $(VENV)/installed-dev
	@$(PYTHON) -m bench $(ARGS)

soak: $(VENV)/installed-dev
	@$(PYTHON) -m tests.soak $(ARGS)

clean:
	rm -rf $(VENV) .bench .demo .conformance .lint .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

TO_RUN := ml-requirements.txt requirements.txt demo/requirements.txt
TO_TEST := $(TO_RUN) otel-requirements.txt requirements-dev.txt

$(VENV)/installed: $(VENV)/made $(TO_RUN)
	$(call install,$(TO_RUN))
	@touch $@

$(VENV)/installed-dev: $(VENV)/made $(TO_TEST)
	$(call install,$(TO_TEST))
	@touch $(VENV)/installed $@

# Quiet twice, because once still warns about every package that one of several configured indexes lacks.
define install
@touch $(VENV)/unfinished
@set -e; for file in $(1); do \
	printf "Installing %s: " $$file; start=$$(date +%s); \
	$(PYTHON) -m pip install --quiet --quiet --disable-pip-version-check -r $$file; \
	echo "$$(($$(date +%s) - start)) s"; \
done
@rm $(VENV)/unfinished
endef

# A stamp says that its install ran to the end. pip takes a package that was cut off half-way for a whole one, so an
# environment found unfinished, or of another Python, starts over.
usable := $(shell test ! -e $(VENV)/unfinished && $(PYTHON) -c 'import sys, pip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

ifneq ($(usable),3.12)
$(VENV)/made: FORCE
	@for python in python3.12 python3 python; do \
		if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then \
			rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/unfinished && $$python -m venv $(VENV) \
				&& rm $(VENV)/unfinished && touch $@; exit; \
		fi; \
	done; \
	echo "Python 3.12 is needed, but none of python3.12, python3 and python on the PATH is one: install it first." >&2; exit 2
else
$(VENV)/made:
	@touch $@
endif
