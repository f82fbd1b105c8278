"""What a classifier predicts for given examples, in one streamed pass.

z    logits   [examples, labels]  in evaluation mode
y    labels   [examples]          the label that each should have
p    softmax(z)

entropy  H = -sum_c p_c log p_c          0 .. log(labels), nats
margin   z_y - log sum_{c != y} exp z_c  logit of the probability of the right label
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.labelled import Labelled
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Examples, evaluating

BATCH_SIZE = 64
"""Examples a batch: memory and speed, not result."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Float32 logits of all examples in the order they were given, and their labels; on the CPU."""

    logits: Float[Tensor, "examples labels"]
    labels: Int[Tensor, " examples"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def log_probabilities(self) -> Float[Tensor, "examples labels"]:
        """log p, nats."""
        return self.logits.log_softmax(-1)

    @property
    def probabilities(self) -> Float[Tensor, "examples labels"]:
        """p; rows sum to one."""
        return self.logits.softmax(-1)

    @property
    def correct(self) -> Bool[Tensor, " examples"]:
        """Whether the most probable label is the right one."""
        return self.logits.argmax(-1) == self.labels

    @property
    def nll(self) -> Float[Tensor, " examples"]:
        """Cross-entropy of each example, nats."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")

    @property
    def entropy(self) -> Float[Tensor, " examples"]:
        """H of each prediction, nats."""
        return torch.special.entr(self.probabilities).sum(-1)

    @property
    def margin(self) -> Float[Tensor, " examples"]:
        """How far the right label leads over all others together, nats."""
        return margins(self.logits, self.labels)


def margins(
    logits: Float[Tensor, "*models examples labels"], labels: Int[Tensor, " examples"]
) -> Float[Tensor, "*models examples"]:
    """How far the right label of each example leads over all others together, nats; raises where there is no other."""
    if logits.shape[-1] < 2:
        raise PalimpsestError("a margin needs at least two labels: there is no other one to lead over.")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
        wrong = next(label for label in labels.tolist() if not 0 <= label < logits.shape[-1])
        raise PalimpsestError(f"there is a label {wrong}, expected 0 to {logits.shape[-1] - 1}.")
    places = labels.to(logits.device).expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, places, -torch.inf)
    return logits.gather(-1, places)[..., 0] - others.logsumexp(-1)


@torch.no_grad()
def classify(
    model: Model, records: Sequence[Record] | Sequence[Labelled], run: Run, label: str = "classifying"
) -> Predictions:
    """The predictions of a classifier for records or examples; raises where there are none, or one has no label."""
    examples = Examples(model, records)
    logits = torch.empty(len(examples), model.network.config.num_labels)
    labels = torch.empty(len(examples), dtype=torch.long)
    with evaluating(model.network):
        for group in run.track(examples.groups(BATCH_SIZE), label):
            batch = examples.batch(group)
            logits[batch.index] = batch.logits(model.network).float().cpu()
            labels[batch.index] = batch.targets.cpu()
    return Predictions(logits, labels)
