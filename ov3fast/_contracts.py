"""What the operators and every backend's kernels agree on, below both: formats of results, and checks that each backend makes itself."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of an image's results: channels last where x is, plain where x is contiguous both ways."""
    for dimensions, candidate in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == dimensions and x.is_contiguous(memory_format=candidate) and not x.is_contiguous():
            return candidate
    return torch.contiguous_format


LABELS_OUT_OF_RANGE = "linear_cross_entropy: labels out of range"


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError for a label outside [0, classes) other than ignore_index; on a GPU queues an assertion, so that the host need not wait."""
    good = ((labels >= 0) & (labels < classes)) | (labels == ignore_index)
    if labels.device.type != "cpu":
        torch._assert_async(good.all(), LABELS_OUT_OF_RANGE)
    elif not good.all():
        worst = labels[~good][0].item()
        raise ValueError(
            f"linear_cross_entropy: labels must lie in [0, {classes}) or be ignore_index={ignore_index}, got {worst}"
        )
