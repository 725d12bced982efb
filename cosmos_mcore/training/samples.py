"""Clips that the model generates while it trains (``logging.sample_interval``), by the code of generation.

Generation reads the very weights that train, so all it needs is room for its cache, and it draws no random numbers but
its own: training goes on as if nothing had been. The tensor-parallel ranks of the first replica generate. The others
wait for them on the host, so that a watchdog sees them alive and no collective of a GPU runs into its timeout.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from cosmos_mcore.config.derived import TEXT_LENGTH, run_dir
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.loader import Batch
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.pipeline import pixel_frames
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.video_io import DEFAULT_FPS, frame_rate, write_mp4
from cosmos_mcore.inference.weights import weights_of
from cosmos_mcore.parallel.agreement import from_rank_zero, largest
from cosmos_mcore.training.pictures import PictureThread, frames_of
from cosmos_mcore.training.setup import Run

logger = logging.getLogger(__name__)

_FOLDER = "samples"
_ROOM = 2e9  # bytes that generation needs on a GPU beside its cache: the pass over the prompt, the graph


class Samples:
    """Continues the first validation clip, or without validation the first training clip, always the same one.

    Training waits for the ids and for the tokenizer, which could need memory that a step has in use; files are written
    in a thread. A clip that cannot be read, memory that is short, and a file that cannot be written cost the sample
    only. An error in between ends the run as one in a step does: a rank that went on alone would leave the others
    waiting.

    Args:
        run: the run, not in pipeline stages.
        on_written: told, in the thread, the iteration and the PNG of each clip.
    """

    def __init__(self, run: Run, on_written: Callable[[int, Path], None]) -> None:
        self._run, self._on_written = run, on_written
        self._folder = run_dir(run.config) / _FOLDER
        self._loader = run.loader if run.validation is None else run.validation
        self._generates = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        self._thread = PictureThread("sample", run.device) if dist.get_rank() == 0 else None
        self._source: tuple[Clip, Batch] | None = None
        # Without conditioning frames in training there still has to be something to continue.
        latents = max(1, run.config.model.num_condition_latents)
        self._num_given = pixel_frames(latents, run.layout.pixel_chunk_duration)
        self._prompt_length = latents * math.prod(run.layout.latent_shape[1:])

    def take(self, iteration: int) -> None:
        """Generates a clip and starts writing it. All ranks."""
        began = time.perf_counter()
        run, speaks = self._run, self._thread is not None
        prompt = from_rank_zero(self._read_prompt())
        if prompt is None:
            return
        run.gather_weights()
        if largest(int(self._generates and not self._has_room()))[0]:
            if speaks:
                logger.warning("iteration %d: no sample, the GPU's memory is too full for its cache", iteration)
            return
        started = time.perf_counter()
        ids = self._generate(*prompt) if self._generates else None
        seconds = time.perf_counter() - started
        if speaks and ids is not None:
            self._start_writing(iteration, ids)
        largest(0)  # here the other ranks wait
        logger.info(
            "iteration %d sample: %d tokens in %.1f s; training stood still for %.1f s",
            *(iteration, run.layout.num_tokens - self._prompt_length, seconds, time.perf_counter() - began),
        )

    def close(self) -> None:
        """Finishes the files under way."""
        if self._thread is not None:
            self._thread.close()

    def _read_prompt(self) -> tuple[Tensor, Tensor | None] | None:
        """Ids [1, P] of the given frames and the embedding of the text, on rank 0.

        None elsewhere, and if the clip cannot be read or the last one is not written yet.
        """
        if self._thread is None:
            return None
        if self._thread.busy:  # a slow disk must not hold up training
            logger.info("the sample before is not written yet, so there is none now; raise logging.sample_interval")
            return None
        with self._thread.attempt():
            if self._source is None:
                self._source = self._loader.read(0)
            _, (ids, context) = self._source
            return ids[:, : self._prompt_length], context
        return None

    def _has_room(self) -> bool:
        """Whether the GPU has memory left: if one rank failed in the midst of generation, the others would hang."""
        device, arch = self._run.device, self._run.arch
        if device.type == "cpu":
            return True
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        groups = arch.num_query_groups // parallel_state.get_tensor_model_parallel_world_size()
        number = next(self._run.chunks[0].parameters()).element_size()
        length = self._run.layout.sequence_length + (TEXT_LENGTH if arch.text_to_video else 0)
        cache = 2 * arch.num_layers * groups * arch.kv_channels * length * number
        return torch.cuda.mem_get_info(device)[0] + unused >= cache + _ROOM

    def _generate(self, prompt: Tensor, text: Tensor | None) -> Tensor:
        """Ids [tokens of a clip], the prompt [1, P] in front; all tensor-parallel ranks of the replica."""
        run, first = self._run, int(self._run.layout.begin_of_video)
        prompt = F.pad(prompt.to(run.device, torch.int64), (first, 0), value=run.arch.vocab_size)
        group = parallel_state.get_tensor_model_parallel_group()
        network = CachedNetwork(weights_of(run.chunks[0], run.arch), run.arch, run.layout, group)
        generator = TokenGenerator(network, 1, SamplingOptions(), 0 if text is None else text.size(1))
        missing = run.layout.num_tokens - self._prompt_length
        ids = generator(prompt, missing, [run.config.training.seed], text)[0, first:]
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # the time to be told is that of the device
        return ids

    def _start_writing(self, iteration: int, ids: Tensor) -> None:
        assert self._thread is not None and self._source is not None
        run, (clip, truth) = self._run, self._source
        with self._thread.attempt():
            shape = (1, *run.layout.latent_shape)
            videos = [run.tokenizer.decode(one.to(run.device).view(shape))[0].cpu() for one in (truth.ids, ids)]
            self._thread.start(partial(self._write, iteration, clip, *videos))

    def _write(self, iteration: int, clip: Clip, round_trip: Tensor, generated: Tensor) -> None:
        from cosmos_mcore.inference.picture import write_strip  # brings matplotlib, which takes its time to load

        rows, fps = {"tokenizer round trip": round_trip, "generated": generated}, DEFAULT_FPS
        video = frames_of(self._loader, clip)
        if video is not None:
            rows, fps = {"input": video.cpu(), **rows}, frame_rate(clip.path, self._run.config.data.frame_stride)
        name = f"iter_{iteration:09d}"
        write_mp4(self._folder / f"{name}.mp4", generated, fps)
        self._on_written(iteration, write_strip(self._folder / f"{name}_strip.png", rows, self._num_given, fps))
