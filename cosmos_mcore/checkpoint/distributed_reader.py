"""Megatron's distributed checkpoints, read in one process without building the model.

A folder in the ``torch_dist`` format: ``.metadata`` lists each tensor's chunks and where they lie, ``__R_0.distcp``
holds the chunks that rank R wrote, each a small archive of ``torch.save``. Layers are stacked in a leading axis; gate
and up projection are stored one after the other, query, key and value interleaved by group. PyTorch's own reader
unpickles whatever ``.metadata`` holds; ours does not.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from cosmos_mcore.checkpoint.architecture import arch_of_size, check_tensors
from cosmos_mcore.checkpoint.names import entries, original_shapes, ours_shape, stacked_name, unfuse
from cosmos_mcore.checkpoint.reader import EXP_AVG, EXP_AVG_SQ, MASTER, WEIGHT, Checkpoint, TrainingState
from cosmos_mcore.checkpoint.torch_file import TorchFile, load_bytes
from cosmos_mcore.model.presets import ModelArch

METADATA, COMMON = ".metadata", "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"  # where newer versions of Megatron keep what is in common.pt
STATE_PREFIX = {
    WEIGHT: "",
    EXP_AVG: "optimizer.state.exp_avg.",
    EXP_AVG_SQ: "optimizer.state.exp_avg_sq.",
    MASTER: "optimizer.state.param.",
}
_UNSHARDED_MASTER = "optimizer.state.fp32_param."  # what Megatron calls them without its distributed optimizer
OPTIMIZER = "optimizer."  # how all keys of its state begin
_NEMO_PREFIX = "module."  # the NeMo port's weights have Megatron's names too, but for this
_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    _DCP + "filesystem": {"_StorageInfo"},
    _DCP + "metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    _DCP + "planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles only the classes that describe tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Reads ``.metadata`` of a distributed checkpoint without running code from it.

    Raises:
        ValueError: if it is missing, damaged, or would run code.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        whole = not isinstance(metadata, Metadata) or _is_whole(metadata)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): not a complete checkpoint") from None
    except pickle.UnpicklingError as error:
        if "." in str(error) and " " not in str(error):
            raise ValueError(f"{path} is refused: it holds Python objects ({error}) that could run code") from None
        raise ValueError(f"{path} is damaged; copy it again") from None
    except Exception:  # unpickling damaged bytes raises about everything
        raise ValueError(f"{path} is damaged; copy it again") from None
    if not whole:
        raise ValueError(f"{path} is damaged; copy it again")
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path} does not describe a distributed checkpoint")
    return metadata


def _is_whole(metadata: Metadata) -> bool:
    """Whether everything has its fields, of their types, as after damage it may not; may raise, too."""
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            sizes = [entry.size, *(side for chunk in entry.chunks for side in (chunk.offsets, chunk.sizes))]
            if not isinstance(entry.properties.dtype, torch.dtype) or {*map(len, sizes)} != {len(entry.size)}:
                return False
    return all(
        isinstance(info.relative_path, str) and info.offset >= 0 and info.length >= 0 and isinstance(index.fqn, str)
        for index, info in (metadata.storage_data or {}).items()
    )


class DistributedCheckpoint(Checkpoint):
    """A distributed checkpoint of any parallel layout."""

    def __init__(self, path: Path, model_size: str = "auto") -> None:
        """Reads the list of tensors and checks it against the table.

        Raises:
            ValueError: if the folder is damaged or holds another kind of model.
        """
        self.path, self.layout = path, "distributed"
        metadata = read_metadata(path)
        self._storage: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and "_extra_state" not in name
        }
        _check_chunks(self._tensors, path)
        sizes = {name: tuple(entry.size) for name, entry in self._tensors.items() if not name.startswith(OPTIMIZER)}
        self._prefix = _NEMO_PREFIX if all(name.startswith(_NEMO_PREFIX) for name in sizes) else ""
        sizes = {name.removeprefix(self._prefix): size for name, size in sizes.items()}
        detected = _arch_of_sizes(sizes, str(path))
        self.arch = arch_of_size(model_size, original_shapes(detected), str(path))
        check_tensors(sizes, stacked_sizes(self.arch), str(path))
        self._entries = {name: entry for entry in entries(self.arch) for name in entry.originals}
        self._fused: dict[tuple[str, str], list[Tensor]] = {}
        self._state_prefix = dict(STATE_PREFIX)
        if _UNSHARDED_MASTER + next(iter(sizes)) in self._tensors:
            self._state_prefix[MASTER] = _UNSHARDED_MASTER
        if self._has(EXP_AVG, sizes) and self._has(EXP_AVG_SQ, sizes):
            self.training = self._training_state()
            self.has_master = self._has(MASTER, sizes)
        elif not self._prefix and any(name.startswith(STATE_PREFIX[EXP_AVG]) for name in self._tensors):
            raise ValueError(f"{path / METADATA} is damaged: it lacks Adam's moments of some weights; copy it again")

    @property
    def files(self) -> set[Path]:
        """See ``Checkpoint``."""
        return {self.path / METADATA, *(self.path / info.relative_path for info in self._storage.values())}

    @property
    def newer_than_common(self) -> bool:
        """Whether it was written by a version of Megatron (0.19) that keeps no ``common.pt``, which older ones need."""
        return MetadataIndex(_COMMON_OBJECT) in self._storage

    def dtype(self, name: str, state: str = WEIGHT) -> torch.dtype:
        """See ``Checkpoint``."""
        return self._tensors[self._key(stacked_name(self._entries[name].ours)[0], state)].properties.dtype

    def read(self, name: str, state: str = WEIGHT) -> Tensor:
        """See ``Checkpoint``."""
        entry = self._entries[name]
        key = (entry.ours, state)
        if key not in self._fused:
            # Parts of one parameter are asked for one after the other, w1 and w3 with w2 between them.
            while len(self._fused) > 1:
                self._fused.pop(next(iter(self._fused)))
            self._fused[key] = unfuse(self._read_ours(entry.ours, state), entry, self.arch)
        return self._fused[key][entry.originals.index(name)]

    def _read_ours(self, ours: str, state: str) -> Tensor:
        name, layer = stacked_name(ours)
        key = self._key(name, state)
        stored = self._tensors[key]
        wanted = [slice(0, size) for size in stored.size]
        if layer is not None:
            wanted[0] = slice(layer, layer + 1)
        full, filled = None, 0
        for chunk in stored.chunks:
            inside, target = [], []
            for axis, offset, size in zip(wanted, chunk.offsets, chunk.sizes, strict=True):
                first, last = max(axis.start, offset), min(axis.stop, offset + size)
                inside.append(slice(first - offset, last - offset))
                target.append(slice(first - axis.start, last - axis.start))
            if any(part.stop <= part.start for part in target):
                continue
            part = self._read_chunk(key, chunk)[tuple(inside)]
            if full is None and [axis.stop - axis.start for axis in wanted] == list(part.shape):
                full = part
            else:
                if full is None:
                    full = torch.empty([axis.stop - axis.start for axis in wanted], dtype=stored.properties.dtype)
                full[tuple(target)] = part
            filled += part.numel()
        if full is None or filled != full.numel():
            raise ValueError(f"{self.path}: chunks of {key} are missing; copy the folder again")
        return full if layer is None else full[0]

    def _key(self, name: str, state: str) -> str:
        return self._state_prefix[state] + self._prefix + name

    def _has(self, state: str, names: Iterable[str]) -> bool:
        return all(self._key(name, state) in self._tensors for name in names)

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        data, where = self._read_bytes(MetadataIndex(key, chunk.offsets))
        tensor = load_bytes(data, where)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where} is a {type(tensor).__name__}, not a tensor")
        if tensor.shape != chunk.sizes or tensor.dtype != self._tensors[key].properties.dtype:
            raise ValueError(f"{where} is {list(tensor.shape)}, not {list(chunk.sizes)} as {METADATA} says")
        return tensor

    def _read_bytes(self, index: MetadataIndex) -> tuple[bytes, str]:
        info = self._storage.get(index)
        if info is None or Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{self.path / METADATA} does not say where {index.fqn} is; copy the folder again")
        where = f"{self.path / info.relative_path}: {index.fqn}"
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{where} is compressed, which is not supported")
        try:
            with open(self.path / info.relative_path, "rb") as file:
                file.seek(info.offset)
                data = file.read(info.length)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None
        if len(data) < info.length:
            raise ValueError(f"{where} is truncated; copy the folder again")
        return data, where

    def _training_state(self) -> TrainingState | None:
        common = self._common()
        try:
            optimizer = common["optimizer"]
            optimizer = optimizer.get("optimizer", optimizer)  # a float32 model's, not distributed, stands alone
            (group,) = optimizer["param_groups"]
            progress = common["progress"]
            step = group["step"] if "step" in group else optimizer["state"]["common_step"]
            kept = {key: value for key, value in group.items() if key not in ("params", "step")}
            consumed = progress.get("consumed_samples")
            return TrainingState(int(progress["iteration"]), float(step), kept, consumed_samples=consumed)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None  # moments of a run of some other program

    def _common(self) -> Any:
        if (self.path / COMMON).is_file():
            return TorchFile(self.path / COMMON).content
        data, where = self._read_bytes(MetadataIndex(_COMMON_OBJECT))
        return load_bytes(data, where)[0]


def _check_chunks(tensors: Mapping[str, TensorStorageMetadata], path: Path) -> None:
    """Sees that chunks make up their tensors: ``.metadata`` has no checksum, and readers put chunks where it says."""
    for name, entry in tensors.items():
        places = {tuple(chunk.offsets) for chunk in entry.chunks}
        count = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if len(places) < len(entry.chunks) or count != math.prod(entry.size):
            raise ValueError(
                f"{path / METADATA} is damaged: the chunks of {name} are not the whole of it; copy it again"
            )


def stacked_sizes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Sizes of all weights by Megatron's key, layers stacked."""
    shapes, sizes = original_shapes(arch), {}
    for entry in entries(arch):
        name, layer = stacked_name(entry.ours)
        size = ours_shape(entry, shapes)
        sizes[name] = size if layer is None else (arch.num_layers, *size)
    return sizes


def _arch_of_sizes(sizes: Mapping[str, tuple[int, ...]], where: str) -> ModelArch:
    layer = "decoder.layers."
    try:
        num_layers, head = sizes[layer + "self_attention.q_layernorm.weight"]
        _, hidden, q = sizes[layer + "self_attention.linear_proj.weight"]
        _, qkv, _ = sizes[layer + "self_attention.linear_qkv.weight"]
        cross = sizes.get(layer + "cross_attention.linear_kv.weight")
        return ModelArch(
            num_layers=num_layers,
            hidden_size=hidden,
            ffn_hidden_size=sizes[layer + "mlp.linear_fc2.weight"][2],
            num_attention_heads=q // head,
            num_query_groups=max(1, (qkv - q) // head // 2),
            kv_channels=head,
            vocab_size=sizes["output_layer.weight"][0],
            embedding_size=sizes["embedding.word_embeddings.weight"][0],
            context_size=cross[2] if cross else None,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{where} does not hold a Cosmos video model ({error})") from None
