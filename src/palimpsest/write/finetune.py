"""Fine-tuning: the model learns to recite the records of the role `train`.

The plain way to put knowledge into a model, and the state that every eraser starts from. Use it to implant facts, and
for the gold model of an audit: the same fine-tuning without the records that are to be forgotten.

    L = CE(train), token-weighted over the answers; of a classifier, mean over the labels
"""

from __future__ import annotations

from palimpsest.data.records import Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training, schedule, train


@system(
    "finetune",
    verb="write",
    title="Fine-tuning",
    paper="",
    takes="causal-lm or classifier",
    needs={"train"},
    fidelity="standard practice",
)
class Finetune(Method):
    """Trains on the role `train` until the model recites it."""

    training: Training = setting(
        default=Training(learning_rate=1e-4, epochs=8, batch_size=8, warmup_epochs=0.5),
        origin="ours: 100 question-answer pairs are recited by the embedded model",
        help="how to train",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after learning the records of `train`."""
        plan = schedule(model, self.training, run, train=data.train)
        return train(model, plan, lambda batch: batch.train.cross_entropy, self.training, run, label="learning")
