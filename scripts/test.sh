#!/usr/bin/env bash
# Installs what the tests need and runs them all: lint, types, tests. Options go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment test

echo "Checking style and types ..."
ruff check .
ruff format --check .
mypy
echo "Running the tests ..."
exec python -m pytest "$@"
