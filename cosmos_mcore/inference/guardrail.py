"""The content check of finished videos, by the optional package ``cosmos-guardrail`` (spec/inference.md section 10).

It looks at every frame, refuses unsafe videos and blurs faces. Where it cannot run, that is said, and only then videos
are written unchecked; where it runs and fails, the video is not written.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
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

    def check(self, video: Tensor) -> Tensor | None:
        """Checks a video [3, T, H, W] in [-1, 1].

        Returns:
            Frames [T, H, W, 3] uint8 with faces blurred, or None if the video must not be shown.
        """
        try:
            frames = self._checker.check_video_safety(to_frames(video))
        except Exception as error:  # whatever goes wrong in there, nothing may pass because of it
            logger.error("error: the guardrail has failed (%s: %s)", type(error).__name__, error)
            return None
        return None if frames is None else torch.from_numpy(frames)


def find_guardrail(device: torch.device) -> Guardrail | None:
    """The checker on ``device``, or None, with a line that says why, where package or weights are not installed.

    Only weights that are there already are taken if ``arguments.stay_offline`` has been called before.
    """
    try:
        from cosmos_guardrail import CosmosSafetyChecker

        checker = CosmosSafetyChecker()
    except ImportError:
        reason = "the guardrail extra is not installed (pip install '.[guardrail]')"
    except Exception as error:  # of the hub, of files, of torch
        reason = f"its weights cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    else:
        for model in getattr(checker.video_guardrail, "models", None) or ():
            if isinstance(model, torch.nn.Module):
                model.to(device)
        return Guardrail(checker)
    logger.warning("videos are written UNCHECKED: no guardrail, since %s; --disable_guardrail hides this line", reason)
    return None
