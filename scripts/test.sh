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
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tensors are small, and many ranks share the cores
exec python -m pytest "$@"
