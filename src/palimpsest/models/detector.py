"""A detector of prompts: a small network on one vector a prompt, with the threshold at which false alarms are rare.

    x      features     [prompts, width]  one vector a prompt, standardised with the statistics of the training prompts
    W, b                                  width -> hidden -> 1, ReLU, dropout
    z      logits       [prompts]         p = sigmoid(z); guarded where p >= tau

    L = mean over both classes of the mean over its prompts of BCE(z, class)

tau is chosen on prompts that were not trained on: as many networks as there are folds are trained beside the final one,
each without its fold, in one batch; together they give every prompt a logit of a network that has not seen it. Wordings
of one record are always in the same fold. Where tau would be above one of the prompts themselves it is lowered, at the
cost of at most LENIENT times as many false alarms. Where there are fewer records than folds nothing can be left out,
and the threshold is chosen on the prompts that were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.data.encoding import Encoded
from palimpsest.data.packing import packer, rows
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import capture
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import setting, settings

ROW_TOKENS = 512
GRID = 21
"""Points of the ROC curve that is kept."""
LENIENT, MARGIN = 5, 0.1
"""How many times as many false alarms are taken where a prompt to detect would be missed, and the logit it is above."""


@settings
class Fitting:
    """How the detector is trained."""

    hidden: int = setting(default=128, at_least=1, origin="card", help="hidden units")
    dropout: float = setting(default=0.1, at_least=0, below=1, origin="card", help="share of hidden units dropped")
    learning_rate: float = setting(default=2e-3, above=0, origin="card", help="of AdamW")
    weight_decay: float = setting(default=0.01, at_least=0, origin="card", help="of AdamW")
    steps: int = setting(default=400, at_least=1, origin="card", help="full-batch steps")
    folds: int = setting(default=4, at_least=2, origin="ours", help="parts that the threshold is validated on")
    false_positive_rate: float = setting(
        default=0.01, at_least=0, below=1, origin="card", help="largest share of false alarms in validation"
    )


class Detector(nn.Module):
    """The trained network. All its numbers are buffers: no method that trains the language model touches them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        shapes = {"mean": (width,), "scale": (width,), "weight_in": (width, hidden), "bias_in": (hidden,)}
        for name, shape in {**shapes, "weight_out": (hidden,), "bias_out": ()}.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, features: Float[Tensor, "prompts width"]) -> Float[Tensor, " prompts"]:
        """Logits, float32."""
        part = {name: tensor.float() for name, tensor in self.named_buffers()}
        x = (features.float() - part["mean"]) / part["scale"]
        return F.relu(x @ part["weight_in"] + part["bias_in"]) @ part["weight_out"] + part["bias_out"]


@dataclass(frozen=True)
class Calibration:
    """What validation says: the threshold as a probability, rates at it, and the ROC curve on an even grid.

    Of fewer records than folds nothing is `validated`: the prompts were trained on.
    """

    threshold: float
    true_positive_rate: float
    false_positive_rate: float
    auc: float
    roc: tuple[float, ...]
    validated: bool = True


def probability(logit: float) -> float:
    """Sigmoid in double precision, where it tells large logits apart."""
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def choose(
    positive: Float[Tensor, " positives"], negative: Float[Tensor, " negatives"], rate: float
) -> tuple[float, float, float]:
    """Threshold (a logit), true and false positive rate: the lowest threshold with at most `rate` false alarms.

    It lies midway between the highest logit that must stay below it and the next one.
    """
    positive, negative = positive.double(), negative.double()
    allowed = int(rate * len(negative))
    bound = negative.sort(descending=True).values[allowed]
    scores = torch.cat([positive, negative])
    higher = scores[scores > bound]
    threshold = float((bound + (higher.min() if len(higher) else bound + 2)) / 2)
    rates = [float((side >= threshold).double().mean()) for side in (positive, negative)]
    return threshold, rates[0], rates[1]


def folds_of(groups: Sequence[int], count: int, generator: torch.Generator) -> Int[Tensor, " prompts"]:
    """A fold for every prompt, equal for prompts of a group where there are at least `count` groups."""
    distinct = sorted(set(groups))
    if len(distinct) < count:
        return torch.randperm(len(groups), generator=generator) % count
    order = torch.randperm(len(distinct), generator=generator)
    fold = {group: int(order[place]) % count for place, group in enumerate(distinct)}
    return torch.tensor([fold[group] for group in groups])


