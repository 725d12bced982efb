"""Small stand-ins for the released tokenizer files: the same names, constants and entry points, other weights."""

import warnings

import torch
from torch import nn

from cosmos_mcore.tokenizer import fsq
from cosmos_mcore.tokenizer.networks import Decoder, Encoder, NetworkSize

SMALL = NetworkSize(spatial_compression=16, latent_channels=6, channels=4)


class _Constants(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


def _quantizer():
    levels, basis = torch.tensor(fsq.LEVELS, dtype=torch.int32), torch.tensor(fsq.BASIS, dtype=torch.int32)
    return _Constants(_levels=levels, _basis=basis, implicit_codebook=torch.zeros(8, 6))


class EncoderFile(Encoder):
    """As exported: gives (ids, codes, loss)."""

    def __init__(self, size=SMALL):
        super().__init__(size)
        wavelets = torch.tensor([0.70703125, 0.70703125])
        buffers = {"wavelets": wavelets, "_arange": torch.arange(2), "patch_size_buffer": torch.tensor([4])}
        self.encoder.add_module("patcher3d", _Constants(**buffers))
        self.quantizer = _quantizer()

    def forward(self, video):
        ids = fsq.quantize(super().forward(video))
        return ids, fsq.ids_to_codes(ids), torch.zeros(())


class _Inverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = _quantizer()

    def forward(self, ids):
        return fsq.ids_to_codes(ids)


class DecoderFile(Decoder):
    """As exported: takes ids."""

    def __init__(self, size=SMALL):
        super().__init__(size)
        self.inv_quant = _Inverse()
        self.decoder.add_module("unpatcher3d", _Constants(wavelets=torch.zeros(2), _arange=torch.arange(2)))

    def forward(self, ids):
        return super().forward(self.inv_quant(ids))


def seeded(network, seed=0):
    """Gives a network random weights that keep its activations in range."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=draw)
        gain = name.endswith("norm.weight")
        fan = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data = 1 + 0.1 * values if gain else 1.5 * values * fan**-0.5
    return network.requires_grad_(False).eval()


def write_released(folder, encoder=None, decoder=None, frames=9, height=32, width=32, device="cpu"):
    """Writes ``encoder.jit`` and ``decoder.jit``, traced at one size as the released ones are; returns the folder.

    A trace runs on the kind of device that it was made on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder, decoder = encoder or seeded(EncoderFile()), decoder or seeded(DecoderFile(), 1)
    video = torch.zeros(1, 3, frames, height, width, device=device)
    ids = torch.zeros(1, (frames + 7) // 8, height // 16, width // 16, dtype=torch.int32, device=device)
    for name, module, example in (("encoder.jit", encoder, video), ("decoder.jit", decoder, ids)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes become constants, as in the released files
            traced = torch.jit.trace(module.to(device), example, check_trace=False)
        torch.jit.save(traced, str(folder / name))
    return folder
