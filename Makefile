# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Each target sets up what it needs, in a fresh clone with Python 3.11 or newer and pip.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help drill test test-full lint bench lab-up lab-down real lock clean environment

# Made by us, so that another folder can be tried without touching the usual one.
VENV ?= .venv
VENV_OLDEST ?= .venv-2.19
# `make test REAL=vault,pgbouncer,s3`: these parts must be the real ones.
REAL ?=
# What pytest runs and how: `make test ARGS="-k fence -x"`.
ARGS ?=

IN_VENV = PATH="$(abspath $(VENV))/bin:$$PATH"

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

drill: environment  ## a thief in the lab, contained by the real playbook; prints a scorecard
	@$(IN_VENV) python -m lab drill

test: environment  ## everything that can fail: lint, then the tests on both ansible-cores
	@VENV="$(VENV)" VENV_OLDEST="$(VENV_OLDEST)" REAL="$(REAL)" sh tools/test $(ARGS)

test-full: environment  ## the whole truth harness, at most 45 minutes; writes what it tried into the README
	@$(IN_VENV) FIREBREAK_REAL="$(REAL)" python -m tests.truth.table $(ARGS)

lint:  ## style, types, documentation, licences, sanity, what Galaxy would say
	@sh tools/environment "$(VENV)" newest lint
	@$(IN_VENV) python tools/lint.py $(ARGS)

bench: environment  ## how fast it is, as ratios taken in one run (about six minutes; `make bench ARGS=control`)
	@$(IN_VENV) python -m tests.bench $(ARGS)

lab-up: environment  ## start the lab and leave it running
	@$(IN_VENV) python -m lab up

lab-down: environment  ## end it
	@$(IN_VENV) python -m lab down

real:  ## build the real servers that pip cannot give into the user's cache folder
	@python="$$(sh tools/find-python 3.13 3.12 3.11)" && "$$python" -I lab/real.py

lock:  ## write the locks in requirements/ anew (needs Python 3.11 and 3.12)
	@python="$$(sh tools/find-python 3.13 3.12 3.11)" && "$$python" -I tools/lock.py

clean:  ## remove the environments and what the tools left (not the lab, not the cache of `make real`)
	rm -rf .venv .venv-2.19 .ansible .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis dist tests/output

environment:
	@sh tools/environment "$(VENV)" newest
