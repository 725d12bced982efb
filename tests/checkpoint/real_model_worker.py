"""One rank of ``test_real_model.py``: ``python -m tests.checkpoint.real_model_worker TP PP FOLDER``.

Loads ``FOLDER/converted`` into the real model, compares every parameter with ``FOLDER/model.pt``, and saves what was
loaded, with an optimizer, under ``FOLDER/saved``. Then resumes from ``FOLDER/resume`` and saves that under
``FOLDER/resumed``.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mcore.checkpoint.distributed import load_checkpoint, save_checkpoint
from cosmos_mcore.checkpoint.load import load_any_weights, named_entries
from cosmos_mcore.checkpoint.names import local_value
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.training.optimizer import build_optimizer, update
from cosmos_mcore.training.setup import wrap_for_data_parallel


def main(tensor_parallel_size, pipeline_parallel_size, folder):
    """Writes FOLDER/names_{rank}.json."""
    config = RunConfig()
    config.parallel.tensor_model_parallel_size = tensor_parallel_size
    config.parallel.pipeline_model_parallel_size = pipeline_parallel_size
    device = initialize(config.parallel, seed=0)
    original = open_checkpoint(folder / "model.pt")
    arch = original.arch
    layout = VideoLayout(1, (1, 4, 4), arch.text_to_video, 16 + arch.text_to_video, 0)
    chunks = build_model(config, arch, layout, device)
    load_any_weights(folder / "converted", arch, chunks)
    rank, names = parallel_state.get_tensor_model_parallel_rank(), []
    for entry, parameter in named_entries(chunks, arch):
        assert torch.equal(parameter, local_value(original.read, entry, arch, rank, tensor_parallel_size)), entry.ours
        names.append(entry.ours)
    (folder / f"names_{dist.get_rank()}.json").write_text(json.dumps(names))

    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    optimizer.reload_model_params()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a step that makes moments and leaves the weights
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(1.0)
    update(optimizer)
    save_checkpoint(folder / "saved", 1, chunks, optimizer, {"iteration": 1, "consumed_samples": 1})

    progress = load_checkpoint(folder / "resume", chunks, optimizer)
    save_checkpoint(folder / "resumed", progress["iteration"], chunks, optimizer, progress)
    shut_down()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
