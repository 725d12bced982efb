"""From a YAML file and dotted overrides to a checked ``RunConfig``, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.config.validate import validate
from cosmos_mcore.config.values import accepts, leaf_kinds, mismatch, show

KINDS = leaf_kinds(RunConfig)
_UNREADABLE = (ValueError, KeyError)  # from PyYAML for what looks like a number and is none, as 0x_; for bytes, too
SECTIONS = {key[:dot] for key in KINDS for dot, letter in enumerate(key) if letter == "."}
_MARKED = "'\"!&|>"  # how a string begins that is not what was typed


class _Setting(NamedTuple):
    value: object
    source: str  # the file or the override that it comes from


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML file.

    A file may name one base file, relative to itself, as ``extends: base.yaml``; its own keys replace the base's. Keys
    are nested or dotted. OmegaConf's ``${...}`` interpolation works, for example ``path: ${oc.env:DATA}``.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``, applied last, the value in YAML.

    Raises:
        ValueError: one sentence that names the file or override, the key and what to do.
    """
    settings = _read_file(Path(path))
    for override in overrides:
        settings.update(_read_override(override))
    config = _apply(settings, str(path))
    validate(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML, in the order of the schema, that ``load_config`` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(asdict(config))))


def _read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, _Setting]:
    """Settings of a file and, under them, of the files that it extends."""
    chain = (*seen, path.resolve())
    if path.resolve() in seen:
        raise ValueError(f"{path}: extends goes round in a circle: {' -> '.join(file.name for file in chain)}")
    tree = _parse_file(path, asked_by=seen[-1] if seen else None)
    base = tree.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends={show(base)} must be the name of one YAML file, relative to this one")
    settings = _read_file(path.parent / base, chain) if base else {}
    own: dict[str, _Setting] = {}
    for key, value in _flatten(tree, str(path)):
        if key in own:
            raise ValueError(f"{path}: {key} is there twice, with a dot and in its section; leave one out")
        own[key] = _Setting(value, str(path))
    return settings | own


def _parse_file(path: Path, asked_by: Path | None) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        where = f"{asked_by}: extends={path}" if asked_by else f"{path}"
        others = sorted(str(file) for file in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where}: there is no such config file{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {_one_line(error)}") from None
    except (OSError, OmegaConfBaseException, *_UNREADABLE) as error:
        raise ValueError(f"{path}: cannot be read as a config: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a config must consist of sections with keys, not of a list")
    return {str(name): value for name, value in tree.items()}


def _read_override(override: str) -> dict[str, _Setting]:
    source = f"override {override}"
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ValueError(f"{source}: must have the form section.key=value")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        assert isinstance(parsed, dict)
        value = parsed["value"]
    except (yaml.YAMLError, OmegaConfBaseException, *_UNREADABLE) as error:
        raise ValueError(f"{source}: not valid YAML: {_one_line(error)}") from None
    typed = text.strip()
    if key in KINDS and isinstance(value, (bool, int, float)) and accepts(KINDS[key], typed):
        value = typed  # job.name=007 means the text that was typed, not the number that YAML makes of it
    elif isinstance(value, str) and typed[0] not in _MARKED:
        value = typed  # data.path=/take #2 has no comment in it
    return {known: _Setting(item, source) for known, item in _flatten({key: value}, source)}


def _flatten(tree: Mapping[Any, Any], source: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the dotted keys of a tree and their values; a key that the schema does not have is an error."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in KINDS:
            yield key, value
        elif isinstance(value, Mapping) and (value or key in SECTIONS):
            yield from _flatten(value, source, f"{key}.")
        elif key not in SECTIONS:
            raise ValueError(f"{source}: unknown key {key}; did you mean {_nearest(key)}?")
        elif value is not None:  # a section whose keys are all commented out is None
            keys = ", ".join(known for known in KINDS if known.startswith(f"{key}."))
            raise ValueError(f"{source}: {key} is a section and cannot be {show(value)}; set one of {keys}")


def _nearest(key: str) -> str:
    """The known key that looks most like ``key``; the last part counts twice, so ``lr`` finds its section."""

    def likeness(known: str) -> float:
        pairs = ((key, known), (key.rpartition(".")[2], known.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(KINDS, key=likeness)


def _apply(settings: dict[str, _Setting], path: str) -> RunConfig:
    """Puts the settings over the defaults, with interpolations resolved and every value's type and range checked."""
    try:
        tree = OmegaConf.create(asdict(RunConfig()))
        for key, setting in settings.items():
            OmegaConf.update(tree, key, setting.value, merge=False)
        resolved: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        source = settings[key].source if key in settings else path
        raise ValueError(f"{source}: {key} cannot be resolved: {str(error).splitlines()[0]}") from None
    config = RunConfig()
    for key, setting in settings.items():
        section, _, name = key.rpartition(".")
        value = reduce(getitem, key.split("."), resolved)
        if not accepts(KINDS[key], value):
            raise ValueError(f"{setting.source}: {mismatch(key, KINDS[key], value)}")
        setattr(attrgetter(section)(config), name, value)
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _escape(value: Any) -> Any:
    """Protects a literal ``${`` from being read as an interpolation."""
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
