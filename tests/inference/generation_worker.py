"""What one process of ``test_generate.py`` runs: ``python -m tests.inference.generation_worker FOLDER``."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from cosmos_mcore.checkpoint.load import set_weights
from cosmos_mcore.config import RunConfig
from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.weights import weights_of
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.tokenizer.haar import HaarTokenizer
from tests.conftest import GOLDEN
from tests.golden_model import golden_model
from tests.inference.models import text_model_weights

GREEDY, DRAWN = SamplingOptions(0), SamplingOptions(1.0, 0.9)


def error_of(function, *arguments):
    """The message of the ValueError that a call must end in."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


@torch.no_grad()
def tokens(name, config, rank):
    """Generation with a golden model, beside Megatron's forward pass of what was generated."""
    case, arch, layout, (model,) = golden_model(GOLDEN / f"{name}.pt", config)
    model.eval()
    network = CachedNetwork(weights_of(model, arch), arch, layout, parallel_state.get_tensor_model_parallel_group())
    prompt, text = case["tokens"][:, :24], case["context"]
    prompt = torch.cat((prompt, prompt[:1].flip(1)))
    text = None if text is None else torch.cat((text, text[:1]))
    length = 0 if text is None else text.size(1)
    new = 20
    results = {}
    for batch in (1, 3):
        generator = TokenGenerator(network, batch, GREEDY, length)
        rows = slice(0, batch), None if text is None else text[:batch]
        ids = generator(prompt[rows[0]], new, [0] * batch, rows[1])
        context = None if rows[1] is None else rows[1].transpose(0, 1)
        logits = gather_from_tensor_model_parallel_region(model(ids, context=context)).transpose(0, 1)
        results[f"greedy {batch}"] = {"ids": ids, "logits": logits, "new": new}
    # The cache's logits of the last positions of the golden tokens, one by one.
    cache, given = network.new_cache(2, length), case["tokens"]
    first = given.size(1) - 10
    steps = [network.prefill(given[:, :first], cache, case["context"])]
    steps += [network.decode(given[:, at], torch.tensor([at]), cache) for at in range(first, given.size(1))]
    results["cached logits"] = torch.stack(steps, 1)
    # A seed of its own on every rank: only the first rank's draw may count.
    drawn = TokenGenerator(network, 3, DRAWN, length)
    results["drawn"] = drawn(prompt, new, [rank, 7, 7], text)
    single = TokenGenerator(network, 1, DRAWN, length)
    row = None if text is None else text[1:2]
    results["drawn alone"] = single(prompt[1:2], new, [7], row)
    results["too long"] = error_of(single, prompt[:1], network.capacity - 23, [0], row)
    results["other batch"] = error_of(single, prompt, new, [0, 0, 0], text)
    results["text"] = error_of(network.prefill, prompt, cache, None if text is not None else torch.zeros(3, 2, 8))
    model.post_process = False
    results["staged"] = error_of(weights_of, model, arch)
    return results


@torch.no_grad()
def video_to_world(config, rank):
    """Frames and text to ids, with the begin-of-video token that the golden case lacks, beside Megatron's pass."""
    arch, layout = (
        ModelArch(2, 64, 96, 4, 2, 16, embedding_size=64064, context_size=8),
        VideoLayout(17, (3, 2, 3), True, 19, 6),
    )
    weights = text_model_weights(arch)
    chunks = build_model(config, arch, layout, torch.device("cpu"))
    set_weights(chunks, arch, weights.__getitem__)
    network = CachedNetwork(weights_of(chunks[0], arch), arch, layout, parallel_state.get_tensor_model_parallel_group())
    pipeline = VideoPipeline(network, lambda: HaarTokenizer(17))
    draw = torch.Generator().manual_seed(1)
    given = torch.rand(1, 3, 9, 32, 48, generator=draw).repeat(3, 1, 1, 1, 1) * 2 - 1
    text = torch.randn(2, 5, 8, generator=draw)[[0, 1, 0]]
    made = pipeline.continue_videos(given, GREEDY, [0, 0, 0], text=text)
    assert len(made) == (3 if rank == 0 else 0)
    ids = torch.stack([each.ids[0] for each in made]) if made else torch.empty(3, 3, 2, 3, dtype=torch.int64)
    dist.broadcast(ids, 0)
    tokens = torch.cat((torch.full((3, 1), arch.vocab_size), ids.flatten(1)), 1)
    logits = gather_from_tensor_model_parallel_region(chunks[0](tokens, context=text.transpose(0, 1))).transpose(0, 1)
    refused = error_of(pipeline.continue_videos, given, GREEDY, [0, 0, 0])
    return {"ids": ids, "choices": logits[:, 12:-1].argmax(-1), "without text": refused}


def main():
    """Saves this rank's results as FOLDER/RANK.pt."""
    config = RunConfig()
    config.precision.dtype = "fp32"
    config.parallel.tensor_model_parallel_size = int(os.environ["WORLD_SIZE"])
    initialize(config.parallel, seed=0)
    rank = int(os.environ["RANK"])
    results = {name: tokens(name, config, rank) for name in ("base", "yarn", "video2world")}
    results["with prompts"] = video_to_world(config, rank)
    torch.save({**results}, Path(sys.argv[1]) / f"{rank}.pt")
    shut_down()


if __name__ == "__main__":
    main()
