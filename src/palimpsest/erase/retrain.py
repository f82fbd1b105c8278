"""Retraining: the gold model, which learned everything but the forget set.

The only exact erasure, and the reference for every other: start again from the model before it learned, and repeat the
learning on the retain set. Use it where the cost can be paid, and for audits.

The start and the recipe come from the ledger of the given model, whose last entry must be a `finetune`; or name them.
"""

from __future__ import annotations

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune


@system(
    "retrain",
    verb="erase",
    title="Retraining without the forget set (gold)",
    paper="",
    takes="causal-lm or classifier",
    needs={"retain"},
    uses={"forget"},
    fidelity="exact",
)
class Retrain(Method):
    """Repeats the fine-tuning of the ledger on the retain set, from where it started."""

    base: str | None = setting(
        default=None, origin="the ledger", help="model before it learned; None: the ledger's source"
    )
    training: Training | None = setting(
        default=None, origin="the ledger", help="how it learned; None: as the ledger says"
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model that never saw the forget set."""
        from palimpsest.models.loading import is_start, load, load_start

        learned = [entry for entry in model.ledger.entries if entry.method == "finetune"]
        source = self.base or model.ledger.source
        if not source or (self.training is None and not learned):
            raise PalimpsestError(
                "retrain: the ledger does not say how this model learned. Name the start with base and training."
            )
        if len(model.ledger.entries) > 1 and self.base is None:
            others = ", ".join(entry.method for entry in model.ledger.entries)
            raise PalimpsestError(f"retrain: more than one thing was done to this model ({others}). Name the base.")
        training = self.training or Training(**learned[-1].settings["training"])
        start = load(self.base, run=run) if self.base else load_start(source, "retrain", run)
        if self.base is None and not is_start(start, learned[-1].weights_before):
            raise PalimpsestError(
                f"retrain: {source}, from which this model started by its ledger, holds other weights now. Name the "
                "start as base."
            )
        return Finetune(training=training).apply(start, Roles(train=data.retain), run.replace(in_place=True))
