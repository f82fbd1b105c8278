"""Causal convolution of each channel with a short filter, then SiLU: tokens stay in front of channels.

    line [b, s + t, c]   the last s inputs before, then the new ones       filters [c, 1, s + 1]
    y_t = silu(sum_j filters_j line_{t + j})

The library's convolution wants channels in front of time; for four taps, moving them there and back costs more than the
work. The gradient is written out for the same reason: a slice's is a tensor of zeros as long as the line.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def naive_convolution(line: Float[Tensor, "b l c"], filters: Float[Tensor, "c 1 k"]) -> Float[Tensor, "b t c"]:
    """The same by the library: the oracle."""
    return F.silu(F.conv1d(line.mT, filters, groups=len(filters)).mT)


def short_convolution(line: Float[Tensor, "b l c"], filters: Float[Tensor, "c 1 k"]) -> Float[Tensor, "b t c"]:
    """SiLU of the convolution at every place where the whole filter lies on the line."""
    return _Convolution.apply(line, filters.to(line.dtype))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: Tensor, filters: Tensor) -> Tensor:
        taps = filters[:, 0].T.contiguous()
        time = line.shape[1] - len(taps) + 1
        y = line[:, :time] * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(line[:, j : j + time], taps[j])
        ctx.save_for_backward(line, taps, y)
        return F.silu(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        line, taps, y = ctx.saved_tensors
        time = y.shape[1]
        d = torch.ops.aten.silu_backward(grad, y)
        d_line, d_taps = torch.zeros_like(line), []
        for j in range(len(taps)):
            d_line[:, j : j + time].addcmul_(d, taps[j])
            d_taps.append((d * line[:, j : j + time]).sum((0, 1)))
        return d_line, torch.stack(d_taps, 1)[:, None]
