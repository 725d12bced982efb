"""Batches of token ids for each optimizer step, read ahead of training."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
import torch.distributed
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.decode import build_decoder
from cosmos_mcore.data.index import ClipIndex, SkippedFile
from cosmos_mcore.data.mp4 import UnreadableVideoError
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.data.transforms import normalize, resize_and_crop
from cosmos_mcore.tokenizer.base import VideoTokenizer

logger = logging.getLogger(__name__)


class ClipLoader:
    """The token ids of each step's clips, the same on every rank of a model replica; a context manager.

    The first rank of the replica reads, decodes and tokenizes the clips of the next steps in background threads and
    broadcasts their ids; frames never cross ranks, and the other ranks need no files and start no threads.
    Step n of the run takes the samples n·G to n·G + G - 1 of the sampler's stream (G: global batch size), replica r
    its r-th contiguous part, so what a step sees depends neither on the layout nor on interruptions. A clip that
    cannot be read is replaced by another one that depends on the sample's position alone.
    """

    def __init__(
        self,
        index: ClipIndex,
        sampler: ClipSampler,
        tokenizer: VideoTokenizer,
        config: RunConfig,
        layout: VideoLayout,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        replica_group: torch.distributed.ProcessGroup | None,
        device: torch.device,
        consumed_samples: int = 0,
    ) -> None:
        """Starts reading ahead.

        Args:
            index: the clips; read on the first rank of the replica only.
            sampler: the order of the clips.
            tokenizer: turns clips into ids; called from several threads.
            config: read are ``data`` and ``training.global_batch_size``.
            layout: shape of one clip's ids.
            data_parallel_rank: which replica this rank belongs to.
            data_parallel_size: number of replicas; divides the global batch size.
            replica_group: the ranks of this replica (None: this rank alone).
            device: where the tokenizer runs and the batches go.
            consumed_samples: samples that all replicas together have seen before this step.
        """
        assert config.training.global_batch_size % data_parallel_size == 0
        self._clips, self._sampler, self._tokenizer, self._layout = index.clips, sampler, tokenizer, layout
        self._height, self._width = config.data.height, config.data.width
        self._global_batch_size = config.training.global_batch_size
        self._batch_size = self._global_batch_size // data_parallel_size
        self._first_of_batch = data_parallel_rank * self._batch_size
        self._group, self._device = replica_group, device
        self._decoder = build_decoder(config.data)
        self.consumed_samples = consumed_samples
        self.skipped: list[SkippedFile] = []
        self._undrained: list[SkippedFile] = []
        self._unreadable: set[int] = set()  # numbers of clips that failed
        self._lock = threading.Lock()

        self._steps: deque[list[Future[Tensor]]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._next_step_to_read = consumed_samples
        self._steps_ahead = config.data.prefetch_steps
        if replica_group is None or replica_group.rank() == 0:
            self._report(index.skipped, log=data_parallel_rank == 0)  # every replica has found the same ones
            self._pool = ThreadPoolExecutor(config.data.num_workers, thread_name_prefix="clip")
            self._read_ahead(self._steps_ahead)

    def __enter__(self) -> ClipLoader:
        """Returns the loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the background threads."""
        self.close()

    def next(self) -> Tensor:
        """Waits for the clips of the next step and moves on by one step.

        Returns:
            Ids [global_batch_size / data_parallel_size, tokens of a clip], int64, on the device.

        Raises:
            ValueError: if no clip can be read any more.
        """
        if self._pool is not None:
            self._read_ahead(self._steps_ahead + 1)
            ids = torch.stack([clip.result() for clip in self._steps.popleft()]).to(self._device)
        else:
            ids = torch.empty((self._batch_size, self._layout.num_tokens), dtype=torch.int32, device=self._device)
        if self._group is not None and self._group.size() > 1:
            source = torch.distributed.get_global_rank(self._group, 0)
            torch.distributed.broadcast(ids, src=source, group=self._group)
        self.consumed_samples += self._global_batch_size
        return ids.to(torch.int64)

    def drain_skipped(self) -> list[SkippedFile]:
        """The files that were found unusable since the last call; each is reported once."""
        with self._lock:
            drained, self._undrained = self._undrained, []
        return drained

    def close(self) -> None:
        """Drops what was read ahead and waits for the background threads to end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, steps: int) -> None:
        assert self._pool is not None
        while len(self._steps) < steps:
            first = self._next_step_to_read + self._first_of_batch
            clips = self._sampler.clip_indices(first, self._batch_size)
            self._steps.append([self._pool.submit(self._load, first + i, clip) for i, clip in enumerate(clips)])
            self._next_step_to_read += self._global_batch_size

    def _load(self, position: int, number: int) -> Tensor:
        """Ids [tokens] int32 on the CPU of the sample at ``position``: clip ``number`` or, if unreadable, another."""
        for candidate in itertools.chain([number], self._sampler.replacements(position)):
            ids = self._try_tokenize(candidate)
            if ids is not None:
                return ids
        last = self.skipped[-1]
        raise ValueError(
            f"no clip can be read any more: all {len(self._clips)} have failed, the last one in "
            f"{last.path} ({last.reason}); check data.path"
        )

    def _try_tokenize(self, number: int) -> Tensor | None:
        if number in self._unreadable:
            return None
        clip = self._clips[number]
        try:
            frames = self._decoder.decode(clip)
        except UnreadableVideoError as error:
            self._unreadable.add(number)
            self._report([SkippedFile(clip.path, str(error))])
            return None
        video = normalize(resize_and_crop(frames, self._height, self._width).to(self._device))
        ids = self._tokenizer.encode(video.unsqueeze(0)).squeeze(0)
        assert tuple(ids.shape) == self._layout.latent_shape, (ids.shape, self._layout.latent_shape)
        return ids.flatten().to(device="cpu", dtype=torch.int32)

    def _report(self, files: Iterable[SkippedFile], log: bool = True) -> None:
        """Remembers each bad file once: another clip of it may fail later, in another thread."""
        with self._lock:
            known = {file.path for file in self.skipped}
            new = [file for file in files if file.path not in known]
            self.skipped += new
            self._undrained += new
        for file in new if log else ():
            logger.warning("skipped %s: %s", file.path, file.reason)
