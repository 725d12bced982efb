"""Fixtures that many tests share."""

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def golden_dir() -> Path:
    """The original system's numbers."""
    return GOLDEN


@pytest.fixture
def shared_dir() -> Path:
    """The folder with the developers' real clips and larger golden files; absent for users."""
    if not SHARED.is_dir():
        pytest.skip("the developers' shared folder is not beside this checkout")
    return SHARED
