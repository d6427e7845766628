#!/usr/bin/env bash
# Trains under mpirun; DeepSpeed finds the ranks through mpi4py.
#
#   scripts/train_mpi.sh RANKS [OPTION ...]     options of tlgc-mp train
#   HOSTS=node1:4,node2:4 scripts/train_mpi.sh 8 --model wrn-28-40 --groups 4 --dataset cifar10 --data-dir data
#
# Every host needs this folder, and ssh without a password. MPIRUN_FLAGS adds flags of mpirun. Ctrl-C and SIGTERM save a
# checkpoint and end every rank; a second one ends them at once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
[ $# -ge 1 ] || fail "usage: scripts/train_mpi.sh RANKS [OPTION ...]"
ranks=$1
shift
prepare_environment

# It passes signals on so that mpirun does not kill its ranks, and ends an mpirun that stays when they have ended.
python=$(command -v python)
exec "$python" -m tlgc_mp launch --max-restarts 0 --mpi "$ranks" ${HOSTS:+--hosts "$HOSTS"} -- \
    "$python" -m tlgc_mp train "$@"
