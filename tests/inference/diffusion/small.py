"""Small diffusion decoders: the golden one, one with random weights, and the released files with either."""

import io
import warnings
from functools import cache

import torch
from torch import nn

from cosmos_mcore.inference.diffusion.network import DiffusionNetwork, DiffusionSize
from cosmos_mcore.inference.diffusion.weights import NETWORK_FOLDER, TOKENIZER_FOLDER
from cosmos_mcore.tokenizer.networks import Decoder, NetworkSize
from tests.tokenizer.released import seeded

SMALL = DiffusionSize(channels=48, blocks=2, heads=2, adaln_rank=8, vocab_size=50, token_channels=4, text_channels=16)


def golden_network(golden, group=None):
    """The network of ``diffusion_decoder.pt`` in float32."""
    state = {name.removeprefix("net."): tensor.float() for name, tensor in golden["state_dict"].items()}
    del state["pos_embedder.seq"]
    config = golden["config"]
    vocab, token_channels = state["token_embedder.weight"].shape
    size = DiffusionSize(
        config["model_channels"], config["num_blocks"], config["num_heads"], config["adaln_lora_dim"], vocab,
        token_channels, config["crossattn_emb_channels"],
    )  # fmt: skip
    network = DiffusionNetwork(size, group).requires_grad_(False).eval()
    network.load_state_dict(state)
    return network


def random_network(size=SMALL, seed=0, group=None):
    """All weights random, those that training would start at zero, too."""
    draw = torch.Generator().manual_seed(seed)
    network = DiffusionNetwork(size, group).requires_grad_(False).eval()
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=draw)
        parameter.data = 1.5 + 0.2 * values if parameter.ndim == 1 else values * parameter.size(-1) ** -0.5
        if "embedder" in name:
            parameter.data *= 2
    return network


def write_network(folder, state, text):
    """``model.pt`` and ``aux_vars.pt``."""
    (folder / NETWORK_FOLDER).mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / NETWORK_FOLDER / "model.pt")
    torch.save({"context": text}, folder / NETWORK_FOLDER / "aux_vars.pt")


def write_released(folder, size=SMALL):
    """All files of a small decoder; returns the folder."""
    state = {f"net.{name}": tensor.bfloat16() for name, tensor in random_network(size).state_dict().items()}
    state["net.pos_embedder.seq"] = torch.arange(128).bfloat16()
    write_network(folder, state, torch.randn(1, 7, size.text_channels, generator=torch.Generator().manual_seed(3)))
    write_continuous(folder / TOKENIZER_FOLDER)
    return folder


def write_continuous(folder):
    """``decoder.jit`` with the released names and constants, and ``mean_std.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decoder.jit").write_bytes(_traced_decoder())
    draw = torch.Generator().manual_seed(5)
    mean, std = torch.randn(1, 16, 10, 1, 1, generator=draw), 0.5 + torch.rand(1, 16, 10, 1, 1, generator=draw)
    torch.save((mean, std), folder / "mean_std.pt")
    return folder


class _Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("wavelets", torch.tensor([0.70703125, 0.70703125]))
        self.register_buffer("_arange", torch.arange(2))


@cache
def _traced_decoder():
    decoder = Decoder(NetworkSize(8, 16, channels=4))
    decoder.decoder.add_module("unpatcher3d", _Constants())
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.save(torch.jit.trace(seeded(decoder, 2), torch.zeros(1, 16, 2, 2, 2), check_trace=False), file)
    return file.getvalue()
