"""The checks of prompts and videos by the optional package ``cosmos-guardrail`` (spec/inference.md section 10).

Which ones there are is the package's choice: a list of words and a language model for prompts, a classifier of frames
in some of its versions, blurred faces. Where it cannot run, that is said, and only then videos are written unchecked;
where it runs and fails, nothing passes. The package itself takes a check that fails within for passed, and logs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_mcore.inference.video_io import to_frames

logger = logging.getLogger(__name__)


class Guardrail:
    """A ready checker.

    Args:
        checker: ``cosmos_guardrail.CosmosSafetyChecker``.
    """

    def __init__(self, checker: Any) -> None:
        self._checker = checker

    def allows(self, prompt: str) -> bool:
        """Whether a video may be made of a prompt."""
        return bool(_asked(self._checker.check_text_safety, prompt))

    def check(self, video: Tensor) -> Tensor | None:
        """Checks a video [3, T, H, W] in [-1, 1].

        Returns:
            Frames [T, H, W, 3] uint8 with faces blurred, or None if the video must not be shown.
        """
        frames = _asked(self._checker.check_video_safety, to_frames(video))
        return None if frames is None else torch.from_numpy(frames)


class _Complaints(logging.Handler):
    """Notes what the package says that has gone wrong; CRITICAL is its word for what it blocks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Notes one."""
        if record.levelno < logging.CRITICAL:
            self.heard.append(record.getMessage())


def _asked(check: Callable[[Any], Any], what: object) -> Any:
    """The answer of a check; None if it has failed: whatever goes wrong in there, nothing may pass because of it."""
    complaints, package = _Complaints(), logging.getLogger("cosmos_guardrail")
    package.addHandler(complaints)
    try:
        answer = check(what)
    except Exception as error:
        complaints.heard.append(f"{type(error).__name__}: {error}")
    finally:
        package.removeHandler(complaints)
    if complaints.heard:
        logger.error("error: the guardrail has failed (%s)", complaints.heard[0])
        return None
    return answer


def find_guardrail(device: torch.device, with_prompts: bool) -> Guardrail | None:
    """The checker on ``device``, or None, with a line that says why, where package or weights are not installed.

    Only weights that are there already are taken if ``arguments.stay_offline`` has been called before.

    Args:
        device: where its networks go.
        with_prompts: whether there will be prompts to check.
    """
    try:
        from cosmos_guardrail import CosmosSafetyChecker

        checker = CosmosSafetyChecker()
    except ImportError:
        reason = "the guardrail extra is not installed (pip install '.[guardrail]')"
    except Exception as error:  # of the hub, of files, of torch
        reason = f"its weights cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    else:
        for runner in (checker.video_guardrail, *([checker.text_guardrail] if with_prompts else [])):
            for model in getattr(runner, "models", None) or ():
                if isinstance(model, torch.nn.Module):
                    model.to(device)
        return Guardrail(checker)
    what = "prompts and videos are" if with_prompts else "videos are"
    logger.warning("%s UNCHECKED: no guardrail, since %s; --disable_guardrail hides this line", what, reason)
    return None


def blocked_prompts(
    guardrail: Guardrail | None, prompts: Sequence[str], device: torch.device, group: dist.ProcessGroup
) -> set[str]:
    """Those that the first rank's guardrail does not allow, on all ranks.

    Args:
        guardrail: of the first rank; None: it allows all.
        prompts: alike on all ranks.
        device: for the talk between ranks.
        group: ranks that all call this.
    """
    distinct = list(dict.fromkeys(prompts))
    blocked = torch.zeros(len(distinct), dtype=torch.uint8, device=device)
    if guardrail is not None and group.rank() == 0:
        blocked.copy_(torch.tensor([not guardrail.allows(prompt) for prompt in distinct]))
    if group.size() > 1:
        dist.broadcast(blocked, dist.get_global_rank(group, 0), group=group)
    return {prompt for prompt, flag in zip(distinct, blocked.tolist(), strict=True) if flag}
