"""Networks of random weights, made without a checkpoint."""

from types import SimpleNamespace

import torch

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.inference.weights import Weights, weights_from
from cosmos_mcore.model.init import initial_tensor

NO_GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # a process group of one, without a store


def random_weights(arch, fp8=False, seed=0, device="cpu", dtype=torch.float32) -> Weights:
    """The start weights of training."""
    shapes = original_shapes(arch)

    def get(name):
        return initial_tensor(name, shapes[name], arch, seed, torch.device("cpu"))

    return weights_from(get, arch, torch.device(device), dtype, fp8)


def text_model_weights(arch) -> dict[str, torch.Tensor]:
    """Start weights, under the original's names, of a model that listens: untrained ones hardly heed the text."""
    shapes, cpu = original_shapes(arch), torch.device("cpu")
    weights = {name: initial_tensor(name, shape, arch, 0, cpu) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        if "cross_attention.w" in name:
            tensor.normal_(std=2 * tensor.size(-1) ** -0.5, generator=torch.Generator().manual_seed(len(name)))
    return weights


def write_guardrail(folder) -> None:
    """A package ``cosmos_guardrail`` without weights, which says whether the hub's package may download any."""
    folder.mkdir()
    (folder / "cosmos_guardrail.py").write_text(
        "from huggingface_hub import constants\n\n\n"
        "class CosmosSafetyChecker:\n"
        "    def __init__(self):\n"
        "        raise OSError(f'hub offline: {constants.HF_HUB_OFFLINE}')\n"
    )
