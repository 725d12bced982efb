"""Which model a checkpoint holds: read from its tensors' shapes, and every name and shape checked against the table."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields, replace

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.model.presets import PRESETS, ModelArch

# What the original's tools call the sizes (spec/checkpoint.md sections 3 and 6).
MODEL_SIZES = {"1b": "1b", "4b": "4b", "5b": "5b-video2world", "12b": "12b", "13b": "13b-video2world"}
_LISTED = 3  # names spelled out in a message before "and N more"

Shape = tuple[int, ...]


def detect_arch(shapes: Mapping[str, Shape], where: str) -> ModelArch:
    """Reads the architecture from the full shapes of the original's tensors.

    YaRN leaves no trace in shapes: it is taken from the preset with the same sizes, and is off if there is none.

    Args:
        shapes: full shapes under the original's names, without the ``model.`` prefix.
        where: the checkpoint, for messages.

    Raises:
        ValueError: if a tensor that tells a size is missing or has the wrong number of axes, or if the model is one of
            the presets but cut in parts (as when shard files are missing).
    """

    def shape(name: str, axes: int) -> Shape:
        found = shapes.get(name)
        if found is None:
            raise ValueError(f"{where}: {name} is missing{_nearest(name, shapes)}; this is not a Cosmos video model")
        if len(found) != axes or 0 in found:
            raise ValueError(f"{where}: {name} has shape {list(found)}, which cannot be: it needs {axes} axes")
        return found

    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    attention = "layers.0.attention."
    (hidden,) = shape("norm.weight", 1)
    (head,) = shape(attention + "q_norm.weight", 1)
    cross = any(".cross_attention." in name for name in shapes)
    arch = ModelArch(
        num_layers=max(1, len(layers)),
        hidden_size=hidden,
        ffn_hidden_size=shape("layers.0.feed_forward.w1.weight", 2)[0],
        num_attention_heads=max(1, shape(attention + "wq.weight", 2)[0] // head),
        num_query_groups=max(1, shape(attention + "wk.weight", 2)[0] // head),
        kv_channels=head,
        vocab_size=shape("output.weight", 2)[0],
        embedding_size=shape("tok_embeddings.weight", 2)[0],
        context_size=shape("layers.0.cross_attention.wk.weight", 2)[1] if cross else None,
    )
    for preset in PRESETS.values():
        if replace(preset, yarn=None) == arch:
            return preset
    for name, preset in PRESETS.items():
        for parts in (2, 4, 8):
            if replace(_one_of(preset, parts), num_layers=arch.num_layers) == arch:
                raise ValueError(f"{where}: holds 1/{parts} of a {name} model; are shard files missing?")
    return arch


def arch_of_size(model_size: str, shapes: Mapping[str, Shape], where: str) -> ModelArch:
    """The architecture that ``--model_size`` names, or the detected one for ``auto``.

    Raises:
        ValueError: for an unknown size, or if the tensors are of another size.
    """
    if model_size == "auto":
        return detect_arch(shapes, where)
    preset = MODEL_SIZES.get(model_size.lower(), model_size.lower())
    if preset not in PRESETS:
        raise ValueError(f"--model_size {model_size} is unknown; known: auto, {', '.join(MODEL_SIZES)}")
    arch = PRESETS[preset]
    wrong = _first_difference(shapes, original_shapes(arch))
    if wrong:
        raise ValueError(f"{where}: is not a {model_size} model: {wrong}; leave --model_size away to have it detected")
    return arch


def preset_name(arch: ModelArch) -> str | None:
    """The preset that ``arch`` equals, if any."""
    return next((name for name, preset in PRESETS.items() if preset == arch), None)


def describe(arch: ModelArch) -> str:
    """The preset's name, or the sizes that differ from ``ModelArch``'s defaults."""
    name = preset_name(arch)
    if name is not None:
        return name
    shown = (field for field in fields(arch) if getattr(arch, field.name) != field.default)
    return ", ".join(f"{field.name}={getattr(arch, field.name)}" for field in shown)


def check_tensors(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Checks that exactly the expected tensors are there, each in its shape.

    Raises:
        ValueError: one line that lists missing, unexpected and misshapen tensors with the nearest names.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    problems = []
    if missing:
        problems.append(_listing("missing", [name + _nearest(name, unexpected) for name in missing]))
    if unexpected:
        problems.append(_listing("unexpected", [name + _nearest(name, missing or expected) for name in unexpected]))
    if misshapen:
        described = [f"{name} is {list(found[name])}, not {list(expected[name])}" for name in misshapen]
        problems.append(_listing("misshapen", described))
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")


def _one_of(arch: ModelArch, parts: int) -> ModelArch:
    """What ``arch`` looks like if only one of ``parts`` groups of tensor-parallel shards is there."""
    return replace(
        arch,
        ffn_hidden_size=arch.ffn_hidden_size // parts,
        num_attention_heads=arch.num_attention_heads // parts,
        num_query_groups=arch.num_query_groups // parts,
        vocab_size=arch.vocab_size // parts,
        embedding_size=arch.embedding_size // parts,
        yarn=None,
    )


def _first_difference(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str | None:
    for name, shape in expected.items():
        if name not in found:
            return f"{name} is missing"
        if tuple(found[name]) != tuple(shape):
            return f"{name} is {list(found[name])}, not {list(shape)}"
    extra = next((name for name in found if name not in expected), None)
    return extra and f"it has {extra}"


def _listing(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"


def _nearest(name: str, candidates: Collection[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.85)
    return f" (nearest: {near[0]})" if near else ""
