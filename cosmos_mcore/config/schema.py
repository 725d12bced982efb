"""The run's YAML as dataclasses: one class per section, Megatron's terms for the keys.

A key's type says which values it takes, range included (``values.py``); loading, checking and error messages follow
from it. Nothing here imports torch, so a mistake in a config is reported within a second. Numbers that follow from
other numbers (latent shape, sequence length, ignored tokens, padding, micro-batches) are not here: see ``derived.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cosmos_mcore.config.values import (
    FolderName,
    Fraction,
    NonEmptyFloats,
    NonEmptyList,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    TwoCounts,
)


@dataclass
class JobConfig:
    """Names the run; its files go to ``${OUTPUT_ROOT:-checkpoints}/PROJECT/GROUP/NAME``."""

    project: FolderName = "posttraining"
    group: FolderName = "autoregressive_base"
    name: FolderName = "unnamed"


@dataclass
class ModelConfig:
    """A preset and, where not None, single fields that replace the preset's (Megatron's names)."""

    preset: NonEmptyStr = "4b"
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_query_groups: PositiveInt | None = None
    kv_channels: PositiveInt | None = None
    num_condition_latents: NonNegativeInt = (
        1  # leading latent frames that are given, not learnt (spec/model.md section 7)
    )
    z_loss_coeff: NonNegativeFloat = 1.0e-4


@dataclass
class TokenizerConfig:
    """Which video tokenizer turns frames into ids: ``haar`` (training-free) or ``dv8x16x16`` (released weights)."""

    name: Literal["haar", "dv8x16x16"] = "haar"
    path: NonEmptyStr | None = None  # folder with encoder.jit and decoder.jit (dv8x16x16 only)
    pixel_chunk_duration: PositiveInt | None = (
        None  # frames encoded as one causal clip; None: 33, or num_frames if shorter
    )
    engine: Literal["eager", "jit"] = "eager"  # dv8x16x16 only: our networks, or the released files run as they are


@dataclass
class DataConfig:
    """MP4 files and the clips cut from them (spec/data.md)."""

    # A folder (searched recursively), a file, or a list of both; or a token cache, to train without videos.
    path: NonEmptyStr | NonEmptyList = "datasets/videos"
    weights: NonEmptyFloats | None = None  # share of each entry of path in the samples; None: all clips alike
    height: PositiveInt = 640
    width: PositiveInt = 848
    num_frames: PositiveInt = 33
    frame_stride: PositiveInt = 1  # distance in frames between two frames of a clip
    start_frame_interval: PositiveInt = 1  # distance in frames between the first frames of two clips of one file
    decoder: Literal["auto", "pyav", "dali"] = "auto"
    num_workers: PositiveInt = 2  # decoding threads of each process (PyAV)
    prefetch_steps: PositiveInt = 4  # steps decoded and tokenized ahead of training
    decode_timeout: PositiveFloat = 60.0  # seconds until the decoding of a clip is given up; another takes its place
    token_cache: NonEmptyStr | None = "auto"  # folder that keeps ids; auto: below the run's folder; null: nowhere
    token_cache_gb: PositiveFloat = 100.0  # its largest size; beyond it, what was used longest ago is deleted
    validation_path: NonEmptyStr | NonEmptyList | None = None  # videos that are never trained on; None: no validation
    # Text-to-video models only: a JSONL file with the prompts of all videos; None: a .txt beside each video.
    prompts: NonEmptyStr | None = None
    prompt_cache: NonEmptyStr = "auto"  # folder with the prompts' embeddings; auto: beside the projects' folders


@dataclass
class ParallelConfig:
    """How the model is split over processes (Megatron's terms)."""

    tensor_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    num_layers_in_first_pipeline_stage: PositiveInt | None = None  # None: even, or embedding and head count as layers
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    context_parallel_size: PositiveInt = 1
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None  # selective: attention only
    recompute_num_layers: PositiveInt | None = None  # full only: layers recomputed of each (virtual) stage; None: all
    distributed_timeout_minutes: PositiveFloat = 30.0


@dataclass
class PrecisionConfig:
    """``bf16``: bf16 compute with float32 master weights; ``fp32``: everything in float32."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None  # recipe of matrix products; GPUs only
    fp8_first_last_bf16: TwoCounts = field(default_factory=lambda: [0, 0])  # layers at both ends without FP8
    main_grads: Literal["bf16", "fp32"] = "fp32"  # in which gradients are accumulated and reduced
    moments: Literal["bf16", "fp32"] = "fp32"  # in which Adam's moments are kept; bf16 is rounded at random


@dataclass
class OptimizerConfig:
    """AdamW; weight decay acts on every parameter, as in the original (spec/training.md section 2)."""

    lr: PositiveFloat = 1.0e-3
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.05
    clip_grad: NonNegativeFloat = 1.0  # largest norm of the whole gradient; 0: no clipping


@dataclass
class ScheduleConfig:
    """Learning rate over iterations (spec/training.md section 2)."""

    name: Literal["warmup_cosine", "lambda_linear"] = "warmup_cosine"
    warmup_iters: NonNegativeInt = 5000
    decay_iters: PositiveInt | None = None  # None: training.train_iters
    min_lr: NonNegativeFloat = 1.0e-8
    cooldown_iters: PositiveInt | None = None  # lambda_linear only: length of the final descent to 0; None: no descent


@dataclass
class TrainingConfig:
    """Length and batch of the run. One iteration is one optimizer step over ``global_batch_size`` clips."""

    train_iters: PositiveInt = 50000
    global_batch_size: PositiveInt = 1
    micro_batch_size: PositiveInt = 1
    seed: Seed = 0
    exit_duration_minutes: PositiveFloat | None = None  # from the start of the process until it saves and exits
    eval_interval: PositiveInt = 1000  # steps between two validations, if there is a data.validation_path
    eval_iters: PositiveInt = 10  # batches of a validation, always the same ones
    max_nan_iterations: PositiveInt = 10  # steps in a row with a loss or gradient that is not finite, that end the run


@dataclass
class CheckpointConfig:
    """What to start from and what to keep."""

    load: NonEmptyStr | None = None  # weights to start from, in any layout; a checkpoint of the run itself goes first
    save_interval: PositiveInt = 1000
    keep: PositiveInt | None = None  # newest checkpoints that stay on disk; None: all
    export_original: bool = False  # the original's files beside each checkpoint, too; ``keep`` holds for both
    keep_every: PositiveInt | None = None  # checkpoints at multiples of this iteration stay, whatever ``keep`` says
    max_save_failures: PositiveInt = 5  # failed saves in a row (disk full, folder gone) that end the run
    retry_seconds: NonNegativeFloat = 60.0  # from a failed save to the next try


@dataclass
class LoggingConfig:
    """What the run reports, and how often."""

    log_interval: PositiveInt = 1
    tensorboard: bool = True
    wandb_project: NonEmptyStr | None = None
    progress_bar: bool = True  # only drawn on a terminal
    teacher_forcing_interval: PositiveInt | None = None  # steps between two pictures of predicted clips; None: none
    sample_interval: PositiveInt | None = None  # steps between two clips that the model in training makes; None: none
    profile_step_start: NonNegativeInt | None = None  # first step recorded by torch's profiler; None: none
    profile_step_end: NonNegativeInt | None = None  # first step not recorded any more
    profile_ranks: list[NonNegativeInt] = field(default_factory=lambda: [0])  # whose steps are recorded
    straggler_interval: PositiveInt | None = None  # steps between two comparisons of the ranks' speed; None: none


@dataclass
class RunConfig:
    """One run: the root of the YAML."""

    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
