# Sourced by reproduce_*.sh: runs of a table, which leave finished ones as they are and go on where one was cut off.

# row FOLDER OPTIONS...: trains one row on RANKS ranks (default 1) and keeps what it says in FOLDER/log.txt.
# LAUNCHER starts it, with {ranks} in place of their number; where not given, deepspeed does, or plainly one process.
row() {
    local folder=$1 start=${LAUNCHER:-}
    shift
    if [ -z "$start" ]; then
        start="python -m tlgc_mp"
        [ "${RANKS:-1}" = 1 ] ||
            start="deepspeed --num_accelerators {ranks} --master_port $(free_port) --log_level error --module tlgc_mp"
    fi
    [ ! -e "$folder/result.json" ] || return 0
    mkdir -p "$folder"
    echo "$folder"
    ${start//\{ranks\}/${RANKS:-1}} train --output-dir "$folder" --keep 1 --resume auto "$@" >>"$folder/log.txt" 2>&1 || {
        echo "$folder failed: $(tail -n 1 "$folder/log.txt")" >&2
        return 1
    }
}
export -f row

if [ -z "${DS_ACCELERATOR:-}" ] && [ "$(accelerators)" = 0 ]; then
    export DS_ACCELERATOR=cpu
fi

# table_row FOLDER MODEL CONV GROUPS DATASET: a row as the paper trained it, its images in $data/DATASET.
# With SMALLEST=1 one step on two small made-up images instead, and WideResNets of a tenth of a width of 40 or more.
table_row() {
    local folder=$1 model=$2 conv=$3 groups=$4 dataset=$5 options=()
    if [ -n "${SMALLEST:-}" ]; then
        case $dataset in
            cifar10) options=(--num-classes 10 --recipe cifar --image-size 8) ;;
            cifar100) options=(--num-classes 100 --recipe cifar --image-size 8) ;;
            imagenet) options=(--num-classes 1000 --recipe imagenet --image-size 32) ;;
        esac
        case $model in wrn-28-[4-9]0) model=${model%0} ;; esac
        options+=(--dataset synthetic --epochs 1 --limit-steps 1 --batch-size 2)
    else
        options=(--dataset "$dataset" --data-dir "$data/$dataset")
    fi
    [ "$conv" != sc ] || options+=(--tp "${RANKS:-1}")
    row "$folder/$model-$conv-$groups-$dataset" --model "$model" --conv "$conv" --groups "$groups" "${options[@]}" ||
        failed=1 # and the other rows are trained all the same
}
