#!/usr/bin/env bash
# Renew the committed locks: names, versions and hashes, and no address of where they came from.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
compile() {
  uv pip compile pyproject.toml "${@:2}" --python "$python" --python-version 3.12 --generate-hashes \
    --no-annotate --no-header --no-emit-index-url --no-emit-find-links --quiet -o "requirements-$1.lock"
}
compile dev --extra dev
compile run --constraint requirements-dev.lock # the same versions, only fewer
