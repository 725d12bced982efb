"""Nothing here means anything without a GPU: training tests would run on the CPU, for hours."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.exit("these tests need a GPU, and torch.cuda.is_available() is false", returncode=1)
