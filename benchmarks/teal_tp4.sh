#!/bin/bash
# conf/teal_tp4.yaml on four GPUs, from the original's shards (random weights) to a video:
#   bash benchmarks/teal_tp4.sh OUTPUT VIDEOS [section.key=value ...]
# Curves at TP 4, 2, 1 and in FP8, a resume at TP 2, merge, generation, speed by number of GPUs. 170 GB of disk for the 4B.
# Rehearsal on CPUs (4 minutes): STEPS=8 and model.preset=tiny model.num_query_groups=4 data.height=64 data.width=128
#   precision.dtype=fp32 precision.main_grads=fp32 precision.moments=fp32; what needs FP8 fails there.
# shellcheck source=benchmarks/parts.sh
. "$(dirname "$0")/parts.sh"

videos="$2"
shift 2
steps="${STEPS:-50}"
run=posttraining/autoregressive_base/base_4b_example_tealrobot_tp4
all=(data.path="$videos" tokenizer.name=haar tokenizer.path=null checkpoint.save_interval="$steps" checkpoint.keep=1 "$@")

layout() { # number of GPUs
  echo "parallel.tensor_model_parallel_size=$1 parallel.sequence_parallel=$([ "$1" = 1 ] && echo false || echo true)"
}

train() { # name, number of GPUs, overrides: its files lie in $output/NAME/$run
  local name="$1" count="$2"
  shift 2
  # shellcheck disable=SC2046  # two words
  OUTPUT_ROOT="$output/$name" part "$name" torchrun examples/pretrain_cosmos_ar.py conf/teal_tp4.yaml \
    $(layout "$count") "${all[@]}" "$@"
}

train weights 1 checkpoint.load=null training.train_iters=1 optimizer.lr=1e-12 schedule.min_lr=0 checkpoint.export_original=true
mkdir -p "$output/model"
mv "$output/weights/$run"/checkpoints/*.pt "$output/model/model.pt" && rm -r "$output/weights"
part shards python scripts/shard_autoregressive_base_checkpoints.py -c "$output/model/model.pt" -t 4
mkdir -p "$output/shards"
mv "$output"/model/model_model_mp_*.pt "$output/shards"

load=checkpoint.load="$output/model/model.pt"
from_shards=checkpoint.load="$output/shards/model.pt"
once=(training.train_iters="$steps" checkpoint.save_interval=100000)
train tp1 1 "$load" "${once[@]}"
train tp2 2 "$load" "${once[@]}"
train tp4_fp8 4 "$from_shards" "${once[@]}" precision.fp8=delayed
rm -rf "$output"/tp*/"$run"/checkpoints # 40 GB each
train tp4 4 "$from_shards" training.train_iters="$steps" checkpoint.export_original=true
for other in tp2 tp4 tp4_fp8; do
  curves "$output/tp1/$run" "$output/$other/$run"
done

exported="$output/exported"
mkdir -p "$exported"
mv "$output/tp4/$run"/checkpoints/*.pt "$exported"
cp -r "$output/tp4" "$output/tp4_then_tp2"
train tp4 4 training.train_iters=$((steps + 10))
train tp4_then_tp2 2 training.train_iters=$((steps + 10))
curves "$output/tp4/$run" "$output/tp4_then_tp2/$run"

shards=("$exported"/*_model_mp_0.pt)
part merge python scripts/merge_autoregressive_tp_checkpoints.py -c "${shards[0]%_model_mp_0.pt}.pt" -t 4 -o "$output/merged/model.pt"
part generate torchrun --nproc-per-node 4 examples/generate_video.py --num_gpus=4 --checkpoint "$output/merged/model.pt" \
  --config "$output/tp4/$run/config.yaml" --input_type=video --input_image_or_video_path "$(find "$videos" -name '*.mp4' | sort | head -n 1)" \
  --video_save_folder "$output" --video_save_name generated --disable_diffusion_decoder --disable_guardrail --compare

for count in 1 2 4; do
  for fp8 in null delayed; do
    # shellcheck disable=SC2046
    part "step_tp${count}_$fp8" torchrun --nproc-per-node "$count" benchmarks/train_step.py conf/teal_tp4.yaml $(layout "$count") \
      precision.fp8=$fp8 precision.moments=bf16 "$@"
  done
done
