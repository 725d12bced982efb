"""What one rank of ``test_loader.py`` runs: ``python -m tests.data.loader_worker VIDEOS FOLDER``.

Both ranks form one replica. The second one gets an index of files that do not exist: it must not need them. After a
few steps the first rank fails and leaves.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.data.index import ClipIndex, Clips, index_clips
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.tokenizer.build import build_tokenizer
from tests.data.test_loader import CPU, loader_threads, small_config


def main(videos, folder):
    """Writes FOLDER/RANK.json."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    config = small_config(videos)
    index = index_clips(config.data)
    if rank == 1:
        index = ClipIndex(Clips([("missing.mp4", len(index.clips))], config.data), [])
    found = {"error": None}
    with ClipLoader(
        index,
        ClipSampler(len(index.clips), 5),
        build_tokenizer(config, CPU),
        config,
        derive_video_layout(config),
        data_parallel_rank=0,
        data_parallel_size=1,
        replica_group=dist.group.WORLD,
        device=CPU,
        consumed_samples=8,
    ) as loader:
        found["ids"] = torch.stack([loader.next() for _ in range(5)]).tolist()
        found["consumed_samples"] = loader.consumed_samples
        found["threads"] = loader_threads()
        loader._tokenizer = None if rank == 0 else loader._tokenizer
        try:
            for _ in range(10):
                loader.next()
        except Exception as error:
            found["error"] = type(error).__name__
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # after the failure of a peer, gloo may abort when Python tidies up


if __name__ == "__main__":
    main(*sys.argv[1:])
