#!/usr/bin/env bash
# The paper's comparisons at a size for two CPU cores: WRN-10-2 on CIFAR-10 at 16 x 16 pixels, four epochs, every
# convolution at N = 2, 4, 8, 16, three seeds, and the coarse level's variants at N = 8. Two to six hours.
#
#   scripts/reproduce_small.sh DATA [OUTPUT]
#
# DATA holds train/<class>/ and test/<class>/. JOBS runs go side by side (default 2), each on one thread. Started again,
# it leaves finished runs and goes on with the others. Then it writes rows.jsonl, the tables and the figures to
# OUTPUT/report (OUTPUT is runs/small where not given).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
data=$(realpath "${1:?give the folder that holds train/ and test/}")
output=$(realpath -m "${2:-runs/small}")
prepare_environment
source "$root/scripts/rows.sh"
export OMP_NUM_THREADS=1 data root

plan() { # one line a run: its folder and its options
    local seed conv groups
    for seed in 0 1 2; do
        echo "'$output/sc-1-seed-$seed' --conv sc --groups 1 --seed $seed"
        for groups in 2 4 8 16; do
            for conv in gc gc-2l gc-2l-proto shuffle flgc; do
                echo "'$output/$conv-$groups-seed-$seed' --conv $conv --groups $groups --seed $seed"
            done
        done
        for variant in "--coarse-kernel-size 1" "--coarse-init scaled" "--coarse-init he"; do
            echo "'$output/gc-2l-8${variant// /-}-seed-$seed' --conv gc-2l --groups 8 $variant --seed $seed"
        done
    done
}

small_row() {
    row "$@" --model wrn-10-2 --dataset imagefolder --data-dir "$data" --image-size 16 --epochs 4 --workers 1 \
        --deepspeed_config "$root/ds_configs/zero0.json"
}
export -f small_row

plan | xargs -P "${JOBS:-2}" -L 1 bash -c 'small_row "$@"' small_row
tlgc-mp report "$output" --output "$output/report"
