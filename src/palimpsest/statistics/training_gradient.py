"""The gradient of the mean loss over all that a model was trained on, stored for later deletions.

With it, the gradient over the records that stay follows from that over the records that go, without the former.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Reduction
from palimpsest.statistics.per_example import mean_gradient, trainable
from palimpsest.statistics.stored import read_tensors, write_tensors

FORMAT = "palimpsest-gradient-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingGradient:
    """g_D and what it was taken on: the digest of the model's weights, and a mark of every record."""

    values: Mapping[str, Float[Tensor, "*weight"]]
    model: str
    records: tuple[str, ...]
    reduction: Reduction

    @property
    def examples(self) -> int:
        """How many records it is the mean over."""
        return len(self.records)

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file, complete or not at all."""
        facts = {"format": FORMAT, "model": self.model, "records": " ".join(self.records), "reduction": self.reduction}
        return write_tensors(path, self.values, facts)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> TrainingGradient:
        """The gradient of a file; raises where the file holds none, or that of other weights."""
        values, facts = read_tensors(path, FORMAT, "gradient", model.device)
        if facts["model"] != model.digest():
            raise PalimpsestError(
                f"the stored gradient belongs to a model with weights {facts['model'][:12]}..., this one has "
                f"{model.digest()[:12]}... Compute it again on this model."
            )
        if set(values) != set(trainable(model.network)):
            raise PalimpsestError(
                "the stored gradient is not that of the weights that train now. Compute it again on this model."
            )
        return cls(
            values=values,
            model=facts["model"],
            records=tuple(facts["records"].split()),
            reduction=facts["reduction"],  # type: ignore[arg-type]
        )


def training_gradient(
    model: Model,
    records: Sequence[Record],
    run: Run,
    *,
    reduction: Reduction = "mean",
    batch_size: int = 128,
    max_length: int | None = 512,
) -> TrainingGradient:
    """g_D of the model over all that it was trained on, to be saved at the end of its training."""
    values = mean_gradient(model, records, run, reduction=reduction, batch_size=batch_size, max_length=max_length)
    check_finite(values, "train")
    marks = tuple(map(mark, records))
    return TrainingGradient(values=values, model=model.digest(), records=marks, reduction=reduction)


def mark(record: Record) -> str:
    """By what a record is known again in a file that does not hold it."""
    return hashlib.sha256(record.key.encode()).hexdigest()[:16]


def check_finite(gradients: Mapping[str, Tensor], role: str) -> None:
    """Raises where a gradient has values that are no numbers, naming the weight."""
    for name, g in gradients.items():
        if not torch.isfinite(g).all():
            raise PalimpsestError(
                f"the loss on {role} has no finite gradient at {name}. Check the model and these records."
            )
