"""Whether a tensor holds nothing but numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    # only finite values have a finite sum, which is a quarter of the work; that of large ones may still be infinite
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())
