#!/usr/bin/env bash
# A SLURM job: one rank a GPU, tensor-parallel ranks on one node, replicas across nodes.
#
#   sbatch --nodes=2 --gpus-per-node=4 scripts/train_slurm.sh --model wrn-28-40 --groups 4 --tp 4 \
#       --dataset cifar10 --data-dir /data/cifar10 --output-dir runs/wrn-28-40
#
#SBATCH --job-name=tlgc-mp
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@60
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?start it with sbatch}/scripts/environment.sh"
prepare_environment

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m tlgc_mp train "$@"
