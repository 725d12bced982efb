"""Networks of random weights, made without a checkpoint."""

import torch

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.inference.weights import Weights, weights_from
from cosmos_mcore.model.init import initial_tensor


def random_weights(arch, fp8=False, seed=0) -> Weights:
    """The start weights of training, in float32 on the CPU."""
    shapes = original_shapes(arch)
    device = torch.device("cpu")
    return weights_from(
        lambda name: initial_tensor(name, shapes[name], arch, seed, device), arch, device, torch.float32, fp8
    )
