#!/usr/bin/env bash
# Trains on images in DATA/{train,test}/<class>/, is stopped in the middle and goes on, and uses what came of it.
#   docs/examples/cifar10.sh DATA RUN [OPTION ...]      options of tlgc-mp train
set -euo pipefail
tlgc-mp train --dataset imagefolder --data-dir "$1" --schedule onecycle --label-smoothing 0.1 --ema \
    --output-dir "$2" "${@:3}" &
while kill -0 $! 2>/dev/null && [ ! -e "$2/checkpoints/latest" ]; do sleep 0.2; done
kill -TERM $! 2>/dev/null || true
wait $! || test $? = 143 # stopped by SIGTERM, with a checkpoint
tlgc-mp train --resume --output-dir "$2"
tlgc-mp evaluate "$2"
tlgc-mp export "$2/checkpoints/best" "$2/best.safetensors"
tlgc-mp predict "$2/best.safetensors" "$1"/test/*/0001.*
