# Short names for what is done often; each works on its own in an environment with requirements-dev.txt.
.PHONY: app lint types tests benchmarks viewer

app:
	python app.py

lint:
	ruff check . && ruff format --check .

types:
	mypy

tests:
	python -m pytest

benchmarks:
	python benchmarks/default_job.py

viewer:
	cd frontend && npm ci && npm run build
