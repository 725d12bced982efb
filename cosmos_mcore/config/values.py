"""What a key of the config may hold: types with their range, the test for them, and their words in a message."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Rule:
    """Narrows a type in ``Annotated[type, Rule(...)]``.

    Attributes:
        words: names such values in an error message, after "must be".
        holds: says whether a value of the type is one of them.
    """

    words: str
    holds: Callable[[Any], bool]


PositiveInt = Annotated[int, Rule("a whole number of at least 1", lambda value: value >= 1)]
NonNegativeInt = Annotated[int, Rule("a whole number of at least 0", lambda value: value >= 0)]
Seed = Annotated[int, Rule("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)]  # as NumPy's
PositiveFloat = Annotated[float, Rule("a number above 0", lambda value: value > 0)]
NonNegativeFloat = Annotated[float, Rule("a number of at least 0", lambda value: value >= 0)]
Fraction = Annotated[float, Rule("a number from 0 to below 1", lambda value: 0 <= value < 1)]
NonEmptyStr = Annotated[str, Rule("a non-empty string", bool)]
NonEmptyList = Annotated[list[NonEmptyStr], Rule("a non-empty list of strings", bool)]
TwoCounts = Annotated[
    list[NonNegativeInt], Rule("a list of two whole numbers of at least 0", lambda value: len(value) == 2)
]
NonEmptyFloats = Annotated[list[PositiveFloat], Rule("a non-empty list of numbers above 0", bool)]
FolderName = Annotated[
    str,
    Rule(
        "a folder's name of letters, digits, '_', '-' and '.', at most 255, that starts with a letter, a digit or '_'",
        lambda value: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}", value) is not None,
    ),
]

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}


def accepts(kind: Any, value: object) -> bool:
    """Whether ``value`` is of the annotated type ``kind`` and keeps its rules.

    No value is converted: a whole number does for a float, ``true`` does not for a number, nor infinity or nan.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return accepts(args[0], value) and all(rule.holds(value) for rule in args[1:])
    if origin in (Union, UnionType):
        return any(accepts(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(accepts(args[0], item) for item in value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max  # false for nan, and no overflow for a huge int
    return type(value) is kind


def describe(kind: Any) -> str:
    """Words for the annotated type ``kind`` that can follow "must be" in a message."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return args[1].words
    if origin in (Union, UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is list:
        return f"a list, each item {describe(args[0])}"
    return _WORDS[kind]


def mismatch(key: str, kind: Any, value: object) -> str:
    """The sentence that says what ``key`` should have held instead of ``value``."""
    return f"{key}={show(value)} must be {describe(kind)}"


def show(value: object) -> str:
    """A value as the user writes it in YAML, strings in quotes."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


@cache
def leaf_kinds(cls: type) -> dict[str, Any]:
    """Dotted keys of a nested dataclass in the order of their definition, with their annotated types."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(cls, include_extras=True).items():
        if isinstance(kind, type) and is_dataclass(kind):
            kinds |= {f"{name}.{inner}": inner_kind for inner, inner_kind in leaf_kinds(kind).items()}
        else:
            kinds[name] = kind
    return kinds
