#!/usr/bin/env bash
# A shell on one node with GPUs; with CONTAINER_IMAGE inside the container. Then: python examples/pretrain_cosmos_ar.py ...
#
#   scripts/slurm/interactive.sh [GPUS] [HOURS]

set -euo pipefail

options=(--nodes=1 --ntasks=1 "--gpus-per-node=${1:-1}" "--time=${2:-2}:00:00" --pty)
if [ -n "${CONTAINER_IMAGE:-}" ]; then
  options+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
    --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi
exec srun "${options[@]}" bash
