"""What one rank of ``test_loader.py`` runs: ``python -m tests.data.loader_worker VIDEOS FOLDER BATCH``.

All ranks form one replica. Two loaders share it, at different speeds. After a few steps the first rank fails.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.data.decode import PyAVDecoder
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.tokenizer.build import build_tokenizer
from tests.data.test_loader import CPU, small_config


def main(videos, folder, batch):
    """Writes FOLDER/RANK.json."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    config = small_config(videos, global_batch_size=int(batch))
    index = index_clips(config.data)
    decoded = []
    decode = PyAVDecoder.decode
    PyAVDecoder.decode = lambda self, clip: (decoded.append((clip.path, clip.first_frame)), decode(self, clip))[1]
    found = {"error": None}

    def open_loader():
        return ClipLoader(
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
        )

    with open_loader() as loader:
        found["ids"] = torch.stack([loader.next().ids for _ in range(6)]).tolist()
        found["decoded"] = list(decoded)
        with open_loader() as other:
            found["same"] = []
            for step in range(6):
                time.sleep(0.01 * ((step + rank) % 3))
                found["same"].append(other.next().ids.tolist())
                if step % 2:
                    loader.next()
        found["consumed_samples"] = loader.consumed_samples
        if rank == 0:
            loader._clip_tokens._tokenizer = None
        try:
            for _ in range(20):
                loader.next()
        except Exception as error:
            found["error"], found["message"] = type(error).__name__, str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # after the failure of a peer, gloo may abort when Python tidies up


if __name__ == "__main__":
    main(*sys.argv[1:])
