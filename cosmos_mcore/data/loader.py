"""Token ids, and the texts that go with them, for each optimizer step, read ahead of training."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.clip_tokens import build_clip_tokens
from cosmos_mcore.data.exchange import Exchange
from cosmos_mcore.data.index import Clip, ClipIndex, SkippedFile
from cosmos_mcore.data.mp4 import UnreadableVideoError
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.text.cache import EmbeddingCache
from cosmos_mcore.tokenizer.base import VideoTokenizer

_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.002


class Batch(NamedTuple):
    """What one step of a model replica learns from.

    Attributes:
        ids: [B, tokens of a clip].
        context: embeddings [B, text length, text width] of the clips' prompts, bf16; None for models without text.
    """

    ids: Tensor
    context: Tensor | None = None

    def pinned(self) -> Batch:
        """A copy that travels to the GPU while the host goes on."""
        return Batch(self.ids.pin_memory(), None if self.context is None else self.context.pin_memory())

    def first(self, count: int) -> Batch:
        """The first clips of the batch."""
        return Batch(self.ids[:count], None if self.context is None else self.context[:count])


@dataclass
class _Step:
    """One step of the replica: number of its first clip since the start, and the clips that this rank reads."""

    first: int
    mine: list[Future[Tensor]]


class ClipLoader:
    """The token ids of each step's clips, the same on every rank of a model replica; a context manager.

    The ranks of a replica take the clips of the coming steps in turn, read, decode and tokenize them in background
    threads, and send each other the ids, also in the background; frames never cross ranks. A step waits for nothing
    as long as reading keeps up.
    Step n of the run takes the samples n·G to n·G + G - 1 of the sampler's stream (G: global batch size), replica r
    its r-th contiguous part, so what a step sees depends neither on the layout nor on interruptions. A clip that
    cannot be read is replaced by another one that depends on the sample's position alone. With the ids travels the
    clip's number, which tells each rank the prompt; its embedding comes from a cache on disk.
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
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        """Starts reading ahead.

        Args:
            index: the clips.
            sampler: the order of the clips.
            tokenizer: turns clips into ids; called from several threads.
            config: read are ``data``, ``job`` (for the token cache's place) and ``training.global_batch_size``.
            layout: shape of one clip's ids.
            data_parallel_rank: which replica this rank belongs to.
            data_parallel_size: number of replicas; divides the global batch size.
            replica_group: the ranks of this replica, through gloo (None: this rank alone); loaders may share it if all
                ranks open them in the same order.
            device: where the tokenizer runs and the batches go.
            consumed_samples: samples that all replicas together have seen before this step.
            embeddings: of the clips' prompts, which the index must have then; None: batches have no context.

        Raises:
            ValueError: if the decoder is not available, or the token cache was made with other settings.
        """
        assert config.training.global_batch_size % data_parallel_size == 0
        assert len(index.clips) < 2**31  # a clip's number travels as one of the ids
        self._clips, self._sampler, self._embeddings = index.clips, sampler, embeddings
        self._clip_tokens = build_clip_tokens(config, tokenizer, device)
        self._global_batch_size = config.training.global_batch_size
        self._batch_size = self._global_batch_size // data_parallel_size
        self._first_of_batch = data_parallel_rank * self._batch_size
        self._device = device
        self.consumed_samples = consumed_samples
        self.skipped: dict[str, SkippedFile] = {}
        self._undrained: list[SkippedFile] = []
        self._named: set[str] = set()
        self._unreadable: set[int] = set()  # numbers of clips that failed
        self._lock = threading.Lock()

        self._exchange = Exchange(replica_group, layout.num_tokens + 1)
        ahead = config.data.prefetch_steps
        self._shared_ahead = ahead
        # With fewer clips in a step than ranks, a rank has a clip in every few steps only and must look further ahead.
        self._read_ahead = ahead * -(-self._exchange.size // self._batch_size)
        self._next_step_to_read, self._clips_dealt = consumed_samples, 0
        self._reading: deque[_Step] = deque()  # steps that are read, and not yet shared
        self._sharing: queue.Queue[_Step | None] = queue.Queue()
        self._shared: queue.Queue[Batch | Exception] = queue.Queue()
        self._steps_shared = self._steps_taken = 0
        threads = max(config.data.num_workers, self._clip_tokens.parallel_clips)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clip")
        # A daemon, since a rank that has failed must be able to leave while its peers are silent.
        self._sharer = threading.Thread(target=self._share_steps, name="clip-sharer", daemon=True)
        self._sharer.start()
        self._report(index.skipped)
        self._advance(0)

    def __enter__(self) -> ClipLoader:
        """Returns the loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the background threads."""
        self.close()

    def next(self) -> Batch:
        """Takes the clips of the next step, after waiting for them if need be; the GPU is not waited for.

        Returns:
            global_batch_size / data_parallel_size clips, ids int64, on the device.

        Raises:
            ValueError: if no clip can be read any more, or an embedding is gone.
            RuntimeError: if another rank of the replica has left.
        """
        self._advance(1)
        batch = self._shared.get()
        self._steps_taken += 1
        if isinstance(batch, Exception):
            raise batch
        self.consumed_samples += self._global_batch_size
        ids = batch.ids.to(self._device, non_blocking=True).to(torch.int64)
        return Batch(ids, None if batch.context is None else batch.context.to(self._device, non_blocking=True))

    @property
    def ready_steps(self) -> int:
        """Steps whose clips lie ready at this moment."""
        return self._shared.qsize()

    @property
    def num_clips(self) -> int:
        """Clips to choose from."""
        return len(self._clips)

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether ``next`` would not have to wait; waits for the next step's clips up to ``seconds``."""
        deadline = time.monotonic() + seconds
        while not self.ready_steps:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def clip_at(self, position: int) -> Clip:
        """The clip at a position of the run's stream of samples; not its replacement, if it could not be read."""
        return self._clips[self._sampler.clip_indices(position, 1)[0]]

    def read(self, position: int) -> tuple[Clip, Batch]:
        """Reads a sample of the run's stream apart from the steps.

        Returns:
            The clip at ``position`` or, if it cannot be read, its replacement, and a batch of it alone on the CPU, ids
            int32.

        Raises:
            ValueError: if no clip can be read, or its embedding is gone.
        """
        sample = self._load(position, self._sampler.clip_indices(position, 1)[0])
        number = int(sample[-1])
        return self._clips[number], Batch(sample[None, :-1], self._context([number]))

    def video(self, clip: Clip) -> Tensor:
        """Frames [3, T, H, W] float32 in [-1, 1] on the device, as the tokenizer gets them.

        Raises:
            UnreadableVideoError: if the clip cannot be decoded, or only its ids are kept.
        """
        return self._clip_tokens.video(clip)

    def drain_skipped(self) -> list[SkippedFile]:
        """The files that this rank found unusable since the last call."""
        with self._lock:
            drained, self._undrained = self._undrained, []
        return drained

    def name_skipped(self, files: Iterable[SkippedFile]) -> list[SkippedFile]:
        """Those of the files, found by any rank, that have not been named before; each is named once in a run."""
        new: dict[str, SkippedFile] = {}
        for file in files:
            if file.path not in self._named:
                new.setdefault(file.path, file)
        self._named.update(new)
        return list(new.values())

    def close(self) -> None:
        """Drops what was read ahead and ends the background threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._sharing.put(None)
        self._sharer.join(_CLOSE_SECONDS)
        self._clip_tokens.close()

    def _advance(self, steps: int) -> None:
        """Starts reading and sharing as far ahead as is due when ``steps`` more steps are taken."""
        taken = self._steps_taken + steps
        while self._steps_shared + len(self._reading) < taken + max(self._read_ahead, self._shared_ahead):
            self._reading.append(self._start_reading())
        # All ranks come here equally often, so all of them will share the same steps.
        while self._steps_shared < taken + self._shared_ahead:
            self._sharing.put(self._reading.popleft())
            self._steps_shared += 1

    def _start_reading(self) -> _Step:
        position = self._next_step_to_read + self._first_of_batch
        first, rank = self._clips_dealt, self._exchange.rank
        clips = self._sampler.clip_indices(position, self._batch_size)
        mine = [i for i in range(self._batch_size) if self._exchange.owner(first + i) == rank]
        self._next_step_to_read += self._global_batch_size
        self._clips_dealt += self._batch_size
        return _Step(first, [self._pool.submit(self._load, position + i, clips[i]) for i in mine])

    def _share_steps(self) -> None:
        """Runs in a thread of its own until it gets None."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # or pinning memory would wake the first GPU
        while (step := self._sharing.get()) is not None:
            mine: list[Tensor] | Exception
            try:
                mine = [clip.result() for clip in step.mine]
            except CancelledError:
                mine = RuntimeError("the loader is closed")
            except Exception as error:
                mine = error
            try:
                shared = self._exchange.gather(step.first, self._batch_size, mine)
                batch = Batch(shared[:, :-1].contiguous(), self._context(shared[:, -1].tolist()))
                self._shared.put(batch.pinned() if self._device.type == "cuda" else batch)
            except Exception as error:
                self._shared.put(error)

    def _context(self, numbers: list[int]) -> Tensor | None:
        """Embeddings [B, text length, text width] of these clips' prompts."""
        if self._embeddings is None:
            return None
        texts = []
        for number in numbers:
            clip = self._clips[number]
            assert clip.prompt is not None, "an index without prompts"
            text = self._embeddings.read(clip.prompt)
            if text is None:
                raise ValueError(
                    f"the embedding of the prompt of {clip.path} is missing or damaged in {self._embeddings.folder}; "
                    "run scripts/embed_prompts.py with this config, then start the run again"
                )
            texts.append(text)
        return torch.stack(texts)

    def _load(self, position: int, number: int) -> Tensor:
        """The sample at ``position``: clip ``number`` or, if unreadable, another.

        Returns:
            The clip's ids and its number, [tokens + 1] int32, on the CPU.
        """
        for candidate in itertools.chain([number], self._sampler.replacements(position)):
            ids = self._try_load(candidate)
            if ids is not None:
                return ids
        last = list(self.skipped.values())[-1]
        raise ValueError(
            f"no clip can be read any more: all {len(self._clips)} have failed, the last one in "
            f"{last.path} ({last.reason}); check data.path"
        )

    def _try_load(self, number: int) -> Tensor | None:
        if number in self._unreadable:
            return None
        clip = self._clips[number]
        try:
            ids = self._clip_tokens.ids(clip)
        except UnreadableVideoError as error:
            self._unreadable.add(number)
            self._report([SkippedFile(clip.path, str(error))])
            return None
        return torch.from_numpy(np.append(ids, number).astype(np.int32))

    def _report(self, files: Iterable[SkippedFile]) -> None:
        """Remembers each bad file once: another clip of it may fail later, in another thread."""
        with self._lock:
            for file in files:
                if file.path not in self.skipped:
                    self.skipped[file.path] = file
                    self._undrained.append(file)
