#!/usr/bin/env bash
# The paper's Table 3: the compared methods, shuffled and learned groups, and those of Table 1 at the same N.
#
#   scripts/reproduce_table3.sh DATA [OUTPUT]
#
# DATA holds a folder for each data set: cifar10/, cifar100/ (downloaded where missing) and imagenet/.
# Started again, it leaves finished rows and goes on with the others. LAUNCHER="srun -n {ranks} python -m tlgc_mp", say,
# starts the rows on a cluster. SMALLEST=1 tries each row for one step on small made-up images. Then the table is written
# to OUTPUT/report (OUTPUT is runs/tables where not given, for all four tables).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
data=$(realpath -m "${1:?give the folder of the data sets}")
output=$(realpath -m "${2:-runs/tables}")
prepare_environment
source "$root/scripts/rows.sh"

for dataset in cifar10 cifar100 imagenet; do
    model=wrn-28-10
    [ $dataset != imagenet ] || model=imagenet-wrn-34-2
    for groups in 2 4 8 16; do
        for conv in gc shuffle flgc gc-2l; do
            table_row "$output" $model $conv $groups $dataset
        done
    done
done
tlgc-mp report "$output" --output "$output/report"
exit "${failed:-0}"
