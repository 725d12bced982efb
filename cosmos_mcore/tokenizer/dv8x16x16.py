"""The released discrete video tokenizer, DV8x16x16 (spec/tokenizer.md).

``ReleasedTokenizer`` runs our own networks with the released weights: bfloat16 on GPUs, float32 elsewhere; patching and
quantisation are float32 everywhere. ``JitTokenizer`` runs the released files as they are.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_mcore.tokenizer.base import VideoTokenizer
from cosmos_mcore.tokenizer.causal_layers import FrameNorm
from cosmos_mcore.tokenizer.cuda_graph import capture
from cosmos_mcore.tokenizer.fsq import ids_to_codes, quantize
from cosmos_mcore.tokenizer.jit_file import read_jit_weights
from cosmos_mcore.tokenizer.networks import DECODER_NORM, DV8X16X16, ENCODER_NORM, Decoder, Encoder
from cosmos_mcore.tokenizer.released_file import check_tensors, read_channels

ENCODER_FILE, DECODER_FILE = "encoder.jit", "decoder.jit"

_VERSION = 1  # part of the fingerprint: raise it with every change that alters ids
# What tracing captured beside the weights. A bfloat16 export has rounded the wavelet, so it must not be used.
_ENCODER_CONSTANTS = {
    "encoder.patcher3d.wavelets",
    "encoder.patcher3d._arange",
    "encoder.patcher3d.patch_size_buffer",
    "quantizer._levels",
    "quantizer._basis",
    "quantizer.implicit_codebook",
}
_DECODER_CONSTANTS = {
    "decoder.unpatcher3d.wavelets",
    "decoder.unpatcher3d._arange",
    "decoder.unpatcher3d.patch_size_buffer",
    "inv_quant.quantizer._levels",
    "inv_quant.quantizer._basis",
    "inv_quant.quantizer.implicit_codebook",
}


class ReleasedTokenizer(VideoTokenizer):
    """Our networks with the weights of ``encoder.jit`` and ``decoder.jit``; thread-safe.

    Clips go through the encoder one by one. One clip fills a GPU, and its ids cannot depend on its neighbours in a
    batch: kernels chosen by batch size round differently, which changes a few ids.
    """

    def __init__(self, path: Path, pixel_chunk_duration: int, device: torch.device) -> None:
        """Loads the weights.

        Args:
            path: the folder with the two files.
            pixel_chunk_duration: frames of one chunk.
            device: where the networks run.

        Raises:
            ValueError: if a file is missing or damaged, or its tensors are not those of this tokenizer.
        """
        super().__init__(pixel_chunk_duration)
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weights = _read_weights(path / ENCODER_FILE, _ENCODER_CONSTANTS)
        self._weights = _hash_tensors(weights)
        self._encoder = self._load(path / ENCODER_FILE, weights, Encoder, ENCODER_NORM, device)
        weights = _read_weights(path / DECODER_FILE, _DECODER_CONSTANTS)
        self._decoder = self._load(path / DECODER_FILE, weights, Decoder, DECODER_NORM, device)
        encoder = self._encoder  # not self: a tokenizer in a cycle of references would keep its memory when dropped
        self._ids: Callable[[Tensor], Tensor] = lambda video: quantize(encoder(video))
        if device.type == "cuda":
            self._ids = _Graphs(self._ids)

    @property
    def fingerprint(self) -> str:
        """Version of the code, hash of the encoder's weights, dtype and chunk length."""
        dtype = str(self._dtype).removeprefix("torch.")
        return f"dv8x16x16-v{_VERSION}-{self._weights}-{dtype}-chunk{self.pixel_chunk_duration}"

    def latents(self, video: Tensor) -> Tensor:
        """The encoder's output before quantisation: [N, 3, 1+8k, H, W] to [N, 6, 1+k, H/16, W/16]."""
        with torch.no_grad():
            return self._encoder(video)

    def _encode_chunks(self, video: Tensor) -> Tensor:
        return torch.cat([self._ids(clip) for clip in video.split(1)])

    def _decode_chunks(self, ids: Tensor) -> Tensor:
        return torch.cat([self._decoder(ids_to_codes(clip)) for clip in ids.split(1)])

    def _load(
        self,
        path: Path,
        weights: Mapping[str, Tensor],
        kind: type[Encoder] | type[Decoder],
        norm: tuple[str, int],
        device: torch.device,
    ) -> nn.Module:
        channels = read_channels(path, "DV8x16x16", weights, *norm)
        network = kind(replace(DV8X16X16, channels=channels))
        check_tensors(path, "DV8x16x16", weights, network.state_dict())
        network.load_state_dict(weights)
        network.requires_grad_(False).eval()
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        network.to(device, self._dtype)
        for module in network.modules():
            if isinstance(module, FrameNorm):
                module.float()  # they compute in float32
        return network


class JitTokenizer(VideoTokenizer):
    """The released TorchScript files, run as they are, in the dtype that they were saved in."""

    def __init__(self, path: Path, pixel_chunk_duration: int, device: torch.device) -> None:
        """Loads the two files.

        Args:
            path: the folder with the two files.
            pixel_chunk_duration: frames of one chunk.
            device: where they run.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        super().__init__(pixel_chunk_duration)
        # As in the original: its fuser makes them wrong or slow.
        torch._C._jit_set_texpr_fuser_enabled(False)
        self._encoder, self._decoder = (_load_jit(path / name, device) for name in (ENCODER_FILE, DECODER_FILE))
        self._dtype = next(self._encoder.parameters()).dtype
        self._file = hashlib.sha256((path / ENCODER_FILE).read_bytes()).hexdigest()[:16]
        self._lock = threading.Lock()  # a script module keeps state between calls while it is being optimised

    @property
    def fingerprint(self) -> str:
        """Hash of the encoder's file and chunk length."""
        return f"dv8x16x16-jit-{self._file}-chunk{self.pixel_chunk_duration}"

    def _encode_chunks(self, video: Tensor) -> Tensor:
        with self._lock:
            outputs = [self._encoder(clip) for clip in video.to(self._dtype).split(1)]
        return torch.cat([indices.to(torch.int32) for indices, *_ in outputs])

    def _decode_chunks(self, ids: Tensor) -> Tensor:
        with self._lock:
            return torch.cat([self._decoder(clip).float() for clip in ids.split(1)])


class _Graphs:
    """Runs a function of one clip as a CUDA graph per shape, so that a thread needs microseconds to start it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def __call__(self, video: Tensor) -> Tensor:
        """Queues one clip; like any kernel, it runs after what the current stream holds and before what follows."""
        with self._lock, torch.cuda.device(video.device):
            caller = torch.cuda.current_stream()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            # All graphs share one stream: they share no buffers, but each must end before its own next start.
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                if video.shape not in self._graphs:
                    self._graphs[video.shape] = self._capture(video)
                graph, given, result = self._graphs[video.shape]
                given.copy_(video)
                graph.replay()
                ids = result.clone()
            video.record_stream(self._stream)
            ids.record_stream(caller)
            caller.wait_stream(self._stream)
        return ids

    def _capture(self, video: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        assert self._stream is not None
        given = video.to(torch.float32, copy=True).contiguous()
        for _ in range(2):  # lets cuDNN choose its kernels
            self._function(given)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self._stream):
            result = self._function(given)
        return graph, given, result


def _read_weights(path: Path, constants: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_jit_weights(path).items() if name not in constants}


def _load_jit(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; tokenizer.path must be the folder that has it")
    try:
        module = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no complete TorchScript file ({str(error).splitlines()[0]})") from None
    return module.eval()


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that change with any value."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
