"""A neural memory without a network around it: pairs of keys and values go in, values come out for keys.

The gates are constants, nothing is learned but the memory itself. Use it to see what the rule of
`palimpsest.layers.gradient_memory` holds, forgets and confuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.layers.gradient_memory import Inputs, chunk_memory, fresh, recall, surprises


class StreamMemory:
    """Starts with the given weights, [d, e] of each layer; takes tensors and arrays, in the precision of the weights.

    `forget`, `momentum` and `step` are alpha, eta and theta; after a `write`, `surprise` has |u| of each of its pairs.
    """

    def __init__(
        self,
        weights: Sequence[Float[Tensor, "d e"]],
        *,
        step: float,
        forget: float = 0.0,
        momentum: float = 0.0,
        chunk: int = 1,
    ) -> None:
        self.memory = fresh([torch.as_tensor(w)[None] for w in weights])
        self.step, self.forget, self.momentum, self.chunk = step, forget, momentum, chunk
        self.surprise: Float[Tensor, " n"] = self.memory.weights[0].new_zeros(0)

    @torch.no_grad()
    def write(self, keys: Any, values: Any) -> None:
        """Writes the pairs [n, d], [n, e] in their order."""
        k, v = self._rows(keys), self._rows(values)
        gates = (torch.full_like(k[..., 0], gate) for gate in (self.step, self.forget, self.momentum))
        x = Inputs(k, k, v, *gates)
        self.surprise = surprises(x, self.memory, self.chunk)[0]
        _, self.memory = chunk_memory(x, self.memory, self.chunk)

    @torch.no_grad()
    def read(self, keys: Any) -> Float[Tensor, "n e"]:
        """M(k) of each key."""
        return recall(self.memory.weights, self._rows(keys))[0]

    def error(self, keys: Any, values: Any) -> float:
        """What is recalled wrongly: sum |M(k) - v|^2 / sum |v|^2."""
        v = self._rows(values)[0]
        return float((self.read(keys) - v).square().sum() / v.square().sum())

    def _rows(self, x: Any) -> Float[Tensor, "1 n d"]:
        return torch.as_tensor(x, dtype=self.memory.weights[0].dtype)[None]
