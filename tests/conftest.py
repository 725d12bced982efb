"""Settings and fixtures that many tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: tests start several processes each, which would fight over the cores otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on the CPU, slowly

# Without a deadline, since a loaded machine is no mistake; the same examples on every run of the CI.
settings.register_profile("cosmos_mcore", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.load_profile("cosmos_mcore")

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


@pytest.fixture
def triton_interpreter() -> None:
    """Triton's interpreter: kernels run on CPU tensors."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("there is a GPU: tests/gpu runs the kernels on it")
