"""Fine-tuning on the retain set: the do-nothing control.

The forget set is not used at all; what fades, fades by catastrophic forgetting. A method that does not beat it has
shown nothing.

    L = CE(retain), token-weighted over the answers; of a classifier, mean over the labels
"""

from __future__ import annotations

from palimpsest.data.records import Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training, schedule, train


@system(
    "retain-finetune",
    verb="erase",
    title="Fine-tuning on the retain set",
    paper="Maini et al. 2024 (arXiv 2401.06121)",
    takes="causal-lm or classifier",
    needs={"retain"},
    fidelity="standard practice",
)
class RetainFinetune(Method):
    """Trains on the role `retain` only."""

    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after more of what it should keep."""
        plan = schedule(model, self.training, run, retain=data.retain)
        return train(model, plan, lambda batch: batch.retain.cross_entropy, self.training, run)
