#!/usr/bin/env bash
# The paper's Table 2: WRN-28-40, -60 and -80 on CIFAR-10, two-level convolution with a rank for each group.
#
#   scripts/reproduce_table2.sh DATA [OUTPUT]
#
# DATA holds a folder for each data set: cifar10/ (downloaded where missing).
# Started again, it leaves finished rows and goes on with the others. LAUNCHER="srun -n {ranks} python -m tlgc_mp", say,
# starts the rows on a cluster. SMALLEST=1 tries each row for one step on small made-up images. Then the table is written
# to OUTPUT/report (OUTPUT is runs/tables where not given, for all four tables).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
data=$(realpath -m "${1:?give the folder of the data sets}")
output=$(realpath -m "${2:-runs/tables}")
prepare_environment
source "$root/scripts/rows.sh"

# The dense networks run on as many ranks as the paper gave them, their channels split; the paper split their layers, one
# rank busy at a time: tlgc-mp bench scaling measures that.
RANKS=1 table_row "$output" wrn-28-40 sc 1 cifar10
RANKS=2 table_row "$output" wrn-28-60 sc 1 cifar10
RANKS=4 table_row "$output" wrn-28-80 sc 1 cifar10
for width in 40 60 80; do
    for groups in 2 4; do
        RANKS=$groups table_row "$output" wrn-28-$width gc-2l $groups cifar10
    done
done
tlgc-mp report "$output" --output "$output/report"
exit "${failed:-0}"
