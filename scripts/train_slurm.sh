#!/usr/bin/env bash
# A SLURM job: one rank a task, one task a GPU, tensor-parallel ranks on one node, replicas across nodes.
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 scripts/train_slurm.sh --model wrn-28-40 --groups 4 --tp 4 \
#       --dataset cifar10 --data-dir /data/cifar10 --output-dir runs/wrn-28-40
#
# Submitted again, or put back into the queue, the job goes on from the newest checkpoint. At its time limit it saves and
# ends as a success, so that a chain of jobs (--dependency=afterok:ID) trains on; one after the end of training does nothing.
#
#SBATCH --job-name=tlgc-mp
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?start it with sbatch}/scripts/environment.sh"
prepare_environment

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
status=0
srun --kill-on-bad-exit=1 "$(command -v python)" -m tlgc_mp train --resume auto "$@" || status=$?
[ "$status" != 143 ] || status=0 # stopped by SIGTERM
exit $status
