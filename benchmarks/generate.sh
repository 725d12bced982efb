#!/bin/bash
# All figures of docs/generation.md on one GPU (about 20 minutes), one JSON line each: bash benchmarks/generate.sh [OUTPUT]
# With two GPUs and more also tensor parallelism. A part that fails is named, and the others go on.
# shellcheck source=benchmarks/parts.sh
. "$(dirname "$0")/parts.sh"

part tests python -m pytest -q tests/gpu/test_generation.py
part 4b python benchmarks/generate.py --kernels --cases 1 1:fp8 8 8:fp8
part 4b_no_overlap python benchmarks/generate.py --no-overlap
part tiles python benchmarks/decode_tiles.py
part offload python benchmarks/offload.py
part 1b python benchmarks/generate.py --preset 1b
part 12b python benchmarks/generate.py --preset 12b --cases 1 1:fp8
for processes in 2 4 8; do
  if [ "$gpus" -ge "$processes" ]; then
    part "4b_tp$processes" torchrun --nproc-per-node "$processes" benchmarks/generate.py --kernels
  fi
done
