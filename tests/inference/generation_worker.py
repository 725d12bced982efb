"""What one process of ``test_generate.py`` runs: ``python -m tests.inference.generation_worker FOLDER``."""

import os
import sys
from pathlib import Path

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from cosmos_mcore.checkpoint.load import initialize_weights
from cosmos_mcore.config import RunConfig, derive_video_layout
from cosmos_mcore.inference.generate import generate_tokens
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.tokenizer.build import build_tokenizer
from tests.conftest import GOLDEN
from tests.golden_model import golden_model


def error_of(function, *arguments):
    """The message of the ValueError that a call must end in."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


def tokens(config, rank):
    """Generation with the golden model."""
    case, _, _, (model,) = golden_model(GOLDEN / "base.pt", config)
    model.eval()
    prompt, new = case["tokens"][:, :24], case["tokens"].size(1) - 24
    greedy = generate_tokens(model, prompt, new, SamplingOptions(0))
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(model(greedy)).transpose(0, 1)
    # A seed of its own on every rank: only the first rank's draw may count.
    sampled = generate_tokens(model, prompt, new, SamplingOptions(1.0, 0.9), torch.Generator().manual_seed(rank))
    too_long = error_of(generate_tokens, model, prompt, new + 1, SamplingOptions(0))
    model.post_process = False
    staged = error_of(generate_tokens, model, prompt, new, SamplingOptions(0))
    return {
        "prompt_length": prompt.size(1),
        "greedy": greedy,
        "logits": logits,
        "sampled": sampled,
        "too_long": too_long,
        "staged": staged,
    }


def videos(config):
    """Continuation of a clip with a tiny model of random weights."""
    config.model.preset = "tiny"
    config.data.height, config.data.width, config.data.num_frames = 32, 48, 25
    arch, layout, device = resolve_arch(config.model), derive_video_layout(config), torch.device("cpu")
    chunks = build_model(config, arch, layout, device)
    initialize_weights(chunks, arch, seed=0)
    tokenizer = build_tokenizer(config, device)
    pipeline = VideoPipeline(chunks[0].eval(), tokenizer, layout)
    clip = torch.rand(1, 3, 25, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    options = SamplingOptions(1.0, 0.8)
    results = {"clip_ids": tokenizer.encode(clip)[0]}
    for name, frames, seed in (("one", 1, 0), ("nine", 9, 0), ("nine_again", 9, 0), ("nine_other", 9, 1)):
        made = pipeline.continue_video(clip[:, :, :frames], options, seed)
        results[name] = {"ids": made.ids, "video": made.video, "num_given": made.num_given}
    results["decoded"] = tokenizer.decode(made.ids[None])[0]
    results["bad"] = [
        error_of(pipeline.continue_video, clip[:, :, :frames, :height], options, 0)
        for frames, height in ((8, 32), (25, 32), (9, 16))
    ]
    return results


def main():
    """Saves this rank's results as FOLDER/RANK.pt."""
    config = RunConfig()
    config.precision.dtype = "fp32"
    config.parallel.tensor_model_parallel_size = int(os.environ["WORLD_SIZE"])
    initialize(config.parallel, seed=0)
    rank = int(os.environ["RANK"])
    torch.save({"tokens": tokens(config, rank), "videos": videos(config)}, Path(sys.argv[1]) / f"{rank}.pt")
    shut_down()


if __name__ == "__main__":
    main()
