#!/bin/bash
# Training with prompts on GPUs of 80 GB (about 15 minutes on one): bash benchmarks/video2world.sh [OUTPUT]
# With two GPUs also layouts and tensor parallelism. A part that fails is named, and the others go on.
# shellcheck source=benchmarks/parts.sh
. "$(dirname "$0")/parts.sh"

one="conf/video2world_5b.yaml parallel.tensor_model_parallel_size=1 parallel.sequence_parallel=false precision.moments=bf16"
part tests python -m pytest -q tests/gpu/test_video2world.py "tests/gpu/test_fp8.py::test_a_step_never_waits_for_the_device"
part encoder python benchmarks/text_encoder.py
# shellcheck disable=SC2086  # several words
part 5b_4801 python benchmarks/train_step.py $one data.height=384 data.width=640
# shellcheck disable=SC2086
part 5b_4801_fp8 python benchmarks/train_step.py $one data.height=384 data.width=640 precision.fp8=delayed
if [ "$gpus" -ge 2 ]; then
  part 5b_12801_tp2 torchrun --nproc-per-node 2 benchmarks/train_step.py conf/video2world_5b.yaml \
    parallel.tensor_model_parallel_size=2 precision.moments=bf16
fi
if [ "$gpus" -ge 4 ]; then
  part 5b_12801_tp4 torchrun --nproc-per-node 4 benchmarks/train_step.py conf/video2world_5b.yaml
fi
