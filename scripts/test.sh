#!/usr/bin/env bash
# Installs what the tests need and runs them all: lint, types, tests. Options go to pytest: -n 0 runs them in one process.
# Else there is one for each core, eight at most; the tests of a file stay together, and share what they make once.
#
#   scripts/test.sh --slow      runs the slow ones too: each fault 20 times at random moments, hours on two cores.
#                               They add the table of docs/reliability.md to runs/reliability.md, and some go by the
#                               clock: one process.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
slow=()
workers=
if [ "${1:-}" = --slow ]; then
    shift
    slow=(-m "slow or not slow")
    workers=0
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
workers=${workers:-$(python -c 'from tlgc_mp.host import usable_cores; print(min(usable_cores(), 8))')}
exec python -m pytest -n "$workers" --dist loadfile "${slow[@]}" "$@"
