"""One of several ranks that share the latent frames: the same numbers as alone. Usage: FOLDER, of released files."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cosmos_mcore.inference.diffusion import decoder
from cosmos_mcore.inference.diffusion.decoder import DiffusionDecoder
from tests.inference.diffusion.small import SMALL, random_network

CPU = torch.device("cpu")


@torch.no_grad()
def main(folder: Path) -> None:
    """Compares network and decoder with a process that works alone."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 8, 4, 6, generator=draw), torch.randn(1, 5, 16, generator=draw)
    tokens = torch.randint(SMALL.vocab_size, (2, 8, 2, 3), generator=draw)
    whole = random_network()(latent, tokens, text, 0.3)
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    part = random_network(group=dist.group.WORLD)(latent[:, :, mine], tokens[:, mine], text, 0.3)
    torch.testing.assert_close(part, whole[:, :, mine], atol=2e-6, rtol=0)

    decoder.noise_levels = lambda: [80.0, 1.0, 0.0]  # each step costs exchanges, and 15 prove no more than 2
    ids = torch.randint(SMALL.vocab_size, (5, 2, 3), generator=draw)
    alone = DiffusionDecoder.from_folder(folder, CPU).decode(ids, seed=4)
    shared = DiffusionDecoder.from_folder(folder, CPU, dist.group.WORLD, offload=True).decode(ids, seed=4)
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
