"""The content check with a stand-in for the package, which needs weights behind a licence."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from cosmos_mcore.inference.guardrail import find_guardrail

CPU = torch.device("cpu")
VIDEO = torch.zeros(3, 2, 4, 6)


def install(monkeypatch, checker):
    package = ModuleType("cosmos_guardrail")
    package.CosmosSafetyChecker = checker
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", package)


class Checker:
    answer = None

    def __init__(self):
        self.video_guardrail = SimpleNamespace(models=[torch.nn.Linear(1, 1), object()])

    def check_video_safety(self, frames):
        assert frames.shape == (2, 4, 6, 3)
        assert frames.dtype == np.uint8
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("error", [OSError("gated repository"), RuntimeError("")])
def test_missing_weights_are_said(monkeypatch, caplog, error):
    class Missing:
        def __init__(self):
            raise error

    install(monkeypatch, Missing)
    assert find_guardrail(CPU) is None
    assert "UNCHECKED" in caplog.text
    assert type(error).__name__ in caplog.text


def test_a_missing_package_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)
    assert find_guardrail(CPU) is None
    assert "UNCHECKED" in caplog.text
    assert "pip install" in caplog.text


def test_frames_pass_changed_blocked_and_never_by_a_failure(monkeypatch, caplog):
    install(monkeypatch, Checker)
    guardrail = find_guardrail(CPU)
    blurred = np.full((2, 4, 6, 3), 7, np.uint8)
    monkeypatch.setattr(Checker, "answer", blurred)
    assert torch.equal(guardrail.check(VIDEO), torch.from_numpy(blurred))
    monkeypatch.setattr(Checker, "answer", None)
    assert guardrail.check(VIDEO) is None
    monkeypatch.setattr(Checker, "answer", RuntimeError("out of memory"))
    assert guardrail.check(VIDEO) is None
    assert "out of memory" in caplog.text
