#!/usr/bin/env bash
# The paper's Table 4: MobileNetV2 on ImageNet, its 1x1 convolutions replaced.
#
#   scripts/reproduce_table4.sh DATA [OUTPUT]
#
# DATA holds a folder for each data set: imagenet/.
# Started again, it leaves finished rows and goes on with the others. LAUNCHER="srun -n {ranks} python -m tlgc_mp", say,
# starts the rows on a cluster. SMALLEST=1 tries each row for one step on small made-up images. Then the table is written
# to OUTPUT/report (OUTPUT is runs/tables where not given, for all four tables).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
data=$(realpath -m "${1:?give the folder of the data sets}")
output=$(realpath -m "${2:-runs/tables}")
prepare_environment
source "$root/scripts/rows.sh"

table_row "$output" mobilenet_v2 sc 1 imagenet
for groups in 2 4 8; do
    for conv in gc shuffle flgc gc-2l; do
        table_row "$output" mobilenet_v2 $conv $groups imagenet
    done
done
tlgc-mp report "$output" --output "$output/report"
exit "${failed:-0}"
