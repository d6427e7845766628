#!/usr/bin/env bash
# Runs the tests that depend most on torch and DeepSpeed with other releases of them, each set of releases in a fresh
# environment in a temporary folder (6 GB in TMPDIR while it is used). Adds a row each to runs/versions.md, which is the
# table of docs/lab/versions.md.
#
#   scripts/versions.sh                     the lowest releases that pyproject.toml allows, then the newest that pip finds
#   scripts/versions.sh torch==2.9.0,torchvision==0.24.0,deepspeed ...         these
#
# TESTS names other tests to run, PYTHON another interpreter.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"

packages="torch|torchvision|deepspeed"
lowest=$(grep -oE "\"($packages)>=[0-9.]+" pyproject.toml | tr -d '"' | sed 's/>=/==/' | paste -sd,)
[ $# -gt 0 ] || set -- "$lowest" "${packages//|/,}"
tests=${TESTS:-tests/versions/test_private_names.py tests/nn tests/models
    $(printf 'tests/parallel/test_%s.py ' plan split_tensor split_tensor_memory layer_parity engine_parity \
        deepspeed_membership watched_models plain_collectives)}
table=runs/versions.md
mkdir -p runs
[ -f $table ] || printf '| torch | torchvision | DeepSpeed | Python | date | tests |\n|---|---|---|---|---|---|\n' >$table

environment=""
trap 'rm -rf "$environment"' EXIT
failed=0
for releases in "$@"; do
    environment=$(mktemp -d)
    echo "Installing ${releases//,/ } ..."
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --editable ".[test]" \
        ${releases//,/ } || fail "$releases cannot be installed; the lines above say why"
    echo "Running the tests ..."
    # shellcheck disable=SC2086  # several tests
    PATH="$environment/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
        "$environment/bin/python" -m pytest $tests | tee "$environment/log" || failed=1
    versions=$("$environment/bin/python" -c '
import importlib.metadata, platform
releases = [importlib.metadata.version(name) for name in ("torch", "torchvision", "deepspeed")]
print(*releases, platform.python_version(), sep=" | ")')
    echo "| $versions | $(date -u +%F) | $(tail -n 1 "$environment/log" | sed 's/ in .*//') |" | tee -a $table
    rm -rf "$environment"
done
exit $failed
