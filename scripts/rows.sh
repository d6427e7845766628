# Sourced by reproduce_*.sh: the runs of a table, one after the other or side by side, going on where they were cut off.

# row FOLDER OPTIONS...: trains one row. A finished one is left as it is, one that was cut off goes on from its last epoch.
# LAUNCH is what starts it: tlgc-mp on one device, or a launcher of several, such as
# LAUNCH="deepspeed --num_accelerators 4 --module tlgc_mp".
row() {
    local folder=$1 resume=()
    shift
    [ ! -e "$folder/result.json" ] || return 0
    [ ! -e "$folder/checkpoints/latest" ] || resume=(--resume)
    mkdir -p "$folder"
    echo "$folder"
    ${LAUNCH:-tlgc-mp} train --output-dir "$folder" --keep 1 "${resume[@]}" "$@" >>"$folder/log.txt" 2>&1 || {
        echo "$folder failed: $(tail -n 1 "$folder/log.txt")" >&2
        return 1
    }
}
export -f row
