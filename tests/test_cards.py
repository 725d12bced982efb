"""Verification cards name everything that is needed to repeat them."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CARDS = sorted((Path(__file__).parents[1] / "docs" / "cards").glob("*.yaml"))
FIELDS: dict[str, type] = {
    "title": str,
    "date": datetime.date,
    "command": str,
    "commit": str,
    "hardware": str,
    "versions": dict,
    "setting": dict,
    "tensors_matched": dict,
    "metrics": dict,
    "notes": str,
}


def test_there_are_cards() -> None:
    assert CARDS


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card(path: Path) -> None:
    card: dict[str, Any] = yaml.safe_load(path.read_text())
    assert set(card) == set(FIELDS)
    for name, kind in FIELDS.items():
        assert isinstance(card[name], kind) and card[name], name
    assert re.fullmatch(r"[0-9a-f]{7,40}", card["commit"])
    assert {"python", "torch", "megatron-core"} <= set(card["versions"])
    assert _numbers(card["metrics"]), "a card without a measured number"


def _numbers(tree: object) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in _numbers(value)]
    return [float(tree)] if isinstance(tree, int | float) else []
