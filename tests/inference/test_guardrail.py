"""The content check with a stand-in for the package, which needs weights behind a licence."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from cosmos_mcore.inference.guardrail import blocked_prompts, find_guardrail
from tests.inference.models import NO_GROUP

CPU = torch.device("cpu")
VIDEO = torch.zeros(3, 2, 4, 6)


def install(monkeypatch, checker):
    package = ModuleType("cosmos_guardrail")
    package.CosmosSafetyChecker = checker
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", package)


class Checker:
    answer = None
    complaint = None

    def __init__(self):
        self.video_guardrail = SimpleNamespace(models=[torch.nn.Linear(1, 1), object()])
        self.text_guardrail = SimpleNamespace(models=[object(), torch.nn.Linear(1, 1)])
        Checker.made = self

    def check_text_safety(self, prompt):
        if self.complaint is not None:
            logging.getLogger("cosmos_guardrail.inner").log(*self.complaint)
        if isinstance(self.answer, Exception):
            raise self.answer
        return prompt != "a bad thing"

    def check_video_safety(self, frames):
        if self.complaint is not None:
            logging.getLogger("cosmos_guardrail.inner").log(*self.complaint)
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
    assert find_guardrail(CPU, False) is None
    assert "UNCHECKED" in caplog.text
    assert type(error).__name__ in caplog.text


def test_a_missing_package_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)
    assert find_guardrail(CPU, False) is None
    assert "UNCHECKED" in caplog.text
    assert "pip install" in caplog.text


def test_frames_pass_changed_blocked_and_never_by_a_failure(monkeypatch, caplog):
    install(monkeypatch, Checker)
    guardrail = find_guardrail(CPU, False)
    blurred = np.full((2, 4, 6, 3), 7, np.uint8)
    monkeypatch.setattr(Checker, "answer", blurred)
    assert torch.equal(guardrail.check(VIDEO), torch.from_numpy(blurred))
    monkeypatch.setattr(Checker, "answer", None)
    assert guardrail.check(VIDEO) is None
    monkeypatch.setattr(Checker, "answer", RuntimeError("out of memory"))
    assert guardrail.check(VIDEO) is None
    assert "out of memory" in caplog.text


def test_prompts_pass_and_do_not(monkeypatch, caplog):
    install(monkeypatch, Checker)
    guardrail = find_guardrail(CPU, True)
    prompts = ["a box", "a bad thing", "a box"]
    assert blocked_prompts(guardrail, prompts, CPU, NO_GROUP) == {"a bad thing"}
    assert blocked_prompts(None, prompts, CPU, NO_GROUP) == set()
    assert caplog.text == ""
    monkeypatch.setattr(Checker, "answer", RuntimeError("out of memory"))
    assert blocked_prompts(guardrail, prompts, CPU, NO_GROUP) == set(prompts)
    assert "the guardrail has failed (RuntimeError: out of memory)" in caplog.text


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_a_check_that_fails_inside_the_package_is_not_passed(monkeypatch, caplog, level):
    """The package logs such an error and says that all is safe."""
    install(monkeypatch, Checker)
    guardrail = find_guardrail(CPU, True)
    monkeypatch.setattr(Checker, "answer", np.zeros((2, 4, 6, 3), np.uint8))
    monkeypatch.setattr(Checker, "complaint", (level, "classifier failed on frame %d", 1))
    assert not guardrail.allows("a box")
    assert guardrail.check(VIDEO) is None
    assert "the guardrail has failed (classifier failed on frame 1)" in caplog.text
    monkeypatch.setattr(Checker, "complaint", (logging.INFO, "checking"))
    assert guardrail.allows("a box")
    assert guardrail.check(VIDEO) is not None


@pytest.mark.parametrize("with_prompts", [True, False])
def test_only_what_is_needed_goes_to_the_device(monkeypatch, with_prompts):
    install(monkeypatch, Checker)
    find_guardrail(torch.device("meta"), with_prompts)
    assert Checker.made.video_guardrail.models[0].weight.is_meta
    assert Checker.made.text_guardrail.models[1].weight.is_meta == with_prompts
