#!/bin/bash
# All figures of docs/generation.md on one GPU (about 20 minutes), one JSON line each: bash benchmarks/gpu_generate.sh [OUTPUT]
# With two GPUs and more also tensor parallelism. A part that fails is named, and the others go on.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD"
output="${1:-outputs/gpu_generate}"
mkdir -p "$output"
gpus=$(python -c "import torch; print(torch.cuda.device_count())")

part() { # name, command
  local name="$1"
  shift
  echo "== $name: $*"
  if "$@" >"$output/$name.out" 2>"$output/$name.err"; then
    tail -n 12 "$output/$name.out"
  else
    echo "FAILED with code $?"
    tail -n 20 "$output/$name.out" "$output/$name.err"
  fi
}

part tests python -m pytest -q tests/gpu/test_generation.py
part 4b python benchmarks/gpu_generate.py --kernels --cases 1 1:fp8 8 8:fp8
part 4b_no_overlap python benchmarks/gpu_generate.py --no-overlap
part tiles python benchmarks/gpu_linear_tiles.py "$output/tiles.json"
part 4b_tiles python benchmarks/gpu_generate.py --cases 1 1:fp8 8 --tiles "$output/tiles.json"
part 1b python benchmarks/gpu_generate.py --preset 1b
part 12b python benchmarks/gpu_generate.py --preset 12b --cases 1 1:fp8
for processes in 2 4 8; do
  if [ "$gpus" -ge "$processes" ]; then
    part "4b_tp$processes" torchrun --nproc-per-node "$processes" benchmarks/gpu_generate.py --kernels
  fi
done
