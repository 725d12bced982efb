"""What one process of ``test_golden.py`` runs: ``python -m tests.model.golden_worker FOLDER``."""

import os
import sys
from pathlib import Path

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from cosmos_mcore.checkpoint.load import named_entries
from cosmos_mcore.checkpoint.names import unfuse
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.training.optimizer import build_optimizer, set_learning_rate
from cosmos_mcore.training.setup import wrap_for_data_parallel
from cosmos_mcore.training.step import LossPositions, train_step
from tests.conftest import GOLDEN
from tests.golden_model import golden_model


def gradients(chunks, arch):
    """This rank's gradients under the original's names, each with the axis that tensor parallelism cuts."""
    return {
        name: (part.clone(), entry.split_axis)
        for entry, parameter in named_entries(chunks, arch)
        for name, part in zip(entry.originals, unfuse(parameter.main_grad, entry, arch), strict=True)
    }


def train(name, micro_batch_size, sequence_parallel, distributed_optimizer):
    """Logits and five steps of a golden model through the code that trains."""
    config = RunConfig()
    config.precision.dtype = "fp32"
    config.parallel.tensor_model_parallel_size = int(os.environ["WORLD_SIZE"])
    config.parallel.sequence_parallel = sequence_parallel
    config.parallel.use_distributed_optimizer = distributed_optimizer
    case, arch, layout, chunks = golden_model(GOLDEN / f"{name}.pt", config)
    settings = case["adamw"]
    config.optimizer.lr, config.optimizer.adam_eps = settings["lr"], settings["eps"]
    config.optimizer.adam_beta1, config.optimizer.adam_beta2 = settings["betas"]
    config.optimizer.weight_decay, config.optimizer.clip_grad = settings["weight_decay"], settings["clip"]

    text = case["context"]
    with torch.no_grad():
        parts = chunks[0](case["tokens"], context=None if text is None else text.transpose(0, 1))
        logits = gather_from_tensor_model_parallel_region(parts).transpose(0, 1)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    optimizer.reload_model_params()
    set_learning_rate(optimizer, settings["lr"])

    first_gradients, prepare_grads = {}, optimizer.prepare_grads

    def recording_prepare_grads():
        if not first_gradients:
            first_gradients.update(gradients(chunks, arch))
        return prepare_grads()

    optimizer.prepare_grads = recording_prepare_grads
    positions = LossPositions(layout, arch, config.model.z_loss_coeff, torch.device("cpu"))
    steps = [
        train_step(model, optimizer, positions, case["tokens"], micro_batch_size, text).read() for _ in case["losses"]
    ]
    return {
        "logits": logits,
        "gradients": first_gradients,
        "ce": [result.loss for result in steps],
        "z": [result.z_loss for result in steps],
        "grad_norm": steps[0].grad_norm,
    }


def main():
    """Saves this rank's results as FOLDER/RANK.pt."""
    config, world_size = RunConfig(), int(os.environ["WORLD_SIZE"])
    config.parallel.tensor_model_parallel_size = world_size
    initialize(config.parallel, seed=0)
    results = {
        "base, two micro-batches": train("base", 1, False, False),
        "base, distributed optimizer": train("base", 2, False, True),
        "yarn": train("yarn", 2, False, True),
        "video2world": train("video2world", 1, False, True),
    }
    if world_size > 1:
        results["base, sequence parallel"] = train("base", 1, True, True)
        results["video2world, sequence parallel"] = train("video2world", 2, True, True)
    torch.save(results, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    shut_down()


if __name__ == "__main__":
    main()
