#!/usr/bin/env bash
# Installs the package and trains a two-level WideResNet whose groups are split over two ranks, on handwritten digits.
#
#   scripts/quickstart.sh [OPTION ...]      options of tlgc-mp train, --epochs 2 for example
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment

case $(accelerators) in
    0) ranks=2 && export DS_ACCELERATOR=cpu ;;
    1) ranks=1 ;;
    *) ranks=2 ;;
esac
echo "Starting $ranks rank(s) with the deepspeed launcher ..."
exec deepspeed --num_accelerators "$ranks" --master_port "$(free_port)" --log_level error --module tlgc_mp \
    train --model wrn-10-4 --groups 4 --dataset digits --deepspeed_config "$root/ds_configs/zero1.json" \
    --output-dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
