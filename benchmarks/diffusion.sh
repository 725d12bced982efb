#!/bin/bash
# The diffusion decoder and prompts on GPUs of 80 GB (about 6 minutes on one): bash benchmarks/diffusion.sh [OUTPUT]
# A part that fails is named, and the others go on.
# shellcheck source=benchmarks/parts.sh
. "$(dirname "$0")/parts.sh"

part tests python -m pytest -q -s tests/gpu/test_diffusion.py
part text python -m pytest -q tests/gpu/test_generation.py -k text
part bf16 python benchmarks/diffusion.py --kernels
part fp8 python benchmarks/diffusion.py --fp8 --kernels
part offload python benchmarks/diffusion.py --offload
for ranks in 2 4 8; do
  if [ "$gpus" -ge "$ranks" ]; then
    part "ranks_$ranks" torchrun --nproc-per-node "$ranks" benchmarks/diffusion.py
  fi
done
