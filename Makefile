.PHONY: quality style test test-slow bench docs site build versions

quality:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

style:
	ruff check --fix .
	ruff format .

test:
	HF_HUB_OFFLINE=1 pytest

test-slow:
	HF_HUB_OFFLINE=1 pytest -m slow

# Minutes on two cores; the other benchmarks are in benchmarks/README.md, one command each.
bench:
	python benchmarks/step_time.py
	python benchmarks/plain_overhead.py
	python benchmarks/family_table.py

# The pages and pictures of docs/ that are made by scripts.
docs:
	python tools/make_reference.py
	python tools/make_models.py
	python tools/draw_figures.py

# The same pages as a site, in build/site; needs pip install -e ".[docs]".
site:
	mkdocs build --strict

build:
	python tools/check_build.py

versions:
	python tools/check_versions.py
