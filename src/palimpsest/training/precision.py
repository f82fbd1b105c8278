"""The precision that a training computes in."""

from __future__ import annotations

import time

import torch
from torch import nn

from palimpsest.run import Run

SMALL = 10_000_000
"""Weights of a network below which bfloat16 gains little: its casts take as long as its products save."""


def precision_of(run: Run, network: nn.Module) -> str:
    """The precision that the run asks for. `auto`: float32 for a small network, else what measuring says.

    A small network therefore learns the same on every machine.
    """
    if run.precision != "auto":
        return run.precision
    small = sum(weight.numel() for weight in network.parameters()) < SMALL
    return "float32" if small else measured_precision(str(run.torch_device()))


def measured_precision(device: str, trials: int = 3) -> str:
    """`bfloat16` where this device multiplies matrices at least 1.3 times as fast in it as in float32."""
    if device not in _MEASURED:
        _MEASURED[device] = (
            "bfloat16"
            if _seconds(device, torch.float32, trials) > 1.3 * _seconds(device, torch.bfloat16, trials)
            else "float32"
        )
    return _MEASURED[device]


_MEASURED: dict[str, str] = {}


def _seconds(device: str, dtype: torch.dtype, trials: int) -> float:
    a, b = torch.ones(512, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
    times = []
    for _ in range(trials + 1):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return min(times[1:])
