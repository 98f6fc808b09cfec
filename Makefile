# What CI runs, step by step. `make check` takes a few minutes and needs no GPU.
.PHONY: check lint types test generate

check: lint types test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest

# everything that is generated from the declarations: schemas, hooks, rule catalogue, format tables
generate:
	python -m qschema.export
	qvalidate rules --markdown > docs/rules.md
	python -m qschema.format_table > docs/formats.md
