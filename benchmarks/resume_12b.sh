#!/bin/bash
# conf/cosmos_12b_tp8.yaml on eight GPUs: saves in the background, and resumes at TP 8, TP 4 x PP 2 and TP 2 x PP 4:
#   bash benchmarks/resume_12b.sh OUTPUT VIDEOS [section.key=value ...]
# Random weights, FP8, bf16 gradients and moments; a save is 100 GB, and two of them are there at times.
# Rehearsal on CPUs: model.preset=tiny model.num_attention_heads=8 model.num_query_groups=8 data.height=64 data.width=128
#   precision.dtype=fp32 precision.main_grads=fp32 precision.moments=fp32 precision.fp8=null
# shellcheck source=benchmarks/parts.sh
. "$(dirname "$0")/parts.sh"

videos="$2"
shift 2
run=posttraining/autoregressive_base/base_12b_tp8
all=(data.path="$videos" tokenizer.name=haar tokenizer.path=null checkpoint.load=null training.global_batch_size=4
  checkpoint.save_interval=10 checkpoint.keep=1 precision.fp8=delayed precision.main_grads=bf16 precision.moments=bf16 "$@")

train() { # name, iterations, TP, PP
  OUTPUT_ROOT="$output/$1" part "$1" torchrun --nproc-per-node 8 examples/pretrain_cosmos_ar.py conf/cosmos_12b_tp8.yaml \
    "${all[@]}" training.train_iters="$2" parallel.tensor_model_parallel_size="$3" parallel.pipeline_model_parallel_size="$4"
}

train first 20 8 1
for layout in "8 1" "4 2" "2 4"; do
  read -r tp pp <<<"$layout"
  name="resumed_tp${tp}_pp$pp"
  mkdir -p "$output/$name/$run"
  cp -al "$output/first/$run/checkpoints" "$output/$name/$run" # hard links: a save is replaced, never written into
  train "$name" 25 "$tp" "$pp"
  rm -r "$output/$name/$run/checkpoints"
done
for layout in tp4_pp2 tp2_pp4; do
  curves "$output/resumed_tp8_pp1/$run" "$output/resumed_$layout/$run"
done
