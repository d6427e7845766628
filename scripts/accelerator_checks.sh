#!/usr/bin/env bash
# Checks this package on the accelerator of this machine, in nine minutes at most: its tests, losses compiled and not,
# stopped and resumed, the benchmark, narrow groups. Writes checks.json and checks.md. Installs nothing: torch and
# deepspeed are to be there, and pytest for the tests.
#
#   scripts/accelerator_checks.sh [--output DIR]
#   scripts/accelerator_checks.sh --device cpu --quick        tries the script itself
#
# PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

python=${PYTHON:-python3}
"$python" -c 'import torch, deepspeed' 2>/dev/null ||
    fail "torch and deepspeed must be installed for $python; PYTHON=/path/to/python chooses another"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/tests/accelerator/checks.py" "$@"
