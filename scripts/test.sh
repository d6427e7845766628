#!/usr/bin/env bash
# Installs what the tests need and runs them all: lint, types, tests. Options go to pytest.
#
#   scripts/test.sh --fast      runs what takes a minute, in one process: lint, types, and the tests that start no ranks,
#                               no engine and no other process. What these leave out is counted at the end.
#   scripts/test.sh --slow      runs the slow ones too: each fault 20 times at random moments, hours on two cores.
#                               They add the table of docs/reliability.md to runs/reliability.md.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
lane=()
if [ "${1:-}" = --fast ]; then
    shift
    lane=(-m fast)
elif [ "${1:-}" = --slow ]; then
    shift
    lane=(-m "slow or not slow")
    mkdir -p runs
    export RELIABILITY_TABLE=${RELIABILITY_TABLE:-$PWD/runs/reliability.md}
fi
prepare_environment test

echo "Checking style and types ..."
ruff check .
ruff format --check .
mypy
echo "Running the tests ..."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tensors are small, and many ranks share the cores
exec python -m pytest "${lane[@]}" "$@"
