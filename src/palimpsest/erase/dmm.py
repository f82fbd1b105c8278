"""Datamodel matching (DMM): predict what a retrained classifier would say, and fine-tune to that.

The ideal is a model retrained without the forget set (an oracle). Data attribution says what each training record adds
to each logit; without the contributions of the forget set, the logits of the model as given become a prediction of the
oracle's. Fine-tuning on the forget set and a few retained records to these targets has, unlike gradient ascent, an end
in the right place. Use it where deletions will come again and again: the datamodel is estimated once, from many models
trained on random parts of the data, and stored (`statistics.attribution`, the setting `datamodel`). Without a file one
is estimated on the spot (TRAK) from a few models that are retrained for it: to try the method out, since one retraining
without the forget set would do. `oracle-matching` fine-tunes to true oracles: the upper bound, of no use by itself.

Source: Georgiev et al. 2025 (arXiv 2410.23232) and the authors' code. Differs: normalisation layers are in evaluation
mode (the code trains them on batches of mostly forget records); each epoch is shuffled, at a constant rate (the code
goes through in order, its rate x 0.95 an epoch); the TRAK estimate on the spot is ours.

    f(x)     given     [points, classes]         logits of the model as given, fixed before the first step
    b_i(x)             [train, points, classes]  contribution of training record i
    m        multiplier                          what true changes are of predicted ones
    F        forget; the points are F, repeated, and retain_multiplier |F| retained records drawn once
    z        logits    [points, classes]         of the model in training; theta its weights, theta_0 those as given

    T(x) = f(x) - m sum_{i in F} b_i(x)          (DM-Direct);  oracle matching: mean over oracles
    L    = mean over points and classes of (z - T)^2  +  anchor |theta - theta_0|^2

With the loss `cross-entropy`, L is the mean over points of that between softmax(T) and softmax(z), and the mean over
oracles is one of probabilities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.labelled import class_count, labelled
from palimpsest.data.records import Record, Roles
from palimpsest.erase.relabelling import PLAIN
from palimpsest.erase.retrain import Retrain
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.attribution import Datamodel, calibrated, family, names_of, trak
from palimpsest.statistics.ensemble import groups_like
from palimpsest.statistics.predictions import classify
from palimpsest.system import Method, configuration, setting, system
from palimpsest.train import Batch, Mode, Training, schedule, train

Loss = Literal["squared", "cross-entropy"]
Rows = Int[Tensor, " forget"]
APART = 1_000_003
"""Between the seeds of retrained models: more than there are seeds."""


def dm_direct(
    logits: Float[Tensor, "points classes"], removal: Float[Tensor, "points classes"]
) -> Float[Tensor, "points classes"]:
    """The predicted logits of a model without the forget set; `removal` is of `Datamodel.predict_removal`."""
    if logits.shape != removal.shape:
        raise PalimpsestError(f"the removal has shape {list(removal.shape)}, the logits {list(logits.shape)}.")
    return logits - removal.to(logits)


def mean_oracle(outputs: Float[Tensor, "oracles points classes"], loss: Loss) -> Float[Tensor, "points classes"]:
    """The logits that stand for several oracles: their mean, or those of their mean probability."""
    return outputs.mean(0) if loss == "squared" else outputs.log_softmax(-1).logsumexp(0) - math.log(len(outputs))


def matching_loss(
    logits: Float[Tensor, "points classes"], teacher: Float[Tensor, "points classes"], loss: Loss = "squared"
) -> Float[Tensor, " points"]:
    """How far each point is from its target: the mean over classes of squared differences, or cross-entropy."""
    if loss == "squared":
        return (logits - teacher).square().mean(-1)
    return F.cross_entropy(logits, teacher.softmax(-1), reduction="none")


def lessons(
    forget: Sequence[Record], retain: Sequence[Record], forget_multiplier: float, retain_multiplier: float, run: Run
) -> list[Record]:
    """The fine-tuning points: the forget set over and over (a fraction repeats a prefix), then retained records."""
    repeats = round(forget_multiplier * len(forget))
    if not repeats:
        raise PalimpsestError(f"forget_multiplier {forget_multiplier:g} leaves none of {len(forget)} forget records.")
    wanted = round(retain_multiplier * len(forget))
    if wanted > len(retain):
        raise PalimpsestError(
            f"{wanted} retained records are to be drawn, but retain has {len(retain)}: lower retain_multiplier."
        )
    drawn = torch.randperm(len(retain), generator=run.generator())[:wanted].tolist()
    return [forget[i % len(forget)] for i in range(repeats)] + [retain[i] for i in drawn]


@configuration(
    "oracle-matching",
    title="Oracle matching (upper bound)",
    preset={"teacher": "oracles"},
    deviations=("normalisation layers are in evaluation mode", "each epoch is shuffled, at a constant rate"),
)
@system(
    "dmm",
    verb="erase",
    title="Datamodel matching (DMM)",
    paper="Georgiev et al. 2025 (arXiv 2410.23232)",
    takes="classifier",
    needs={"forget", "retain"},
    uses={"train"},
    fidelity="adapted",
    deviations=(
        "normalisation layers are in evaluation mode",
        "each epoch is shuffled, at a constant rate",
        "without a datamodel file, TRAK on a few retrained models is the estimate",
    ),
)
class DMM(Method):
    """Fine-tunes to the predicted outputs of a retrained model; without `train`, `retain` and `forget` are all."""

    teacher: Literal["datamodel", "oracles"] = setting(
        default="datamodel", origin="paper", help="whose outputs are matched; oracles are trained for it"
    )
    datamodel: str | None = setting(
        default=None, origin="paper: stored, estimated once", help="file of a datamodel; None: TRAK, on the spot"
    )
    multiplier: float | None = setting(
        default=None, above=0, origin="ours; official code: 1", help="m; None: that of the datamodel"
    )
    forget_multiplier: float = setting(default=1.0, above=0, origin="official code", help="repeats of the forget set")
    retain_multiplier: float = setting(
        default=3.0, at_least=0, origin="official code", help="retained records for each forget record"
    )
    loss: Loss = setting(default="squared", origin="official code", help="what is matched: logits or probabilities")
    anchor: float = setting(default=0.0, at_least=0, origin="official code", help="pull towards the weights as given")
    models: int = setting(
        default=5,
        at_least=2,
        origin="ours; official code: up to 10 oracles",
        help="models to retrain, for TRAK or as oracles",
    )
    base: str | None = setting(default=None, origin="the ledger", help="what those models start from, as in `retrain`")
    learning: Training | None = setting(
        default=None, origin="the ledger", help="how those models learn, as in `retrain`"
    )
    mode: Mode = setting(
        default="eval", origin="ours; official code: train", help="of normalisation and dropout; see `train`"
    )
    training: Training = setting(
        default=dataclasses.replace(PLAIN, learning_rate=5e-4, epochs=5, batch_size=512),
        origin="official code",
        help="how to train",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after it was matched to what it should be."""
        stored = None if self.datamodel is None else Datamodel.load(self.datamodel)
        if stored is not None and self.teacher == "oracles":
            raise PalimpsestError("dmm: a datamodel file is named, but the teacher is oracles. Leave one of them out.")
        records = lessons(data.forget, data.retain, self.forget_multiplier, self.retain_multiplier, run)
        known = data.train if "train" in data else [*data.retain, *data.forget]
        empty = torch.zeros(len(known), 0, class_count(model))
        blank = Datamodel(contributions=empty, train=names_of(known), points=(), family=family(model))
        gone = (stored or blank).forgotten(data.forget)  # before any work, since it checks them
        if self.teacher == "oracles":
            target = self._oracles(model, known, gone, records, run)
        else:
            if stored is not None:
                stored.check(model, known)
            found = stored or self._trak(model, known, gone, records, blank, run)
            target = self._predicted(model, found, gone, records, run)
        teacher = target.to(model.device)
        student = model if run.in_place else model.copy()
        weights = [w for w in student.network.parameters() if w.requires_grad] if self.anchor else []
        start = [w.detach().clone() for w in weights]
        plan = schedule(student, self.training, run, mixed=records)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            value = batch.mixed.mean_tokens(matching_loss(batch.mixed.logits, teacher[batch.mixed.index], self.loss))
            pull = [(w - old).square().sum() for w, old in zip(weights, start, strict=True)]
            return value + self.anchor * torch.stack(pull).sum() if pull else value

        return train(student, plan, objective, self.training, run.replace(in_place=True), mode=self.mode)

    def _predicted(
        self, model: Model, found: Datamodel, gone: Rows, records: list[Record], run: Run
    ) -> Float[Tensor, "points classes"]:
        """DM-Direct at the points."""
        if self.multiplier is not None:
            found = dataclasses.replace(found, multiplier=self.multiplier)
        if not found.multiplier > 0:
            run.warn(f"dmm: true changes are {found.multiplier:.2g} times the predicted: the datamodel says nothing.")
        removal = found.predict_removal(gone, found.known(records))
        run.note(multiplier=found.multiplier, predicted_change=float(removal.square().mean().sqrt()))
        return dm_direct(classify(model, records, run, "teacher").logits, removal)

    def _trak(
        self, model: Model, known: list[Record], gone: Rows, records: list[Record], blank: Datamodel, run: Run
    ) -> Datamodel:
        """A datamodel of these points by TRAK; the models that it is averaged over give its multiplier, too."""
        labels = torch.tensor([example.label for example in labelled(model, known)])
        masks = groups_like(gone, labels, self.models, run.generator(1))
        kept = ([known[i] for i in mask.nonzero()[:, 0]] for mask in masks)
        models = [self._retrained(model, part, number, run) for number, part in enumerate(kept)]
        points = list({record.key: record for record in records}.values())
        contributions = trak(models, masks, known, points, run)
        found = dataclasses.replace(blank, contributions=contributions, points=names_of(points))
        return calibrated(found, masks, torch.stack([classify(m, points, run).logits for m in models]))

    def _oracles(
        self, model: Model, known: list[Record], gone: Rows, records: list[Record], run: Run
    ) -> Float[Tensor, "points classes"]:
        """What models say that never saw the forget set."""
        forget = set(gone.tolist())
        rest = [record for row, record in enumerate(known) if row not in forget]
        oracles = (self._retrained(model, rest, k, run) for k in range(self.models))
        return mean_oracle(torch.stack([classify(oracle, records, run).logits for oracle in oracles]), self.loss)

    def _retrained(self, model: Model, records: list[Record], number: int, run: Run) -> Model:
        """The model's own recipe on other records, in an order of its own."""
        own = run.replace(seed=run.seed + APART * (number + 1), in_place=False, stop=None, penalty=None)
        return Retrain(base=self.base, training=self.learning).apply(model, Roles(retain=records), own)