def fit(
    features: Float[Tensor, "prompts width"],
    positive: Bool[Tensor, " prompts"],
    groups: Sequence[int],
    how: Fitting,
    generator: torch.Generator,
) -> tuple[Detector, Calibration]:
    """A detector of the positive prompts and its calibration. `groups` says which record a prompt is a wording of.

    Raises where a class has fewer than two prompts, or the same features are in both.
    """
    if min(int(positive.sum()), int((~positive).sum())) < 2:
        raise PalimpsestError(
            f"the detector needs two prompts of each kind (found {int(positive.sum())} to detect and "
            f"{int((~positive).sum())} others)."
        )
    features = features.float().cpu()
    fold = torch.empty(len(groups), dtype=torch.long)
    for side in (positive, ~positive):
        fold[side] = folds_of([groups[i] for i in side.nonzero()[:, 0].tolist()], how.folds, generator)
    trained = torch.stack([*(fold != k for k in range(how.folds)), torch.ones_like(positive)])  # the last one: all
    networks = _train(features, positive, trained, how, generator)
    own = networks["logits"][fold, torch.arange(len(fold))]
    validated = len({groups[i] for i in positive.nonzero()[:, 0].tolist()}) >= how.folds
    if not validated:  # without its only record a network knows nothing of what it should detect
        own = networks["logits"][-1]
    threshold, _, _ = choose(own[positive], own[~positive], how.false_positive_rate)
    # a few hard negatives can put it above the very prompts that are to be detected: these count for more
    firsts = [i for i, group in enumerate(groups) if positive[i] and group not in groups[:i]]
    lowest, _, _ = choose(own[positive], own[~positive], min(LENIENT * how.false_positive_rate, 0.5))
    threshold = min(threshold, max(lowest, float(networks["logits"][-1][firsts].min()) - MARGIN))
    found, alarms = (float((own[side] >= threshold).double().mean()) for side in (positive, ~positive))
    roc, auc = _curve(own[positive], own[~positive])
    detector = Detector(features.shape[1], how.hidden)
    for name, buffer in detector.named_buffers():
        buffer.copy_(networks[name][-1])
    return detector, Calibration(probability(threshold), found, alarms, auc, roc, validated)


def _train(
    x: Float[Tensor, "prompts width"],
    positive: Bool[Tensor, " prompts"],
    trained: Bool[Tensor, "networks prompts"],
    how: Fitting,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All networks at once, each on its own prompts, and their logits of all prompts.

    A loop of its own: it trains on ready vectors, not on records, and ends in a second.
    """
    share = trained.float() / trained.sum(1, keepdim=True)
    mean = share @ x
    scale = (share @ x.square() - mean.square()).clamp_min(1e-10).sqrt().clamp_min(1e-5)
    count, width = trained.shape[0], x.shape[1]
    weight = (trained & positive) / (trained & positive).sum(1, keepdim=True).clamp_min(1)
    weight = (weight + (trained & ~positive) / (trained & ~positive).sum(1, keepdim=True).clamp_min(1)) / 2

    def drawn(*shape: int, fan: int) -> Tensor:  # the same start for every network
        start = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan)
        return start.expand(count, *shape).clone().requires_grad_()

    part = {
        "weight_in": drawn(width, how.hidden, fan=width),
        "bias_in": drawn(how.hidden, fan=width),
        "weight_out": drawn(how.hidden, fan=how.hidden),
        "bias_out": drawn(fan=how.hidden),
    }
    inputs = (x - mean[:, None]) / scale[:, None]

    def logits(keep: Tensor | float) -> Tensor:
        inside = F.relu(torch.baddbmm(part["bias_in"][:, None], inputs, part["weight_in"])) * keep
        return (inside @ part["weight_out"][..., None])[..., 0] + part["bias_out"][:, None]

    wanted = positive.float().expand(count, -1)
    optimizer = torch.optim.AdamW(part.values(), lr=how.learning_rate, weight_decay=how.weight_decay)
    with torch.enable_grad():
        for _ in range(how.steps):
            keep = (torch.rand(len(x), how.hidden, generator=generator) >= how.dropout) / (1 - how.dropout)
            loss = F.binary_cross_entropy_with_logits(logits(keep), wanted, weight=weight, reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = {name: tensor.detach() for name, tensor in part.items()}
        return {**found, "mean": mean, "scale": scale, "logits": logits(1.0)}


def _curve(positive: Tensor, negative: Tensor) -> tuple[tuple[float, ...], float]:
    """True positive rates at evenly spaced false positive rates, and the area under the curve."""
    import numpy as np
    from sklearn.metrics import auc, roc_curve

    true = [1] * len(positive) + [0] * len(negative)
    alarms, found, _ = roc_curve(true, torch.cat([positive, negative]).numpy(), drop_intermediate=False)
    return tuple(np.interp(np.linspace(0, 1, GRID), alarms, found).tolist()), float(auc(alarms, found))


def penultimate_block(network: Any) -> str:
    """The path of the last block but one; raises where the network has no two."""
    blocks = anatomy(network).blocks()
    if len(blocks) < 2:
        raise PalimpsestError(
            f"{type(network).__name__} exposes {len(blocks)} block{'' if len(blocks) == 1 else 's'}, and the detector "
            'reads hidden states of the last but one. Use features="encoder".'
        )
    return blocks[-2].path


@torch.no_grad()
def prompt_states(
    model: Model, path: str, prompts: Sequence[tuple[int, ...]], run: Run
) -> Float[Tensor, "prompts width"]:
    """The output of a module at the last token of every prompt, float32 on the CPU; shared beginnings computed once."""
    network = model.network.eval()
    arrange = packer(network)
    sequences = [Encoded(tokens, len(tokens) - 1) for tokens in prompts]
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group in run.track(list(rows(sequences, ROW_TOKENS)), "reading prompts"):
        packed = arrange([sequences[i] for i in group]).to(model.device)
        with capture({path: network.get_submodule(path)}) as outputs:
            network(**packed.inputs(), logits_to_keep=torch.zeros(1, dtype=torch.long))
        for i, state in zip(group, outputs[path][packed.row, packed.here].float().cpu(), strict=True):
            found[i] = state
    return torch.stack(found)
