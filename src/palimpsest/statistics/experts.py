"""Which experts of a mixture some records use, in one streamed forward pass.

    s_t       softmax of the router's logits   [experts]  of a token t
    g_t       the weights of the chosen experts, 0 elsewhere, as the model itself scales them
    affinity  mean over records of the mean over a record's tokens of g_t
    share     the same of s_t
    chosen    how often each expert was among the chosen, over all tokens
    overlap   mean over layers and tokens of the share of experts that two models both choose

Padding does not count. Source of the affinity: Zhuang et al. 2025 (arXiv 2411.18797), section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Examples, Minibatch, evaluating


@dataclasses.dataclass(frozen=True)
class ExpertUsage:
    """How much each expert of each layer is used; rows are the routers in `routers`, in order."""

    routers: tuple[str, ...]
    affinity: Float[Tensor, "layers experts"]
    share: Float[Tensor, "layers experts"]
    chosen: Int[Tensor, "layers experts"]
    tokens: int
    top_k: int

    def ranked(self) -> list[tuple[str, int]]:
        """All (router, expert) pairs, the highest affinity first."""
        order = self.affinity.flatten().argsort(descending=True, stable=True).tolist()
        experts = self.affinity.shape[1]
        return [(self.routers[place // experts], place % experts) for place in order]


@torch.no_grad()
def expert_usage(
    model: Model, records: Sequence[Any], run: Run, *, batch_size: int = 32, max_length: int | None = None
) -> ExpertUsage:
    """How much the records use each expert; a model without routed experts raises."""
    routers = _routers(model)
    examples = Examples(model, records, max_length, warn=run.warn)
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    tokens = top_k = 0

    def receive(call: Call, output: Any) -> None:
        nonlocal top_k
        masked, probability, used = routing(call.key, output)
        top_k = int(used.sum(-1).max())
        assert batch.real is not None
        weight = (batch.real / (batch.lengths[:, None] * len(examples))).flatten()  # type: ignore[index]
        count = used[batch.real.flatten()].sum(0)
        new = weight @ masked, weight @ probability, count
        old = sums.get(call.key)
        sums[call.key] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]

    with evaluating(model.network), watch(routers, forward=receive):
        for group in run.track(examples.groups(batch_size), "experts"):
            batch = examples.batch(group)
            batch.visit(model.network)
            tokens += int(batch.lengths.sum()) if batch.lengths is not None else 0
    affinity, share, chosen = (torch.stack([sums[name][i] for name in routers]) for i in range(3))
    return ExpertUsage(tuple(routers), affinity, share, chosen, tokens, top_k)


@torch.no_grad()
def routing_overlap(
    model: Model,
    original: Model,
    records: Sequence[Any],
    run: Run,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> float:
    """How much of the original's choice of experts the model still makes on these records; 1 is all of it."""
    examples = Examples(model, records, max_length, warn=run.warn)
    both = [_routers(m) for m in (model, original)]
    if list(both[0]) != list(both[1]):
        raise PalimpsestError("the two models have different routers: their choices cannot be compared.")
    agreed, tokens = 0.0, 0
    with evaluating(model.network), evaluating(original.network):
        for group in run.track(examples.groups(batch_size), "routing"):
            batch = examples.batch(group)
            assert batch.real is not None
            real = batch.real.flatten()
            first, second = (_choices(m, routers, batch) for m, routers in zip((model, original), both, strict=True))
            for name, used in first.items():
                same = (used & second[name])[real].sum(-1) / used[real].sum(-1)
                agreed += float(same.sum()) / len(first)
            tokens += int(real.sum())
    return agreed / tokens


def _choices(model: Model, routers: dict[str, Any], batch: Minibatch) -> dict[str, Tensor]:
    """Who is chosen for each token, by router."""
    found: dict[str, Tensor] = {}

    def receive(call: Call, output: Any) -> None:
        found[call.key] = routing(call.key, output)[2].bool()

    with watch(routers, forward=receive):
        batch.visit(model.network)
    return found


def _routers(model: Model) -> dict[str, Any]:
    routers = {part.name: part.module for part in anatomy(model.network).find("router")}
    if not routers:
        raise PalimpsestError(f"{type(model.network).__name__} has no routed experts: no router was found in it.")
    return routers


def routing(
    name: str, output: Any
) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens experts"], Int[Tensor, "tokens experts"]]:
    """The weights of the chosen experts, the router's probabilities and who was chosen, from a router's output.

    Routers of transformers 5 give (logits, weights of the chosen, places of the chosen).
    """
    if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
        raise PalimpsestError(f"{name} gives something else than logits, weights and places of the chosen experts.")
    logits, weights, places = output
    logits = logits.reshape(-1, logits.shape[-1]).float()
    places = places.reshape(len(logits), -1)
    weights = weights.reshape(len(logits), -1).float()
    if weights.shape != places.shape:
        raise PalimpsestError(f"{name} gives {weights.shape[1]} weights a token for {places.shape[1]} chosen experts.")
    total = logits.sum(-1)
    known = bool((logits >= 0).all() and ((total - 1).abs() < 1e-3).all())  # some give probabilities by that name
    probability = logits if known else logits.softmax(-1)
    masked = torch.zeros_like(probability).scatter(1, places, weights)
    used = torch.zeros_like(probability, dtype=torch.long).scatter(1, places, 1)
    return masked, probability, used
